// What a name stood for at one moment.
//
// Private: values only. Shared: nothing. When a process dies here: nothing has changed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "store/layout.h"

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
  Policy policy = Policy::kKeep;
  // Not of a file that is read with no service.
  bool spilled = false;  // then there are no blocks, and of the text the first byte alone
  uint64_t bytes = 0;    // of the blocks, wherever they are
  // Which slot, cell and life it was found in.
  uint32_t slot = 0, cell = 0, life = 0;
};

}  // namespace torchshm::store
