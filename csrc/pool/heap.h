// Cuts small blocks (4 KiB to 512 KiB) from the chunks that this lease owns.
//
// Private: everything here; it can be rebuilt from the descriptors at any time, and after a death whoever adopts a chunk does just that.
// Shared: only the space it manages. Nobody else allocates in an owned chunk; others free blocks in it and leave a hint.
// Thread safety: one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "pool/arena.h"

namespace torchshm::pool {

class Heap {
 public:
  explicit Heap(Arena& arena);

  struct Place {
    uint32_t block;  // page in which it starts
    uint32_t first;  // granules from there
  };
  // Room for `granules`; with whole_pages it starts and ends on page boundaries. Nothing when the owned chunks have no such gap.
  std::optional<Place> place(uint32_t granules, bool whole_pages);
  // A place that turned out not to be usable: taken back exactly.
  void cancel(const Place& place, uint32_t granules);
  // A chunk that somebody else has taken. REQUIRES: owned.
  void lose(uint32_t chunk);
  // A chunk to cut from. With blocks in it already (adopted): found from the descriptors.
  void add(uint32_t chunk, bool adopted);
  // Takes the space of a freed block back; hints may come twice or late, so the descriptor decides. Returns whether it did.
  bool give_back(uint32_t block);
  // Looks at all descriptors of all owned chunks for blocks that were freed without a hint.
  void rescan();
  // A chunk with nothing in it that need not be kept, removed from the heap.
  std::optional<uint32_t> remove_empty(uint32_t keep);
  uint32_t empty_chunks() const { return empty_; }
  bool owns(uint32_t chunk) const { return chunk < by_chunk_.size() && by_chunk_[chunk] != nullptr; }

 private:
  struct Owned {
    uint32_t chunk = 0;
    uint32_t free = kGranulesPerChunk;     // granules
    uint32_t longest = kGranulesPerChunk;  // upper bound of the longest gap
    uint64_t used[kGranulesPerChunk / 64] = {};
    uint64_t starts[kPagesPerChunk / 64] = {};  // pages in which a block that we placed starts
  };
  struct Cached {
    uint32_t granules = 0;
    Place place{};
  };
  // Returns how many of the granules were not so before. REQUIRES: from + count <= kGranulesPerChunk
  static uint32_t mark(Owned& owned, uint32_t from, uint32_t count, bool used);
  static bool all_used(const Owned& owned, uint32_t from, uint32_t count);
  static std::optional<uint32_t> find_gap(Owned& owned, uint32_t count, uint32_t align);
  void free_space(Owned& owned, uint32_t block, uint32_t first, uint32_t granules);
  void empty_cache();

  Arena& arena_;
  std::vector<std::unique_ptr<Owned>> by_chunk_;
  std::vector<Owned*> owned_;
  size_t current_ = 0;
  uint32_t empty_ = 0;  // chunks with nothing in them, not even a cached block
  static constexpr uint32_t kCacheLines = 64;
  Cached cache_[kCacheLines];  // the last freed block of a size, by granules: warm in the processor's caches too
};

}  // namespace torchshm::pool
