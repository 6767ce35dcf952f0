// The wire of an array: what is written is read again, and nothing else is.
#include "pool/array_wire.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "processes.h"

namespace torchshm::tests {
namespace {

using pool::ArrayWire;
using pool::Mode;

constexpr uint64_t kKey = 0x1234567890abcdef;
constexpr size_t kFixed = 64;
constexpr size_t kVersionAt = 32, kModeAt = 33, kFlagsAt = 34, kNdimAt = 35;
constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

struct Bytes {
  char data[pool::kWireMost + 64] = {};
  size_t length = 0;

  explicit Bytes(const ArrayWire& wire, uint64_t key = kKey) : length(pool::encode(wire, data, key)) {}
  // With one byte of it something else.
  Bytes& with(size_t at, int value) {
    data[at] = static_cast<char>(value);
    return *this;
  }
  Status refusal() const {
    auto read = pool::decode(data, length);
    return std::move(read.status());
  }
};

ArrayWire wire_of(std::vector<int64_t> shape, ArrayWire::Order order = ArrayWire::Order::kC,
                  std::vector<int64_t> strides = {}) {
  ArrayWire wire;
  wire.handle = {7, 8, 9, 10, 11};
  wire.item_size = 8;
  wire.type_num = 12;
  wire.ndim = static_cast<int>(shape.size());
  wire.order = order;
  std::copy(shape.begin(), shape.end(), wire.shape.begin());
  std::copy(strides.begin(), strides.end(), wire.strides.begin());
  return wire;
}

std::vector<int64_t> strides(const ArrayWire& wire) { return {wire.strides.begin(), wire.strides.begin() + wire.ndim}; }

// Names the reason, as users read it.
void expect_refused(const Bytes& bytes, const std::string& why) {
  const Status refused = bytes.refusal();
  EXPECT_EQ(refused.code(), Code::kInvalid);
  EXPECT_NE(refused.what().find(why), std::string::npos) << refused.what();
}

TEST(ArrayWire, IsReadAsItWasWritten) {
  for (const bool on : {false, true}) {
    ArrayWire wire = wire_of({2, 3, 4});
    wire.mode = on ? Mode::kCopyOnWrite : Mode::kRead;
    wire.writeable = wire.swapped = wire.exclusive = on;
    wire.dtype_apart = !on;
    wire.offset = 4096;
    const Bytes bytes(wire);
    EXPECT_EQ(bytes.length, kFixed + 3 * 8);
    EXPECT_TRUE(pool::intact(bytes.data, bytes.length, kKey));
    auto read = pool::decode(bytes.data, bytes.length);
    ASSERT_TRUE(read.ok()) << read.status().what();
    EXPECT_EQ(std::memcmp(&read->handle, &wire.handle, sizeof wire.handle), 0);
    EXPECT_EQ(read->mode, wire.mode);
    EXPECT_EQ(read->writeable, on);
    EXPECT_EQ(read->swapped, on);
    EXPECT_EQ(read->exclusive, on);
    EXPECT_EQ(read->dtype_apart, !on);
    EXPECT_FALSE(read->carries);
    EXPECT_EQ(read->type_num, 12);
    EXPECT_EQ(read->item_size, 8);
    EXPECT_EQ(read->offset, 4096U);
    EXPECT_EQ(strides(*read), (std::vector<int64_t>{96, 32, 8}));
  }
}

TEST(ArrayWire, TellsTheStridesOfEveryOrder) {
  const Bytes fortran(wire_of({2, 3, 4}, ArrayWire::Order::kFortran));
  EXPECT_EQ(strides(*pool::decode(fortran.data, fortran.length)), (std::vector<int64_t>{8, 16, 48}));
  const Bytes strided(wire_of({2, 3}, ArrayWire::Order::kStrided, {-40, 16}));
  EXPECT_EQ(strided.length, kFixed + 4 * 8);
  EXPECT_EQ(strides(*pool::decode(strided.data, strided.length)), (std::vector<int64_t>{-40, 16}));
  const Bytes scalar(wire_of({}));
  EXPECT_EQ(pool::decode(scalar.data, scalar.length)->ndim, 0);
  // Repeated along a dimension: more elements than bytes.
  const Bytes repeated(wire_of({kHuge, 2}, ArrayWire::Order::kStrided, {0, 8}));
  EXPECT_TRUE(pool::decode(repeated.data, repeated.length).ok());
}

TEST(ArrayWire, EveryBitCountsInItsSum) {
  const Bytes bytes(wire_of({2, 3}, ArrayWire::Order::kStrided, {24, 8}));
  EXPECT_FALSE(pool::intact(bytes.data, bytes.length, kKey + 1));
  EXPECT_FALSE(pool::intact(bytes.data, kFixed - 1, kKey));
  for (size_t bit = 0; bit < 8 * bytes.length; ++bit) {
    Bytes damaged = bytes;
    damaged.data[bit / 8] = static_cast<char>(damaged.data[bit / 8] ^ 1 << bit % 8);
    EXPECT_FALSE(pool::intact(damaged.data, damaged.length, kKey)) << bit;
  }
}

TEST(ArrayWire, RefusesWhatIsNone) {
  Bytes bytes(wire_of({2, 3}));
  for (size_t length = 0; length < kFixed; ++length) EXPECT_FALSE(pool::decode(bytes.data, length).ok());
  expect_refused(Bytes(bytes).with(kVersionAt, 99), "another version");
  expect_refused(Bytes(bytes).with(kModeAt, 3), "unknown mode");
  expect_refused(Bytes(bytes).with(kNdimAt, 65), "too many dimensions");
  expect_refused(Bytes(bytes).with(kFlagsAt, 3 << 4), "unknown memory order");
  expect_refused(Bytes(bytes).with(kNdimAt, 1), "length does not fit");
  ++bytes.length;
  expect_refused(bytes, "length does not fit");
  for (const int64_t size : {int64_t{0}, int64_t{-8}, int64_t{1} << 31}) {
    ArrayWire wire = wire_of({2, 3});
    wire.item_size = size;
    expect_refused(Bytes(wire), "impossible item size");
  }
  expect_refused(Bytes(wire_of({2, 0})), "impossible shape");
  expect_refused(Bytes(wire_of({kHuge, 3})), "impossible shape");
  expect_refused(Bytes(wire_of({2, -1}, ArrayWire::Order::kStrided, {8, 8})), "impossible shape");
}

TEST(ArrayWire, ThatCarriesItsBytesHasAllOfThem) {
  ArrayWire wire = wire_of({2, 1});
  wire.carries = true;
  Bytes bytes(wire, 0);
  expect_refused(bytes, "does not carry all its bytes");
  bytes.length += 16;
  auto read = pool::decode(bytes.data, bytes.length);
  ASSERT_TRUE(read.ok()) << read.status().what();
  EXPECT_TRUE(read->carries);
  ++bytes.length;
  expect_refused(bytes, "does not carry all its bytes");
  bytes.length = kFixed + 8;
  expect_refused(bytes, "length does not fit");
  wire = wire_of({2}, ArrayWire::Order::kStrided, {8});
  wire.carries = true;
  Bytes strided(wire, 0);
  strided.length += 16;
  expect_refused(strided, "length does not fit");
}

TEST(ArrayWire, ReachesFromTheLowestToTheHighestByte) {
  const auto of = [](std::vector<int64_t> shape, std::vector<int64_t> steps) {
    return pool::reach(static_cast<int>(shape.size()), shape.data(), steps.data(), 8);
  };
  EXPECT_EQ(of({}, {})->high, 8);
  const auto both = of({3, 4}, {-100, 8});
  EXPECT_EQ(both->low, -200);
  EXPECT_EQ(both->high, 32);
  EXPECT_FALSE(of({0}, {8}));
  EXPECT_FALSE(of({3}, {kHuge}));
  EXPECT_FALSE(of({2, 2}, {kHuge, 8}));
  EXPECT_FALSE(of({2, 2}, {-kHuge, -8}));
}

TEST(ArrayWire, OpensInsideItsBlockAlone) {
  auto member = fresh_pool();
  auto small = member->allocate(5000, false), whole = member->allocate(8192, true);
  const auto open = [&](const pool::Member::View& view, int64_t n, uint64_t offset, Mode mode,
                        std::vector<int64_t> steps = {}) {
    ArrayWire wire = wire_of({n}, steps.empty() ? ArrayWire::Order::kC : ArrayWire::Order::kStrided, steps);
    wire.handle = *member->issue(view.block);
    wire.mode = mode;
    wire.offset = offset;
    const Bytes bytes(wire);
    auto opened = pool::open(*member, *pool::decode(bytes.data, bytes.length));
    if (opened) member->release(opened->view.block, opened->mode);
    return opened;
  };
  EXPECT_TRUE(open(*whole, 1024, 0, Mode::kReadWrite).ok());
  EXPECT_EQ(open(*whole, 1024, 0, Mode::kCopyOnWrite)->mode, Mode::kCopyOnWrite);
  EXPECT_EQ(open(*whole, 512, 8184, Mode::kRead, {-16})->mode, Mode::kRead);
  EXPECT_EQ(open(*small, 100, 64, Mode::kCopyOnWrite)->mode, Mode::kReadWrite);  // it does not consist of whole pages
  for (const Code outside :
       {open(*whole, 1025, 0, Mode::kReadWrite).code(), open(*whole, 1024, 8, Mode::kReadWrite).code(),
        open(*whole, 1, 8193, Mode::kReadWrite).code(), open(*whole, 2, 0, Mode::kRead, {-8}).code(),
        open(*whole, 3, 0, Mode::kReadWrite, {kHuge}).code()}) {
    EXPECT_EQ(outside, Code::kInvalid);
  }
  const pool::Handle gone = *member->issue(small->block);
  member->release(small->block, Mode::kReadWrite);
  ArrayWire wire = wire_of({1});
  wire.handle = gone;
  ASSERT_TRUE(pool::open(*member, wire).ok());
  member->release(gone.block, Mode::kReadWrite);
  EXPECT_EQ(pool::open(*member, wire).code(), Code::kStale);
}

}  // namespace
}  // namespace torchshm::tests
