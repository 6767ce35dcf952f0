// Who uses which block: the count in the block's word, one ledger bit per lease and block, and the lease's intent.
//
// Shared: block words, ledger bits, intents. Private: nothing.
// Invariant:  count(block) >= |{leases whose bit is set}| + |{tickets out for it}| (+ names), with equality when no intent names the block.
// The order keeps it: the count goes up before a bit or ticket appears, and down after it is gone. So a death can only leave a count too
// high, the dead lease's intent says where, and settle() counts that block anew. A block whose count reaches zero is free in the same
// exchange; there is no moment in which a block is unused but not free.
//
// When a process dies here: at any point its intent names the one block whose count may be too high; reaper.h does the rest.
// Thread safety: one thread of a lease at a time (Member's mutex); any number of leases at once.
#pragma once

#include <cstdint>

#include "base/status.h"
#include "pool/arena.h"

namespace torchshm::pool {

// Told when a block has become free, while the intent still names it: gives the space back. Must be idempotent.
class FreedSink {
 public:
  virtual ~FreedSink() = default;
  virtual void freed(uint32_t block, uint64_t generation) = 0;
};

// `Shared` is the Arena, or the small model of it that tests/torture/relacy explores.
template <class Shared>
class BasicLedger {
 public:
  BasicLedger(Shared& arena, uint32_t slot, FreedSink& sink) : arena_(arena), slot_(slot), sink_(sink) {}

  // Makes a free block live, held by this lease. False when the space is not this lease's (any more), or the chunk of a large block
  // does not expect the generation that came out: choose another place. REQUIRES: no other thread of this lease uses the space.
  bool allocate(uint32_t block, uint32_t first, uint32_t granules);
  // Adds this lease's hold. False when the block is not live with that generation. REQUIRES: not held by this lease.
  bool attach(uint32_t block, uint64_t generation);
  // The same on behalf of a lease that does not run yet (fork).
  bool attach_for(uint32_t heir, uint32_t block, uint64_t generation);
  // Ends this lease's hold. REQUIRES: held.
  void drop(uint32_t block) { drop_of(slot_, block); }
  // Ends the hold of a dead lease, if nobody else has ended it yet.
  void drop_of(uint32_t dead, uint32_t block);
  // Recounts the block that a dead lease's intent names. False when a living lease is at work on it: try again later.
  bool settle(uint32_t dead, uint32_t block, uint64_t generation);

  // For tickets (and names): a count without a ledger bit. An intent must stand.
  bool count_up(uint32_t block, uint64_t generation);
  void count_down(uint32_t block);

  void begin(Op op, uint32_t block, uint64_t generation);
  void end();

  BlockValue value(uint32_t block) const { return BlockValue::of(arena_.block(block).value.load()); }
  bool holds(uint32_t slot, uint32_t block) const;

 private:
  void set_bit(uint32_t slot, uint32_t block);
  bool clear_bit(uint32_t slot, uint32_t block);
  bool owns_space(uint32_t block, uint64_t generation, bool small) const;
  bool busy_elsewhere(uint32_t dead, uint32_t block) const;
  Shared& arena_;
  uint32_t slot_;
  FreedSink& sink_;
};

using Ledger = BasicLedger<Arena>;
extern template class BasicLedger<Arena>;

}  // namespace torchshm::pool
