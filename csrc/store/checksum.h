// XXH3 with 64 bits, of bytes that come in parts. 20 GB/s and more of a core: what it costs is reading the memory.
//
// Against damage, not against forgers: who can write to a file can also write its checksums. Private. Thread safety: none, of one object.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchshm::store {

uint64_t checksum(const std::byte* bytes, uint64_t count);

class Checksum {
 public:
  Checksum();
  void add(const std::byte* bytes, uint64_t count);
  // Of all that was added, as checksum() says of it in one piece.
  uint64_t value() const;

 private:
  alignas(64) std::byte state_[576];
};

}  // namespace torchshm::store
