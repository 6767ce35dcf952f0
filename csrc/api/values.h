// What a value's text says (docs/store.md "Values"), and the texts that C++ writes: both as Python writes and reads them.
//
// Values only: no memory is looked at here. Trusted by nobody: whatever parse() returns is in itself sound, and whether it lies in its
// blocks is checked where they are opened.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "api/dtypes.h"
#include "api/json.h"
#include "base/status.h"
#include "store/catalogue.h"
#include "torchshm/store.h"

namespace torchshm::api {

// A range of a block. Empty where a value has no bytes.
struct Region {
  uint32_t block = 0;  // index in the entry's blocks
  uint64_t offset = 0, length = 0;
};

// An array or a tensor in a value.
struct Leaf {
  Array array;  // without data; dtype is only right where `row` is not null
  const TypeRow* row = nullptr;
  int64_t item_size = 0;  // bytes
  std::optional<Region> region;
  int64_t offset = 0;  // of the first element in the region
  std::string unfit;   // why C++ can't have it as an Array; empty: it can
};

struct Value {
  char kind = 0;             // the text's first letter
  std::vector<Leaf> leaves;  // of "A" the one
  Json tree;                 // of "J": the node that the value is
};

// kInvalid when it is damaged. A kind that C++ does not know has no leaves.
Result<Value> parse(const store::Entry& entry, pool::Member& member);

// The index of the leaf that a node is; nothing when it is something else.
std::optional<size_t> leaf_at(const Value& value, const Json& node);

// The text of an array or tensor whose lowest byte lies at the start of `region`; no region: it has no bytes. face: as Python should return
// it, or null. REQUIRES: row is the array's, and Python has that dtype.
std::string describe(const Array& array, const TypeRow& row, const std::optional<Region>& region, int64_t offset,
                     const char* face);

}  // namespace torchshm::api
