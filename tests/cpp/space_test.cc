// Chunks change hands: claims under the limit, releases by whoever is last, and what a death leaves.
#include "pool/space.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>

#include "kernel.h"
#include "parts.h"

namespace torchshm {
namespace {

using pool::Arena;
using pool::BlockValue;
using pool::ChunkState;
using pool::ChunkValue;
using pool::kChunk;
using pool::kNobody;
using pool::kPage;
using pool::kPagesPerChunk;
using tests::Between;
using tests::Failing;
using tests::fresh_arena;
using tests::Parts;

constexpr uint64_t kMib = uint64_t{1} << 20;

class SpaceTest : public testing::Test {
 protected:
  ChunkValue chunk(uint32_t index) { return a.space.value(index); }
  void set(uint32_t index, ChunkState state, uint32_t owner, uint32_t committed = 0, uint32_t head = 0,
           uint64_t generation = 0) {
    tests::set_chunk(arena, index, {state, owner, committed, head, generation});
    if (arena.header().chunks_used.load() <= index) arena.header().chunks_used.store(index + 1);
  }
  // Pages of a chunk that are there.
  uint32_t resident(uint32_t block) {
    unsigned char there[kPagesPerChunk];
    EXPECT_EQ(::mincore(arena.data() + uint64_t{block} * kPage, kChunk, there), 0);
    return static_cast<uint32_t>(
        std::count_if(there, there + kPagesPerChunk, [](unsigned char page) { return (page & 1) != 0; }));
  }
  Arena arena = fresh_arena(64 * kMib);  // 128 chunks
  Parts a{arena}, b{arena};
};

// ---- claims

TEST_F(SpaceTest, ARunIsCommittedToThePageAndWarmWhenItIsReleased) {
  const uint32_t block = a.run(3 * kMib);
  const uint32_t head = block / kPagesPerChunk;
  EXPECT_EQ(chunk(head).committed, kPagesPerChunk);
  EXPECT_EQ(chunk(head + 1).committed, kPagesPerChunk / 2);
  EXPECT_EQ(a.space.committed(), 3 * kMib);
  EXPECT_EQ(a.space.idle(), 0U);
  a.ledger.drop(block);
  EXPECT_EQ(a.space.idle(), 3 * kMib);
  EXPECT_EQ(chunk(head).state, ChunkState::kIdle);
  EXPECT_EQ(a.run(3 * kMib), block);  // warm for it
}

TEST_F(SpaceTest, WhatCanNeverFitIsRefused) {
  EXPECT_EQ(a.space.claim_run(0).code(), Code::kFull);
  EXPECT_EQ(a.space.claim_run(uint64_t{arena.pages()} * kPage + 1).code(), Code::kFull);
  EXPECT_EQ(a.space.claim_run(65 * kMib).code(), Code::kFull);
  EXPECT_EQ(a.space.committed(), 0U);
}

TEST_F(SpaceTest, WithoutNeighbouringChunksThereIsNoRunAndWithoutAnyNoChunk) {
  for (uint32_t i = 0; i < arena.chunks(); ++i) set(i, ChunkState::kSmall, b.slot, kPagesPerChunk);
  arena.header().limit.store(UINT64_MAX);
  EXPECT_EQ(a.space.claim_small().code(), Code::kFull);
  EXPECT_EQ(a.space.claim_run(kMib).code(), Code::kFull);
  set(arena.chunks() - 1, ChunkState::kHole, 0);
  set(3, ChunkState::kHole, 0);
  EXPECT_EQ(a.space.claim_run(3 * kMib).code(), Code::kFull);
  EXPECT_TRUE(a.space.claim_run(2 * kMib).ok());
}

TEST_F(SpaceTest, PagesBeyondTheLimitAreNotTakenAndNothingStaysTaken) {
  const uint32_t block = a.run(62 * kMib);
  EXPECT_EQ(b.space.claim_run(4 * kMib).code(), Code::kFull);
  EXPECT_EQ(a.space.committed(), 62 * kMib);
  EXPECT_TRUE(b.space.claim_small().ok());
  EXPECT_EQ(b.space.claim_small().code(), Code::kFull);
  EXPECT_EQ(a.space.committed(), 64 * kMib);
  a.ledger.drop(block);
  // Idle pages elsewhere are given up for new ones.
  arena.header().limit.store(20 * kMib);
  EXPECT_TRUE(b.space.claim_run(15 * kMib).ok());
  EXPECT_LE(a.space.committed(), 20 * kMib);
}

TEST_F(SpaceTest, WhatAChunkHasBeyondItsBlockGoesBackWhereMemoryIsScarce) {
  const uint32_t whole = a.run(2 * kMib);
  a.ledger.drop(whole);
  const uint32_t little = a.run(kMib);  // there is much left
  EXPECT_EQ(little, whole);
  EXPECT_EQ(chunk(little / kPagesPerChunk).committed, kPagesPerChunk);
  a.ledger.drop(little);
  arena.header().limit.store(2 * kMib);
  arena.header().warm.store(2 * kMib);
  EXPECT_EQ(a.run(kMib), little);  // all of it is to stay warm
  EXPECT_EQ(chunk(little / kPagesPerChunk).committed, kPagesPerChunk);
  a.ledger.drop(little);
  arena.header().warm.store(0);
  EXPECT_EQ(a.run(kMib), little);
  EXPECT_EQ(chunk(little / kPagesPerChunk).committed, kPagesPerChunk / 2);
  EXPECT_EQ(a.space.committed(), kMib);
  EXPECT_EQ(resident(little), kPagesPerChunk / 2);
  a.ledger.drop(little);
  EXPECT_EQ(a.run(2 * kMib), little);
  EXPECT_EQ(a.space.committed(), 2 * kMib);
}

TEST_F(SpaceTest, WhereTheLimitHasSunkAWarmRunGivesUpWhatItHasTooMuch) {
  const uint32_t warm = a.run(4 * kMib);
  a.ledger.drop(warm);
  arena.header().limit.store(3 * kMib + kMib / 2);  // as tables that grow make it
  EXPECT_EQ(a.run(3 * kMib), warm);
  EXPECT_EQ(a.space.committed(), 3 * kMib);
  EXPECT_EQ(resident(warm + kPagesPerChunk), kPagesPerChunk / 2);
  a.ledger.drop(warm);
  EXPECT_EQ(a.run(3 * kMib), warm);
}

TEST_F(SpaceTest, WhatTheSystemDoesNotTakeBackOfAHugePageStaysCounted) {
  const uint32_t block = a.run(2 * kMib);  // a huge page, where there are some
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  iovec page{arena.data() + uint64_t{block} * kPage, kPage};
  ASSERT_EQ(::vmsplice(ends[1], &page, 1, 0), static_cast<ssize_t>(kPage));  // pins it
  a.ledger.drop(block);
  arena.header().limit.store(2 * kMib);
  arena.header().warm.store(0);
  EXPECT_EQ(a.run(kMib), block);
  EXPECT_EQ(chunk(block / kPagesPerChunk).committed, resident(block));
  ::close(ends[0]);
  ::close(ends[1]);
  a.ledger.drop(block);
  EXPECT_EQ(a.run(kMib), block);
  EXPECT_EQ(chunk(block / kPagesPerChunk).committed, kPagesPerChunk / 2);
  EXPECT_EQ(resident(block), kPagesPerChunk / 2);
}

TEST_F(SpaceTest, OwnWarmChunksComeFirst) {
  const uint32_t first = a.run(3 * kMib), second = b.run(3 * kMib), third = a.run(5 * kMib);
  a.ledger.drop(first);
  b.ledger.drop(second);
  a.ledger.drop(third);
  EXPECT_EQ(b.run(3 * kMib), second);
  b.ledger.drop(second);
  EXPECT_EQ(a.run(3 * kMib), third);  // what it had last
  EXPECT_EQ(a.run(3 * kMib), first);
}

TEST_F(SpaceTest, TheShortestRunThatIsLongEnoughIsTaken) {
  const uint32_t longer = a.run(8 * kMib);
  (void)a.run(kMib);
  const uint32_t fitting = a.run(4 * kMib);
  (void)a.run(kMib);
  a.ledger.drop(longer);
  a.ledger.drop(fitting);
  EXPECT_EQ(b.run(4 * kMib), fitting);
  EXPECT_EQ(b.run(4 * kMib), longer);
}

TEST_F(SpaceTest, WhoCanNotGrowLeavesOthersWhatIsWarm) {
  (void)a.run(60 * kMib);
  const uint32_t warm = b.run(3 * kMib);
  b.ledger.drop(warm);
  EXPECT_EQ(a.space.claim_run(8 * kMib).code(), Code::kFull);
  EXPECT_EQ(a.space.idle(), 3 * kMib);
  EXPECT_TRUE(a.space.claim_run(4 * kMib).ok());  // with the place of what is warm
  EXPECT_LE(a.space.committed(), 64 * kMib);
}

TEST_F(SpaceTest, RunsOfManySizesAreRememberedOnlySoFar) {
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 40; ++i) blocks.push_back(a.run(kMib));
  for (const uint32_t block : blocks) a.ledger.drop(block);
  EXPECT_EQ(a.run(kMib), blocks.back());
  EXPECT_EQ(a.space.idle(), 39 * kMib);
}

TEST_F(SpaceTest, WhatTheDeadLeftIsLookedForBeforeThePoolGrows) {
  (void)a.run();
  EXPECT_EQ(a.growths, 1);
  (void)a.small();
  EXPECT_EQ(a.growths, 2);
  a.ledger.drop(a.run());
  EXPECT_EQ(a.growths, 3);
  (void)a.run();  // idle: no growth
  EXPECT_EQ(a.growths, 3);
}

TEST_F(SpaceTest, AnOrphanIsAdoptedBeforeAnythingElseIsTaken) {
  const uint32_t block = b.small();
  const uint32_t index = block / kPagesPerChunk;
  set(index, ChunkState::kSmall, kNobody, kPagesPerChunk);
  auto claimed = a.space.claim_small();
  ASSERT_TRUE(claimed.ok());
  EXPECT_EQ(claimed->chunk, index);
  EXPECT_TRUE(claimed->adopted);
  EXPECT_EQ(chunk(index).owner, a.slot);
}

TEST_F(SpaceTest, AnOrphanThatTheDeadHaveJustLeftIsAdoptedToo) {
  const uint32_t index = b.small() / kPagesPerChunk;
  pool::Space space(arena, a.slot, [&] { set(index, ChunkState::kSmall, kNobody, kPagesPerChunk); });
  auto claimed = space.claim_small();
  ASSERT_TRUE(claimed.ok());
  EXPECT_TRUE(claimed->adopted);
  EXPECT_EQ(claimed->chunk, index);
}

TEST_F(SpaceTest, AClaimThatMustNotGrowTheMachineIsRefused) {
  TORCHSHM_NEEDS_MOUNTS();
  // 32 MiB are left alone.
  EXPECT_TRUE(tests::succeeds([&] {
    return tests::private_mounts() && tests::show("/proc/meminfo", "MemAvailable: 37000 kB\n") &&
           a.space.claim_run(6 * kMib).code() == Code::kFull && a.space.committed() == 0 &&
           a.space.claim_run(2 * kMib).ok();
  }));
  EXPECT_TRUE(tests::succeeds([&] {
    return tests::private_mounts() && tests::show("/proc/meminfo", "MemAvailable: 34000 kB\n") &&
           a.space.claim_small().code() == Code::kFull;
  }));
}

// ---- releases

TEST_F(SpaceTest, AReleaseOfSomethingElseChangesNothing) {
  const uint32_t block = a.run();
  const uint32_t head = block / kPagesPerChunk;
  const uint64_t generation = a.generation(block);
  const ChunkValue before = chunk(head);
  a.space.release_run(block, generation + 1);
  a.space.release_run(block + 1, generation);
  pool::BlockValue odd;
  odd.granules = 4;
  tests::set_block(arena, block + 5, odd);  // a block with an extent, and no run's
  a.space.release_run(block + 5, generation);
  a.space.release_run(arena.pages(), generation);
  EXPECT_EQ(chunk(head).pair(), before.pair());
  set(head + 1, ChunkState::kRun, b.slot, 4, head + 7, generation);  // somebody else's since
  b.space.release_run(block, generation);
  EXPECT_EQ(chunk(head).state, ChunkState::kIdle);
  EXPECT_EQ(chunk(head + 1).head, head + 7);
  a.space.release_run(block, generation);  // again
  EXPECT_EQ(chunk(head).state, ChunkState::kIdle);
}

TEST_F(SpaceTest, OnlyOwnChunksOfSmallBlocksAreReleased) {
  const uint32_t index = a.small() / kPagesPerChunk;
  b.space.release_small(index);
  EXPECT_EQ(chunk(index).state, ChunkState::kSmall);
  a.space.release_small(index);
  EXPECT_EQ(chunk(index).state, ChunkState::kIdle);
  a.space.release_small(index);
  EXPECT_EQ(a.space.idle(), kChunk);
}

TEST_F(SpaceTest, AnAbandonedRunIsAsItWasBefore) {
  auto block = a.space.claim_run(5 * kMib);
  ASSERT_TRUE(block.ok());
  const uint32_t head = *block / kPagesPerChunk;
  (void)b.small();  // in the next chunk
  a.space.abandon_run(*block);
  for (uint32_t i = head; i < head + 3; ++i) EXPECT_EQ(chunk(i).state, ChunkState::kIdle);
  // Only what is still its own: each of these ends it.
  set(head, ChunkState::kRun, a.slot, 1, head, 1);
  set(head + 1, ChunkState::kRun, b.slot, 1, head, 1);
  a.space.abandon_run(*block);
  EXPECT_EQ(chunk(head + 1).owner, b.slot);
  set(head, ChunkState::kRun, a.slot, 1, head, 1);
  set(head + 1, ChunkState::kRun, a.slot, 1, head + 1, 1);
  a.space.abandon_run(*block);
  EXPECT_EQ(chunk(head).state, ChunkState::kIdle);
  EXPECT_EQ(chunk(head + 1).state, ChunkState::kRun);
  set(arena.chunks() - 1, ChunkState::kRun, a.slot, 1, arena.chunks() - 1, 1);  // to the end of the file
  a.space.abandon_run((arena.chunks() - 1) * kPagesPerChunk);
  EXPECT_EQ(chunk(arena.chunks() - 1).state, ChunkState::kIdle);
}

// ---- taking

TEST_F(SpaceTest, EmptyChunksOfOthersAreTakenAndUsedOnesAreNot) {
  const uint32_t used = b.small(), empty = b.small(), own = a.small();
  b.ledger.drop(empty);
  a.ledger.drop(own);
  a.space.take_empty();
  EXPECT_EQ(chunk(used / kPagesPerChunk).owner, b.slot);
  EXPECT_EQ(chunk(empty / kPagesPerChunk).state, ChunkState::kIdle);
  EXPECT_EQ(chunk(empty / kPagesPerChunk).owner, a.slot);
  EXPECT_EQ(chunk(own / kPagesPerChunk).state, ChunkState::kSmall);
  EXPECT_EQ(a.space.idle(), kChunk);
}

TEST_F(SpaceTest, UnsettledIsWhatSomebodyIsJustGettingOrGivingBack) {
  EXPECT_FALSE(a.space.unsettled());
  const uint32_t block = a.run();
  (void)a.small();
  EXPECT_FALSE(a.space.unsettled());
  set(20, ChunkState::kTrimming, b.slot);
  EXPECT_TRUE(a.space.unsettled());
  set(20, ChunkState::kBacking, b.slot);
  EXPECT_TRUE(a.space.unsettled());
  set(20, ChunkState::kHole, 0);
  set(21, ChunkState::kRun, b.slot, 512, 21, 1);  // claimed, its block not live yet
  EXPECT_TRUE(a.space.unsettled());
  set(21, ChunkState::kRun, b.slot, 512, block / kPagesPerChunk, 1);  // a later part of a run
  EXPECT_FALSE(a.space.unsettled());
}

TEST_F(SpaceTest, TrimKeepsAsMuchAsItIsTold) {
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 6; ++i) blocks.push_back(a.run(2 * kMib));
  for (const uint32_t block : blocks) a.ledger.drop(block);
  EXPECT_EQ(b.space.trim(5 * kMib), 8 * kMib);
  EXPECT_EQ(a.space.idle(), 4 * kMib);
  EXPECT_EQ(chunk(blocks[0] / kPagesPerChunk).state, ChunkState::kIdle);  // from the end of the file
  EXPECT_EQ(b.space.trim(0), 4 * kMib);
  EXPECT_EQ(a.space.committed(), 0U);
  EXPECT_EQ(b.space.trim(0), 0U);
}

