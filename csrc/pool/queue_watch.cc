#include "pool/queue_watch.h"

#include "os/futex.h"
#include "os/thread.h"

namespace torchshm::pool {

constexpr uint64_t kNap = 100'000'000;  // ns

Result<std::unique_ptr<QueueWatch>> QueueWatch::start(Queue& queue) {
  auto fd = os::create_event_fd();
  if (!fd) return std::move(fd.status());
  std::unique_ptr<QueueWatch> watch(new QueueWatch(queue, fd.take()));
  auto started = os::start_thread([at = watch.get()] { at->run(); });
  if (!started) return std::move(started.status());
  watch->thread_ = started.take();
  return watch;
}

QueueWatch::~QueueWatch() {
  if (!thread_.joinable()) return;
  ending_.store(true, std::memory_order_release);
  turned_off_.fetch_add(1, std::memory_order_release);
  os::wake_all(turned_off_);
  queue_.wake_takers();
  thread_.join();
}

bool QueueWatch::left_behind() const { return epoch_ != Queue::epoch(); }

void QueueWatch::settle() {
  const std::lock_guard lock(mutex_);
  const bool on = !queue_.empty();
  if (on == on_) return;
  on_ = on;
  os::turn(fd_, on);
  if (on) return;
  turned_off_.fetch_add(1, std::memory_order_release);
  os::wake_all(turned_off_);
}

void QueueWatch::run() {
  while (!ending_.load(std::memory_order_acquire)) {
    const uint32_t seen = turned_off_.load(std::memory_order_acquire);
    settle();
    bool on = false;
    {
      const std::lock_guard lock(mutex_);
      on = on_;
    }
    // Nothing to do while it is on, but to see that others have taken all.
    if (on) {
      (void)os::wait(turned_off_, seen, kNap);
    } else {
      queue_.wait(Queue::For::kMessage, kNap);
      if (!queue_.empty()) queue_.pass_wake_on();
    }
  }
}

}  // namespace torchshm::pool
