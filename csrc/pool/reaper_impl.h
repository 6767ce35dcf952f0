// The bodies of pool/reaper.h.
// Included by reaper.cc, which instantiates it for the Arena, and by tests/torture/relacy, which explores it over a small model of one.
#pragma once

#include <algorithm>
#include <bit>

#include "base/failpoint.h"
#include "pool/reaper.h"
#include "pool/slots.h"

namespace torchshm::pool {

template <class Shared, class Chunks>
uint32_t BasicReaper<Shared, Chunks>::reap_all() {
  uint32_t finished = 0;
  for (uint32_t slot = 0, slots = arena_.slots_used(); slot < slots; ++slot) {
    if (is_dead(arena_, slot_, slot) && reap(slot)) ++finished;
  }
  return finished;
}

// All but the slot. False when the block that the dead lease's intent names could not be settled.
template <class Shared, class Chunks>
bool BasicReaper<Shared, Chunks>::take_back(uint32_t dead) {
  auto& lease = arena_.lease(dead);
  // Relaxed, here and below: what the dead has written, the lock has ordered; and what other reapers do to the lease is the same.
  // The block it was at work on, if any: its count may be too high.
  const uint64_t intent = lease.intent.load(std::memory_order_relaxed);
  bool settled = true;
  if (intent >> 32 != 0) {
    const auto block = static_cast<uint32_t>(intent);
    const uint64_t generation = lease.intent_generation.load(std::memory_order_relaxed);
    if (block < arena_.pages()) {
      arena_.ledger(dead, block / 64).fetch_and(~(uint64_t{1} << (block % 64)), std::memory_order_relaxed);
      TORCHSHM_POINT("reap.bit_cleared");
      settled = ledger_.settle(dead, block, generation);
    }
    if (settled) {
      uint64_t expected = intent;
      (void)lease.intent.compare_exchange_strong(expected, 0, std::memory_order_relaxed);
    }
    TORCHSHM_POINT("reap.intent_done");
    // Of our own lease there is one intent only, and dropping needs it.
    if (!settled && dead == slot_) return false;
  }

  const uint64_t last = std::min<uint64_t>(lease.ledger_end.load(std::memory_order_relaxed), arena_.pages() / 64);
  for (uint64_t i = 0; i < last; ++i) {
    uint64_t bits = arena_.ledger(dead, i).load(std::memory_order_relaxed);
    while (bits != 0) {
      const auto block = static_cast<uint32_t>(i * 64 + static_cast<uint64_t>(std::countr_zero(bits)));
      ledger_.drop_of(dead, block);
      bits &= bits - 1;
    }
  }
  TORCHSHM_POINT("reap.ledger_done");

  space_.inherit(dead);
  TORCHSHM_POINT("reap.chunks_done");
  return settled;
}

template <class Shared, class Chunks>
bool BasicReaper<Shared, Chunks>::reap(uint32_t dead) {
  auto& self = arena_.lease(slot_);
  auto& lease = arena_.lease(dead);
  const uint64_t word = lease.word.load(std::memory_order_relaxed);
  TORCHSHM_POINT("reap.seen");
  self.reaping.store(dead + 1, std::memory_order_seq_cst);
  TORCHSHM_POINT("reap.announced");
  // Announced first, looked at again second: a joiner does it the other way round, so one of the two sees the other.
  if (!is_dead(arena_, slot_, dead) || lease.word.load(std::memory_order_relaxed) != word) {
    self.reaping.store(0, std::memory_order_relaxed);  // nothing was done
    TORCHSHM_POINT("reap.left");
    return false;
  }

  const bool settled = take_back(dead);
  if (!settled) {  // a living lease, perhaps a paused one, is at work on that very block; all but this block and the slot is back
    self.reaping.store(0, std::memory_order_relaxed);  // and so nobody gets the slot
    TORCHSHM_POINT("reap.left");
    return false;
  }

  lease.reaping.store(0, std::memory_order_release);  // whom it was taking back itself when it died
  TORCHSHM_POINT("reap.its_reaping_ended");
  uint64_t expected = word;
  const bool mine = lease.word.compare_exchange_strong(expected, kLeaseFree, std::memory_order_relaxed);
  TORCHSHM_POINT("reap.freed");
  if (mine) arena_.header().reaped.fetch_add(1, std::memory_order_relaxed);
  TORCHSHM_POINT("reap.told");
  // Release: who gets the slot next finds the lease as all its reapers have left it.
  self.reaping.store(0, std::memory_order_release);
  TORCHSHM_POINT("reap.left");
  return mine;
}

}  // namespace torchshm::pool
