#include "pool/members.h"

#include <pthread.h>

#include <array>
#include <atomic>
#include <mutex>

namespace torchshm::pool {
namespace {

// Fixed and appended to only, so that readers need no lock. Sixteen pools in one process are plenty: a family has one.
constexpr size_t kMost = 16;
std::array<std::atomic<Member*>, kMost> members{};
std::atomic<size_t> count{0};
std::mutex adding;

template <class F>
void each(F f) {
  for (size_t i = 0, n = count.load(std::memory_order_acquire); i < n; ++i)
    f(*members[i].load(std::memory_order_relaxed));
}

void before() {
  adding.lock();
  each([](Member& m) { m.prepare_fork(); });
}
void in_parent() {
  each([](Member& m) { m.parent_after_fork(); });
  adding.unlock();
}
void in_child() {
  each([](Member& m) { m.child_after_fork(); });
  adding.unlock();
}

}  // namespace

Member* adopt(std::unique_ptr<Member> member) {
  const std::lock_guard lock(adding);
  const size_t n = count.load(std::memory_order_relaxed);
  if (n == kMost) return nullptr;
  if (n == 0) pthread_atfork(before, in_parent, in_child);
  Member* raw = member.release();
  members[n].store(raw, std::memory_order_relaxed);
  count.store(n + 1, std::memory_order_release);  // publishes the entry
  return raw;
}

Member* find_pool(uint64_t pool_id) {
  Member* found = nullptr;
  each([&](Member& m) { found = m.pool_id() == pool_id ? &m : found; });
  return found;
}

Member* find_address(const void* address) {
  Member* found = nullptr;
  each([&](Member& m) { found = m.arena().locate(address) ? &m : found; });
  return found;
}

}  // namespace torchshm::pool
