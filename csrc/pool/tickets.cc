#include "pool/tickets.h"

#include <ctime>

#include <algorithm>
#include <vector>

#include "base/failpoint.h"
#include "pool/membership.h"

namespace torchshm::pool {
namespace {

// Arbitrary: small enough to stay in the first-level cache, wide enough that a free entry is nearly always the next one.
constexpr uint32_t kFirstWindow = 256;
constexpr uint32_t kStripe = kTickets / kMaxLeases;

}  // namespace

Tickets::Tickets(Arena& arena, Ledger& ledger, uint32_t slot)
    : arena_(arena), ledger_(ledger), slot_(slot), base_(slot * kStripe), window_(kFirstWindow) {}

uint32_t Tickets::now() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
  return static_cast<uint32_t>(t.tv_sec);
}

std::optional<TicketId> Tickets::claim(uint32_t block) {
  for (;;) {
    for (uint32_t probes = 0; probes < window_; ++probes) {
      const uint32_t index = (base_ + cursor_) % kTickets;
      cursor_ = (cursor_ + 1) % window_;
      Pair found = arena_.ticket(index).value.load();
      TicketValue ticket = TicketValue::of(found);
      if (ticket.sender != 0) continue;
      uint32_t used = arena_.header().tickets_used.load(std::memory_order_relaxed);
      while (used <= index &&
             !arena_.header().tickets_used.compare_exchange_weak(used, index + 1, std::memory_order_seq_cst)) {
      }
      TORCHSHM_POINT("issue.in_sight");
      const uint64_t incarnation = arena_.lease(slot_).word.load(std::memory_order_relaxed) >> 8;
      ticket = {(ticket.nonce + 1) & TicketValue::kNonceMask, TicketValue::sender_of(slot_, incarnation), block, now()};
      if (!arena_.ticket(index).value.exchange_if(found, ticket.pair())) continue;
      // Crowded: look over a wider stretch from now on.
      if (probes > 32 && window_ < kTickets) window_ *= 2;
      return TicketId{index, ticket.nonce};
    }
    if (window_ >= kTickets) return std::nullopt;
    window_ *= 2;
  }
}

std::optional<TicketId> Tickets::issue(uint32_t block, uint64_t generation) {
  ledger_.begin(Op::kIssue, block, generation);
  std::optional<TicketId> id;
  if (ledger_.count_up(block, generation)) {
    TORCHSHM_POINT("issue.counted");
    id = claim(block);
    TORCHSHM_POINT("issue.out");
    if (!id) ledger_.count_down(block);
  }
  ledger_.end();
  return id;
}

bool Tickets::clear(uint32_t index, uint64_t nonce, uint32_t block) {
  Pair found = arena_.ticket(index).value.load();
  for (;;) {
    TicketValue ticket = TicketValue::of(found);
    if (ticket.sender == 0 || ticket.nonce != nonce || ticket.block != block) return false;
    ticket.sender = 0;
    if (arena_.ticket(index).value.exchange_if(found, ticket.pair())) return true;
  }
}

bool Tickets::redeem(TicketId id, uint32_t block, uint64_t generation) {
  ledger_.begin(Op::kRedeem, block, generation);
  const bool was_out = clear(id.index, id.nonce, block);
  TORCHSHM_POINT("redeem.cleared");
  if (was_out) ledger_.count_down(block);
  ledger_.end();
  return was_out;
}

uint32_t Tickets::take_back(uint32_t older_than, bool dead_only, uint64_t enough) {
  struct Candidate {
    int64_t age;
    uint32_t index;
    TicketValue ticket;
  };
  std::vector<Candidate> candidates;
  const uint32_t used = arena_.tickets_used(), moment = now();
  std::vector<int8_t> gone(kMaxLeases, -1);
  for (uint32_t i = 0; i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena_.ticket(i).value.load());
    const uint32_t sender = (ticket.sender & 0xfff) - 1;
    if (ticket.sender == 0 || sender >= kMaxLeases || ticket.block >= arena_.pages()) continue;
    if (dead_only) {
      // Another incarnation in the slot, none, or a dead one.
      const uint64_t word = arena_.lease(sender).word.load();
      const bool same = (word & 0xff) == kLeaseLive && TicketValue::sender_of(sender, word >> 8) == ticket.sender;
      int8_t& known = gone[sender];
      if (same && known < 0) known = Membership::dead(arena_, slot_, sender) ? 1 : 0;
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

}  // namespace torchshm::pool
