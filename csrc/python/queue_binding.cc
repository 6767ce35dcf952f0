#include "python/queue_binding.h"

#include <cstring>
#include <memory>

#include "base/copy.h"
#include "os/futex.h"
#include "pool/queue.h"
#include "pool/queue_watch.h"
#include "python/errors.h"
#include "python/family.h"
#include "python/without_gil.h"

namespace py = pybind11;

namespace torchshm::python {
namespace {

using pool::Queue;

constexpr uint64_t kForever = UINT64_MAX;
constexpr uint64_t kCopyUnderGil = 256 << 10;    // bytes
constexpr uint64_t kReadInPlace = 32 << 10;      // bytes; smaller messages are copied before they are unpickled
constexpr uint64_t kCheckSignals = 100'000'000;  // ns

// Nanoseconds from now; none for a time that is over, kForever for a negative one.
uint64_t deadline_of(int64_t nanoseconds) {
  return nanoseconds < 0 ? kForever : os::boot_time() + static_cast<uint64_t>(nanoseconds);
}

class SharedQueue {
 public:
  explicit SharedQueue(uint64_t maxsize) {
    pool::Member* own = member();
    if (own == nullptr) fail(Status(Code::kUnsupported, "this process has no pool"));
    auto made = Queue::create(*own, maxsize);
    if (!made) fail(made.status());
    queue_ = made.take();
  }
  explicit SharedQueue(const py::bytes& handle) {
    const std::string_view bytes = handle;
    if (bytes.size() != pool::Handle::kBytes) throw py::value_error("a queue's handle has 32 bytes");
    const auto from = pool::Handle::read(bytes.data());
    pool::Member* owner = member_of(from.pool_id);
    if (owner == nullptr) throw py::error_already_set();
    auto opened = Queue::open(*owner, from);
    if (!opened) fail(opened.status());
    queue_ = opened.take();
  }
  ~SharedQueue() { drop_watch(); }

  py::bytes handle() {
    auto made = queue().handle();
    if (!made) fail(made.status());
    char bytes[pool::Handle::kBytes];
    made->write(bytes);
    return {bytes, sizeof bytes};
  }

  // False when it was full until the time was up.
  bool put(py::object dumps, py::object obj, int64_t nanoseconds);
  bool put_bytes(const py::object& bytes, int64_t nanoseconds) {
    return send(bytes.ptr(), nanoseconds, deadline_of(nanoseconds), nullptr);
  }
  // What loads(bytes) gives; raises queue.Empty.
  py::object get(const py::object& loads, int64_t nanoseconds);
  py::object get_bytes(int64_t nanoseconds) { return get(py::none(), nanoseconds); }
  bool wait(Queue::For what, int64_t nanoseconds);

  uint64_t size() { return queue().size(); }
  bool empty() { return queue().empty(); }
  bool full() { return queue().full(); }
  bool task_done() { return queue().task_done(); }
  void close_parcel() {
    if (queue_) queue_->close_parcel();
  }
  void set_flag(bool on) { queue().set_flag(on); }
  bool flag() { return queue().flag(); }

  int fileno() {
    if (watch_ && watch_->left_behind()) (void)watch_.release();  // its thread is the parent's, and so may be its mutex
    if (!watch_) {
      auto watch = pool::QueueWatch::start(queue());
      if (!watch) fail(watch.status());
      watch_ = watch.take();
    }
    watch_->settle();
    return watch_->fd();
  }

 private:
  Queue& queue() { return *queue_; }
  void drop_watch() {
    if (watch_ && watch_->left_behind()) (void)watch_.release();
    if (!watch_) return;
    const WithoutGil release;
    watch_.reset();
  }
  class Pickling;
  bool send(PyObject* data, int64_t nanoseconds, uint64_t deadline, Pickling* pickling);
  // False when the time is up. wait: without the GIL, for so many nanoseconds at most.
  template <class Wait>
  bool sleep(uint64_t deadline, Wait wait);
  bool sleep(Queue::For what, uint64_t deadline) {
    return sleep(deadline, [&](uint64_t most) { queue().wait(what, most); });
  }

