// The bodies of pool/ledger.h.
// Included by ledger.cc, which instantiates it for the Arena, and by tests/torture/relacy, which explores it over a small model of one.
#pragma once

#include "base/failpoint.h"
#include "pool/ledger.h"
#include "pool/slots.h"

namespace torchshm::pool {

template <class Shared>
void BasicLedger<Shared>::begin(Op op, uint32_t block, uint64_t generation) {
  auto& lease = arena_.lease(slot_);
  lease.intent_generation.store(generation, std::memory_order_relaxed);
  TORCHSHM_POINT("ledger.generation_up");
  // Relaxed: whoever sees a step that the intent covers (the word's exchange, a ticket's, a bit taken off) sees the intent, since each of
  // them releases; and after a death the kernel's lock has ordered everything.
  lease.intent.store(static_cast<uint64_t>(op) << 32 | block, std::memory_order_relaxed);
  TORCHSHM_POINT("ledger.intent_up");
}

template <class Shared>
void BasicLedger<Shared>::end() {
  TORCHSHM_POINT("ledger.before_intent_down");
  // Release: every step that the intent covers is visible before it is gone.
  arena_.lease(slot_).intent.store(0, std::memory_order_release);
  TORCHSHM_POINT("ledger.intent_down");
}

template <class Shared>
void BasicLedger<Shared>::set_bit(uint32_t slot, uint32_t block) {
  const uint64_t word = block / 64;
  auto& lease = arena_.lease(slot);
  // Relaxed: only this lease (or the parent that makes it) moves its end, and a reaper reads it after the death.
  if (lease.ledger_end.load(std::memory_order_relaxed) <= word)
    lease.ledger_end.store(word + 1, std::memory_order_relaxed);
  TORCHSHM_POINT("ledger.end_moved");
  // Relaxed: a recount that misses the bit sees the intent, or what took it down.
  arena_.ledger(slot, word).fetch_or(uint64_t{1} << (block % 64), std::memory_order_relaxed);
}

template <class Shared>
bool BasicLedger<Shared>::clear_bit(uint32_t slot, uint32_t block) {
  const uint64_t bit = uint64_t{1} << (block % 64);
  // Release: a recount that no longer counts the bit sees the intent.
  return (arena_.ledger(slot, block / 64).fetch_and(~bit, std::memory_order_release) & bit) != 0;
}

template <class Shared>
bool BasicLedger<Shared>::holds(uint32_t slot, uint32_t block) const {
  return (arena_.ledger(slot, block / 64).load(std::memory_order_acquire) >> (block % 64) & 1) != 0;
}

template <class Shared>
bool BasicLedger<Shared>::owns_space(uint32_t block, uint64_t generation, bool small) const {
  const ChunkValue chunk = ChunkValue::of(arena_.chunk(block / Shared::kPagesInChunk).value.load());
  if (chunk.owner != slot_) return false;
  if (small) return chunk.state == ChunkState::kSmall;
  return chunk.state == ChunkState::kRun && chunk.head * Shared::kPagesInChunk == block &&
         chunk.generation == generation;
}

template <class Shared>
bool BasicLedger<Shared>::allocate(uint32_t block, uint32_t first, uint32_t granules) {
  auto& descriptor = arena_.block(block);
  const bool small = granules * kGranule <= kSmallMax;
  for (;;) {
    // Loaded first, the owner looked at second, exchanged third: who takes a chunk away (taking.h) moves the value of every
    // free descriptor in it before it decides, so an exchange that was late by any time fails.
    Pair found = descriptor.value.load();
    BlockValue next = BlockValue::of(found);
    next.generation = (next.generation + 1) & BlockValue::kGenerationMask;
    if (next.live || !owns_space(block, next.generation, small)) return false;
    begin(Op::kAllocate, block, next.generation);
    TORCHSHM_POINT("allocate.checked");
    if (!small) descriptor.granules.store(granules, std::memory_order_relaxed);  // published by the exchange
    TORCHSHM_POINT("allocate.measured");
    next.granules = small ? granules : 0;
    next.first = first;
    next.live = true;
    next.count = 1;
    ++next.sequence;
    const bool live = descriptor.value.exchange_if(found, next.pair());
    TORCHSHM_POINT("allocate.live");
    if (live) set_bit(slot_, block);
    TORCHSHM_POINT("allocate.held");
    end();
    if (live) return true;
  }
}

template <class Shared>
bool BasicLedger<Shared>::count_up(uint32_t block, uint64_t generation) {
  auto& descriptor = arena_.block(block);
  Pair found = descriptor.value.load();
  for (;;) {
    BlockValue next = BlockValue::of(found);
    if (!next.live || next.generation != generation) return false;
    ++next.count;
    ++next.sequence;
    if (descriptor.value.exchange_if(found, next.pair())) return true;
  }
}

template <class Shared>
void BasicLedger<Shared>::count_down(uint32_t block) {
  auto& descriptor = arena_.block(block);
  Pair found = descriptor.value.load();
  for (;;) {
    BlockValue next = BlockValue::of(found);
    if (!next.live || next.count == 0) return;  // a corrupt control file; nothing to give back
    --next.count;
    ++next.sequence;
    next.live = next.count != 0;
    if (descriptor.value.exchange_if(found, next.pair())) {
      TORCHSHM_POINT("ledger.counted_down");
      if (!next.live) sink_.freed(block, next.generation);
      return;
    }
  }
}

template <class Shared>
bool BasicLedger<Shared>::attach(uint32_t block, uint64_t generation) {
  return attach_for(slot_, block, generation);
}

template <class Shared>
bool BasicLedger<Shared>::attach_for(uint32_t heir, uint32_t block, uint64_t generation) {
  begin(Op::kAttach, block, generation);
  const bool live = count_up(block, generation);
  TORCHSHM_POINT("attach.counted");
  if (live) set_bit(heir, block);
  TORCHSHM_POINT("attach.held");
  end();
  return live;
}

template <class Shared>
void BasicLedger<Shared>::drop_of(uint32_t holder, uint32_t block) {
  begin(Op::kDrop, block, value(block).generation);
  if (clear_bit(holder, block)) {
    TORCHSHM_POINT("drop.bit_cleared");
    count_down(block);
  }
  end();
}

template <class Shared>
bool BasicLedger<Shared>::busy_elsewhere(uint32_t dead, uint32_t block) const {
  const uint32_t slots = arena_.slots_used();
  for (uint32_t slot = 0; slot < slots; ++slot) {
    if (slot == dead || slot == slot_) continue;
    const auto& lease = arena_.lease(slot);
    // Acquire: of what an intent has covered that is down again, everything is seen.
    const uint64_t intent = lease.intent.load(std::memory_order_acquire);
    if (intent >> 32 == 0 || static_cast<uint32_t>(intent) != block) continue;
    if (!is_dead(arena_, slot_, slot)) return true;
  }
  return false;
}

template <class Shared>
bool BasicLedger<Shared>::settle(uint32_t dead, uint32_t block, uint64_t generation) {
  auto& descriptor = arena_.block(block);
  for (int attempt = 0; attempt < 16; ++attempt) {
    Pair found = descriptor.value.load();
    const BlockValue before = BlockValue::of(found);
    if (before.generation != generation)
      return true;  // never made live, or freed and used again: nothing of the dead is left
    if (!before.live) {
      sink_.freed(block, generation);  // it may have died between the exchange and giving the space back
      return true;
    }
    if (busy_elsewhere(dead, block)) return false;
    uint32_t count = 0;
    const uint32_t slots = arena_.slots_used();
    for (uint32_t slot = 0; slot < slots; ++slot) count += holds(slot, block) ? 1 : 0;
    const uint32_t tickets = arena_.tickets_used();
    for (uint32_t i = 0; i < tickets; ++i) {
      const TicketValue ticket = TicketValue::of(arena_.ticket(i).value.load());
      count += ticket.sender != 0 && ticket.block == block ? 1 : 0;
    }
    TORCHSHM_POINT("settle.counted");
    if (busy_elsewhere(dead, block)) return false;
    BlockValue next = before;
    next.count = count;
    ++next.sequence;
    next.live = count != 0;
    if (descriptor.value.exchange_if(found, next.pair())) {
      TORCHSHM_POINT("settle.exchanged");
      if (!next.live) sink_.freed(block, generation);
      return true;
    }
  }
  return false;
}

}  // namespace torchshm::pool
