// The bytes of shared memory: what another version of this library, or another process, relies on.
#include "pool/layout.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <type_traits>

#include "pool/handle.h"

namespace torchshm::pool {
namespace {

static_assert(std::is_standard_layout_v<Header> && std::is_standard_layout_v<Lease>);
static_assert(std::is_trivially_copyable_v<Handle>);
static_assert(std::is_trivially_destructible_v<Header> && std::is_trivially_destructible_v<Lease> &&
              std::is_trivially_destructible_v<Block>);

TEST(Layout, HeaderStartsWithWhatAnyVersionCanRead) {
  EXPECT_EQ(offsetof(Header, magic), 0U);
  EXPECT_EQ(offsetof(Header, version), 8U);
  EXPECT_EQ(offsetof(Header, layout_hash), 12U);
  EXPECT_EQ(offsetof(Header, pool_id), 16U);
  EXPECT_EQ(offsetof(Header, family), 32U);
  EXPECT_EQ(offsetof(Header, chunks), 40U);
  EXPECT_EQ(offsetof(Header, limit), 64U);
  EXPECT_EQ(offsetof(Header, pages), 136U);
  EXPECT_EQ(offsetof(Header, numa_nodes), 144U);
  EXPECT_EQ(sizeof(Header), 192U);
}

TEST(Layout, TablesHaveTheirSizes) {
  EXPECT_EQ(sizeof(Lease), 4352U);
  EXPECT_EQ(offsetof(Lease, intent), 32U);
  EXPECT_EQ(offsetof(Lease, hints_end), 128U);
  EXPECT_EQ(sizeof(Chunk), 16U);
  EXPECT_EQ(sizeof(Ticket), 16U);
  EXPECT_EQ(sizeof(Block), 32U);
  EXPECT_EQ(offsetof(Block, granules), 16U);
  EXPECT_EQ(sizeof(Handle), 32U);
}

TEST(Layout, TablesLieOneAfterAnother) {
  const Offsets o = Offsets::of(1000);
  EXPECT_EQ(o.leases, 4096U);
  EXPECT_GE(o.chunks, o.leases + sizeof(Lease) * kMaxLeases);
  EXPECT_GE(o.tickets, o.chunks + sizeof(Chunk) * 1000);
  EXPECT_GE(o.blocks, o.tickets + sizeof(Ticket) * kTickets);
  EXPECT_GE(o.ledgers, o.blocks + sizeof(Block) * 1000 * kPagesPerChunk);
  EXPECT_GE(o.ledger_stride * 8, uint64_t{1000} * kPagesPerChunk);
  EXPECT_EQ(o.total, o.ledgers + o.ledger_stride * kMaxLeases);
}

TEST(Layout, WordsKeepTheirFields) {
  const BlockValue block{BlockValue::kGenerationMask, 0xfffffffff, 0xffffff, true, 512, 3};
  const BlockValue same = BlockValue::of(block.pair());
  EXPECT_EQ(same.generation, block.generation);
  EXPECT_EQ(same.sequence, block.sequence);
  EXPECT_EQ(same.count, block.count);
  EXPECT_TRUE(same.live);
  EXPECT_EQ(same.granules, 512U);
  EXPECT_EQ(same.first, 3U);
  EXPECT_EQ((BlockValue{1, 2, 3, true, 5, 1}.pair()), (Pair{1 << 12 | 1 << 10 | 5, uint64_t{2} << 28 | 3 << 4 | 1}));

  const ChunkValue chunk{ChunkState::kRun, kNobody, 512, 0xffffffff, 77};
  const ChunkValue chunk_again = ChunkValue::of(chunk.pair());
  EXPECT_EQ(chunk_again.state, ChunkState::kRun);
  EXPECT_EQ(chunk_again.owner, kNobody);
  EXPECT_EQ(chunk_again.committed, 512U);
  EXPECT_EQ(chunk_again.head, 0xffffffff);
  EXPECT_EQ(chunk_again.generation, 77U);

  const TicketValue ticket{TicketValue::kNonceMask, TicketValue::sender_of(kMaxLeases - 1, 0xabc), 0xfffffffe, 12345};
  const TicketValue ticket_again = TicketValue::of(ticket.pair());
  EXPECT_EQ(ticket_again.nonce, ticket.nonce);
  EXPECT_EQ(ticket_again.sender, ticket.sender);
  EXPECT_EQ(ticket_again.block, ticket.block);
  EXPECT_EQ(ticket_again.second, 12345U);
}

TEST(Layout, AFreshFileIsAValidEmptyPool) {
  const Pair zero;
  EXPECT_FALSE(BlockValue::of(zero).live);
  EXPECT_EQ(ChunkValue::of(zero).state, ChunkState::kHole);
  EXPECT_EQ(TicketValue::of(zero).sender, 0U);
  EXPECT_EQ(kLeaseFree, 0U);
}

TEST(Pair, ExchangesBothHalvesOrNone) {
  AtomicPair pair{};
  Pair expected{1, 2};
  EXPECT_FALSE(pair.exchange_if(expected, {3, 4}));
  EXPECT_EQ(expected, (Pair{0, 0}));
  EXPECT_TRUE(pair.exchange_if(expected, {3, 4}));
  EXPECT_EQ(pair.load(), (Pair{3, 4}));
}

}  // namespace
}  // namespace torchshm::pool
