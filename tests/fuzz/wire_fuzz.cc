// Any bytes as the wire of an array: decode(), and what an intact one opens in a live pool. An array that comes of it lies inside its
// block; everything else is a Status.
//
// An input is a selector and a wire. The selector says whether the bytes are laid over (xor) a true wire, and whether the sum is made
// right afterwards, as only a member of the pool could.
#include "pool/array_wire.h"

#include <memory>
#include <vector>

#include "input.h"
#include "os/memfd.h"
#include "small_pool.h"

namespace torchshm::fuzz {
namespace {

using pool::ArrayWire;
using pool::Member;
using pool::Mode;

constexpr size_t kSumAt = 56, kFixed = 64;

// Written again from docs/protocol.md, to sign what is not an encoded wire.
uint64_t sum_of(const unsigned char* from, size_t length, uint64_t key) {
  uint64_t sum = key ^ length;
  for (size_t at = 0; at + 8 <= length; at += 8) {
    if (at == kSumAt) continue;
    uint64_t word = 0;
    std::memcpy(&word, from + at, 8);
    sum = (sum ^ word) + 0x9e3779b97f4a7c15;
    sum = (sum ^ sum >> 30) * 0xbf58476d1ce4e5b9;
    sum = (sum ^ sum >> 27) * 0x94d049bb133111eb;
    sum ^= sum >> 31;
  }
  return sum;
}

// Whether an array stays in [0, length), with arithmetic that can't overflow: 64 dimensions of less than 2^126 each, cut off at 2^100.
bool inside(const ArrayWire& wire, uint64_t length) {
  constexpr __int128 kFar = __int128{1} << 100;
  __int128 low = wire.offset, high = low + wire.item_size;
  for (int i = 0; i < wire.ndim; ++i) {
    const __int128 span = static_cast<__int128>(wire.shape[i] - 1) * wire.strides[i];
    if (span > kFar || span < -kFar) return false;
    (span < 0 ? low : high) += span;
  }
  return low >= 0 && high <= length;
}

class Target {
 public:
  Target() {
    member_ = small_pool();
    key_ = member_->arena().header().secret;
    for (int i = 0; i < 12; ++i) {
      ArrayWire wire;
      wire.mode = static_cast<Mode>(i % 3);
      wire.order = static_cast<ArrayWire::Order>(i / 3 % 3);
      wire.ndim = i % 4;
      wire.type_num = i;
      wire.item_size = i % 2 == 0 ? 4 : 8;
      wire.exclusive = i % 5 == 1;
      wire.swapped = i % 7 == 1;
      wire.carries = i == 9 || i == 11;
      if (wire.carries) wire.order = static_cast<ArrayWire::Order>(i / 10);
      int64_t bytes = wire.item_size;
      for (int d = 0; d < wire.ndim; ++d) {
        wire.shape[d] = 3 + 5 * d;
        wire.strides[d] = d == 0 ? bytes : -bytes;
        if (d != 0) wire.offset += static_cast<uint64_t>(bytes * (wire.shape[d] - 1));
        bytes *= wire.shape[d];
      }
      if (wire.order != ArrayWire::Order::kStrided || wire.carries) wire.offset = 0;
      if (!wire.carries) {
        auto block = member_->allocate(static_cast<uint64_t>(bytes) * (i == 7 ? 2000 : 1), i % 2 == 0);
        REQUIRE(block.ok());
        blocks_.push_back({block->block, block->length});
        // Its ticket will be used up at once; a held block is opened without one.
        auto handle = member_->issue(block->block);
        REQUIRE(handle.ok());
        wire.handle = *handle;
      }
      std::vector<unsigned char> bytes_of(pool::kWireMost + static_cast<size_t>(wire.carries ? bytes : 0));
      bytes_of.resize(pool::encode(wire, reinterpret_cast<char*>(bytes_of.data()), wire.carries ? 0 : key_) +
                      static_cast<size_t>(wire.carries ? bytes : 0));
      REQUIRE(wire.carries || pool::intact(reinterpret_cast<char*>(bytes_of.data()), bytes_of.size(), key_));
      wires_.push_back(std::move(bytes_of));
      REQUIRE(one(wires_.back()));  // else the mutations of it would end at the first check
    }
  }