  std::unique_ptr<Queue> queue_;
  std::unique_ptr<pool::QueueWatch> watch_;
};

template <class Wait>
bool SharedQueue::sleep(uint64_t deadline, Wait wait) {
  uint64_t left = kCheckSignals;
  if (deadline != kForever) {
    const uint64_t now = os::boot_time();
    if (now >= deadline) return false;
    left = deadline - now;
  }
  {
    const WithoutGil release;
    wait(std::min(left, kCheckSignals));
  }
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  return true;
}

bool SharedQueue::wait(Queue::For what, int64_t nanoseconds) {
  const uint64_t deadline = deadline_of(nanoseconds);
  for (;;) {
    switch (what) {
      case Queue::For::kMessage:
        if (!queue().empty()) return true;
        break;
      case Queue::For::kRoom:
        if (!queue().full()) return true;
        break;
      case Queue::For::kAllDone:
        if (queue().all_done()) return true;
        break;
      case Queue::For::kFlag:
        if (queue().flag()) return true;
        break;
    }
    if (nanoseconds == 0 || !sleep(what, deadline)) return false;
  }
}

// While a message is pickled. What it has issued is taken back unless the message is sent.
class SharedQueue::Pickling {
 public:
  explicit Pickling(Queue& queue)
      : queue_(queue), busy_(queue), outer_(scope().queue), outer_member_(scope().queue_member) {
    issued_.swap(scope().in_message);
    scope().queue = &queue.ref();
    scope().queue_member = &queue.member();
  }
  void end() {
    if (ended_) return;
    ended_ = true;
    issued_.swap(scope().in_message);
    scope().queue = outer_;
    scope().queue_member = outer_member_;
  }
  const std::vector<pool::Handle>& issued() const { return issued_; }
  void reserved() { busy_.end(); }
  void sent() { issued_.clear(); }
  ~Pickling() {
    end();
    for (const pool::Handle& handle : issued_) queue_.member().give_up(handle);
  }
  Pickling(const Pickling&) = delete;
  Pickling& operator=(const Pickling&) = delete;

