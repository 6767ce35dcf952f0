// The bodies of pool/tickets.h.
// Included by tickets.cc, which instantiates it for the Arena, and by tests/torture/relacy, which explores it over a small model of one.
#pragma once

#include <ctime>

#include <algorithm>
#include <vector>

#include "base/failpoint.h"
#include "pool/mark.h"
#include "pool/slots.h"
#include "pool/tickets.h"

namespace torchshm::pool {

// Arbitrary: small enough to stay in the first-level cache, wide enough that a free entry is nearly always the next one.
constexpr uint32_t kFirstTicketWindow = 256;

template <class Shared>
BasicTickets<Shared>::BasicTickets(Shared& arena, BasicLedger<Shared>& ledger, uint32_t slot)
    : arena_(arena),
      ledger_(ledger),
      slot_(slot),
      base_(slot * (Shared::kTicketSlots / Shared::kLeaseSlots)),
      window_(std::min(kFirstTicketWindow, Shared::kTicketSlots)) {}

template <class Shared>
uint32_t BasicTickets<Shared>::now() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return static_cast<uint32_t>(t.tv_sec);
}

template <class Shared>
std::optional<TicketId> BasicTickets<Shared>::claim(uint32_t block, const QueueRef* queue) {
  for (;;) {
    for (uint32_t probes = 0; probes < window_; ++probes) {
      const uint32_t index = (base_ + cursor_) % Shared::kTicketSlots;
      cursor_ = (cursor_ + 1) % window_;
      if (!arena_.reserve_tickets(index + 1)) return std::nullopt;
      Pair found = arena_.ticket(index).value.load();
      TicketValue ticket = TicketValue::of(found);
      if (ticket.sender != 0) continue;
      raise(arena_.header().tickets_used, index + 1);
      TORCHSHM_POINT("issue.in_sight");
      const uint64_t incarnation = arena_.lease(slot_).word.load(std::memory_order_relaxed) >> 8;
      const uint32_t sender = queue != nullptr ? TicketValue::sender_of_queue(queue->generation)
                                               : TicketValue::sender_of(slot_, incarnation);
      ticket = {(ticket.nonce + 1) & TicketValue::kNonceMask, sender, block, queue != nullptr ? queue->block : now()};
      if (!arena_.ticket(index).value.exchange_if(found, ticket.pair())) continue;
      // Crowded: look over a wider stretch from now on.
      if (probes > 32 && window_ < Shared::kTicketSlots) window_ *= 2;
      return TicketId{index, ticket.nonce};
    }
    if (window_ >= Shared::kTicketSlots) return std::nullopt;
    window_ *= 2;
  }
}

template <class Shared>
std::optional<TicketId> BasicTickets<Shared>::issue(uint32_t block, uint64_t generation, const QueueRef* queue) {
  ledger_.begin(Op::kIssue, block, generation);
  std::optional<TicketId> id;
  if (ledger_.count_up(block, generation)) {
    TORCHSHM_POINT("issue.counted");
    id = claim(block, queue);
    TORCHSHM_POINT("issue.out");
    if (!id) ledger_.count_down(block);
  }
  ledger_.end();
  return id;
}

template <class Shared>
bool BasicTickets<Shared>::clear(uint32_t index, uint64_t nonce, uint32_t block) {
  Pair found = arena_.ticket(index).value.load();
  for (;;) {
    TicketValue ticket = TicketValue::of(found);
    if (ticket.sender == 0 || ticket.nonce != nonce || ticket.block != block) return false;
    ticket.sender = 0;
    if (arena_.ticket(index).value.exchange_if(found, ticket.pair())) return true;
  }
}

template <class Shared>
bool BasicTickets<Shared>::keep(TicketId id, uint32_t block) {
  Pair found = arena_.ticket(id.index).value.load();
  for (;;) {
    TicketValue ticket = TicketValue::of(found);
    if (ticket.sender == 0 || ticket.nonce != id.nonce || ticket.block != block) return false;
    ticket.sender = TicketValue::kName;
    if (arena_.ticket(id.index).value.exchange_if(found, ticket.pair())) return true;
  }
}

template <class Shared>
bool BasicTickets<Shared>::end(uint32_t index, const TicketValue& ticket) {
  ledger_.begin(Op::kRedeem, ticket.block, ledger_.value(ticket.block).generation);
  Pair found = ticket.pair();
  TicketValue over = ticket;
  over.sender = 0;
  const bool was_out = arena_.ticket(index).value.exchange_if(found, over.pair());
  TORCHSHM_POINT("redeem.cleared");
  if (was_out) ledger_.count_down(ticket.block);
  ledger_.end();
  return was_out;
}

