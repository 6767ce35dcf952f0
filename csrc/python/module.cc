// The module torchshm._C: membership, settings and figures through pybind11; the hot path (reduce.h, rebuild.h) through the C API.
#define TORCHSHM_LOADS_NUMPY_API
#include "python/numpy_api.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "os/memfd.h"
#include "pool/stats.h"
#include "python/block_ref.h"
#include "python/check_binding.h"
#include "python/errors.h"
#include "python/family.h"
#include "python/item_list.h"
#include "python/module_api.h"
#include "python/numpy_memory.h"
#include "python/queue_binding.h"
#include "python/rebuild.h"
#include "python/reduce.h"
#include "python/store_binding.h"
#include "python/store_file_binding.h"
#include "python/without_gil.h"

namespace py = pybind11;

namespace torchshm::python {
namespace {

pool::Member& current() {
  if (member() == nullptr) {
    (void)raise_named("TorchshmError", "this process has no pool yet: call torchshm.register() first");
    throw py::error_already_set();
  }
  return *member();
}

// One share() of this thread while it pickles. What it pickles may share something itself.
class Sharing {
 public:
  explicit Sharing(uint8_t mode) : sharing_(scope().sharing), mode_(scope().mode) {
    issued_.swap(scope().issued);
    scope().sharing = true;
    scope().mode = static_cast<pool::Mode>(mode);
  }
  // The one around it goes on.
  void end() {
    issued_.swap(scope().issued);
    scope().sharing = sharing_;
    scope().mode = mode_;
  }
  // After the end: takes back what has been issued and not received.
  void give_up() {
    for (const pool::Handle& handle : issued_) {
      if (pool::Member* owner = pool::find_pool(handle.pool_id)) owner->give_up(handle);
    }
    issued_.clear();
  }

 private:
  bool sharing_;
  pool::Mode mode_;
  std::vector<pool::Handle> issued_;  // until the end, of the one around it
};

void start(Result<std::unique_ptr<pool::Member>> made, bool current) {
  if (!made) fail(made.status());
  pool::Member* adopted = pool::adopt(made.take());
  if (adopted == nullptr) fail(Status(Code::kSystem, pool::kTooMany));
  if (current || member() == nullptr) set_member(adopted);
}

void create(uint64_t family, uint64_t limit, uint64_t warm) {
  pool::Limits limits;
  limits.limit = limit;
  limits.warm = warm;
  Result<std::unique_ptr<pool::Member>> made = Status();
  {
    const WithoutGil release;
    made = pool::Member::create(family, limits);
  }
  start(std::move(made), true);
}

// The descriptors stay the caller's. current: this process's own data goes to that pool from now on.
void attach(int data, int control, bool current) {
  auto own_data = os::duplicate(data), own_control = os::duplicate(control);
  if (!own_data) fail(own_data.status());
  if (!own_control) fail(own_control.status());
  start(pool::Member::attach(own_data.take(), own_control.take()), current);
}

// This process's own data goes to a pool that it is a member of already. False when it is not.
bool choose(uint64_t pool_id) {
  pool::Member* known = pool::find_pool(pool_id);
  if (known != nullptr) set_member(known);
  return known != nullptr;
}

// What lies in a pool that it is a member of already goes by reference. False when it is not.
bool refer(uint64_t pool_id) {
  pool::Member* known = pool::find_pool(pool_id);
  if (known != nullptr) refer_to(known);
  return known != nullptr;
}

// (pool_id, data, control) of this process's pools, oldest first; its own data goes to the last one.
py::list own_pools() {
  py::list rows;
  const auto add = [&](pool::Member& pool) {
    if (!pool.arena().owns_descriptors()) return;
    rows.append(py::make_tuple(pool.pool_id(), pool.arena().data_fd(), pool.arena().control_fd()));
  };
  for (pool::Member* pool : former_members()) add(*pool);
  if (member() != nullptr) add(*member());
  return rows;
}

// The family of a pool that this process has not joined.
uint64_t peek_family(int control) {
  auto own = os::duplicate(control);
  if (!own) fail(own.status());
  auto family = pool::Arena::family_of(own->get());
  if (!family) fail(family.status());
  return *family;
}

py::dict stats() {
  pool::Stats s;
  pool::Member& pool = current();
  {
    const WithoutGil release;
    s = pool.stats();
  }
  py::list processes;
  for (const pool::LeaseStats& lease : s.leases) {
    py::dict row;
    row["pid"] = lease.pid;
    row["name"] = py::reinterpret_steal<py::object>(lenient_text(lease.name));
    row["held_blocks"] = lease.held_blocks;
    row["held_bytes"] = lease.held_bytes;
    row["allocations"] = lease.allocations;
    row["fallbacks"] = lease.fallbacks;
    row["grown_bytes"] = lease.grown_bytes;
    processes.append(row);
  }
  py::dict out;
  out["live_bytes"] = s.live;
  out["warm_bytes"] = s.warm;
  out["committed_bytes"] = s.committed;
  out["limit_bytes"] = s.limit;
  out["warm_limit_bytes"] = s.warm_limit;
  out["control_bytes"] = s.control;
  out["blocks"] = s.blocks;
  out["leases"] = s.leases.size();
  out["tickets"] = s.tickets;
  out["named"] = s.named;
  out["reaped"] = s.reaped;
  out["tickets_taken_back"] = s.taken_back;
  out["processes"] = processes;
  return out;
}

bool holds_address(uintptr_t address) {
  const auto* p = reinterpret_cast<const void*>(address);
  pool::Member* owner = pool::find_address(p);
  return owner != nullptr && owner->find(p).has_value();
}

// Pool, block, offset: the same for all of a block's mappings. And whether it came in a message made for this process.
std::optional<std::tuple<uint64_t, uint32_t, uint64_t, bool>> block_at(uintptr_t address) {
  const auto* p = reinterpret_cast<const void*>(address);
  pool::Member* owner = pool::find_address(p);
  const auto found = owner == nullptr ? std::nullopt : owner->find(p);
  if (!found) return std::nullopt;
  return std::tuple(owner->pool_id(), found->block, found->offset, found->exclusive);
}

// What is written there by this process is seen by others, and the other way round.
bool is_written_by_all(uintptr_t address) {
  const auto* p = reinterpret_cast<const void*>(address);
  pool::Member* owner = pool::find_address(p);
  const auto found = owner == nullptr ? std::nullopt : owner->find(p);
  return found && found->mode == pool::Mode::kReadWrite && !found->exclusive && !owner->is_private(found->block);
}

uint64_t trim(uint64_t keep) {
  pool::Member& pool = current();
  const WithoutGil release;
  return pool.trim(keep);
}

PyMethodDef hot[] = {
    {"reduce_ndarray", reduce_ndarray, METH_O,
     "reduce_ndarray(array)\n--\n\nThe reduce value of an array; registered with ForkingPickler."},
    {"empty", empty, METH_VARARGS, "empty(shape, dtype)\n--\n\nAn uninitialised array in the pool."},
    {"enter_pooled", enter_pooled, METH_NOARGS,
     "enter_pooled()\n--\n\nInstalls the pool as NumPy's allocator; returns the handler before."},
    {"leave_pooled", leave_pooled, METH_O, "leave_pooled(handler)\n--\n\nInstalls the handler that was there before."},
    {nullptr, nullptr, 0, nullptr},
};

int load_numpy() {
  import_array1(-1);
  return 0;
}

}  // namespace
}  // namespace torchshm::python

