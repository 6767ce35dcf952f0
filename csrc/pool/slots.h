// How a lease's slot changes hands: found free, claimed, found dead, freed by a reaper.
//
// Shared: the lease's word and everybody's `reaping`. Private: nothing.
// A slot is not given out while anybody is still taking it back, however long that one sleeps. The joiner claims first and looks at the
// announcements second; the reaper announces first and looks at the lease second; so one of the two sees the other. That takes sequential
// consistency: of the announcements, of the mark that says how many leases to look at, and of the lock, which is the kernel's.
// The word's own loads and exchanges are relaxed: what they say is confirmed by the lock or by an exchange, and what a reaper has done to
// a lease is published by the end of its announcement.
// When a process dies here: after the claim the slot is a dead lease's like any other.
// `Shared` is the Arena, or the small model of it that tests/torture/relacy explores.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/failpoint.h"
#include "pool/layout.h"
#include "pool/mark.h"

namespace torchshm::pool {

template <class Shared>
bool being_reaped(const Shared& arena, uint32_t slot) {
  const uint32_t slots = arena.slots_used();
  for (uint32_t other = 0; other < slots; ++other) {
    if (arena.lease(other).reaping.load(std::memory_order_seq_cst) == slot + 1) return true;
  }
  return false;
}

// Worth locking its byte for.
template <class Shared>
bool looks_free(const Shared& arena, uint32_t slot) {
  return arena.lease(slot).word.load(std::memory_order_relaxed) == kLeaseFree && !being_reaped(arena, slot);
}

// The new incarnation, or 0 when the slot can't be had. REQUIRES: the caller holds the slot's lock.
template <class Shared>
uint64_t claim_slot(Shared& arena, uint32_t slot) {
  auto& lease = arena.lease(slot);
  // Relaxed: unique is enough.
  const uint64_t incarnation = arena.header().next_incarnation.fetch_add(1, std::memory_order_relaxed);
  TORCHSHM_POINT("join.numbered");
  raise(arena.header().slots_used, slot + 1);
  TORCHSHM_POINT("join.in_sight");
  uint64_t expected = kLeaseFree;
  if (!lease.word.compare_exchange_strong(expected, lease_word(incarnation), std::memory_order_relaxed)) return 0;
  TORCHSHM_POINT("join.claimed");
  // A reaper that was half-way when the slot became free has either been seen by looks_free() or sees the new word now.
  if (!being_reaped(arena, slot)) return incarnation;
  lease.word.store(kLeaseFree, std::memory_order_relaxed);  // nothing else was written
  TORCHSHM_POINT("join.put_back");
  return 0;
}

// Whether `slot` has a record whose process is gone. Never true of `me`. gone(arena, slot) asks the kernel.
template <class Shared>
bool is_dead(const Shared& arena, uint32_t me, uint32_t slot) {
  const auto& lease = arena.lease(slot);
  const uint64_t word = lease.word.load(std::memory_order_relaxed);
  if (slot == me || (word & 0xff) != kLeaseLive) return false;
  if (!gone(arena, slot)) return false;
  // The slot may have changed hands between the two looks.
  return lease.word.load(std::memory_order_relaxed) == word;
}

}  // namespace torchshm::pool
