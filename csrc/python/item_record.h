// How a SharedList lays out its items in blocks: private names for bytes that readers in other processes see.
//
// A chunk is one block. An entry of the index says where an item's record begins: chunk << 40 | offset in it. A record is
//   header   text_bytes << 24 | buffers
//   text     a pickle (protocol 5); in a SharedDict's list the encoded key and its length (4 bytes) follow it, which loads() passes over
//   extents  from the next multiple of 8 on, one for each out-of-band buffer of the pickle (PEP 574)
//   buffers  each from a multiple of 64 of the chunk on
// Nothing here is atomic: a record is complete before its entry exists, and both are before another process is told of the list.
// Reading trusts nothing: whoever shares the block may have damaged it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

namespace torchshm::python {

constexpr int kOffsetBits = 40, kBuffersBits = 24;
constexpr uint64_t kMostChunk = uint64_t{1} << kOffsetBits, kMostBuffers = (uint64_t{1} << kBuffersBits) - 1;
constexpr uint64_t kRecordAlignment = 8;
constexpr uint64_t kBufferAlignment = 64;  // a cache line, and what SIMD loads ask for

struct BufferExtent {
  uint64_t offset;  // in the chunk
  uint64_t length;
};

struct Record {
  const std::byte* text;
  uint64_t text_bytes;
  uint64_t buffers;
  const std::byte* extents;

  BufferExtent extent(uint64_t i) const {
    BufferExtent found;
    std::memcpy(&found, extents + i * sizeof found, sizeof found);
    return found;
  }
};

constexpr uint64_t aligned(uint64_t offset, uint64_t to) { return (offset + to - 1) / to * to; }

// Nothing where it does not lie in the chunk completely.
inline std::optional<Record> record_at(const std::byte* chunk, uint64_t size, uint64_t offset) {
  uint64_t header = 0;
  if (offset % kRecordAlignment != 0 || size < sizeof header || offset > size - sizeof header) return std::nullopt;
  std::memcpy(&header, chunk + offset, sizeof header);
  Record record;
  record.text_bytes = header >> kBuffersBits;
  record.buffers = header & kMostBuffers;
  offset += sizeof header;
  if (record.text_bytes > size - offset) return std::nullopt;
  record.text = chunk + offset;
  record.extents = nullptr;
  if (record.buffers == 0) return record;
  offset = aligned(offset + record.text_bytes, kRecordAlignment);
  if (offset > size || record.buffers > (size - offset) / sizeof(BufferExtent)) return std::nullopt;
  record.extents = chunk + offset;
  return record;
}

// The encoded key behind the pickle; nothing where there can't be one.
struct Key {
  const std::byte* data;
  uint64_t length;
};
inline std::optional<Key> key_of(const Record& record) {
  uint32_t length = 0;
  if (record.text_bytes < sizeof length) return std::nullopt;
  std::memcpy(&length, record.text + record.text_bytes - sizeof length, sizeof length);
  if (length > record.text_bytes - sizeof length) return std::nullopt;
  return Key{record.text + record.text_bytes - sizeof length - length, length};
}

// The same in all processes, which hash() of a str is not. A multiplication a word, and MurmurHash3's end.
inline uint64_t stable_hash(const void* data, uint64_t length) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t hash = length * kOdd;
  for (uint64_t left = length; left != 0;) {
    const uint64_t step = left < 8 ? left : 8;
    uint64_t word = 0;
    std::memcpy(&word, at, step);
    hash = (hash ^ word) * kOdd;
    hash ^= hash >> 32;
    at += step;
    left -= step;
  }
  hash = (hash ^ hash >> 33) * 0xFF51AFD7ED558CCD;
  hash = (hash ^ hash >> 33) * 0xC4CEB9FE1A85EC53;
  return hash ^ hash >> 33;
}

// A slot of the table of a SharedDict: 0, or part of the key's hash << 40 | number of the item + 1. Open addressing, linear probing; at
// least a third of the slots is empty.
constexpr uint64_t slot_of(uint64_t hash, uint64_t item) { return hash >> kOffsetBits << kOffsetBits | (item + 1); }

}  // namespace torchshm::python
