// An ndarray in a message: a handle, and shape, strides and dtype. The bytes of the only argument of torchshm._C.array when it is pickled.
//
// Trusted by nobody: decode() checks every field, open() the extent of the strides against the block. Needs neither Python nor NumPy.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/status.h"
#include "pool/arena.h"
#include "pool/handle.h"
#include "pool/member.h"

namespace torchshm::pool {

constexpr int kMostDims = 64;

struct ArrayWire {
  Handle handle;
  Mode mode = Mode::kReadWrite;
  bool writeable = true;
  bool swapped = false;      // byte order; of a dtype that type_num and item_size describe
  bool dtype_apart = false;  // the dtype is pickled beside the wire
  bool exclusive = false;    // the block was made for this message
  bool carries = false;      // no handle: the bytes themselves follow the wire, in C or Fortran order
  int type_num = 0;
  int64_t item_size = 0;
  uint64_t offset = 0;  // of the first element in the block
  int ndim = 0;
  std::array<int64_t, kMostDims> shape{};
  std::array<int64_t, kMostDims> strides{};
  enum class Order : uint8_t { kC, kFortran, kStrided } order = Order::kC;
};

// Bytes needed at most.
constexpr size_t kWireMost = 72 + 2 * 8 * kMostDims;
// Writes the wire, returns its length. key: the pool's secret; 0 for a wire that carries its bytes.
size_t encode(const ArrayWire& wire, char* to, uint64_t key);
// kInvalid with a reason for anything that encode() does not write. With `carries`, the bytes are the last ones of the input.
Result<ArrayWire> decode(const char* from, size_t length);

// Whether the wire is as it was encoded with that key: a bit that was damaged must not name another block.
bool intact(const char* from, size_t length, uint64_t key);

// Lowest and one past the highest byte that an array touches, relative to its first element. Nothing on overflow.
struct Reach {
  int64_t low, high;
};
std::optional<Reach> reach(int ndim, const int64_t* shape, const int64_t* strides, int64_t item_size);

// The wire's block, held once more, with all that the array touches inside it. kInvalid where it is not; the rest as Member::redeem().
struct Opened {
  Member::View view;
  Mode mode;  // that it is held in: kReadWrite where the wire's own mode has no address space here
};
// REQUIRES: decoded, and intact() for a member of that pool.
Result<Opened> open(Member& owner, const ArrayWire& wire);

}  // namespace torchshm::pool
