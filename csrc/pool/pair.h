// Sixteen bytes in shared memory that change in one compare-and-swap (cmpxchg16b).
//
// Shared: the pair itself. When a process dies here: before the exchange nothing has happened, after it everything has.
// Loads are two halves read twice: consistent unless a pair went through the same values in between, and every decision taken from a
// load is confirmed by an exchange, so that costs a retry at most.
#pragma once

#include <atomic>
#include <cstdint>

#if !defined(__x86_64__)
#error "torchshm's ledger needs a 16-byte compare-and-swap and is tested on x86-64 only"
#endif

#if defined(__SANITIZE_THREAD__)
#define TORCHSHM_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TORCHSHM_TSAN 1
#endif
#endif
#if defined(TORCHSHM_TSAN)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#define TORCHSHM_TSAN_ACQUIRE(p) __tsan_acquire(const_cast<void*>(static_cast<const void*>(p)))
#define TORCHSHM_TSAN_RELEASE(p) __tsan_release(const_cast<void*>(static_cast<const void*>(p)))
#else
#define TORCHSHM_TSAN_ACQUIRE(p) ((void)0)
#define TORCHSHM_TSAN_RELEASE(p) ((void)0)
#endif

namespace torchshm::pool {

struct Pair {
  uint64_t lo = 0;
  uint64_t hi = 0;
  friend bool operator==(const Pair&, const Pair&) = default;
};

// Acquire: what was written before the exchange that made this value is seen.
template <class Half>
Pair load_halves(const Half& lo, const Half& hi) {
  for (;;) {
    Pair first, second;
    first.lo = lo.load(std::memory_order_relaxed);  // which of the two comes first does not matter
    first.hi = hi.load(std::memory_order_acquire);
    second.lo = lo.load(std::memory_order_acquire);
    second.hi = hi.load(std::memory_order_relaxed);  // the same value as the first time, and so no news
    if (first == second) return first;
  }
}

class alignas(16) AtomicPair {
 public:
  Pair load() const {
    const Pair found = load_halves(lo_, hi_);
    TORCHSHM_TSAN_ACQUIRE(this);
    return found;
  }

  // Sequentially consistent. On failure `expected` is what was found.
  // Written out, since ThreadSanitizer emulates the builtin with a lock that other processes do not see.
  bool exchange_if(Pair& expected, Pair desired) {
    bool done = false;
    TORCHSHM_TSAN_RELEASE(this);
    asm volatile("lock cmpxchg16b %1"
                 : "=@ccz"(done), "+m"(*this), "+a"(expected.lo), "+d"(expected.hi)
                 : "b"(desired.lo), "c"(desired.hi)
                 : "memory");
    TORCHSHM_TSAN_ACQUIRE(this);
    return done;
  }

 private:
  std::atomic<uint64_t> lo_;
  std::atomic<uint64_t> hi_;
};

static_assert(sizeof(AtomicPair) == 16);

}  // namespace torchshm::pool
