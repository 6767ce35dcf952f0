#include "store/spill_format.h"

#include <bit>
#include <cstring>
#include <new>

#include "store/checksum.h"

namespace torchshm::store::spill {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint64_t kMagic = 0x6c6c697073737400;  // "\0tsspill"
constexpr uint32_t kVersion = 1;
constexpr uint64_t kMost = uint64_t{1} << 62;
constexpr uint64_t kUnit = 64;

struct Front {
  uint64_t magic = kMagic, checksum = 0;
  uint32_t version = kVersion, zero = 0;
  uint64_t pool_id = 0, id = 0, head_bytes = 0, file_bytes = 0, key_bytes = 0, text_bytes = 0, blocks = 0, pieces = 0;
};
static_assert(sizeof(Front) == 88);
constexpr uint64_t kUnchecked = 16;  // magic and checksum

constexpr uint64_t up(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

Status corrupt(const char* what) { return Status(Code::kCorrupt, what); }

struct Sizes {
  uint64_t key, text, blocks, body;
};

// REQUIRES: all of them far below 2^63.
Shape shape(const Sizes& sizes) {
  Shape shape;
  shape.pieces = (sizes.body + kPiece - 1) / kPiece;
  shape.head_bytes = up(sizeof(Front) + 8 * (sizes.blocks + shape.pieces) + sizes.key + sizes.text, kPage);
  shape.file_bytes = shape.head_bytes + sizes.body;
  return shape;
}

// The offsets as if the body began at 0; its bytes, or kMost and more.
uint64_t place(const std::vector<uint64_t>& lengths, std::vector<uint64_t>* offsets) {
  uint64_t end = 0;
  offsets->reserve(lengths.size());
  for (const uint64_t length : lengths) {
    if (length >= kMost) return kMost;
    end = up(end, length >= kPageFrom ? kPage : kUnit);
    offsets->push_back(end);
    end += length;
    if (end >= kMost) return kMost;
  }
  return up(end, kPage);
}

}  // namespace

Buffer::Buffer(uint64_t bytes)
    : bytes_(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{kPage}, std::nothrow))) {}

void Buffer::Free::operator()(std::byte* bytes) const { ::operator delete[](bytes, std::align_val_t{kPage}); }

Result<Shape> shape_of(const SpillHead& head) {
  std::vector<uint64_t> offsets;
  const uint64_t body = place(head.lengths, &offsets);
  if (body >= kMost) return Status(Code::kInvalid, "the value of " + head.key + " is too large for a file");
  Shape made = shape({head.key.size(), head.text.size(), head.lengths.size(), body});
  for (uint64_t& offset : offsets) offset += made.head_bytes;
  made.offsets = std::move(offsets);
  return made;
}

Result<Buffer> encode(const SpillHead& head, const Shape& shape, const std::vector<uint64_t>& checksums) {
  Buffer buffer(shape.head_bytes);
  if (!buffer) return Status(Code::kFull, "no memory for the head of a spill file");
  Front front;
  front.pool_id = head.pool_id;
  front.id = head.id;
  front.head_bytes = shape.head_bytes;
  front.file_bytes = shape.file_bytes;
  front.key_bytes = head.key.size();
  front.text_bytes = head.text.size();
  front.blocks = head.lengths.size();
  front.pieces = shape.pieces;
  std::byte* at = buffer.data() + sizeof front;
  const auto put = [&](const void* from, uint64_t bytes) {
    if (bytes != 0) std::memcpy(at, from, bytes);
    at += bytes;
  };
  put(head.lengths.data(), 8 * front.blocks);
  put(checksums.data(), 8 * front.pieces);
  put(head.key.data(), front.key_bytes);
  put(head.text.data(), front.text_bytes);
  std::memset(at, 0, static_cast<size_t>(buffer.data() + shape.head_bytes - at));
  std::memcpy(buffer.data(), &front, sizeof front);
  front.checksum = checksum(buffer.data() + kUnchecked, shape.head_bytes - kUnchecked);
  std::memcpy(buffer.data(), &front, sizeof front);
  return buffer;
}

Result<uint64_t> head_bytes(const std::byte* page, uint64_t file_bytes) {
  Front front;
  std::memcpy(&front, page, sizeof front);
  if (front.magic != kMagic) return corrupt("does not begin as a spill file does");
  if (front.version != kVersion) return corrupt("has a version that this build does not know");
  if (front.file_bytes != file_bytes) return corrupt("has not the size that it says");
  if (front.head_bytes < kPage || front.head_bytes % kPage != 0 || front.head_bytes > file_bytes)
    return corrupt("has a damaged head");
  return front.head_bytes;
}

Result<Decoded> decode(const std::byte* bytes, uint64_t count, uint64_t file_bytes) {
  if (checksum(bytes + kUnchecked, count - kUnchecked) != [&] {
        uint64_t stored = 0;
        std::memcpy(&stored, bytes + 8, sizeof stored);
        return stored;
      }())
    return corrupt("has a damaged head");
  Front front;
  std::memcpy(&front, bytes, sizeof front);
  // From here on it is a forger's, or whole.
  const uint64_t most = count / 8;
  if (front.zero != 0 || front.key_bytes > count || front.text_bytes > count || front.blocks > most ||
      front.pieces > most || file_bytes >= kMost)
    return corrupt("has a damaged head");
  const Shape expected = shape({front.key_bytes, front.text_bytes, front.blocks, file_bytes - count});
  if (expected.head_bytes != count || expected.file_bytes != file_bytes || expected.pieces != front.pieces)
    return corrupt("has a damaged head");
  Decoded decoded;
  const std::byte* at = bytes + sizeof front;
  const auto take = [&](void* into, uint64_t n) {
    if (n != 0) std::memcpy(into, at, n);
    at += n;
  };
  decoded.head.pool_id = front.pool_id;
  decoded.head.id = front.id;
  decoded.head.lengths.resize(front.blocks);
  take(decoded.head.lengths.data(), 8 * front.blocks);
  decoded.checksums.resize(front.pieces);
  take(decoded.checksums.data(), 8 * front.pieces);
  decoded.head.key.resize(front.key_bytes);
  take(decoded.head.key.data(), front.key_bytes);
  decoded.head.text.resize(front.text_bytes);
  take(decoded.head.text.data(), front.text_bytes);
  auto found = shape_of(decoded.head);
  if (!found || found->head_bytes != count || found->file_bytes != file_bytes || found->pieces != front.pieces)
    return corrupt("has a damaged head");
  decoded.shape = found.take();
  return decoded;
}

}  // namespace torchshm::store::spill