  void one(Input input) {
    const uint8_t selector = input.byte();
    std::vector<unsigned char>& wire = scratch_;
    wire.assign(input.rest(), input.rest() + input.left());
    const size_t which = selector / 2 % (wires_.size() + 1);
    if (which < wires_.size()) {
      const auto& over = wires_[which];
      // Shorter and longer ones too: an empty rest is the wire itself.
      const int cut = selector >> 6 == 3 && !wire.empty() ? wire.back() % 16 - 8 : 0;
      const size_t length =
          over.size() + static_cast<size_t>(cut) > 4096 ? over.size() : over.size() + static_cast<size_t>(cut);
      wire.resize(length, 0);
      for (size_t i = 0; i < std::min(length, over.size()); ++i) wire[i] ^= over[i];
    }
    if (selector % 2 != 0 && wire.size() >= kFixed) {
      const uint64_t sum = sum_of(wire.data(), wire.size(), key_);
      std::memcpy(wire.data() + kSumAt, &sum, sizeof sum);
    }
    (void)one(wire);
  }

 private:
  struct Known {
    uint32_t block;
    uint64_t length;
  };

  // Whether it was opened, or carries its bytes.
  bool one(const std::vector<unsigned char>& bytes) {
    // A copy of its own size: AddressSanitizer sees a read beyond.
    const std::unique_ptr<char[]> copy(new char[bytes.size()]);
    if (!bytes.empty()) std::memcpy(copy.get(), bytes.data(), bytes.size());
    auto decoded = pool::decode(copy.get(), bytes.size());
    if (!decoded) {
      REQUIRE(decoded.code() == Code::kInvalid && !decoded.status().what().empty());
      return false;
    }
    const ArrayWire& wire = *decoded;
    REQUIRE(wire.ndim >= 0 && wire.ndim <= pool::kMostDims && wire.item_size > 0);
    for (int i = 0; i < wire.ndim; ++i) REQUIRE(wire.shape[i] >= 1);
    if (wire.carries) {
      __int128 total = wire.item_size;
      for (int i = 0; i < wire.ndim; ++i) total *= wire.shape[i];
      REQUIRE(total > 0 && total <= static_cast<__int128>(bytes.size() - kFixed));
    }
    again(wire);
    if (wire.carries) return true;
    if (!pool::intact(copy.get(), bytes.size(), key_)) return false;
    auto opened = pool::open(*member_, wire);
    if (!opened) {
      REQUIRE(!opened.status().what().empty());
      const Code code = opened.code();
      REQUIRE(code == Code::kInvalid || code == Code::kStale || code == Code::kForeign || code == Code::kUnsupported);
      return false;
    }
    const Known* named = nullptr;
    for (const Known& known : blocks_) {
      if (known.block == opened->view.block) named = &known;
    }
    REQUIRE(named != nullptr && named->block == wire.handle.block && named->length == opened->view.length);
    REQUIRE(inside(wire, named->length));
    member_->release(opened->view.block, opened->mode);
    return true;
  }

  // What was decoded is encoded to the same: no two wires mean one thing.
  void again(const ArrayWire& wire) {
    char buffer[pool::kWireMost];
    const size_t length = pool::encode(wire, buffer, 7);
    REQUIRE(length <= sizeof buffer && pool::intact(buffer, length, 7));
    if (wire.carries) return;
    auto decoded = pool::decode(buffer, length);
    REQUIRE(decoded.ok());
    REQUIRE(decoded->handle.block == wire.handle.block && decoded->handle.nonce == wire.handle.nonce);
    REQUIRE(decoded->mode == wire.mode && decoded->order == wire.order && decoded->writeable == wire.writeable);
    REQUIRE(decoded->shape == wire.shape && decoded->strides == wire.strides && decoded->offset == wire.offset);
  }

  std::unique_ptr<Member> member_;
  uint64_t key_ = 0;
  std::vector<Known> blocks_;
  std::vector<std::vector<unsigned char>> wires_;
  std::vector<unsigned char> scratch_;
};

}  // namespace
}  // namespace torchshm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* target = new torchshm::fuzz::Target;
  target->one(torchshm::fuzz::Input(data, size));
  return 0;
}
