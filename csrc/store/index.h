// Looking for a name in a catalogue's index, and reading what its cell says: the same for a client and for a reader of a file at rest.
//
// Shared: what it reads, which others may be changing. Private: the copies that it returns, which are bounded.
// When a process dies here: nothing has changed. Thread safety: all of it.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "store/body.h"
#include "store/entry.h"
#include "store/key.h"

namespace torchshm::store {

inline const Slot& slot_of(const std::byte* file, uint32_t index) {
  return reinterpret_cast<const Slot*>(file + offsets::kSlotsAt)[index];
}
inline const CellWord& word_of(const std::byte* file, uint32_t cell) {
  return reinterpret_cast<const CellWord*>(file + offsets::kWordsAt)[cell];
}

// Copied once, then checked: nothing that follows its numbers goes beyond these.
inline StandingValue standing_of(const std::byte* file, uint32_t cell) {
  return StandingValue::of(reinterpret_cast<const Use*>(file + offsets::kUsesAt)[cell].standing.load());
}
inline Body load_bounded_body(const std::byte* file, uint32_t cell) {
  Body body = load_body(file, cell);
  body.key_bytes = std::min(body.key_bytes, kMaxKey);
  body.text_bytes = static_cast<uint32_t>(std::min<uint64_t>(body.text_bytes, kMaxText));
  body.parts = std::min(body.parts, kMaxParts);
  return body;
}

// A slot, and what was in it.
struct Place {
  uint32_t index = 0;
  SlotValue value;
};
struct Found {
  Place place;
  Body body;
};

// The slot in `state` that has this key, other than `except`. same_key(body) tells whether a cell's key is this one.
template <class SameKey>
std::optional<Found> search_index(const std::byte* file, uint32_t levels, const Key& key, SlotState state,
                                  uint32_t except, SameKey same_key) {
  // The largest level first: most names are there.
  for (uint32_t level = levels; level-- > 0;) {
    for (uint32_t i = 0; i < kWindow; ++i) {
      Found found;
      found.place.index = slot_index(key.hash, level, i);
      if (found.place.index == except) continue;
      for (;;) {
        found.place.value = SlotValue::of(slot_of(file, found.place.index).value.load());
        const SlotValue& value = found.place.value;
        if (value.state != state || value.tag != key.tag || value.cell >= kCells) break;
        prefetch_cell(file, value.cell);
        found.body = load_bounded_body(file, value.cell);
        const bool same = same_key(found.body);
        // The cell stays as it is while the slot does.
        if (SlotValue::of(slot_of(file, found.place.index).value.load()) != value) continue;
        if (same) return found;
        break;
      }
      if (found.place.value.state == SlotState::kEmpty) break;
    }
  }
  return std::nullopt;
}

// The slot that refers to a cell in that life, claimed or named.
inline std::optional<Place> find_referring(const std::byte* file, uint32_t levels, uint32_t cell, uint32_t life,
                                           uint64_t hash) {
  for (uint32_t level = levels; level-- > 0;) {
    for (uint32_t i = 0; i < kWindow; ++i) {
      const uint32_t index = slot_index(hash, level, i);
      const SlotValue value = SlotValue::of(slot_of(file, index).value.load());
      if (value.state == SlotState::kEmpty) break;
      if (value.state != SlotState::kGone && value.cell == cell && value.life == life) return Place{index, value};
    }
  }
  return std::nullopt;
}

// Whether the cell, or its overflow block of `length` bytes, has that key. REQUIRES: overflow, unless fits(body).
inline bool has_key(const Body& body, const Key& key, const std::byte* overflow, uint64_t length) {
  if (fits(body)) return std::memcmp(body.text, key.text.data(), key.text.size()) == 0;
  const uint64_t at = list_bytes(body);
  return at + key.text.size() <= length && std::memcmp(overflow + at, key.text.data(), key.text.size()) == 0;
}
// Worth looking closer.
inline bool may_have_key(const Body& body, const Key& key) {
  return body.hash == key.hash && body.key_bytes == key.text.size();
}

// Whether all of an entry is in the cell itself.
inline bool whole_inside(const Body& body) { return fits(body) && body.parts <= 1; }

// Nothing where the overflow block is too short. REQUIRES: overflow, unless whole_inside(body).
inline std::optional<Entry> entry_from(const Body& body, const std::byte* overflow, uint64_t length) {
  Entry entry;
  entry.created = body.created;
  entry.expires = body.expires;
  entry.owner = body.owner;
  entry.pid = body.pid;
  if (!whole_inside(body) && overflow_bytes(body) > length) return std::nullopt;
  entry.blocks.reserve(body.parts);
  if (body.parts > 0) entry.blocks.push_back({body.first.block, body.first.generation});
  for (uint32_t i = 1; i < body.parts; ++i) {
    Part part;
    std::memcpy(&part, overflow + (i - 1) * sizeof(Part), sizeof part);
    entry.blocks.push_back({part.block, part.generation});
  }
  const char* text = fits(body) ? reinterpret_cast<const char*>(body.text)
                                : reinterpret_cast<const char*>(overflow + list_bytes(body));
  entry.key.assign(text, body.key_bytes);
  entry.text.assign(text + body.key_bytes, body.text_bytes);
  return entry;
}

}  // namespace torchshm::store
