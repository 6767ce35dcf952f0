// A lease: this process's place in a pool, alive exactly as long as the kernel says so.
//
// Shared: the lease's record. Private: the open file description whose lock is the sign of life.
// When a process dies here: between lock and record nothing is visible; afterwards the record stands with its lock gone, which is what
// "dead" means. A slot is not given out while somebody is still taking it back (Lease::reaping), however long that one sleeps.
#pragma once

#include <cstdint>

#include "base/status.h"
#include "os/fd.h"
#include "pool/arena.h"

namespace torchshm::pool {

class Membership {
 public:
  // Takes a free slot. Fails with kNoSlot when all are taken (after which the caller may reap and try again).
  // unsigned_yet: for a child that is about to be forked, which signs for itself; until then its lock alone tells whether it lives.
  static Result<Membership> join(Arena& arena, bool unsigned_yet = false);

  // Takes over the lease of a dead process, from slot `from` on, when no slot is free. It lives from then on and still holds all that the
  // dead held: REQUIRES: BasicReaper::end_own() and, when that is done, renew() before anything else is done with it; or let it die again.
  static Result<Membership> succeed(Arena& arena, uint32_t from);
  void renew(Arena& arena);

  uint32_t slot() const { return slot_; }
  uint64_t incarnation() const { return incarnation_; }
  int life_fd() const { return life_.get(); }

  // Writes who this process is into the record; after a fork the child does it again.
  void sign(Arena& arena) const;
  // Lets the lease die while the process goes on (tests, and a pool that is left).
  void abandon(Arena& arena);

  // Whether `slot` has a record whose process is gone. Never true of `me`, never true of a paused process.
  static bool dead(const Arena& arena, uint32_t me, uint32_t slot);

 private:
  os::Fd life_;
  uint32_t slot_ = 0;
  uint64_t incarnation_ = 0;
};

// Whether nobody holds the slot's lock, and nobody with its record's pid has the pool mapped.
bool gone(const Arena& arena, uint32_t slot);

}  // namespace torchshm::pool
