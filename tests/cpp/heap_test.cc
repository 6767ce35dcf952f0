// Small blocks in owned chunks, and the private counts behind the ledger's bits.
#include "pool/heap.h"

#include "parts.h"
#include "pool/holds.h"

namespace torchshm {
namespace {

using pool::Arena;
using pool::BlockValue;
using pool::Heap;
using pool::Holds;
using pool::kGranulesPerChunk;
using pool::kPagesPerChunk;
using pool::Mode;
using tests::fresh_arena;

class HeapTest : public testing::Test {
 protected:
  // As the ledger would make it live, or free it.
  void set_live(const Heap::Place& place, uint32_t granules, bool live) {
    BlockValue value;
    value.granules = granules;
    value.first = place.first;
    value.live = live;
    value.count = live ? 1 : 0;
    tests::set_block(arena, place.block, value);
  }
  Heap::Place make(uint32_t granules, bool whole_pages = false) {
    const auto place = heap.place(granules, whole_pages);
    EXPECT_TRUE(place.has_value());
    set_live(*place, granules, true);
    return *place;
  }
  bool free(const Heap::Place& place, uint32_t granules) {
    set_live(place, granules, false);
    return heap.give_back(place.block);
  }
  Arena arena = fresh_arena();
  Heap heap{arena};
};

TEST_F(HeapTest, FillsAChunkToTheLastGranule) {
  EXPECT_FALSE(heap.place(4, false).has_value());
  heap.add(2, false);
  for (uint32_t i = 0; i < kGranulesPerChunk / 4; ++i) {
    const auto place = make(4);
    EXPECT_EQ(place.block, 2 * kPagesPerChunk + i);
    EXPECT_EQ(place.first, 0U);
  }
  EXPECT_FALSE(heap.place(4, false).has_value());
}

TEST_F(HeapTest, WholePagesStartOnOne) {
  heap.add(0, false);
  EXPECT_EQ(make(5).first, 0U);
  EXPECT_EQ(make(5).first, 1U);  // right behind it
  const auto whole = make(8, true);
  EXPECT_EQ(whole.first, 0U);
  EXPECT_EQ(whole.block, 3U);
  // A cached block that does not start on a page is not for them.
  const Heap::Place odd{1, 1};
  EXPECT_TRUE(free(odd, 5));
  EXPECT_EQ(make(8, true).first, 0U);
  EXPECT_EQ(make(5).block, 1U);
}

TEST_F(HeapTest, TakesABlockBackOnceAndOnlyWhenItIsFree) {
  heap.add(0, false);
  const auto place = make(4);
  EXPECT_FALSE(heap.give_back(place.block));  // live: an old hint
  EXPECT_TRUE(free(place, 4));
  EXPECT_FALSE(heap.give_back(place.block));         // twice
  EXPECT_FALSE(heap.give_back(7));                   // nothing was placed there
  EXPECT_FALSE(heap.give_back(5 * kPagesPerChunk));  // not our chunk
  EXPECT_FALSE(heap.owns(arena.chunks()));
}

TEST_F(HeapTest, FindsByItselfWhatWasFreedWithoutAHint) {
  heap.add(0, false);
  std::vector<Heap::Place> places;
  while (const auto place = heap.place(512, false)) {
    set_live(*place, 512, true);
    places.push_back(*place);
  }
  for (const auto& place : places) set_live(place, 512, false);
  EXPECT_FALSE(heap.place(512, false).has_value());
  heap.rescan();
  EXPECT_TRUE(heap.place(512, false).has_value());
}

TEST_F(HeapTest, AdoptsWhatLivesInAChunk) {
  set_live({3 * kPagesPerChunk + 1, 2}, 9, true);
  set_live({3 * kPagesPerChunk + 511, 0}, 900, true);  // a length that reaches beyond the chunk
  heap.add(3, true);
  const auto first = make(6);
  EXPECT_EQ(first.block, 3 * kPagesPerChunk);
  EXPECT_EQ(first.first, 0U);
  EXPECT_EQ(make(4).block, 3 * kPagesPerChunk + 3);  // behind the one that lives there
  EXPECT_TRUE(free({3 * kPagesPerChunk + 1, 2}, 9));
}

TEST_F(HeapTest, GivesEmptyChunksUpAndKeepsSome) {
  for (const uint32_t chunk : {0U, 1U, 2U, 3U}) heap.add(chunk, false);
  EXPECT_EQ(heap.empty_chunks(), 4U);
  const auto place = make(4);
  EXPECT_EQ(heap.empty_chunks(), 3U);
  EXPECT_TRUE(heap.remove_empty(2).has_value());
  EXPECT_FALSE(heap.remove_empty(2).has_value());
  EXPECT_TRUE(free(place, 4));  // only cached: the chunk is not empty
  EXPECT_EQ(heap.empty_chunks(), 2U);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(heap.remove_empty(0).has_value()) << i;
  EXPECT_FALSE(heap.remove_empty(0).has_value());
  EXPECT_EQ(heap.empty_chunks(), 0U);
}

TEST_F(HeapTest, LosesAChunkWithAllThatIsCachedOfIt) {
  heap.add(0, false);
  const auto in_first = make(4), large = make(512);
  heap.add(1, false);
  const auto in_second = make(6);
  EXPECT_EQ(in_second.block, kPagesPerChunk);
  EXPECT_TRUE(free(in_first, 4));
  EXPECT_TRUE(free(in_second, 6));
  heap.lose(1);
  EXPECT_FALSE(heap.owns(1));
  EXPECT_NE(make(6).block, in_second.block);
  EXPECT_EQ(make(4).block, in_first.block);
  EXPECT_TRUE(free(large, 512));
  heap.add(2, false);
  EXPECT_EQ(heap.empty_chunks(), 1U);
  heap.lose(2);  // an empty one
  EXPECT_EQ(heap.empty_chunks(), 0U);
}

TEST_F(HeapTest, ADamagedDescriptorFreesNothingTwice) {
  heap.add(0, false);
  const auto large = make(65), damaged = make(5);
  ASSERT_EQ(damaged.first, 1U);
  EXPECT_TRUE(free({damaged.block, 0}, 1));  // it names the last granule of the other now
  EXPECT_TRUE(free(large, 65));
  EXPECT_FALSE(heap.remove_empty(0).has_value());  // its own space is not used again
  EXPECT_EQ(make(65).block, large.block);
}

TEST_F(HeapTest, ACancelledPlaceIsFreeAgain) {
  heap.add(0, false);
  const auto place = heap.place(2048 - 4, false);
  ASSERT_TRUE(place.has_value());
  EXPECT_EQ(heap.empty_chunks(), 0U);
  heap.cancel(*place, 2048 - 4);
  EXPECT_EQ(heap.empty_chunks(), 1U);
  EXPECT_FALSE(heap.give_back(place->block));
  EXPECT_TRUE(heap.place(2048 - 4, false).has_value());
}

TEST_F(HeapTest, LooksForAGapInOtherChunksThanTheLast) {
  heap.add(0, false);
  heap.add(1, false);
  for (uint32_t i = 0; i < 8; ++i) (void)make(512);
  EXPECT_FALSE(heap.place(512, false).has_value());
  // A gap that only whole pages can't use, however much is free.
  heap.add(2, false);
  const auto odd = make(6);
  while (const auto place = heap.place(16, false)) set_live(*place, 16, true);
  EXPECT_TRUE(free(odd, 6));
  heap.rescan();
  EXPECT_FALSE(heap.place(12, true).has_value());
}

// ---- holds

TEST(Holds, CountsEachWayOfLooking) {
  auto holds = Holds::create(1024);
  ASSERT_TRUE(holds.ok());
  holds->add(5, Mode::kReadWrite, 7);
  holds->add_further(5, Mode::kCopyOnWrite);
  holds->add(5, Mode::kCopyOnWrite, 8);
  EXPECT_EQ(holds->generation(5), 7U);  // the first one's
  EXPECT_EQ(holds->count(5), 3U);
  EXPECT_FALSE(holds->remove(5, Mode::kCopyOnWrite).last_copy);
  const auto last_copy = holds->remove(5, Mode::kCopyOnWrite);
  EXPECT_TRUE(last_copy.last_copy);
  EXPECT_EQ(last_copy.left, 1U);
  const auto last = holds->remove(5, Mode::kReadWrite);
  EXPECT_FALSE(last.last_copy);
  EXPECT_EQ(last.left, 0U);
}

TEST(Holds, ABlockIsExclusiveUntilTheLastHoldGoes) {
  auto holds = Holds::create(1024);
  holds->add(70, Mode::kReadWrite, 1);
  EXPECT_FALSE(holds->is_exclusive(70));
  holds->mark_exclusive(70);
  EXPECT_TRUE(holds->is_exclusive(70));
  EXPECT_FALSE(holds->is_exclusive(71));
  holds->remove(70, Mode::kReadWrite);
  EXPECT_FALSE(holds->is_exclusive(70));
  holds->mark_private(70, true);
  holds->mark_private(71, true);
  EXPECT_EQ(holds->private_blocks(), 2);
  EXPECT_TRUE(holds->is_private(70));
  holds->mark_private(70, false);
  EXPECT_FALSE(holds->is_private(70));
  EXPECT_TRUE(holds->is_private(71));
  EXPECT_EQ(holds->private_blocks(), 1);
}

TEST(Holds, LeadFromAPageToTheBlockItMayBelongTo) {
  auto holds = Holds::create(2 * kPagesPerChunk);
  EXPECT_FALSE(holds->start_at_or_before(kPagesPerChunk + 400).has_value());
  holds->add(kPagesPerChunk - 1, Mode::kReadWrite, 1);  // in the chunk before: never leads out of its chunk
  EXPECT_FALSE(holds->start_at_or_before(kPagesPerChunk + 400).has_value());
  holds->add(kPagesPerChunk + 3, Mode::kReadWrite, 1);
  EXPECT_EQ(holds->start_at_or_before(kPagesPerChunk + 400), kPagesPerChunk + 3);
  EXPECT_EQ(holds->start_at_or_before(kPagesPerChunk + 63), kPagesPerChunk + 3);
  EXPECT_EQ(holds->start_at_or_before(kPagesPerChunk + 3), kPagesPerChunk + 3);
  EXPECT_FALSE(holds->start_at_or_before(kPagesPerChunk + 2).has_value());
  holds->add(kPagesPerChunk + 63, Mode::kReadWrite, 1);
  EXPECT_EQ(holds->start_at_or_before(kPagesPerChunk + 63), kPagesPerChunk + 63);
  EXPECT_EQ(holds->start_at_or_before(kPagesPerChunk + 62), kPagesPerChunk + 3);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Holds, AreRefusedWithoutAddressSpace) {
  for (uint64_t at = 1; at <= 5; ++at) {
    const tests::Failing failing("os.mmap", ENOMEM, at);
    EXPECT_EQ(Holds::create(1024).code(), Code::kUnsupported) << at;
  }
}

#endif

}  // namespace
}  // namespace torchshm
