#include "os/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <ctime>

namespace torchshm::os {
namespace {

constexpr uint64_t kSecond = 1'000'000'000;

uint64_t read_clock(clockid_t clock) {
  timespec t{};
  ::clock_gettime(clock, &t);
  return static_cast<uint64_t>(t.tv_sec) * kSecond + static_cast<uint64_t>(t.tv_nsec);
}

}  // namespace

Wait wait(const std::atomic<uint32_t>& word, uint32_t seen, uint64_t nanoseconds) {
  timespec t{static_cast<time_t>(nanoseconds / kSecond), static_cast<long>(nanoseconds % kSecond)};
  if (::syscall(SYS_futex, &word, FUTEX_WAIT, seen, &t, nullptr, 0) == 0 || errno == EAGAIN) return Wait::kChanged;
  return errno == EINTR ? Wait::kInterrupted : Wait::kTimedOut;
}

uint32_t wake_one(const std::atomic<uint32_t>& word) {
  const long woken = ::syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  return woken > 0 ? static_cast<uint32_t>(woken) : 0;
}

void wake_all(const std::atomic<uint32_t>& word) {
  (void)::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

uint64_t boot_time() { return read_clock(CLOCK_BOOTTIME); }
uint64_t real_time() { return read_clock(CLOCK_REALTIME); }

}  // namespace torchshm::os
