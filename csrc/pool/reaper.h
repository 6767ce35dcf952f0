// Takes back what only the dead used.
//
// Shared: everything it touches. Whoever notices a death may do it; several may do it at once, and if one is killed or paused half-way
// any other finishes: each step is one exchange that only one of them can win, made under the reaper's own intent.
// The dead lease's slot is free again when all is done, and not while any reaper is still at it.
#pragma once

#include <cstdint>

#include "pool/ledger.h"
#include "pool/space.h"

namespace torchshm::pool {

template <class Shared, class Chunks>
class BasicReaper {
 public:
  BasicReaper(Shared& arena, uint32_t slot, BasicLedger<Shared>& ledger, Chunks& space)
      : arena_(arena), slot_(slot), ledger_(ledger), space_(space) {}

  // Looks at every lease and takes back the dead ones. Returns how many were finished.
  uint32_t reap_all();
  // Cheap when nobody is dead: one F_OFD_GETLK per lease.
  bool reap(uint32_t dead);
  // What the dead process whose lease this was has left. False when a living lease is at work on the block that its intent names; the
  // lease must then be let die again. REQUIRES: the lease is locked and nothing was done with it yet.
  bool end_own() { return take_back(slot_); }

 private:
  bool take_back(uint32_t dead);
  Shared& arena_;
  uint32_t slot_;
  BasicLedger<Shared>& ledger_;
  Chunks& space_;
};

using Reaper = BasicReaper<Arena, Space>;
extern template class BasicReaper<Arena, Space>;

}  // namespace torchshm::pool
