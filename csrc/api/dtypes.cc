#include "api/dtypes.h"

#include <charconv>
#include <string>

namespace torchshm::api {
namespace {

constexpr TypeRow kRows[] = {
    {{DType::kBool, 8}, "bool", 0, "b1", true, true},
    {{DType::kInt, 8}, "int8", 1, "i1", true, true},
    {{DType::kUInt, 8}, "uint8", 2, "u1", true, true},
    {{DType::kInt, 16}, "int16", 3, "i2", true, true},
    {{DType::kUInt, 16}, "uint16", 4, "u2", true, true},
    {{DType::kInt, 32}, "int32", 5, "i4", true, true},
    {{DType::kUInt, 32}, "uint32", 6, "u4", true, true},
    {{DType::kInt, 64}, "int64", 7, "i8", true, true},
    {{DType::kUInt, 64}, "uint64", 8, "u8", true, true},
    {{DType::kFloat, 16}, "float16", 23, "f2", true, true},
    {{DType::kFloat, 32}, "float32", 11, "f4", true, true},
    {{DType::kFloat, 64}, "float64", 12, "f8", true, true},
    {{DType::kFloat, 128}, "longdouble", 13, "f16", true, false},
    {{DType::kComplex, 64}, "complex64", 14, "c8", true, true},
    {{DType::kComplex, 128}, "complex128", 15, "c16", true, true},
    {{DType::kComplex, 32}, "complex32", -1, "", false, true},
    {{DType::kBFloat, 16}, "bfloat16", -1, "", true, true},
    {{DType::kFloat8e3m4, 8}, "float8_e3m4", -1, "", true, false},
    {{DType::kFloat8e4m3, 8}, "float8_e4m3", -1, "", true, false},
    {{DType::kFloat8e4m3b11fnuz, 8}, "float8_e4m3b11fnuz", -1, "", true, false},
    {{DType::kFloat8e4m3fn, 8}, "float8_e4m3fn", -1, "", true, true},
    {{DType::kFloat8e4m3fnuz, 8}, "float8_e4m3fnuz", -1, "", true, true},
    {{DType::kFloat8e5m2, 8}, "float8_e5m2", -1, "", true, true},
    {{DType::kFloat8e5m2fnuz, 8}, "float8_e5m2fnuz", -1, "", true, true},
    {{DType::kFloat8e8m0fnu, 8}, "float8_e8m0fnu", -1, "", true, true},
};

template <class F>
const TypeRow* first(F f) {
  for (const TypeRow& row : kRows) {
    if (f(row)) return &row;
  }
  return nullptr;
}

}  // namespace

const TypeRow* row_of(DType dtype) {
  return first([&](const TypeRow& row) { return row.dtype == dtype; });
}

const TypeRow* row_of_name(std::string_view name) {
  return first([&](const TypeRow& row) { return row.name == name; });
}

const TypeRow* row_of_number(int number, int64_t item_size) {
  if (number == 9 || number == 10) number -= 2;  // long long is as long as long
  return first([&](const TypeRow& row) { return row.number == number && row.dtype.size() == item_size; });
}

std::optional<TypeString> parse_type_string(std::string_view text) {
  if (text.size() < 3) return std::nullopt;
  const char order = text[0], letter = text[1];
  TypeString found;
  const char* end = text.data() + text.size();
  const auto [stopped, error] = std::from_chars(text.data() + 2, end, found.item_size);
  if (error != std::errc() || found.item_size < 0 || found.item_size > INT32_MAX) return std::nullopt;
  if (letter == 'U') found.item_size *= 4;
  // "M8[ns]" has more to say.
  if (stopped == end && order != '>')
    found.row = first([&](const TypeRow& row) { return row.numpy == text.substr(1); });
  return found;
}

}  // namespace torchshm::api
