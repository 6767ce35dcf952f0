// Who uses which block, when others act in between any two steps.
#include "pool/ledger.h"

#include <atomic>
#include <thread>

#include "parts.h"

namespace torchshm {
namespace {

using pool::Arena;
using pool::BlockValue;
using pool::ChunkState;
using pool::ChunkValue;
using pool::kPagesPerChunk;
using pool::Op;
using tests::Between;
using tests::fresh_arena;
using tests::Parts;

class LedgerTest : public testing::Test {
 protected:
  Arena arena = fresh_arena();
  Parts a{arena}, b{arena}, c{arena};
};

TEST_F(LedgerTest, CountsHoldsAndFreesWithTheLast) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  EXPECT_TRUE(b.ledger.attach(block, generation));
  EXPECT_EQ(a.count(block), 2U);
  a.ledger.drop(block);
  EXPECT_TRUE(a.free_again.empty());
  EXPECT_TRUE(b.ledger.holds(b.slot, block));
  b.ledger.drop(block);
  ASSERT_EQ(b.free_again.size(), 1U);
  EXPECT_EQ(b.free_again[0], std::make_pair(block, generation));
  EXPECT_FALSE(a.ledger.value(block).live);
}

TEST_F(LedgerTest, AHoldIsEndedOnceHoweverOftenItIsDropped) {
  const uint32_t block = a.small();
  ASSERT_TRUE(b.ledger.attach(block, a.generation(block)));
  b.ledger.drop(block);
  b.ledger.drop_of(b.slot, block);
  c.ledger.drop_of(b.slot, block);
  EXPECT_EQ(a.count(block), 1U);
  EXPECT_TRUE(a.ledger.value(block).live);
}

TEST_F(LedgerTest, AnotherGenerationIsNotTheBlock) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  EXPECT_FALSE(b.ledger.attach(block, generation + 1));
  a.ledger.drop(block);
  EXPECT_FALSE(b.ledger.attach(block, generation));
  ASSERT_TRUE(a.ledger.allocate(block, 0, 4));
  EXPECT_FALSE(b.ledger.attach(block, generation));
  EXPECT_FALSE(b.ledger.holds(b.slot, block));
  EXPECT_EQ(a.count(block), 1U);
}

TEST_F(LedgerTest, ACountOfNothingIsNotTakenDown) {
  const uint32_t block = a.small();
  a.ledger.drop(block);
  const BlockValue before = a.ledger.value(block);
  a.ledger.count_down(block);
  EXPECT_EQ(a.ledger.value(block).pair(), before.pair());
  BlockValue live = before;  // live with a count of zero: no member leaves it so
  live.live = true;
  tests::set_block(arena, block, live);
  a.ledger.count_down(block);
  EXPECT_EQ(a.ledger.value(block).pair(), live.pair());
}

TEST_F(LedgerTest, SpaceOfOthersIsNotAllocatedIn) {
  const uint32_t mine = a.small(), large = a.run();
  EXPECT_FALSE(b.ledger.allocate(mine + 1, 0, 4));     // another lease's chunk
  EXPECT_FALSE(a.ledger.allocate(mine, 0, 4));         // live already
  EXPECT_FALSE(a.ledger.allocate(large + 1, 0, 4));    // small, in a run
  EXPECT_FALSE(a.ledger.allocate(mine + 1, 0, 1024));  // large, in a chunk of small blocks
  const uint32_t second = large + kPagesPerChunk;
  EXPECT_FALSE(a.ledger.allocate(second, 0, 1024));  // large, not at the head
  ChunkValue head = a.space.value(large / kPagesPerChunk);
  a.ledger.drop(large);
  tests::set_chunk(arena, large / kPagesPerChunk, head);  // as an abandoned run: made for the generation that was
  EXPECT_FALSE(a.ledger.allocate(large, 0, 1024));
  EXPECT_EQ(a.arena.lease(a.slot).intent.load(), 0U);
}