 private:
  Queue& queue_;
  Queue::Busy busy_;
  const pool::QueueRef* outer_;
  pool::Member* outer_member_;
  std::vector<pool::Handle> issued_;
  bool ended_ = false;
};

bool SharedQueue::put(py::object dumps, py::object obj, int64_t nanoseconds) {
  const uint64_t deadline = nanoseconds == 0 ? 0 : deadline_of(nanoseconds);
  if (nanoseconds == 0 && queue().full()) return false;
  Pickling pickling(queue());
  py::object data = py::reinterpret_steal<py::object>(PyObject_CallOneArg(dumps.ptr(), obj.ptr()));
  pickling.end();
  if (!data) throw py::error_already_set();
  const bool done = send(data.ptr(), nanoseconds, deadline, &pickling);
  if (done) pickling.sent();
  return done;
}

bool SharedQueue::send(PyObject* data, int64_t nanoseconds, uint64_t deadline, Pickling* pickling) {
  struct Buffer {
    Py_buffer view{};
    ~Buffer() {
      if (view.obj != nullptr) PyBuffer_Release(&view);
    }
  } buffer;
  if (PyObject_GetBuffer(data, &buffer.view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  const auto length = static_cast<uint64_t>(buffer.view.len);
  auto message = pickling != nullptr ? queue().reserve(length, pickling->issued()) : queue().reserve(length);
  if (!message) fail(message.status());
  if (pickling != nullptr) pickling->reserved();
  if (length < kCopyUnderGil) {
    std::memcpy(message->data, buffer.view.buf, length);
  } else {
    const WithoutGil release;
    torchshm::copy_bytes(message->data, static_cast<const std::byte*>(buffer.view.buf), length);
  }
  // Until it is published the message is this call's to give back.
  struct Unsent {
    Queue& queue;
    const Queue::Message& message;
    bool sent = false;
    ~Unsent() {
      if (!sent) queue.cancel(message);
    }
  } unsent{queue(), *message};
  for (;;) {
    auto published = queue().publish(*message);
    if (!published) fail(published.status());
    if (*published) break;
    if (nanoseconds == 0 || !sleep(deadline, [&](uint64_t most) { queue().wait_for_room(*message, most); }))
      return false;
  }
  unsent.sent = true;
  return true;
}

py::object SharedQueue::get(const py::object& loads, int64_t nanoseconds) {
  const uint64_t deadline = nanoseconds == 0 ? 0 : deadline_of(nanoseconds);
  for (;;) {
    auto taken = queue().take();
    if (!taken) fail(taken.status());
    if (*taken) {
      const Queue::Message message = **taken;
      if (watch_ && !watch_->left_behind()) watch_->settle();
      const auto length = static_cast<Py_ssize_t>(message.length);
      struct Reading {
        Queue& queue;
        const Queue::Message& message;
        bool done = false, failed = true;
        void end() {
          if (std::exchange(done, true)) return;
          if (failed) {
            queue.drop_rest(message);
          } else {
            queue.keep_for_later(message);  // bytes in it may be unpickled yet
          }
          queue.finish(message);
        }
        ~Reading() { end(); }
      } reading{queue(), message};
      py::object data;
      if (loads.is_none() || message.length <= kReadInPlace) {
        data = py::reinterpret_steal<py::object>(
            PyBytes_FromStringAndSize(reinterpret_cast<const char*>(message.data), length));
        if (loads.is_none() || message.tickets.empty()) {
          reading.failed = !data;
          reading.end();
        }
      } else {
        data = py::reinterpret_steal<py::object>(
            PyMemoryView_FromMemory(reinterpret_cast<char*>(message.data), length, PyBUF_READ));
      }
      if (!data) throw py::error_already_set();
      if (loads.is_none()) return data;
      PyObject* got = PyObject_CallOneArg(loads.ptr(), data.ptr());
      if (got == nullptr) throw py::error_already_set();
      reading.failed = false;
      return py::reinterpret_steal<py::object>(got);
    }
    if (nanoseconds == 0 || !sleep(Queue::For::kMessage, deadline)) {
      PyErr_SetNone(py::module_::import("queue").attr("Empty").ptr());
      throw py::error_already_set();
    }
  }
}

}  // namespace

void add_queue(py::module_& m) {
  py::class_<SharedQueue>(m, "Queue")
      .def(py::init<uint64_t>(), py::arg("maxsize"))
      .def(py::init<const py::bytes&>(), py::arg("handle"))
      .def("handle", &SharedQueue::handle)
      .def("put", &SharedQueue::put)
      .def("put_bytes", &SharedQueue::put_bytes)
      .def("get", &SharedQueue::get)
      .def("get_bytes", &SharedQueue::get_bytes)
      .def("wait_for_message", [](SharedQueue& queue, int64_t ns) { return queue.wait(Queue::For::kMessage, ns); })
      .def("wait_until_done", [](SharedQueue& queue, int64_t ns) { return queue.wait(Queue::For::kAllDone, ns); })
      .def("wait_for_flag", [](SharedQueue& queue, int64_t ns) { return queue.wait(Queue::For::kFlag, ns); })
      .def("size", &SharedQueue::size)
      .def("empty", &SharedQueue::empty)
      .def("full", &SharedQueue::full)
      .def("task_done", &SharedQueue::task_done)
      .def("close_parcel", &SharedQueue::close_parcel)
      .def("set_flag", &SharedQueue::set_flag)
      .def("flag", &SharedQueue::flag)
      .def("fileno", &SharedQueue::fileno);
}

}  // namespace torchshm::python
