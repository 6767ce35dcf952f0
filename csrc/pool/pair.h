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

namespace torchshm::pool {

struct Pair {
  uint64_t lo = 0;
  uint64_t hi = 0;
  friend bool operator==(const Pair&, const Pair&) = default;
};

class alignas(16) AtomicPair {
 public:
  // Acquire: what was written before the exchange that made this value is seen.
  Pair load() const {
    for (;;) {
      const Pair first{lo_.load(std::memory_order_acquire), hi_.load(std::memory_order_acquire)};
      const Pair second{lo_.load(std::memory_order_acquire), hi_.load(std::memory_order_acquire)};
      if (first == second) return first;
    }
  }

  // Sequentially consistent. On failure `expected` is what was found.
  bool exchange_if(Pair& expected, Pair desired) {
    static_assert(sizeof(unsigned __int128) == sizeof(Pair));
    const auto wanted = join(desired), before = join(expected);
    const auto found = __sync_val_compare_and_swap(reinterpret_cast<unsigned __int128*>(this), before, wanted);
    if (found == before) return true;
    expected = {static_cast<uint64_t>(found), static_cast<uint64_t>(found >> 64)};
    return false;
  }

 private:
  static unsigned __int128 join(Pair p) { return (static_cast<unsigned __int128>(p.hi) << 64) | p.lo; }
  std::atomic<uint64_t> lo_;
  std::atomic<uint64_t> hi_;
};

static_assert(sizeof(AtomicPair) == 16);

}  // namespace torchshm::pool
