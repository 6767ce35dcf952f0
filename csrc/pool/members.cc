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

Adoption::Adoption() : adding_(adding) {
  static const int hooked = ::pthread_atfork(before, in_parent, in_child);
  (void)hooked;
}

Adoption::~Adoption() {
  if (fresh_ != nullptr) fresh_->membership().abandon(fresh_->arena());
}

bool Adoption::room() const { return count.load(std::memory_order_relaxed) < kMost; }

Member* Adoption::hold(std::unique_ptr<Member> member) {
  fresh_ = std::move(member);
  return fresh_.get();
}

void Adoption::keep() {
  if (fresh_ != nullptr) {
    const size_t n = count.load(std::memory_order_relaxed);
    members[n].store(fresh_.release(), std::memory_order_relaxed);
    count.store(n + 1, std::memory_order_release);  // publishes the entry
  }
  adding_.unlock();
}

Member* adopt(std::unique_ptr<Member> member) {
  Adoption adoption;
  if (!adoption.room()) return nullptr;
  Member* kept = adoption.hold(std::move(member));
  adoption.keep();
  return kept;
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
