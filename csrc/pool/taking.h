// Taking a chunk of small blocks that looks empty away from its owner, who may be asleep, at work or dead.
//
// Shared: the chunk's word, and the descriptors of its blocks. Private: nothing.
// The chunk's word says so first, then the sequence number of every free descriptor is moved, then what is live is looked at: an
// allocation by the old owner that read its descriptor before that fails in its exchange, however late it comes.
// When a process dies here: the chunk stays in kTaking with its slot; whoever reaps it does finish_taking() again.
// `Shared` is the Arena, or the small model of it that tests/torture/relacy explores.
#pragma once

#include <cstdint>

#include "base/failpoint.h"
#include "pool/layout.h"

namespace torchshm::pool {

template <class Shared>
ChunkValue chunk_value(const Shared& arena, uint32_t chunk) {
  return ChunkValue::of(arena.chunk(chunk).value.load());
}

template <class Shared>
bool replace_chunk(Shared& arena, uint32_t chunk, ChunkValue expected, ChunkValue desired) {
  Pair before = expected.pair();
  return arena.chunk(chunk).value.exchange_if(before, desired.pair());
}

// Whether any block that starts in the chunk is live.
template <class Shared>
bool anything_live(const Shared& arena, uint32_t chunk) {
  for (uint32_t page = 0; page < Shared::kPagesInChunk; ++page) {
    if (BlockValue::of(arena.block(chunk * Shared::kPagesInChunk + page).value.load()).live) return true;
  }
  return false;
}

// Ends kTaking by `taker`: idle when nothing is live, else an orphan. Not its owner's again, who may have given it up in between.
template <class Shared>
void finish_taking(Shared& arena, uint32_t me, uint32_t chunk, uint32_t taker) {
  bool empty = true;
  for (uint32_t page = 0; page < Shared::kPagesInChunk; ++page) {
    auto& block = arena.block(chunk * Shared::kPagesInChunk + page);
    if (page % 64 == 32) TORCHSHM_POINT("take_empty.moving");
    Pair found = block.value.load();
    for (;;) {
      BlockValue next = BlockValue::of(found);
      if (next.live) {
        empty = false;
        break;
      }
      ++next.sequence;
      if (block.value.exchange_if(found, next.pair())) break;
    }
  }
  TORCHSHM_POINT("take_empty.looked");
  for (;;) {
    const ChunkValue found = chunk_value(arena, chunk);
    if (found.state != ChunkState::kTaking || found.owner != taker) return;
    ChunkValue next = found;
    next.state = empty ? ChunkState::kIdle : ChunkState::kSmall;
    next.owner = empty ? me : kNobody;
    if (!replace_chunk(arena, chunk, found, next)) continue;
    TORCHSHM_POINT("take_empty.decided");
    // Relaxed: an estimate.
    if (empty) arena.header().idle_estimate.fetch_add(found.committed * kPage, std::memory_order_relaxed);
    return;
  }
}

template <class Shared>
void take_if_empty(Shared& arena, uint32_t me, uint32_t chunk) {
  const ChunkValue found = chunk_value(arena, chunk);
  if (found.state != ChunkState::kSmall || found.owner == me || anything_live(arena, chunk)) return;
  ChunkValue taking = found;
  taking.state = ChunkState::kTaking;
  taking.owner = me;
  if (!replace_chunk(arena, chunk, found, taking)) return;
  TORCHSHM_POINT("take_empty.announced");
  finish_taking(arena, me, chunk, me);
}

}  // namespace torchshm::pool