// ---- a death's chunks

TEST_F(SpaceTest, WhatTheDeadWereGettingOrGivingBackBecomesHoles) {
  set(0, ChunkState::kTrimming, b.slot, 512);
  set(1, ChunkState::kBacking, b.slot, 512);
  set(2, ChunkState::kRun, b.slot, 512, 2, 1);                   // its block was never made live
  set(3, ChunkState::kRun, b.slot, 512, 2, 1);                   // nor this part's
  set(4, ChunkState::kRun, b.slot, 512, arena.chunks() + 9, 1);  // garbage
  a.space.inherit(b.slot);
  for (uint32_t i = 0; i < 5; ++i) EXPECT_EQ(chunk(i).state, ChunkState::kHole) << i;
}

TEST_F(SpaceTest, WhatOthersStillUseOfTheDeadIsOrphanedAndTheRestIdle) {
  const uint32_t large = b.run(3 * kMib), small = b.small(), empty = b.small(), released = b.run(3 * kMib);
  const uint32_t half = b.run(2 * kMib), idle = b.run(2 * kMib);
  ASSERT_TRUE(a.ledger.attach(large, b.generation(large)));
  ASSERT_TRUE(a.ledger.attach(small, b.generation(small)));
  b.ledger.drop(empty);
  b.ledger.drop(idle);
  for (const uint32_t block : {released, half}) {  // freed, and then killed before the chunks were released
    BlockValue value = b.ledger.value(block);
    value.live = false;
    value.count = 0;
    tests::set_block(arena, block, value);
  }
  for (const uint32_t block : {large, small}) arena.ledger(b.slot, block / 64).store(0);
  a.space.inherit(b.slot);
  EXPECT_EQ(chunk(large / kPagesPerChunk).state, ChunkState::kRun);
  EXPECT_EQ(chunk(large / kPagesPerChunk).owner, kNobody);
  EXPECT_EQ(chunk(large / kPagesPerChunk + 1).owner, kNobody);
  EXPECT_EQ(chunk(small / kPagesPerChunk).state, ChunkState::kSmall);
  EXPECT_EQ(chunk(small / kPagesPerChunk).owner, kNobody);
  EXPECT_EQ(chunk(empty / kPagesPerChunk).state, ChunkState::kIdle);
  for (const uint32_t block : {released, half, idle}) {
    EXPECT_EQ(chunk(block / kPagesPerChunk).state, ChunkState::kIdle);
    EXPECT_EQ(chunk(block / kPagesPerChunk).owner, kNobody);
  }
}

