// A pool small enough to explore: a few leases, tickets and blocks in one chunk, with the members that the pool's code uses of an Arena.
//
// The kernel's part is here too: a process's lock, which goes when the process dies, after all it has written.
#pragma once

#include "pool/ledger_impl.h"
#include "pool/reaper_impl.h"
#include "pool/slots.h"
#include "pool/taking.h"
#include "pool/tickets_impl.h"
#include "words.h"

namespace torchshm::model {

using pool::BlockValue;
using pool::ChunkState;
using pool::ChunkValue;
using pool::Pair;
using pool::TicketId;
using pool::TicketValue;

// Statistics, which nothing depends on.
struct Tally {
  void fetch_add(uint64_t, std::memory_order) {}
};

struct SmallLease {
  Word<uint64_t> word{"word"};
  Word<uint32_t> reaping{"reaping"};
  Word<uint64_t> intent{"intent"}, intent_generation{"intent_generation"}, ledger_end{"ledger_end"};
  Word<uint64_t> bits{"ledger"};
  Word<uint32_t> lock{"lock"};  // 1 while a living process holds the slot's byte
};

struct SmallBlock {
  PairWord value{"block"};
  Word<uint32_t> granules{"granules"};
};

struct SmallChunk {
  PairWord value{"chunk"};
};

struct SmallTicket {
  PairWord value{"ticket"};
};

struct SmallHeader {
  Word<uint64_t> next_incarnation{"next_incarnation"};
  Word<uint32_t> slots_used{"slots_used"}, tickets_used{"tickets_used"};
  Tally idle_estimate, reaped, taken_back;
};

class SmallPool {
 public:
  static constexpr uint32_t kLeaseSlots = 5, kTicketSlots = 2, kPagesInChunk = 2, kChunks = 1;

  SmallHeader& header() const { return header_; }
  SmallLease& lease(uint32_t slot) const { return leases_[slot]; }
  SmallBlock& block(uint32_t index) const { return blocks_[index]; }
  SmallTicket& ticket(uint32_t index) const { return tickets_[index]; }
  SmallChunk& chunk(uint32_t index) const { return chunks_[index]; }
  Word<uint64_t>& ledger(uint32_t slot, uint64_t) const { return leases_[slot].bits; }
  uint32_t pages() const { return 64; }  // one word of ledger bits
  uint32_t slots_used() const { return pool::marked(header_.slots_used, kLeaseSlots); }
  bool reserve_tickets(uint32_t) { return true; }
  uint32_t tickets_used() const { return pool::marked(header_.tickets_used, kTicketSlots); }
  struct Extent {
    uint64_t offset, length;
  };
  std::optional<Extent> extent(uint32_t) const { return Extent{0, 4096}; }

  uint32_t bits_of(uint32_t block) const {
    uint32_t n = 0;
    for (const SmallLease& lease : leases_) n += lease.bits.now() >> block & 1;
    return n;
  }
  uint32_t tickets_of(uint32_t block) const {
    uint32_t n = 0;
    for (const SmallTicket& ticket : tickets_) {
      const TicketValue v = TicketValue::of(ticket.value.now());
      n += v.sender != 0 && v.block == block ? 1 : 0;
    }
    return n;
  }
  // What is in a lease belongs to its process, or to all who are taking it back. Not memory of the pool's: Relacy's race detector is told
  // when one uses it.
  rl::var<uint32_t>& custody(uint32_t slot) const { return custody_[slot]; }
  BlockValue value(uint32_t block) const { return BlockValue::of(blocks_[block].value.now()); }
  ChunkValue chunk_now(uint32_t chunk) const { return ChunkValue::of(chunks_[chunk].value.now()); }

 private:
  mutable SmallHeader header_;
  mutable std::array<SmallLease, kLeaseSlots> leases_;
  mutable std::array<SmallBlock, kPagesInChunk * kChunks> blocks_;
  mutable std::array<SmallTicket, kTicketSlots> tickets_;
  mutable std::array<SmallChunk, kChunks> chunks_;
  mutable std::array<rl::var<uint32_t>, kLeaseSlots> custody_;
};

// What os::locked_by_other says. The kernel's own lock orders it after all that the dead process wrote.
inline bool gone(const SmallPool& pool, uint32_t slot) {
  return pool.lease(slot).lock.load(std::memory_order_seq_cst) == 0;
}

// The part of Space that works on chunks of small blocks.
class SmallSpace {
 public:
  SmallSpace(SmallPool& pool, uint32_t slot, bool with_chunks) : pool_(pool), slot_(slot), with_chunks_(with_chunks) {}
  void inherit(uint32_t dead) {
    (void)static_cast<uint32_t>(pool_.custody(dead)($));
    if (!with_chunks_) return;
    for (uint32_t i = SmallPool::kChunks; i-- > 0;) {
      ChunkValue found = pool::chunk_value(pool_, i);
      while (found.state != ChunkState::kHole && found.owner == dead) {
        ChunkValue next = found;
        next.owner = pool::kNobody;
        if (found.state == ChunkState::kTaking) {
          pool::finish_taking(pool_, slot_, i, dead);
        } else if (pool::replace_chunk(pool_, i, found, next) && found.state == ChunkState::kSmall) {
          pool::take_if_empty(pool_, slot_, i);
        }
        found = pool::chunk_value(pool_, i);
      }
    }
  }
  // Member::freed
  void freed(uint32_t block) {
    if (!with_chunks_) return;
    const uint32_t chunk = block / SmallPool::kPagesInChunk;
    const ChunkValue found = pool::chunk_value(pool_, chunk);
    if (found.state == ChunkState::kSmall && found.owner == pool::kNobody) pool::take_if_empty(pool_, slot_, chunk);
  }
  // Space::claim_small, of an idle chunk or an orphan
  bool claim(uint32_t chunk) {
    const ChunkValue found = pool::chunk_value(pool_, chunk);
    const bool orphan = found.state == ChunkState::kSmall && found.owner == pool::kNobody;
    if (found.state != ChunkState::kIdle && !orphan) return false;
    ChunkValue mine = found;
    mine.state = ChunkState::kSmall;
    mine.owner = slot_;
    return pool::replace_chunk(pool_, chunk, found, mine);
  }

 private:
  SmallPool& pool_;
  uint32_t slot_;
  bool with_chunks_;
};

// One process: the pool's own code over the small pool.
struct Process : pool::FreedSink {
  Process(SmallPool& pool, uint32_t slot, bool with_chunks = false)
      : slot(slot),
        ledger(pool, slot, *this),
        tickets(pool, ledger, slot),
        space(pool, slot, with_chunks),
        reaper(pool, slot, ledger, space) {}
  void freed(uint32_t block, uint64_t) override { space.freed(block); }
  uint32_t slot;
  pool::BasicLedger<SmallPool> ledger;
  pool::BasicTickets<SmallPool> tickets;
  SmallSpace space;
  pool::BasicReaper<SmallPool, SmallSpace> reaper;
};

}  // namespace torchshm::model
