// The bytes of a catalogue, pinned: processes of different builds map the same file.
#include <gtest/gtest.h>

#include <cstddef>

#include "store/layout.h"

namespace torchshm::store {
namespace {

TEST(StoreLayout, HeaderStartsWithWhatAnyVersionCanRead) {
  EXPECT_EQ(offsetof(Header, magic), 0U);
  EXPECT_EQ(offsetof(Header, version), 8U);
  EXPECT_EQ(offsetof(Header, layout_hash), 12U);
  EXPECT_EQ(offsetof(Header, pool_id), 16U);
  EXPECT_EQ(kVersion, 2U);
}

TEST(StoreLayout, TablesHaveTheirSizesAndLieOneAfterAnother) {
  EXPECT_EQ(sizeof(Slot), 16U);
  EXPECT_EQ(sizeof(CellWord), 16U);
  EXPECT_EQ(sizeof(Body), 256U);
  EXPECT_EQ(offsetof(Body, first), 72U);
  EXPECT_EQ(offsetof(Body, text), 96U);
  EXPECT_EQ(kSlots, 8192U + 65536U + 524288U + 4194304U);
  EXPECT_EQ(offsets::kBellsAt, 4096U);
  EXPECT_EQ(offsets::kCountersAt, 12288U);
  EXPECT_EQ(offsets::kSlotsAt, offsets::kCountersAt + 128U * 1024U);
  EXPECT_EQ(offsets::kWordsAt, offsets::kSlotsAt + 16U * uint64_t{kSlots});
  EXPECT_EQ(offsets::kBodiesAt, offsets::kWordsAt + 16U * uint64_t{kCells});
  EXPECT_EQ(offsets::kUsesAt, offsets::kBodiesAt + 256U * uint64_t{kCells});
  EXPECT_EQ(offsets::kTotal, offsets::kUsesAt + 64U * uint64_t{kCells});
}

TEST(StoreLayout, WordsKeepTheirFields) {
  const SlotValue slot{SlotState::kNamed, 0x3fffffff, 0xfedcba98, 0x89abcdef, 0x12345678};
  EXPECT_EQ(slot.pair().lo, 0xfedcba98fffffffeU);
  EXPECT_EQ(slot.pair().hi, 0x1234567889abcdefU);
  EXPECT_EQ(SlotValue::of(slot.pair()), slot);
  const CellValue cell{CellState::kLeaving, 0xabcdef012345678, 7, 9};
  EXPECT_EQ(cell.pair().lo, 0xabcdef0123456784U);
  EXPECT_EQ(cell.pair().hi, 0x0000000900000007U);
  EXPECT_EQ(CellValue::of(cell.pair()).owner, cell.owner);
  EXPECT_EQ(SlotValue{}.pair(), pool::Pair{});  // zero is the initial state
  EXPECT_EQ(CellValue{}.pair(), pool::Pair{});
}

}  // namespace
}  // namespace torchshm::store
