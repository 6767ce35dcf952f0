// Evaluates what must hold in a catalogue's file, together with its pool's, over a store that is alive or dead; says where it does not.
//
// Shared: it only looks, and touches no page of the file that has no memory yet. Private: what it has seen, and a mapping. Whoever has
// the files may call it, client or not (pool::Arena::inspect). Every index is bounded, so any bytes in the file end in a report. When a
// process dies here: nothing has changed. Clients may work, sleep and die meanwhile. Thread safety: all of it.
//
// Invariants, by number, after those of pool/checker.h:
//   10  The header fits the file and the pool. Slots and cells are in one state each, inside the marks that bound a search; a free one is
//       empty; owners are leases' that were.
//   11  A slot in use names a cell of the same life that is not free, on the probe path of its key. A name is one slot's, a cell one
//       slot's. A standing or bound cell has its slot.
//   12  What a name keeps alive it keeps by tickets that are out, its own, and of blocks that live with that generation; key, description
//       and list of blocks lie inside. Every ticket of a name is in a cell, and in one.
//   14  What is known beside a named cell is of its life, with a policy and flags that there are. One that is on disk has a file, and no
//       blocks; a file is one name's, and its number is a cell's that has lived. A claim is a lease's that was. A value in memory says no
//       more bytes than its blocks have.
// At rest, also:
//   13  Nobody's work is half done: no claim, no cell between two states, no bound name of the dead.
//
// Names that have expired are no violation: they go when somebody looks for them, or sweeps.
// What is wrong only for a moment is not reported, as in pool/checker.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "pool/arena.h"
#include "pool/checker.h"

namespace torchshm::store {

struct CatalogueReport {
  std::vector<pool::Violation> violations;
  uint64_t names = 0, marks = 0;  // named; marks are the names that begin with a zero byte
  uint64_t cells = 0;             // not free
  struct Spilled {
    std::string key;
    uint64_t file;
  };
  std::vector<Spilled>
      spilled;            // the names whose values are on disk only; whether the files are there is not looked at
  std::string directory;  // for such files; empty: none
  bool ok() const { return violations.empty(); }
  std::string first() const;  // "invariant 11: slot 512 ..."; empty when all is well
};

// catalogue: the descriptor of a store's catalogue, or of a plain file that it was copied to; it stays the caller's. kInvalid when it is
// none, kForeign when it is another pool's.
// at: where in the file it begins, for a persistent store's.
Result<CatalogueReport> check_catalogue(int catalogue, const pool::Arena& arena, bool at_rest = false, uint64_t at = 0);

// What a file says of itself, when it is a catalogue: also of a copy.
struct CatalogueName {
  uint64_t pool_id;
  std::string name;
};
Result<CatalogueName> catalogue_name(int catalogue, uint64_t at = 0);

}  // namespace torchshm::store
