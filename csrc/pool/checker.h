// Evaluates what must hold in a pool's files, over a pool that is alive or dead, and says where it does not.
//
// Shared: it only looks, and touches no page of the control file that has no memory yet. Private: what it has seen. Whoever has an Arena
// may call it, also one that was opened without joining (Arena::inspect). Every index is bounded, so any bytes in the control file end in
// a report. When a process dies here: nothing has changed. Members may work, sleep and die meanwhile.
//
// Invariants, by number:
//   1  The header fits the files. Chunks are in one state each; runs are whole; blocks lie in a chunk that is for them, inside it, and
//      not in one another; what a block or an idle chunk counts as having has pages.
//   2  Every hold, and every chunk in use, is a lease's that exists, inside the marks that bound a reaper's look; incarnations are unique.
//   3  count(block) >= ledger bits + tickets out, and equal when no intent names the block; live exactly while count > 0; bits and
//      tickets name live blocks.
//   6  What a lease was doing is on record only while the lease is.
//   9  A live block has a generation, and the chunks of a large one carry it.
// At rest, also: every dead lease was reaped, no intent or announcement stands, no chunk is between two states, every chunk of a run
// belongs to a live block, holes have no memory, and the pool is within its limit.
//
// Not to be seen in the files, and checked by the tests around a kill: 4 (bytes change only by holders), 5 (time), 7 (descriptors and
// mappings of the processes; of the files, holes without memory is checked here), 8 (persistence). Nor does the layout tell: of which
// generation of its block a bit or a ticket is; whether two leases' words were written by the leases; and, between operations of living
// members, a run that is being claimed from one that was forgotten by a process which lives (at rest there is neither).
//
// What is wrong only for a moment, because a member was at work between two loads, is not reported: what is suspect must stand
// unchanged, sequence numbers included, over several looks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pool/arena.h"

namespace torchshm::pool {

struct Violation {
  int invariant = 0;
  std::string what;  // names block, lease or chunk, the words, and what was expected
};

struct CheckOptions {
  // No living member is inside an operation (a stopped one neither), and the dead were reaped.
  bool at_rest = false;
  // At rest, compare the committed pages with the limit. Off for a pool whose limit was lowered below what it had.
  bool limit = true;
};

struct CheckReport {
  std::vector<Violation> violations;  // the first hundred or so
  uint64_t blocks = 0, leases = 0;
  uint64_t tickets = 0, named = 0;  // out; those of them that are a name's, and no message's
  bool ok() const { return violations.empty(); }
  std::string first() const;  // "invariant 3: block 512 ..."; empty when all is well
};

CheckReport check(const Arena& arena, const CheckOptions& options = {});

}  // namespace torchshm::pool