TEST_F(SpaceTest, WhatTheDeadWereTakingIsDecidedForThem) {
  Parts c(arena);
  const uint32_t used = b.small(), empty = b.small();
  b.ledger.drop(empty);
  for (const uint32_t block : {used, empty}) set(block / kPagesPerChunk, ChunkState::kTaking, c.slot, kPagesPerChunk);
  a.space.inherit(c.slot);
  EXPECT_EQ(chunk(used / kPagesPerChunk).state, ChunkState::kSmall);
  EXPECT_EQ(chunk(used / kPagesPerChunk).owner, kNobody);
  EXPECT_EQ(chunk(empty / kPagesPerChunk).state, ChunkState::kIdle);
  EXPECT_EQ(chunk(empty / kPagesPerChunk).owner, a.slot);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

// ---- others in between

TEST_F(SpaceTest, AClaimThatLosesAChunkTakesOthers) {
  uint32_t theirs = 0;
  {
    const Between between("claim.in_sight", [&] { theirs = b.run(2 * kMib); });
    EXPECT_NE(a.run(2 * kMib), theirs);
    EXPECT_EQ(Between::passed(), 1);
  }
  {
    const Between between("claim.in_sight", [&] { theirs = b.small(); });
    EXPECT_NE(a.small(), theirs);
  }
  {  // the second chunk of a run: the first is put back
    const Between between("claim_run.chunk", [&] { theirs = b.run(2 * kMib); });
    const uint32_t block = a.run(4 * kMib);
    EXPECT_TRUE(block + 2 * kPagesPerChunk <= theirs || theirs + kPagesPerChunk <= block);
  }
  EXPECT_EQ(a.space.committed(), 14 * kMib);
}

TEST_F(SpaceTest, AClaimThatLosesAChunkLeavesThoseThatWereTakenMeanwhile) {
  int passed = 0;
  const Between between(
      "claim_run.chunk",
      [&] {  // its first chunk was taken for a dead lease's, and the second is gone
        if (passed++ > 0) return;
        set(0, ChunkState::kIdle, 9, 4);
        set(1, ChunkState::kSmall, b.slot, 4);
      },
      Between::kEachTime);
  const uint32_t block = a.run(4 * kMib);
  EXPECT_GE(block / kPagesPerChunk, 2U);
  EXPECT_EQ(chunk(0).owner, 9U);
  EXPECT_EQ(chunk(1).owner, b.slot);
}

TEST_F(SpaceTest, AClaimThatAlwaysLosesGivesUp) {
  uint32_t at = 0;
  const auto steal = [&] {  // the chunk that is about to be claimed
    set(at++, ChunkState::kSmall, b.slot, 0);
  };
  arena.header().chunks_used.store(0);
  const Between between("claim.in_sight", steal, Between::kEachTime);
  EXPECT_EQ(a.space.claim_run(kMib).code(), Code::kFull);
  EXPECT_EQ(a.space.claim_small().code(), Code::kFull);
  EXPECT_GT(Between::passed(), 100);
}

TEST_F(SpaceTest, ARunWhoseHeadAnOldReleaserFreedIsClaimedAgain) {
  const uint32_t before = a.run(2 * kMib);
  a.ledger.drop(before);
  // Another run lived and ended there between the look at its generation and the taking of its chunk, and gives its space back only now.
  const Between between("claim.told", [&] {
    BlockValue value = a.ledger.value(before);
    ++value.generation;
    tests::set_block(arena, before, value);
    ASSERT_EQ(chunk(before / kPagesPerChunk).generation, value.generation);
    a.space.release_run(before, value.generation);
    ASSERT_EQ(chunk(before / kPagesPerChunk).state, ChunkState::kIdle);
  });
  const uint32_t block = a.run(2 * kMib);
  EXPECT_EQ(chunk(block / kPagesPerChunk).state, ChunkState::kRun);
  EXPECT_EQ(chunk(block / kPagesPerChunk).generation, a.generation(block));
}

TEST_F(SpaceTest, ARunIsReleasedWithItsHeadLast) {
  const uint32_t block = a.run(6 * kMib);
  const uint32_t head = block / kPagesPerChunk;
  const uint64_t generation = a.generation(block);
  std::vector<ChunkState> head_was;
  const Between between(
      "release_run.idle", [&] { head_was.push_back(chunk(head).state); }, Between::kEachTime);
  a.ledger.drop(block);
  a.space.release_run(block, generation);
  EXPECT_EQ(head_was, (std::vector{ChunkState::kRun, ChunkState::kRun, ChunkState::kIdle}));
}

TEST_F(SpaceTest, AChunkThatIsReapedWhileItsOwnerSleepsIsNotUsed) {
  const Between between("claim_small.backed", [&] { a.space.inherit(a.slot); });
  const uint32_t block = a.small();
  EXPECT_EQ(chunk(block / kPagesPerChunk).state, ChunkState::kSmall);
  EXPECT_EQ(chunk(block / kPagesPerChunk).owner, a.slot);
}

TEST_F(SpaceTest, ATakerThatSleepsLeavesTheDecisionToWhoeverFinishesIt) {
  const uint32_t block = b.small();
  b.ledger.drop(block);
  const uint32_t index = block / kPagesPerChunk;
  const Between between("take_empty.looked", [&] { set(index, ChunkState::kIdle, 9, kPagesPerChunk); });
  a.space.take_if_empty(index);
  EXPECT_EQ(chunk(index).owner, 9U);
}

TEST_F(SpaceTest, AnotherTakerIsNotFinishedFor) {
  const uint32_t block = b.small();
  b.ledger.drop(block);
  const uint32_t index = block / kPagesPerChunk;
  const Between between("take_empty.looked", [&] { set(index, ChunkState::kTaking, 9, kPagesPerChunk); });
  a.space.take_if_empty(index);
  EXPECT_EQ(chunk(index).state, ChunkState::kTaking);
}

TEST_F(SpaceTest, ABlockMadeLiveJustBeforeTheTakingKeepsItsChunk) {
  const uint32_t block = b.small();
  b.ledger.drop(block);
  const uint32_t index = block / kPagesPerChunk;
  const Between between("take_empty.announced", [&] {
    BlockValue value = b.ledger.value(block);
    value.live = true;
    value.count = 1;
    tests::set_block(arena, block, value);
  });
  a.space.take_if_empty(index);
  EXPECT_EQ(chunk(index).state, ChunkState::kSmall);
  EXPECT_EQ(chunk(index).owner, kNobody);
}

TEST_F(SpaceTest, ATrimThatSleepsThroughAReapingChangesNothing) {
  a.ledger.drop(a.run(2 * kMib));
  const Between between("trim.claimed", [&] { set(0, ChunkState::kSmall, b.slot, kPagesPerChunk); });
  (void)a.space.trim(0);
  EXPECT_EQ(chunk(0).state, ChunkState::kSmall);
  EXPECT_EQ(chunk(0).owner, b.slot);
}

TEST_F(SpaceTest, TwoWhoInheritDoItOnce) {
  const uint32_t block = b.small();
  const uint32_t index = block / kPagesPerChunk;
  const Between between("inherit.chunk", [&] { a.space.inherit(b.slot); });
  a.space.inherit(b.slot);
  EXPECT_EQ(chunk(index).owner, kNobody);
  b.ledger.drop(block);
  set(index, ChunkState::kTrimming, b.slot, kPagesPerChunk);
  const Between again("inherit.chunk", [&] { a.space.inherit(b.slot); });
  a.space.inherit(b.slot);
  EXPECT_EQ(chunk(index).state, ChunkState::kHole);
}

// ---- the system refuses

TEST_F(SpaceTest, PagesThatCanNotBeHadAreGivenUpExactly) {
  a.ledger.drop(a.run(3 * kMib));  // a chunk and a half are there
  {
    const Failing failing("os.commit", ENOMEM);
    EXPECT_EQ(a.space.claim_run(6 * kMib).code(), Code::kFull);
    EXPECT_TRUE(a.space.claim_small().ok());  // the warm one
    EXPECT_EQ(a.space.claim_small().code(), Code::kFull);
  }
  EXPECT_EQ(a.space.committed(), 3 * kMib);
  EXPECT_EQ(a.space.idle(), kMib);
  EXPECT_TRUE(a.space.claim_run(4 * kMib).ok());
}

TEST_F(SpaceTest, AChunkThatTheSystemDoesNotTakeBackIsCountedAndOfferedAgain) {
  set(0, ChunkState::kTrimming, b.slot, 512);
  {
    const Failing failing("os.punch", EPERM);
    a.space.inherit(b.slot);
    EXPECT_EQ(chunk(0).state, ChunkState::kTrimming);
    EXPECT_EQ(chunk(0).owner, kNobody);
    EXPECT_EQ(chunk(0).committed, kPagesPerChunk);
  }
  (void)a.space.trim(0);
  EXPECT_EQ(chunk(0).state, ChunkState::kHole);
  a.ledger.drop(a.run(2 * kMib));
  {
    const Failing failing("os.punch", EPERM);
    EXPECT_EQ(a.space.trim(0), 0U);
  }
  EXPECT_EQ(a.space.idle(), 2 * kMib);
}

#endif

}  // namespace
}  // namespace torchshm
