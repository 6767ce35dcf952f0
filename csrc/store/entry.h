// What a name stood for at one moment.
//
// Private: values only. Shared: nothing. When a process dies here: nothing has changed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace torchshm::store {

struct Entry {
  std::string key;
  std::string text;  // the description, opaque here
  struct Block {
    uint32_t block;
    uint64_t generation;
  };
  std::vector<Block> blocks;
  uint64_t created = 0, expires = 0;  // CLOCK_REALTIME ns, Catalogue::now() ns
  uint64_t owner = 0;                 // a bound name's; else 0
  uint32_t pid = 0;                   // of the saver
};

}  // namespace torchshm::store