TEST_F(LedgerTest, AllChangesOfManyLeasesAtOnceAreCounted) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  const auto work = [&](Parts& parts) {
    for (int i = 0; i < 20000; ++i) {
      EXPECT_TRUE(parts.ledger.attach(block, generation));
      parts.ledger.drop(block);
    }
  };
  std::thread one([&] { work(b); }), two([&] { work(c); });
  one.join();
  two.join();
  EXPECT_EQ(a.count(block), 1U);
  EXPECT_TRUE(b.free_again.empty() && c.free_again.empty());
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST_F(LedgerTest, AnAllocationThatWasOvertakenTriesAgainWhileTheSpaceIsItsOwn) {
  const uint32_t block = a.small();
  a.ledger.drop(block);
  const Between between("allocate.checked", [&] {
    BlockValue moved = a.ledger.value(block);
    ++moved.sequence;
    tests::set_block(arena, block, moved);
  });
  EXPECT_TRUE(a.ledger.allocate(block, 0, 4));
  EXPECT_EQ(Between::passed(), 1);
  EXPECT_TRUE(a.ledger.holds(a.slot, block));
  EXPECT_EQ(a.count(block), 1U);
}

TEST_F(LedgerTest, AnAllocationThatIsLateFindsItsSpaceGone) {
  const uint32_t block = a.small();
  a.ledger.drop(block);
  const Between between("allocate.measured", [&] { b.space.take_if_empty(block / kPagesPerChunk); });
  EXPECT_FALSE(a.ledger.allocate(block, 0, 4));
  EXPECT_EQ(Between::passed(), 1);
  EXPECT_FALSE(a.ledger.value(block).live);
  EXPECT_FALSE(a.ledger.holds(a.slot, block));
  EXPECT_EQ(b.space.value(block / kPagesPerChunk).state, ChunkState::kIdle);
}

// ---- settle

TEST_F(LedgerTest, SettlingTakesACountThatIsTooHighToWhatIsHeldAndOut) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  ASSERT_TRUE(c.tickets.issue(block, generation).has_value());
  // b dies with the count up and neither bit nor ticket.
  b.ledger.begin(Op::kAttach, block, generation);
  ASSERT_TRUE(b.ledger.count_up(block, generation));
  b.die();
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));
  EXPECT_EQ(a.count(block), 2U);
}

TEST_F(LedgerTest, SettlingFreesWhatOnlyTheDeadHeld) {
  const uint32_t block = b.small();
  const uint64_t generation = b.generation(block);
  b.ledger.begin(Op::kDrop, block, generation);
  arena.ledger(b.slot, block / 64).store(0);
  b.die();
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));
  EXPECT_FALSE(c.ledger.value(block).live);
  ASSERT_EQ(c.free_again.size(), 1U);
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));  // once more: the space is given back again
  EXPECT_EQ(c.free_again.size(), 2U);
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation + 1));  // never made live
  EXPECT_EQ(c.free_again.size(), 2U);
}

TEST_F(LedgerTest, SettlingWaitsForTheLivingAtWorkOnTheBlockAndForNobodyElse) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  Parts dead(arena), d(arena);
  b.die();
  a.ledger.begin(Op::kIssue, block, generation);
  EXPECT_FALSE(c.ledger.settle(b.slot, block, generation));
  a.ledger.begin(Op::kIssue, block + 1, generation);  // at work on another
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));
  a.ledger.begin(Op::kIssue, block, generation);
  a.ledger.end();  // op 0 with the block's number still
  arena.lease(a.slot).intent.store(block);
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));
  a.ledger.end();
  dead.ledger.begin(Op::kIssue, block, generation);
  dead.die();
  EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));
  EXPECT_EQ(a.count(block), 1U);
}

TEST_F(LedgerTest, SettlingSeesWhoCameWhileItCounted) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  b.die();
  const Between between("settle.counted", [&] { a.ledger.begin(Op::kIssue, block, generation); });
  EXPECT_FALSE(c.ledger.settle(b.slot, block, generation));
  EXPECT_EQ(Between::passed(), 1);
  EXPECT_EQ(a.count(block), 1U);
}

TEST_F(LedgerTest, SettlingThatIsOvertakenCountsAgainButNotForEver) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  b.die();
  const auto come_and_go = [&] {
    ASSERT_TRUE(a.ledger.count_up(block, generation));
    a.ledger.count_down(block);
  };
  {
    const Between once("settle.counted", come_and_go);
    EXPECT_TRUE(c.ledger.settle(b.slot, block, generation));
  }
  {
    const Between each_time("settle.counted", come_and_go, Between::kEachTime);
    EXPECT_FALSE(c.ledger.settle(b.slot, block, generation));
    EXPECT_GT(Between::passed(), 1);
  }
  EXPECT_EQ(a.count(block), 1U);
}

#endif

}  // namespace
}  // namespace torchshm
