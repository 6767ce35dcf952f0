#include "base/hex.h"

namespace torchshm {

std::string hex16(uint64_t value) {
  static const char* digits = "0123456789abcdef";
  std::string text(kHexDigits, '0');
  for (size_t i = kHexDigits; i-- > 0; value >>= 4) text[i] = digits[value & 15];
  return text;
}

std::optional<uint64_t> parse_hex16(const std::string& text, size_t from) {
  if (text.size() < from + kHexDigits) return std::nullopt;
  uint64_t value = 0;
  for (size_t i = from; i < from + kHexDigits; ++i) {
    const char c = text[i];
    if (!(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'f')) return std::nullopt;
    value = value << 4 | static_cast<uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10);
  }
  return value;
}

}  // namespace torchshm
