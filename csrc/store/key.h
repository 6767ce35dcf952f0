// A name as the catalogue looks for it: its hash, and where in the index that leads.
//
// Private: values only. Shared: every process and every build must come to the same hash, which lies in the file.
// When a process dies here: nothing has changed. Thread safety: all of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "store/layout.h"

namespace torchshm::store {

// Not secret and not seeded: the same in every process and every build.
inline uint64_t hash_of(std::string_view text) {
  constexpr uint64_t kMultiplier = 0x9fb21c651e98df25;
  uint64_t hash = text.size() * 0x9e3779b97f4a7c15;
  while (!text.empty()) {
    uint64_t word = 0;
    const size_t n = std::min<size_t>(text.size(), sizeof word);
    std::memcpy(&word, text.data(), n);
    text.remove_prefix(n);
    hash = (hash ^ word) * kMultiplier;
    hash ^= hash >> 32;
  }
  hash *= kMultiplier;
  return hash ^ hash >> 29;
}

// Shortest form, no surrogates, nothing beyond U+10FFFF.
inline bool is_utf8(std::string_view text) {
  const auto at = [&](size_t i) { return i < text.size() ? static_cast<uint8_t>(text[i]) : uint8_t{0}; };
  for (size_t i = 0; i < text.size();) {
    const uint8_t first = at(i);
    const size_t length = first < 0x80   ? 1
                          : first < 0xc2 ? 0
                          : first < 0xe0 ? 2
                          : first < 0xf0 ? 3
                          : first < 0xf5 ? 4
                                         : 0;
    if (length == 0) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((at(i + k) & 0xc0) != 0x80) return false;
    }
    const uint8_t second = at(i + 1);
    if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90) ||
        (first == 0xf4 && second > 0x8f))
      return false;
    i += length;
  }
  return true;
}

inline uint32_t bell_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 20) % kBells; }

// The i-th slot of a level in which a name with this hash may be.
inline uint32_t slot_index(uint64_t hash, uint32_t level, uint32_t i) {
  return level_start(level) + ((static_cast<uint32_t>(hash) + i) & (level_size(level) - 1));
}

inline uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 34); }

// A program's mark, and not data.
inline bool is_mark(std::string_view name) { return !name.empty() && name[0] == '\0'; }

struct Key {
  explicit Key(std::string_view key) : text(key), hash(hash_of(key)), tag(tag_of(hash)) {}
  std::string_view text;
  uint64_t hash;
  uint32_t tag;
};

}  // namespace torchshm::store
