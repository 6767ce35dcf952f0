// Large copies are exact, whatever their alignment and length.
#include "base/copy.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace torchshm {
namespace {

TEST(Copy, IsExactAndStaysInItsBounds) {
  constexpr size_t kLarge = (size_t{8} << 20) + 777;
  std::vector<uint8_t> source(kLarge + 64), target(kLarge + 256);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  for (const size_t length : {size_t{0}, size_t{1}, size_t{4097}, size_t{8} << 20, kLarge}) {
    for (const size_t to : {size_t{64}, size_t{65}, size_t{127}}) {
      for (const size_t from : {size_t{0}, size_t{3}}) {
        std::fill(target.begin(), target.end(), uint8_t{0xee});
        copy_bytes(target.data() + to, source.data() + from, length);
        ASSERT_TRUE(std::equal(source.begin() + static_cast<std::ptrdiff_t>(from),
                               source.begin() + static_cast<std::ptrdiff_t>(from + length),
                               target.begin() + static_cast<std::ptrdiff_t>(to)))
            << length << " " << to << " " << from;
        ASSERT_EQ(target[to - 1], 0xee);
        ASSERT_EQ(target[to + length], 0xee);
      }
    }
  }
}

TEST(Copy, EveryWayOfThisProcessorIsExact) {
  constexpr size_t kBytes = 100000;
  std::vector<uint8_t> source(kBytes + 64), target(kBytes + 256);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  for (int way = 0; way <= best_copy(); ++way) {
    for (const size_t shift : {size_t{0}, size_t{1}, size_t{63}}) {
      std::fill(target.begin(), target.end(), uint8_t{0xee});
      copy_bytes_by(way, target.data() + shift, source.data() + 5, kBytes);
      ASSERT_TRUE(std::equal(source.begin() + 5, source.begin() + 5 + kBytes,
                             target.begin() + static_cast<std::ptrdiff_t>(shift)))
          << way << " " << shift;
      ASSERT_EQ(target[shift + kBytes], 0xee) << way;
    }
  }
}

}  // namespace
}  // namespace torchshm
