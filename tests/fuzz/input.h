// A fuzzer's bytes as numbers, from the front; zeros once they are used up. Private to the fuzz targets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

namespace torchshm::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  bool empty() const { return at_ == end_; }
  size_t left() const { return static_cast<size_t>(end_ - at_); }
  const uint8_t* rest() const { return at_; }

  template <class T>
  T take() {
    T value{};
    copy(&value, sizeof value);
    return value;
  }
  uint8_t byte() { return take<uint8_t>(); }
  void copy(void* to, size_t size) {
    const size_t n = std::min(size, left());
    if (n != 0) std::memcpy(to, at_, n);
    at_ += n;
  }

  // What a 64-bit word of somebody else's might become.
  uint64_t value(uint64_t before) {
    static constexpr uint64_t kInteresting[] = {0,
                                                1,
                                                2,
                                                63,
                                                64,
                                                0xff,
                                                0xfff,
                                                1023,
                                                1024,
                                                0x7fffffff,
                                                0x80000000,
                                                0xffffffff,
                                                uint64_t{1} << 32,
                                                uint64_t{1} << 52,
                                                uint64_t{1} << 62,
                                                uint64_t{1} << 63,
                                                ~uint64_t{0},
                                                ~uint64_t{0} - 1};
    const uint8_t how = byte();
    switch (how % 8) {
      case 0:
        return take<uint64_t>();
      case 1:
        return before ^ uint64_t { 1 } << byte() % 64;
      case 2:
        return byte();
      case 3:
        return kInteresting[byte() % std::size(kInteresting)];
      case 4:
        return before + static_cast<uint64_t>(static_cast<int64_t>(take<int8_t>()));
      case 5:
        return (before & 0xffffffff00000000) | take<uint32_t>();
      case 6:
        return (before & 0xffffffff) | uint64_t{take<uint32_t>()} << 32;
      default:
        return (before & ~uint64_t{0xffff}) | take<uint16_t>();
    }
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace torchshm::fuzz
