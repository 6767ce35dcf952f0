// The JSON that a value's text consists of, as Python's json module writes it. Trusted by nobody.
//
// Private memory only. Thread safety: values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace torchshm::api {

struct Json {
  enum class Kind : uint8_t { kNull, kBool, kInteger, kNumber, kString, kArray, kObject };
  Kind kind = Kind::kNull;
  int64_t integer = 0;             // of kInteger, kBool. A number that does not fit is a kNumber
  std::string text;                // of kString, in UTF-8; a kNumber as it was written
  std::vector<Json> items;         // of kArray, kObject
  std::vector<std::string> names;  // of kObject: items[i] is called names[i]

  // Null when this is no object or has nothing of that name.
  const Json* find(std::string_view name) const;
  bool is(Kind k) const { return kind == k; }
};

// kInvalid for anything else, and for more than 200 levels.
Result<Json> parse_json(std::string_view text);

// With its quotes. What is no ASCII stays as it is.
std::string quoted(std::string_view text);

// What base64 stands for, as Python's base64.b64encode() writes it.
Result<std::string> decode_base64(std::string_view text);

}  // namespace torchshm::api
