#include "pool/array_wire.h"

#include <cstddef>
#include <cstring>

namespace torchshm::pool {
namespace {

struct Fixed {
  Handle handle;
  uint8_t version;
  uint8_t mode;
  uint8_t flags;
  uint8_t ndim;
  int32_t type_num;
  int64_t item_size;
  uint64_t offset;
  uint64_t check;  // last
};
static_assert(sizeof(Fixed) == 64);
static_assert(sizeof(Fixed) <= kWireMost - 2 * sizeof(int64_t) * kMostDims);

constexpr uint8_t kWireVersion = 1;
constexpr uint8_t kWriteable = 1, kSwapped = 2, kDtypeApart = 4, kCarries = 8, kExclusive = 64, kOrderShift = 4,
                  kOrderMask = 3;

void fill_strides(ArrayWire& wire) {
  int64_t step = wire.item_size;
  if (wire.order == ArrayWire::Order::kC) {
    for (int i = wire.ndim - 1; i >= 0; step *= wire.shape[i], --i) wire.strides[i] = step;
  } else {
    for (int i = 0; i < wire.ndim; step *= wire.shape[i], ++i) wire.strides[i] = step;
  }
}

// Keyed and mixed word by word (the finaliser of SplitMix64, Steele et al. 2014). Against damage and guesses, not against a member.
uint64_t checksum(const char* from, size_t length, uint64_t key) {
  uint64_t sum = key ^ length;
  for (size_t at = 0; at + sizeof(uint64_t) <= length; at += sizeof(uint64_t)) {
    if (at == offsetof(Fixed, check)) continue;
    uint64_t word = 0;
    std::memcpy(&word, from + at, sizeof word);
    sum = (sum ^ word) + 0x9e3779b97f4a7c15;
    sum = (sum ^ sum >> 30) * 0xbf58476d1ce4e5b9;
    sum = (sum ^ sum >> 27) * 0x94d049bb133111eb;
    sum ^= sum >> 31;
  }
  return sum;
}

Status invalid(const char* why) { return Status(Code::kInvalid, why); }

}  // namespace

size_t encode(const ArrayWire& wire, char* to, uint64_t key) {
  Fixed fixed{};
  fixed.handle = wire.handle;
  fixed.version = kWireVersion;
  fixed.mode = static_cast<uint8_t>(wire.mode);
  fixed.flags =
      static_cast<uint8_t>((wire.writeable ? kWriteable : 0) | (wire.swapped ? kSwapped : 0) |
                           (wire.dtype_apart ? kDtypeApart : 0) | (wire.carries ? kCarries : 0) |
                           (wire.exclusive ? kExclusive : 0) | static_cast<uint8_t>(wire.order) << kOrderShift);
  fixed.ndim = static_cast<uint8_t>(wire.ndim);
  fixed.type_num = wire.type_num;
  fixed.item_size = wire.item_size;
  fixed.offset = wire.offset;
  std::memcpy(to, &fixed, sizeof fixed);
  size_t at = sizeof fixed;
  const size_t bytes = sizeof(int64_t) * static_cast<size_t>(wire.ndim);
  std::memcpy(to + at, wire.shape.data(), bytes);
  at += bytes;
  if (wire.order == ArrayWire::Order::kStrided) {
    std::memcpy(to + at, wire.strides.data(), bytes);
    at += bytes;
  }
  const uint64_t check = checksum(to, at, key);
  std::memcpy(to + offsetof(Fixed, check), &check, sizeof check);
  return at;
}

bool intact(const char* from, size_t length, uint64_t key) {
  uint64_t check = 0;
  if (length < sizeof(Fixed)) return false;
  std::memcpy(&check, from + offsetof(Fixed, check), sizeof check);
  return check == checksum(from, length, key);
}

Result<ArrayWire> decode(const char* from, size_t length) {
  Fixed fixed{};
  if (length < sizeof fixed) return invalid("it is cut short");
  std::memcpy(&fixed, from, sizeof fixed);
  if (fixed.version != kWireVersion) return invalid("made by another version of torchshm");
  if (fixed.mode > static_cast<uint8_t>(Mode::kCopyOnWrite)) return invalid("unknown mode");
  if (fixed.ndim > kMostDims) return invalid("too many dimensions");
  const int order = fixed.flags >> kOrderShift & kOrderMask;
  if (order > static_cast<int>(ArrayWire::Order::kStrided)) return invalid("unknown memory order");
  ArrayWire wire;
  wire.handle = fixed.handle;
  wire.mode = static_cast<Mode>(fixed.mode);
  wire.writeable = (fixed.flags & kWriteable) != 0;
  wire.swapped = (fixed.flags & kSwapped) != 0;
  wire.dtype_apart = (fixed.flags & kDtypeApart) != 0;
  wire.carries = (fixed.flags & kCarries) != 0;
  wire.exclusive = (fixed.flags & kExclusive) != 0;
  wire.order = static_cast<ArrayWire::Order>(order);
  wire.type_num = fixed.type_num;
  wire.item_size = fixed.item_size;
  wire.offset = fixed.offset;
  wire.ndim = fixed.ndim;
  const size_t bytes = sizeof(int64_t) * fixed.ndim;
  const bool strided = wire.order == ArrayWire::Order::kStrided;
  const size_t described = sizeof fixed + bytes * (strided ? 2 : 1);
  if (wire.carries ? length < described || strided : length != described)
    return invalid("its length does not fit its dimensions");
  if (wire.item_size <= 0 || wire.item_size > INT32_MAX) return invalid("impossible item size");
  std::memcpy(wire.shape.data(), from + sizeof fixed, bytes);
  // The product first: the strides of a contiguous array are made from it.
  int64_t total = wire.item_size;
  for (int i = 0; i < wire.ndim; ++i) {
    if (wire.shape[i] < 1 || __builtin_mul_overflow(total, wire.shape[i], &total)) {
      if (!strided || wire.shape[i] < 1) return invalid("impossible shape");
    }
  }
  if (wire.carries && static_cast<uint64_t>(total) != length - described)
    return invalid("it does not carry all its bytes");
  if (strided) {
    std::memcpy(wire.strides.data(), from + sizeof fixed + bytes, bytes);
  } else {
    fill_strides(wire);
  }
  return wire;
}

std::optional<Reach> reach(int ndim, const int64_t* shape, const int64_t* strides, int64_t item_size) {
  Reach r{0, item_size};
  for (int i = 0; i < ndim; ++i) {
    int64_t span = 0;
    if (shape[i] < 1 || __builtin_mul_overflow(shape[i] - 1, strides[i], &span)) return std::nullopt;
    int64_t& edge = span < 0 ? r.low : r.high;
    if (__builtin_add_overflow(edge, span, &edge)) return std::nullopt;
  }
  return r;
}

Result<Opened> open(Member& owner, const ArrayWire& wire) {
  const auto touched = reach(wire.ndim, wire.shape.data(), wire.strides.data(), wire.item_size);
  Mode mode = wire.mode;
  auto view = owner.redeem(wire.handle, mode, wire.exclusive);
  if (view.code() == Code::kUnsupported) {
    mode = Mode::kReadWrite;
    view = owner.redeem(wire.handle, mode);
  }
  if (!view) return std::move(view.status());
  const auto length = static_cast<int64_t>(view->length), offset = static_cast<int64_t>(wire.offset);
  if (!touched || wire.offset > view->length || offset + touched->low < 0 || touched->high > length - offset) {
    owner.release(view->block, mode);
    return invalid("its extent is larger than the block");
  }
  return Opened{*view, mode};
}

}  // namespace torchshm::pool
