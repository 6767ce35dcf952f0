// Element types by their several names: DLPack's, NumPy's numbers and strings, torch's.
//
// Constants only.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "torchshm/store.h"

namespace torchshm::api {

struct TypeRow {
  DType dtype;
  const char* name;   // of NumPy, ml_dtypes and torch
  int number;         // NumPy's; -1: ml_dtypes has it, or nobody
  const char* numpy;  // dtype.str without the byte order; empty where number is -1
  bool numpy_has;     // by itself, or by ml_dtypes
  bool torch_has;
};

// Null when there is none.
const TypeRow* row_of(DType dtype);
const TypeRow* row_of_name(std::string_view name);
// NumPy's number, and its size in bytes, which differs between long and long long nowhere here.
const TypeRow* row_of_number(int number, int64_t item_size);

// dtype.str as in "<f4": the row where C++ has one, in the processor's byte order; the size of an element in any case.
struct TypeString {
  const TypeRow* row = nullptr;
  int64_t item_size = 0;
};
std::optional<TypeString> parse_type_string(std::string_view text);

}  // namespace torchshm::api
