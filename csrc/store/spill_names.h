// What the files in a store's spill directory are called, and what a name there says.
//
// <id>.spill is a value; <id>.part and <id>-2.part what is being written, or was by one that died; <octave>-<place>.spare a discarded file
// that may be written anew. Ids have sixteen digits.
// Private memory alone: nothing here looks at the disk. Any thread.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string>

namespace torchshm::store::spill {

std::string spill_name(uint64_t id);
// <id>.part; <id>-2.part and so on while there are others, of writers that died.
std::string part_name(uint64_t id, int attempt);
// A part that nobody writes: it goes with the next sweep.
std::string discarded_name(uint64_t id);

struct Parsed {
  uint64_t id;
  bool part;
};
// Nothing for names of other files, spares among them.
std::optional<Parsed> parse(const std::string& name);
bool is_spare(const std::string& name);

// <store>-<pool id>, the store's own directory in the one that the user named.
std::string directory_name(const std::string& store, uint64_t pool_id);
bool is_directory_name(const std::string& name);

// Where spares of about a size may be: as many names as there may be of them, of the same octave.
struct Shelf {
  uint64_t octave;
  uint64_t places;
  std::string name(uint64_t place) const;
};

constexpr uint64_t kSmallestSpare = uint64_t{64} << 10, kLargestSpare = (uint64_t{128} << 20) - 1;
constexpr uint64_t kFirstOctave = std::bit_width(kSmallestSpare), kLastOctave = std::bit_width(kLargestSpare);

Shelf shelf(uint64_t octave);
// None for what is too small for it to pay, or so large that it would keep much of the disk from others.
std::optional<Shelf> shelf_for(uint64_t bytes);

}  // namespace torchshm::store::spill
