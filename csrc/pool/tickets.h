// Tickets: holds that travel inside messages. One redemption is guaranteed until memory runs out, also when the sender exits first.
//
// Shared: the ticket table. Private: where this lease looks for a free entry next.
// A ticket is out or not in one exchange that carries block, sender and time; its nonce tells a second unpickling from the first.
// When a process dies here: the intent stands, and the block's count is settled against the table.
#pragma once

#include <cstdint>
#include <optional>

#include "pool/arena.h"
#include "pool/ledger.h"

namespace torchshm::pool {

struct TicketId {
  uint32_t index = 0;
  uint64_t nonce = 0;
};

template <class Shared>
class BasicTickets {
 public:
  BasicTickets(Shared& arena, BasicLedger<Shared>& ledger, uint32_t slot);

  // REQUIRES: this lease holds the block. Nothing when the table is full.
  // queue: of whose message, or parts, the block is one; the ticket then ends with that queue, and not before unless it is redeemed.
  std::optional<TicketId> issue(uint32_t block, uint64_t generation, const QueueRef* queue = nullptr);
  // Uses a ticket up, if it is still out.
  bool redeem(TicketId id, uint32_t block, uint64_t generation);
  // From here on the ticket belongs to a name: it is out until it is redeemed. False when it was taken back already.
  bool keep(TicketId id, uint32_t block);
  // Ends the ticket if it is still exactly that one: of the same queue, and not adopted.
  bool end(uint32_t index, const TicketValue& ticket);
  // From here on the ticket of a queue is this lease's, as if it had just been issued. False when it is no such ticket any more.
  bool adopt(TicketId id);
  // Takes back what was issued by dead leases, or longer ago than `older_than` seconds, oldest first, until `enough` bytes of blocks
  // have become free. Returns how many tickets were taken.
  uint32_t take_back(uint32_t older_than, bool dead_only, uint64_t enough);

  // Takes back what belongs to queues that have ended. Whoever notices does it; a second time it does nothing.
  uint32_t end_queues();

  static uint32_t now();

 private:
  std::optional<TicketId> claim(uint32_t block, const QueueRef* queue);
  bool clear(uint32_t index, uint64_t nonce, uint32_t block);
  Shared& arena_;
  BasicLedger<Shared>& ledger_;
  uint32_t slot_;
  uint32_t base_, window_, cursor_ = 0;
};

using Tickets = BasicTickets<Arena>;
extern template class BasicTickets<Arena>;

}  // namespace torchshm::pool
