#include "pool/layout.h"

namespace torchshm::pool {
namespace {

constexpr uint64_t align(uint64_t value) { return (value + kPage - 1) & ~(kPage - 1); }

}  // namespace

Offsets Offsets::of(uint64_t chunk_count) {
  Offsets o{};
  o.leases = align(sizeof(Header));
  o.chunks = align(o.leases + sizeof(Lease) * kMaxLeases);
  o.tickets = align(o.chunks + sizeof(Chunk) * chunk_count);
  o.blocks = align(o.tickets + sizeof(Ticket) * uint64_t{kTickets});
  o.ledgers = align(o.blocks + sizeof(Block) * chunk_count * kPagesPerChunk);
  o.ledger_stride = align(chunk_count * kPagesPerChunk / 8);
  o.total = o.ledgers + o.ledger_stride * kMaxLeases;
  return o;
}

}  // namespace torchshm::pool
