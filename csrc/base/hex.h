// Numbers in the names of files: sixteen digits, so that all are of one length and none is taken for a part of another.
//
// Private memory alone. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace torchshm {

constexpr size_t kHexDigits = 16;

// In lower case.
std::string hex16(uint64_t value);
// The number whose sixteen digits begin at `from`; nothing where they do not.
std::optional<uint64_t> parse_hex16(const std::string& text, size_t from);

}  // namespace torchshm
