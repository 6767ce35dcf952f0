#include "pool/heap.h"

#include <algorithm>
#include <bit>

namespace torchshm::pool {
namespace {

constexpr uint32_t kGranulesPerPage = kPage / kGranule;
constexpr uint32_t kCachedMost = 64;  // granules; larger ones merge with their neighbours at once
constexpr size_t kLook = 64;          // chunks looked at before a fresh one is asked for; arbitrary

}  // namespace

Heap::Heap(Arena& arena) : arena_(arena), by_chunk_(arena.chunks()) {}

namespace {

// The part of [from, from + count) that lies in from's word, and its length.
struct Part {
  uint64_t mask;
  uint32_t length;
};
Part part_of(uint32_t from, uint32_t count) {
  const uint32_t bit = from % 64, n = std::min(64 - bit, count);
  return {(n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1) << bit, n};
}

}  // namespace

uint32_t Heap::mark(Owned& owned, uint32_t from, uint32_t count, bool used) {
  uint32_t changed = 0;
  while (count > 0) {
    const Part part = part_of(from, count);
    uint64_t& word = owned.used[from / 64];
    changed += static_cast<uint32_t>(std::popcount((used ? ~word : word) & part.mask));
    word = used ? word | part.mask : word & ~part.mask;
    from += part.length;
    count -= part.length;
  }
  return changed;
}

bool Heap::all_used(const Owned& owned, uint32_t from, uint32_t count) {
  while (count > 0) {
    const Part part = part_of(from, count);
    if ((owned.used[from / 64] & part.mask) != part.mask) return false;
    from += part.length;
    count -= part.length;
  }
  return true;
}

std::optional<uint32_t> Heap::find_gap(Owned& owned, uint32_t count, uint32_t align) {
  constexpr uint32_t kEnd = kGranulesPerChunk;
  const auto next = [&](uint32_t at, bool used) {  // first granule at or after `at` with that state
    while (at < kEnd) {
      uint64_t word = owned.used[at / 64];
      if (!used) word = ~word;
      word >>= at % 64;
      if (word != 0) return at + static_cast<uint32_t>(std::countr_zero(word));
      at = (at / 64 + 1) * 64;
    }
    return kEnd;
  };
  uint32_t longest = 0;
  for (uint32_t at = next(0, false); at < kEnd;) {
    const uint32_t end = std::min(next(at, true), kEnd);
    const uint32_t start = (at + align - 1) / align * align;
    if (start < end && end - start >= count) return start;
    longest = std::max(longest, end - at);
    at = next(end, false);
  }
  owned.longest = longest;
  return std::nullopt;
}

std::optional<Heap::Place> Heap::place(uint32_t granules, bool whole_pages) {
  const uint32_t align = whole_pages ? kGranulesPerPage : 1;
  Cached& cached = cache_[granules % kCacheLines];
  if (cached.granules == granules && (!whole_pages || cached.place.first == 0)) {
    cached.granules = 0;
    const uint32_t page = cached.place.block % kPagesPerChunk;
    by_chunk_[cached.place.block / kPagesPerChunk]->starts[page / 64] |= uint64_t{1} << (page % 64);
    return cached.place;
  }
  for (size_t looked = 0, n = std::min(kLook, owned_.size()); looked < n; ++looked) {
    if (current_ >= owned_.size()) current_ = 0;
    Owned& owned = *owned_[current_];
    if (owned.free >= granules && owned.longest >= granules) {
      if (const auto start = find_gap(owned, granules, align)) {
        (void)mark(owned, *start, granules, true);
        if (owned.free == kGranulesPerChunk) --empty_;
        owned.free -= granules;
        const uint32_t page = *start / kGranulesPerPage;
        owned.starts[page / 64] |= uint64_t{1} << (page % 64);
        return Place{owned.chunk * kPagesPerChunk + page, *start % kGranulesPerPage};
      }
    }
    ++current_;
  }
  return std::nullopt;
}

void Heap::cancel(const Place& place, uint32_t granules) {
  Owned& owned = *by_chunk_[place.block / kPagesPerChunk];
  const uint32_t page = place.block % kPagesPerChunk;
  owned.starts[page / 64] &= ~(uint64_t{1} << (page % 64));
  free_space(owned, place.block, place.first, granules);
}

void Heap::lose(uint32_t chunk) {
  for (Cached& cached : cache_) {
    if (cached.granules != 0 && cached.place.block / kPagesPerChunk == chunk) cached.granules = 0;
  }
  if (by_chunk_[chunk]->free == kGranulesPerChunk) --empty_;
  owned_.erase(std::find(owned_.begin(), owned_.end(), by_chunk_[chunk].get()));
  by_chunk_[chunk].reset();
}

void Heap::add(uint32_t chunk, bool adopted) {
  auto fresh = std::make_unique<Owned>();
  fresh->chunk = chunk;
  if (adopted) {
    for (uint32_t page = 0; page < kPagesPerChunk; ++page) {
      const BlockValue block = BlockValue::of(arena_.block(chunk * kPagesPerChunk + page).value.load());
      if (!block.live) continue;
      const uint32_t start = page * kGranulesPerPage + block.first;
      const uint32_t length = std::min(block.granules, kGranulesPerChunk - start);
      fresh->free -= mark(*fresh, start, length, true);
      fresh->starts[page / 64] |= uint64_t{1} << (page % 64);
    }
  }
  if (fresh->free == kGranulesPerChunk) ++empty_;
  owned_.push_back(fresh.get());
  current_ = owned_.size() - 1;
  by_chunk_[chunk] = std::move(fresh);
}

void Heap::free_space(Owned& owned, uint32_t block, uint32_t first, uint32_t granules) {
  const uint32_t start = block % kPagesPerChunk * kGranulesPerPage + first;
  const uint32_t length = std::min(granules, kGranulesPerChunk - start);
  const uint32_t freed = mark(owned, start, length, false);
  owned.free += freed;
  owned.longest = owned.free;
  if (freed != 0 && owned.free == kGranulesPerChunk) ++empty_;
}

bool Heap::give_back(uint32_t block) {
  const uint32_t chunk = block / kPagesPerChunk, page = block % kPagesPerChunk;
  if (!owns(chunk)) return false;
  Owned& owned = *by_chunk_[chunk];
  uint64_t& starts = owned.starts[page / 64];
  const uint64_t bit = uint64_t{1} << (page % 64);
  const BlockValue value = BlockValue::of(arena_.block(block).value.load());
  if ((starts & bit) == 0 || value.live) return false;  // an old hint
  starts &= ~bit;
  const uint32_t granules = value.granules, first = value.first, start = page * kGranulesPerPage + first;
  // A descriptor that others have written to may name space that is not the block's; what is not sure is not used again.
  if (start + granules > kGranulesPerChunk || !all_used(owned, start, granules)) return true;
  if (granules > kCachedMost) {
    free_space(owned, block, first, granules);
    return true;
  }
  Cached& cached = cache_[granules % kCacheLines];
  const Cached older = cached;
  cached = {granules, {block, first}};
  if (older.granules != 0) {
    free_space(*by_chunk_[older.place.block / kPagesPerChunk], older.place.block, older.place.first, older.granules);
  }
  return true;
}

void Heap::rescan() {
  for (Owned* owned : owned_) {
    for (uint32_t page = 0; page < kPagesPerChunk; ++page) {
      if ((owned->starts[page / 64] >> (page % 64) & 1) != 0) (void)give_back(owned->chunk * kPagesPerChunk + page);
    }
  }
}

void Heap::empty_cache() {
  for (Cached& cached : cache_) {
    if (cached.granules == 0) continue;
    free_space(*by_chunk_[cached.place.block / kPagesPerChunk], cached.place.block, cached.place.first,
               cached.granules);
    cached.granules = 0;
  }
}

std::optional<uint32_t> Heap::remove_empty(uint32_t keep) {
  empty_cache();
  uint32_t empty = 0;
  for (size_t i = 0; i < owned_.size(); ++i) {
    if (owned_[i]->free != kGranulesPerChunk || ++empty <= keep) continue;
    const uint32_t chunk = owned_[i]->chunk;
    --empty_;
    owned_.erase(owned_.begin() + static_cast<std::ptrdiff_t>(i));
    by_chunk_[chunk].reset();
    return chunk;
  }
  return std::nullopt;
}

}  // namespace torchshm::pool
