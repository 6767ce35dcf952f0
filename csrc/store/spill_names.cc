#include "store/spill_names.h"

#include <algorithm>
#include <cctype>

#include "base/hex.h"

namespace torchshm::store::spill {
namespace {

constexpr const char* kSpill = ".spill";
constexpr const char* kPart = ".part";
constexpr const char* kSpare = ".spare";
constexpr int kDiscarded = 1'000'000;  // in the name of a part: more than any writer comes to
// Of discarded files, for as long as somebody may soon want to write one: of each octave of sizes, files of so many bytes at most; of all
// octaves 1.25 GiB.
constexpr uint64_t kSpareBytes = uint64_t{256} << 20, kMostSpares = 16;

}  // namespace

std::string spill_name(uint64_t id) { return hex16(id) + kSpill; }

std::string part_name(uint64_t id, int attempt) {
  std::string name = hex16(id);
  if (attempt > 1) name.append("-").append(std::to_string(attempt));
  return name + kPart;
}

std::string discarded_name(uint64_t id) { return part_name(id, kDiscarded); }

std::optional<Parsed> parse(const std::string& name) {
  const auto id = parse_hex16(name, 0);
  if (!id) return std::nullopt;
  std::string rest = name.substr(kHexDigits);
  if (rest == kSpill) return Parsed{*id, false};
  if (rest.starts_with('-')) {
    size_t end = 1;
    while (end < rest.size() && std::isdigit(static_cast<unsigned char>(rest[end])) != 0) ++end;
    rest = rest.substr(end);
  }
  if (rest == kPart) return Parsed{*id, true};
  return std::nullopt;
}

bool is_spare(const std::string& name) { return name.ends_with(kSpare); }

std::string directory_name(const std::string& store, uint64_t pool_id) { return store + "-" + hex16(pool_id); }

bool is_directory_name(const std::string& name) {
  if (name.size() < kHexDigits + 2) return false;
  const size_t id = name.size() - kHexDigits;
  return name[id - 1] == '-' && parse_hex16(name, id).has_value();
}

std::string Shelf::name(uint64_t place) const {
  return std::to_string(octave).append("-").append(std::to_string(place)) + kSpare;
}

Shelf shelf(uint64_t octave) {
  const uint64_t most = uint64_t{1} << octave;  // bytes, that one of them is smaller than
  return {octave, std::min(kSpareBytes / most, kMostSpares)};
}

std::optional<Shelf> shelf_for(uint64_t bytes) {
  const auto octave = static_cast<uint64_t>(std::bit_width(bytes));
  if (octave < kFirstOctave || octave > kLastOctave) return std::nullopt;
  return shelf(octave);
}

}  // namespace torchshm::store::spill
