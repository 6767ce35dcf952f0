#include "pool/holds.h"

#include <bit>

namespace torchshm::pool {

Result<Holds> Holds::create(uint32_t pages) {
  using os::Mapping;
  Holds holds;
  auto counts = Mapping::map(Mapping::Kind::kAnonymous, -1, uint64_t{pages} * sizeof(uint32_t));
  if (!counts) return std::move(counts.status());
  auto generations = Mapping::map(Mapping::Kind::kAnonymous, -1, uint64_t{pages} * sizeof(uint64_t));
  if (!generations) return std::move(generations.status());
  auto copies = Mapping::map(Mapping::Kind::kAnonymous, -1, uint64_t{pages} * sizeof(uint32_t));
  if (!copies) return std::move(copies.status());
  auto starts = Mapping::map(Mapping::Kind::kAnonymous, -1, uint64_t{pages} / 8);
  if (!starts) return std::move(starts.status());
  auto exclusive = Mapping::map(Mapping::Kind::kAnonymous, -1, uint64_t{pages} / 8);
  if (!exclusive) return std::move(exclusive.status());
  auto private_words = Mapping::map(Mapping::Kind::kAnonymous, -1, uint64_t{pages} / 8);
  if (!private_words) return std::move(private_words.status());
  holds.private_ = private_words.take();
  holds.exclusive_ = exclusive.take();
  holds.counts_ = counts.take();
  holds.generations_ = generations.take();
  holds.copies_ = copies.take();
  holds.starts_ = starts.take();
  return holds;
}

void Holds::add(uint32_t block, Mode mode, uint64_t generation) {
  if (mode == Mode::kCopyOnWrite) ++copies()[block];
  starts()[block / 64] |= uint64_t{1} << (block % 64);
  if (counts()[block]++ == 0) generations()[block] = generation;
}

Holds::Removed Holds::remove(uint32_t block, Mode mode) {
  Removed removed{--counts()[block], false};
  if (mode == Mode::kCopyOnWrite) removed.last_copy = --copies()[block] == 0;
  if (removed.left == 0) {
    const uint64_t others = ~(uint64_t{1} << (block % 64));
    starts()[block / 64] &= others;
    exclusive()[block / 64] &= others;
  }
  return removed;
}

std::optional<uint32_t> Holds::start_at_or_before(uint32_t page) const {
  const uint32_t first_word = page / kPagesPerChunk * (kPagesPerChunk / 64);
  for (uint32_t word = page / 64;; --word) {
    uint64_t bits = starts()[word];
    if (word == page / 64 && page % 64 != 63) bits &= (uint64_t{1} << (page % 64 + 1)) - 1;
    if (bits != 0) return word * 64 + 63 - static_cast<uint32_t>(std::countl_zero(bits));
    if (word == first_word) return std::nullopt;
  }
}

}  // namespace torchshm::pool
