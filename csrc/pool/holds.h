// What this process has of each block: how many objects look at it, and through which face.
//
// Private: everything. The ledger has one bit per lease and block; this is the count behind the bit, and the way from an address back to
// the block. Lives in anonymous memory that is only touched where blocks are. Dies with the process; a forked child has its own copy.
// Thread safety: one thread at a time.
#pragma once

#include <cstdint>
#include <optional>

#include "base/status.h"
#include "os/mapping.h"
#include "pool/arena.h"

namespace torchshm::pool {

class Holds {
 public:
  static Result<Holds> create(uint32_t pages);

  uint32_t count(uint32_t block) const { return counts()[block]; }
  void prefetch(uint32_t block) const {
    __builtin_prefetch(counts() + block, 1);
    __builtin_prefetch(generations() + block, 1);
  }
  // A block that came in a message is this process's alone in the eyes of the program: until the last hold goes.
  void mark_exclusive(uint32_t block) { exclusive()[block / 64] |= uint64_t{1} << (block % 64); }
  bool is_exclusive(uint32_t block) const { return (exclusive()[block / 64] >> (block % 64) & 1) != 0; }

  // Its range of the shared face is private since a fork.
  void mark_private(uint32_t block, bool on) {
    private_blocks_ += on ? 1 : -1;
    const uint64_t bit = uint64_t{1} << (block % 64);
    uint64_t& word = private_words()[block / 64];
    word = on ? word | bit : word & ~bit;
  }
  int64_t private_blocks() const { return private_blocks_; }
  bool is_private(uint32_t block) const { return (private_words()[block / 64] >> (block % 64) & 1) != 0; }

  // generation: of the block, when this is the first object that looks at it.
  void add(uint32_t block, Mode mode, uint64_t generation);
  void add_further(uint32_t block, Mode mode) { add(block, mode, generation(block)); }
  // That the objects look at. What lies there now may be another one: a fork without handlers may have lost the hold.
  uint64_t generation(uint32_t block) const { return generations()[block]; }
  // Returns the count after, and whether the last copy-on-write view has gone with it.
  struct Removed {
    uint32_t left;
    bool last_copy;
  };
  Removed remove(uint32_t block, Mode mode);

  // The held small block that starts in the chunk's page `page` or the nearest one before it, at or below `page`.
  std::optional<uint32_t> start_at_or_before(uint32_t page_index) const;

 private:
  uint32_t* counts() const { return reinterpret_cast<uint32_t*>(counts_.data()); }
  uint64_t* generations() const { return reinterpret_cast<uint64_t*>(generations_.data()); }
  uint32_t* copies() const { return reinterpret_cast<uint32_t*>(copies_.data()); }
  uint64_t* starts() const { return reinterpret_cast<uint64_t*>(starts_.data()); }
  uint64_t* exclusive() const { return reinterpret_cast<uint64_t*>(exclusive_.data()); }
  uint64_t* private_words() const { return reinterpret_cast<uint64_t*>(private_.data()); }
  os::Mapping counts_, generations_, copies_, starts_, exclusive_, private_;
  int64_t private_blocks_ = 0;
};

}  // namespace torchshm::pool
