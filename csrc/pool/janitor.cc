#include "pool/janitor.h"

#include <chrono>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/thread.h"

namespace torchshm::pool {
namespace {

constexpr uint64_t kLongest = uint64_t{60} * 1'000'000'000;  // ns that it may be told to keep what is idle

}  // namespace

// What a boot before, or somebody's damage, has left there does not count.
uint64_t Janitor::watermark() const {
  const uint64_t left = header_.keep_until.load(std::memory_order_relaxed) - os::boot_time();
  return (left < kLongest ? header_.limit : header_.warm).load(std::memory_order_relaxed);
}

void Janitor::look() {
  // An estimate: deaths let it drift, and run() sets it right. Read as signed, since it may drift below zero.
  const auto idle = static_cast<int64_t>(header_.idle_estimate.load(std::memory_order_relaxed));
  if (idle <= static_cast<int64_t>(header_.warm.load(std::memory_order_relaxed))) return;
  if (idle <= static_cast<int64_t>(watermark())) return;
  const std::lock_guard lock(mutex_);
  wanted_ = true;
  if (!thread_.joinable()) {
    auto started = os::start_thread([this] { run(); });
    if (started) thread_ = started.take();  // else the chunks stay idle, and the limit still counts them
  }
  wake_.notify_one();
}

void Janitor::settle() {
  std::unique_lock lock(mutex_);
  if (!thread_.joinable()) return;
  done_.wait_for(lock, std::chrono::seconds(1), [this] { return !wanted_ && !at_work_; });
}

Janitor::~Janitor() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Janitor::run() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return wanted_ || ending_; });
      if (ending_) return;
      wanted_ = false;
      at_work_ = true;
    }
    (void)space_.trim(watermark());
    header_.idle_estimate.store(space_.idle(), std::memory_order_relaxed);
    TORCHSHM_POINT("janitor.estimated");
    {
      const std::lock_guard lock(mutex_);
      at_work_ = false;
    }
    done_.notify_all();
  }
}

}  // namespace torchshm::pool