template <class Shared>
bool BasicTickets<Shared>::adopt(TicketId id) {
  const uint64_t incarnation = arena_.lease(slot_).word.load(std::memory_order_relaxed) >> 8;
  Pair found = arena_.ticket(id.index).value.load();
  for (;;) {
    TicketValue ticket = TicketValue::of(found);
    if (!ticket.of_queue() || ticket.nonce != id.nonce) return false;
    ticket.sender = TicketValue::sender_of(slot_, incarnation);
    ticket.second = now();
    if (arena_.ticket(id.index).value.exchange_if(found, ticket.pair())) return true;
  }
}

template <class Shared>
bool BasicTickets<Shared>::redeem(TicketId id, uint32_t block, uint64_t generation) {
  ledger_.begin(Op::kRedeem, block, generation);
  const bool was_out = clear(id.index, id.nonce, block);
  TORCHSHM_POINT("redeem.cleared");
  if (was_out) ledger_.count_down(block);
  ledger_.end();
  return was_out;
}

template <class Shared>
uint32_t BasicTickets<Shared>::take_back(uint32_t older_than, bool dead_only, uint64_t enough) {
  struct Candidate {
    int64_t age;
    uint32_t index;
    TicketValue ticket;
  };
  std::vector<Candidate> candidates;
  const uint32_t used = arena_.tickets_used(), moment = now();
  std::vector<int8_t> gone(Shared::kLeaseSlots, -1);
  for (uint32_t i = 0; i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena_.ticket(i).value.load());
    const uint32_t sender = (ticket.sender & 0xfff) - 1;
    if (ticket.sender == 0 || sender >= Shared::kLeaseSlots || ticket.block >= arena_.pages()) continue;
    if (dead_only) {
      // Another incarnation in the slot, none, or a dead one.
      // Relaxed: whoever sees the ticket sees its sender.
      const uint64_t word = arena_.lease(sender).word.load(std::memory_order_relaxed);
      const bool same = (word & 0xff) == kLeaseLive && TicketValue::sender_of(sender, word >> 8) == ticket.sender;
      int8_t& known = gone[sender];
      if (same && known < 0) known = is_dead(arena_, slot_, sender) ? 1 : 0;
      if (same && known == 0) continue;
    }
    // Signed: it may have been issued after `moment`.
    const int64_t age = int64_t{moment} - ticket.second;
    if (!dead_only && age < int64_t{older_than}) continue;
    candidates.push_back({age, i, ticket});
  }
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.age > b.age; });
  uint32_t taken = 0;
  uint64_t bytes = 0;
  for (const Candidate& c : candidates) {
    if (bytes >= enough) break;
    const BlockValue block = ledger_.value(c.ticket.block);
    ledger_.begin(Op::kRetake, c.ticket.block, block.generation);
    TORCHSHM_POINT("take_back.intent");
    if (clear(c.index, c.ticket.nonce, c.ticket.block)) {
      ++taken;
      if (const auto extent = arena_.extent(c.ticket.block); extent && block.count == 1) bytes += extent->length;
      TORCHSHM_POINT("take_back.cleared");
      ledger_.count_down(c.ticket.block);
    }
    ledger_.end();
  }
  arena_.header().taken_back.fetch_add(taken, std::memory_order_relaxed);
  TORCHSHM_POINT("take_back.done");
  return taken;
}

template <class Shared>
uint32_t BasicTickets<Shared>::end_queues() {
  uint32_t taken = 0;
  const uint32_t used = arena_.tickets_used();
  for (uint32_t i = 0; i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena_.ticket(i).value.load());
    if (!ticket.of_queue() || ticket.block >= arena_.pages() || ticket.second >= arena_.pages()) continue;
    // A queue that has ended does not come back: its block's generation moves on.
    const BlockValue queue = ledger_.value(ticket.second);
    if (queue.live && (queue.generation & 0xfff) == ticket.sender >> 12) continue;
    ledger_.begin(Op::kRetake, ticket.block, ledger_.value(ticket.block).generation);
    TORCHSHM_POINT("end_queues.intent");
    if (clear(i, ticket.nonce, ticket.block)) {
      ++taken;
      TORCHSHM_POINT("end_queues.cleared");
      ledger_.count_down(ticket.block);
    }
    ledger_.end();
  }
  return taken;
}

}  // namespace torchshm::pool
