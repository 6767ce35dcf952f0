// What a member works with under one lease: made when it takes the lease, and made anew when a forked child takes another.
//
// Shared: nothing of its own; its parts change the tables. Private: heap, janitor, and where the hints have been read to.
#pragma once

#include "pool/heap.h"
#include "pool/janitor.h"
#include "pool/ledger.h"
#include "pool/member.h"
#include "pool/reaper.h"
#include "pool/space.h"
#include "pool/tickets.h"

namespace torchshm::pool {

struct Member::Work {
  Work(Member& member, uint32_t slot)
      : ledger(member.arena_, slot, member),
        tickets(member.arena_, ledger, slot),
        space(member.arena_, slot, [&member] { member.take_back_before_growth(); }),
        reaper(member.arena_, slot, ledger, space),
        heap(member.arena_),
        janitor(space, member.arena_.header()) {}
  Ledger ledger;
  Tickets tickets;
  Space space;
  Reaper reaper;
  Heap heap;
  Janitor janitor;
  uint32_t hints_seen = 0;
  bool hints_uncertain = false;
  bool queue_ended = false;  // a queue has become free: its tickets are to be taken back
  uint64_t deaths_seen = 0;  // of the pool, when it was last looked for queues that they have ended
};

}  // namespace torchshm::pool
