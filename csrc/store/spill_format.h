// The bytes of a spill file: a head that says whose value it is and where its blocks lie, then the blocks.
//
//   0  magic | checksum of the head from byte 16 on | version | zero | pool id | id | bytes of the head, of the file, of the key, of the text |
//      number of blocks, of pieces | lengths of the blocks | checksums of the pieces | key | text | zeros up to a page
//   then the blocks: those of kPageFrom bytes and more begin on a page, the others where the one before ends, rounded up to 64 bytes.
//      Between them are zeros, and after the last one up to a page. This body is checked in pieces of kPiece bytes, so that several threads
//      can read and write it; all numbers are little-endian and have 64 bits, but version and the zero after it, which have 32.
//
// A file may be anybody's: decode() believes no number before it has checked it. Every byte of the file is under a checksum.
// Private: buffers and lists. Thread safety: functions of their arguments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"

namespace torchshm::store {

struct SpillHead {
  uint64_t pool_id = 0, id = 0;
  std::string key, text;
  std::vector<uint64_t> lengths;  // bytes of each block
};

namespace spill {

inline constexpr uint64_t kPage = 4096;
// Measured with 64 KiB to 8 MiB on the disk of docs/spill.md: from 1 MiB on they differ by less than they vary.
inline constexpr uint64_t kPiece = uint64_t{2} << 20;
// A page more in the file is lost for each of these, at most 1/16 of it.
inline constexpr uint64_t kPageFrom = uint64_t{64} << 10;

// On a page, as direct transfers need it; empty where there is no memory.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(uint64_t bytes);
  std::byte* data() const { return bytes_.get(); }
  explicit operator bool() const { return bytes_ != nullptr; }

 private:
  struct Free {
    void operator()(std::byte* bytes) const;
  };
  std::unique_ptr<std::byte[], Free> bytes_;
};

// Where things lie in the file.
struct Shape {
  std::vector<uint64_t> offsets;  // of the blocks
  uint64_t head_bytes = 0, file_bytes = 0, pieces = 0;
};

// kInvalid when it would not fit into 2^62 bytes.
Result<Shape> shape_of(const SpillHead& head);

// REQUIRES: checksums are those of the shape's pieces. kFull where there is no memory for it.
Result<Buffer> encode(const SpillHead& head, const Shape& shape, const std::vector<uint64_t>& checksums);

struct Decoded {
  SpillHead head;
  Shape shape;
  std::vector<uint64_t> checksums;
};
// How many bytes of the file are its head, from its first page; kCorrupt when that can't be a spill file of `file_bytes`.
Result<uint64_t> head_bytes(const std::byte* page, uint64_t file_bytes);
// kCorrupt. REQUIRES: `bytes` is what head_bytes() said.
Result<Decoded> decode(const std::byte* bytes, uint64_t count, uint64_t file_bytes);

}  // namespace spill
}  // namespace torchshm::store