// Under another name than the file's, so that PyInit__C can look at the interpreter before pybind11 does: in a subinterpreter
// pybind11 waits for ever for a lock on Python 3.11.
PYBIND11_MODULE(unchecked, m) {
  using namespace torchshm;
  using namespace torchshm::python;
  if (load_numpy() < 0 || add_block_ref_type(m.ptr()) < 0 || add_array_type(m.ptr()) < 0 ||
      PyModule_AddFunctions(m.ptr(), hot) < 0 || add_module_api(m.ptr()) < 0 || add_item_list_types(m.ptr()) < 0) {
    throw py::error_already_set();
  }
  add_store(m);
  add_store_file(m);
  add_queue(m);
  add_check(m);
  m.def("create", &create, py::arg("family"), py::arg("limit") = 0, py::arg("warm") = 0);
  m.def("attach", &attach, py::arg("data_fd"), py::arg("control_fd"), py::arg("current") = false);
  m.def("choose", &choose, py::arg("pool_id"));
  m.def("refer", &refer, py::arg("pool_id"));
  m.def("own_pools", &own_pools);
  m.def("peek_family", &peek_family, py::arg("control_fd"));
  m.def("is_member", [] { return member() != nullptr; });
  m.def("pool_id", [] { return current().pool_id(); });
  m.def("family", [] { return current().family(); });
  m.def("fds", [] { return py::make_tuple(current().arena().data_fd(), current().arena().control_fd()); });
  m.def("owns_descriptors", [] { return current().arena().owns_descriptors(); });
  m.def("stats", &stats);
  m.def("reap", [] { return current().reap(); });
  m.def("trim", &trim, py::arg("keep") = 0);
  m.def("holds_address", &holds_address, py::arg("address"));
  m.def("block_at", &block_at, py::arg("address"));
  m.def("is_written_by_all", &is_written_by_all, py::arg("address"));
  m.def(
      "set_min_bytes", [](uint64_t bytes) { settings().min_bytes = bytes; }, py::arg("bytes"));
  m.def("min_bytes", [] { return settings().min_bytes; });
  m.def(
      "set_limit", [](uint64_t bytes) { current().arena().header().limit.store(bytes); }, py::arg("bytes"));
  m.def(
      "set_ticket_age", [](uint32_t seconds) { current().set_ticket_age(seconds); }, py::arg("seconds"));
  m.def(
      "nest_inline", [](int step) { scope().inline_depth += step; }, py::arg("step"));
  m.def("is_inline", [] { return scope().inline_depth > 0; });
  m.def("torch_version", [] { return TORCHSHM_TORCH_VERSION; });
  m.def("batch_begin", [] { scope().batch = Batch{true, {}, {}}; });
  m.def("batch_look", [] { return scope().batch.look(); });
  m.def("batch_end", [] { scope().batch = Batch{}; });
  py::class_<Sharing>(m, "Sharing")
      .def(py::init<uint8_t>(), py::arg("mode"))
      .def("end", &Sharing::end)
      .def("give_up", &Sharing::give_up);
}

// From Python 3.12 on, the import system refuses by itself: the module does not claim support.
extern "C" PYBIND11_EXPORT PyObject* PyInit__C() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return PyInit_unchecked();
  PyErr_SetString(PyExc_ImportError,
                  "torchshm can't be used in a subinterpreter: import it in the main one, or in another process");
  return nullptr;
}
