// A mark in shared memory that only goes up: below it lies every entry of a table that was ever used. It bounds what a scan looks at.
//
// Shared: the mark. When a process dies here: the mark is one higher than it need be.
// An entry is used after its mark was raised, and what publishes the entry (a word's exchange, an intent that is taken down) publishes
// the mark with it. A joiner alone has nothing of the kind: it must see every reaper that has announced itself (slots.h).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace torchshm::pool {

// Never more than the table has, whatever the file says. Sequentially consistent, with raise(): see slots.h.
template <class Word>
uint32_t marked(const Word& mark, uint32_t entries) {
  return std::min<uint32_t>(mark.load(std::memory_order_seq_cst), entries);
}

template <class Word>
void raise(Word& mark, uint32_t value) {
  uint32_t seen = mark.load(std::memory_order_relaxed);
  while (seen < value && !mark.compare_exchange_weak(seen, value, std::memory_order_seq_cst)) {
  }
}

}  // namespace torchshm::pool
