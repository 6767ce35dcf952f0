// The JSON that a value's text consists of, as Python's json module writes it. Trusted by nobody.
//
// Not a library's: json.dumps() writes NaN, Infinity and -Infinity, and strings that are no Unicode (a file's name from os.fsdecode() has
// lone surrogates), which nlohmann_json 3.11, jsoncpp and RapidJSON refuse in whole or in part, and they would refuse every array beside
// one in a dict. nlohmann_json also takes three times as long for the description of a tensor.
//
// Private memory only. When a process dies here: nothing is shared. Thread safety: values.
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
