#include "api/json.h"

#include <charconv>
#include <cstring>

namespace torchshm::api {
namespace {

constexpr int kMostDepth = 200;

class Parser {
 public:
  explicit Parser(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  bool whole(Json& to) { return value(to, 0) && (space(), at_ == end_); }

 private:
  void space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  bool take(char c) {
    space();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  bool word(std::string_view w) {
    if (static_cast<size_t>(end_ - at_) < w.size() || std::memcmp(at_, w.data(), w.size()) != 0) return false;
    at_ += w.size();
    return true;
  }

  bool value(Json& to, int depth) {
    space();
    if (at_ == end_ || depth > kMostDepth) return false;
    switch (*at_) {
      case '{':
      case '[':
        return container(to, depth);
      case '"':
        to.kind = Json::Kind::kString;
        return string(to.text);
      case 't':
      case 'f':
        to.kind = Json::Kind::kBool;
        to.integer = *at_ == 't' ? 1 : 0;
        return word("true") || word("false");
      case 'n':
        return word("null");
      default:
        return number(to);
    }
  }

  bool container(Json& to, int depth) {
    const bool object = *at_++ == '{';
    const char close = object ? '}' : ']';
    to.kind = object ? Json::Kind::kObject : Json::Kind::kArray;
    if (take(close)) return true;
    do {
      space();
      if (object && (at_ == end_ || *at_ != '"' || !string(to.names.emplace_back()) || !take(':'))) return false;
      if (!value(to.items.emplace_back(), depth + 1)) return false;
    } while (take(','));
    return take(close);
  }

  bool number(Json& to) {
    const char* from = at_;
    // Python writes these, though JSON has none of them.
    if (word("NaN") || word("Infinity") || word("-Infinity")) {
      to.kind = Json::Kind::kNumber;
      to.text.assign(from, at_);
      return true;
    }
    while (at_ != end_ && (std::strchr("+-.eE", *at_) != nullptr || (*at_ >= '0' && *at_ <= '9')) && *at_ != 0) ++at_;
    const auto [stopped, error] = std::from_chars(from, at_, to.integer);
    if (error == std::errc() && stopped == at_) {
      to.kind = Json::Kind::kInteger;
      return true;
    }
    to.kind = Json::Kind::kNumber;
    to.text.assign(from, at_);
    double ignored = 0;
    const auto parsed = std::from_chars(from, at_, ignored);
    return at_ != from && parsed.ptr == at_;
  }

  bool four(uint32_t& code) {
    if (end_ - at_ < 4) return false;
    const auto [stopped, error] = std::from_chars(at_, at_ + 4, code, 16);
    if (error != std::errc() || stopped != at_ + 4) return false;
    at_ += 4;
    return true;
  }

  static void put(std::string& to, uint32_t code) {
    if (code < 0x80) {
      to += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr uint8_t kLead[] = {0, 0xc0, 0xe0, 0xf0};
    to += static_cast<char>(kLead[more] | code >> 6 * more);
    for (int i = more; i-- > 0;) to += static_cast<char>(0x80 | (code >> 6 * i & 0x3f));
  }

  bool string(std::string& to) {
    ++at_;
    while (at_ != end_ && *at_ != '"') {
      if (*at_ != '\\') {
        to += *at_++;
        continue;
      }
      if (++at_ == end_) return false;
      static constexpr std::string_view kEscapes = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
      const char c = *at_++;
      if (const size_t i = kEscapes.find(c); i != std::string_view::npos) {
        to += kMeant[i];
        continue;
      }
      uint32_t code = 0, low = 0;
      if (c != 'u' || !four(code)) return false;
      const char* single = at_;
      if (code >= 0xd800 && code < 0xdc00 && word("\\u")) {
        if (!four(low)) return false;
        if (low >= 0xdc00 && low < 0xe000) {
          code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        } else {
          at_ = single;
        }
      }
      put(to, code);
    }
    if (at_ == end_) return false;
    ++at_;
    return true;
  }

  const char* at_;
  const char* end_;
};

}  // namespace

const Json* Json::find(std::string_view name) const {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return &items[i];
  }
  return nullptr;
}

Result<Json> parse_json(std::string_view text) {
  Json json;
  if (!Parser(text).whole(json)) return Status(Code::kInvalid, "its description is no JSON");
  return json;
}

std::string quoted(std::string_view text) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string made = "\"";
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (code < 0x20) {
      made += {'\\', 'u', '0', '0', kDigits[code >> 4], kDigits[code & 15]};
    } else {
      if (c == '"' || c == '\\') made += '\\';
      made += c;
    }
  }
  return made += '"';
}

Result<std::string> decode_base64(std::string_view text) {
  static constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const Status damaged(Code::kInvalid, "its bytes are no base64");
  if (text.size() % 4 != 0) return Status(Code::kInvalid, damaged.what());
  size_t padding = 0;
  while (padding < 2 && !text.empty() && text.back() == '=') {
    text.remove_suffix(1);
    ++padding;
  }
  std::string made;
  uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    const size_t digit = kDigits.find(c);
    if (digit == std::string_view::npos) return Status(Code::kInvalid, damaged.what());
    bits = bits << 6 | static_cast<uint32_t>(digit);
    count += 6;
    if (count >= 8) made += static_cast<char>(bits >> (count -= 8) & 0xff);
  }
  return made;
}

}  // namespace torchshm::api
