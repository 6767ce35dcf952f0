// A cell's body, copied out of a catalogue file or into it, and what its numbers mean.
//
// Shared: the body, of which one process writes and any reads. Private: the copy. Word by word and relaxed: a body may be written while
// somebody reads it who then finds that its slot has moved.
// When a process dies here: the body is half written, and no slot names its cell.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>

#include "store/layout.h"

namespace torchshm::store {

using BodyWords = std::array<uint64_t, sizeof(Body) / sizeof(uint64_t)>;

inline void prefetch_body(const std::byte* file, uint32_t cell) {
  const auto* at = file + offsets::kBodiesAt + sizeof(Body) * uint64_t{cell};
  for (uint64_t line = 0; line < sizeof(Body); line += 64) __builtin_prefetch(at + line);
}
// Of what stands beside it, too: who asks for a name asks for both.
inline void prefetch_cell(const std::byte* file, uint32_t cell) {
  __builtin_prefetch(file + offsets::kUsesAt + sizeof(Use) * uint64_t{cell});
  prefetch_body(file, cell);
}
// Of a mapped catalogue file. Its numbers are as found: not to be believed.
inline Body load_body(const std::byte* file, uint32_t cell) {
  const auto* from =
      reinterpret_cast<const std::atomic<uint64_t>*>(file + offsets::kBodiesAt) + uint64_t{cell} * BodyWords{}.size();
  BodyWords words;
  for (size_t i = 0; i < words.size(); ++i) words[i] = from[i].load(std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_acquire);
  Body body;
  std::memcpy(static_cast<void*>(&body), words.data(), sizeof body);
  return body;
}

// Published by a slot.
inline void store_body(std::byte* file, uint32_t cell, const Body& body) {
  auto* to = reinterpret_cast<std::atomic<uint64_t>*>(file + offsets::kBodiesAt) + uint64_t{cell} * BodyWords{}.size();
  BodyWords words;
  std::memcpy(words.data(), static_cast<const void*>(&body), sizeof body);
  for (size_t i = 0; i < words.size(); ++i) to[i].store(words[i], std::memory_order_relaxed);
}

// Whether key and description lie in the body itself.
inline bool fits(const Body& body) { return uint64_t{body.key_bytes} + body.text_bytes <= kInline; }
// Of the list in the overflow block, which key and description follow where they do not fit.
inline uint64_t list_bytes(const Body& body) { return uint64_t{body.parts > 0 ? body.parts - 1 : 0} * sizeof(Part); }
inline uint64_t overflow_bytes(const Body& body) {
  return list_bytes(body) + (fits(body) ? 0 : uint64_t{body.key_bytes} + body.text_bytes);
}

}  // namespace torchshm::store
