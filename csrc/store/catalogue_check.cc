#include "store/catalogue_check.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "os/mapping.h"
#include "os/memfd.h"
#include "pool/look.h"
#include "pool/mark.h"
#include "pool/membership.h"
#include "store/body.h"
#include "store/key.h"
#include "store/layout.h"

namespace torchshm::store {
namespace {

using pool::BlockValue;
using pool::number;
using pool::Pair;
using pool::TicketValue;
using pool::words;

// ---- words in words

const char* name_of(SlotState state) {
  constexpr std::array<const char*, 4> kNames = {"empty", "claimed", "named", "gone"};
  return kNames[static_cast<size_t>(state)];  // two bits
}

const char* name_of(CellState state) {
  constexpr std::array<const char*, 6> kNames = {"free", "making", "standing", "bound", "leaving", "releasing"};
  const auto index = static_cast<size_t>(state);
  return index < kNames.size() ? kNames[index] : "no state";
}

std::string the_slot(uint32_t index, Pair p) {
  const SlotValue v = SlotValue::of(p);
  return "slot " + number(index) + " " + words(p) + " = " + name_of(v.state) + ", cell " + number(v.cell) + ", life " +
         number(v.life);
}

std::string owner_of(uint64_t owner) {
  return owner == 0 ? "nobody" : "lease " + number(owner & 0xfff) + " incarnation " + number(owner >> 12);
}

std::string the_cell(uint32_t index, Pair p) {
  const CellValue v = CellValue::of(p);
  return "cell " + number(index) + " " + words(p) + " = " + name_of(v.state) + ", life " + number(v.life) + ", owner " +
         owner_of(v.owner);
}

std::string the_key(std::string_view key) {
  constexpr size_t kShown = 60;
  std::string text = " \"";
  for (const char c : key.substr(0, kShown)) {
    if (c == '"' || c == '\\') text += '\\';
    if (static_cast<unsigned char>(c) >= 32 && c != 127) {
      text += c;
    } else {
      text += "\\x" + pool::hex(static_cast<unsigned char>(c)).substr(2);
    }
  }
  return text + (key.size() > kShown ? "...\"" : "\"");
}

std::string the_part(const Part& part) {
  return "ticket " + number(part.ticket) + " (nonce " + number(part.nonce) + ") for block " + number(part.block) +
         " generation " + number(part.generation);
}

// One issue of one ticket.
uint64_t issue_of(uint32_t ticket, uint64_t nonce) {
  static_assert(pool::kTickets <= 1U << 22);
  return nonce << 22 | ticket;
}

// ---- one look

struct Named {
  uint32_t slot, cell;
  uint64_t hash;
  Pair word;  // of the slot
};

class Look {
 public:
  Look(int fd, uint64_t at, const std::byte* file, const pool::Arena& arena, const os::Mapping& data, bool at_rest)
      : fd_(fd), at_(at), file_(file), arena_(arena), data_(data), at_rest_(at_rest) {}

  // Tickets last: one that became a name's later is not looked for, and one that is in no cell then was in none before.
  CatalogueReport look() {
    memory_ = pool::Memory(fd_, offsets::kTotal, at_);
    const std::vector<uint32_t> tickets = named_tickets();
    header();
    bells();
    slots();
    twice();
    cells();
    orphans(tickets);
    return std::move(report_);
  }

 private:
  const Header& head() const { return *reinterpret_cast<const Header*>(file_); }
  Pair slot_word(uint32_t index) const {
    return reinterpret_cast<const Slot*>(file_ + offsets::kSlotsAt)[index].value.load();
  }
  Pair cell_word(uint32_t index) const {
    return reinterpret_cast<const CellWord*>(file_ + offsets::kWordsAt)[index].value.load();
  }
  // Both may lie on a page without memory, which then reads as zero and stays so.
  Pair slot_if_any(uint32_t index) const {
    return memory_.has(offsets::kSlotsAt + uint64_t{index} * sizeof(Slot)) ? slot_word(index) : Pair{};
  }
  Pair cell_if_any(uint32_t index) const {
    return memory_.has(offsets::kWordsAt + uint64_t{index} * sizeof(CellWord)) ? cell_word(index) : Pair{};
  }
  Body body(uint32_t cell) const {
    return memory_.has(offsets::kBodiesAt + uint64_t{cell} * sizeof(Body)) ? load_body(file_, cell) : Body{};
  }
  uint32_t levels() const { return std::max(pool::marked(head().levels, kLevels), 1U); }
  uint32_t slots_used() const { return level_start(levels() - 1) + level_size(levels() - 1); }

  StandingValue standing(uint32_t cell) const {
    return memory_.has(offsets::kUsesAt + uint64_t{cell} * sizeof(Use))
               ? StandingValue::of(reinterpret_cast<const Use*>(file_ + offsets::kUsesAt)[cell].standing.load())
               : StandingValue{};
  }

  bool enough() const { return suspects_.enough(); }
  void suspect(int invariant, std::string what) { suspects_.add(invariant, std::move(what)); }
  template <class F>
  void each(uint64_t table, uint64_t size, uint64_t count, F f) const {
    memory_.each(
        table, size, count, [this] { return !enough(); }, f);
  }

  std::vector<uint32_t> named_tickets() const;
  void header();
  void bells();
  void slots();
  void slot(uint32_t index, Pair word);
  void named(uint32_t index, Pair word, const Body& body, Pair cell);
  void twice();
  void cells();
  void cell(uint32_t index, Pair word);
  void beside(uint32_t index, const Body& seen, const CellValue& v, std::vector<std::string>* wrong);
  void orphans(const std::vector<uint32_t>& tickets);
  std::string part(const Part& part) const;
  std::string owner(uint64_t owner) const;
  std::optional<std::string_view> overflow(const Body& body) const;
  std::optional<std::string> key_of(const Body& body) const;
  std::vector<Part> parts_of(const Body& body) const;
  bool referred(uint32_t cell, uint32_t life, uint64_t hash) const;

  const int fd_;
  const uint64_t at_;
  const std::byte* const file_;
  const pool::Arena& arena_;
  const os::Mapping& data_;
  const bool at_rest_;
  pool::Memory memory_;
  std::vector<Named> named_;
  std::unordered_map<uint64_t, uint32_t> kept_;  // ticket and nonce -> cell that lists it
  std::unordered_map<uint64_t, Named> files_;    // file -> the first name that has it
  CatalogueReport report_;
  pool::Suspects suspects_{report_.violations};
};

void Look::header() {
  const Header& h = head();
  if (h.spilling.load(std::memory_order_acquire) != 0)
    report_.directory.assign(h.directory, ::strnlen(h.directory, sizeof h.directory));
  const auto expect = [&](const char* field, uint64_t found, uint64_t wanted) {
    if (found != wanted)
      suspect(10, std::string("header ") + field + " is " + pool::hex(found) + ", expected " + pool::hex(wanted));
  };
  expect("magic", h.magic, kMagic);
  expect("version", h.version, kVersion);
  expect("layout_hash", h.layout_hash, kLayoutHash);
  expect("size", h.size, offsets::kTotal);
  expect("ready", h.ready.load(std::memory_order_acquire), 1);
  expect("pool_id", h.pool_id, arena_.header().pool_id);
  if (h.created == 0) suspect(10, "header created is 0, expected a time");
  if (h.name[0] == 0 || std::memchr(h.name, 0, sizeof h.name) == nullptr)
    suspect(10, "header name is no zero-terminated text");
  const uint32_t levels = h.levels.load(std::memory_order_acquire);
  if (levels < 1 || levels > kLevels)
    suspect(10, "header levels is " + number(levels) + ", expected 1 to " + number(kLevels));
  const uint32_t used = h.cells_used.load(std::memory_order_acquire);
  if (used > kCells) suspect(10, "header cells_used is " + number(used) + ", more than " + number(kCells));
}

void Look::bells() {
  each(offsets::kBellsAt, sizeof(Bell), kBells, [&](uint32_t index) {
    const uint32_t waiting = reinterpret_cast<const Bell*>(file_ + offsets::kBellsAt)[index].waiting.load();
    if (waiting > 1) suspect(10, "bell " + number(index) + ": waiting is " + number(waiting) + ", expected 0 or 1");
  });
}

// Tickets that names have, when the look began.
std::vector<uint32_t> Look::named_tickets() const {
  std::vector<uint32_t> found;
  for (uint32_t index = 0, used = arena_.tickets_used(); index < used; ++index) {
    if (TicketValue::of(arena_.ticket(index).value.load()).sender == TicketValue::kName) found.push_back(index);
  }
  return found;
}

// ---- slots

void Look::slots() {
  each(offsets::kSlotsAt, sizeof(Slot), kSlots, [&](uint32_t index) {
    if (const Pair word = slot_word(index); word != Pair{}) slot(index, word);
  });
}

// As long as a slot in use stays as it is, so does what it names: what was read between two equal loads of it was true at one moment.
void Look::slot(uint32_t index, Pair word) {
  const SlotValue v = SlotValue::of(word);
  const auto self = [&] { return the_slot(index, word); };
  if (index >= slots_used()) suspect(10, self() + ": beyond level " + number(levels()) + ", where no search looks");
  switch (v.state) {
    case SlotState::kEmpty:
      suspect(10, self() + ": an empty slot is all zero, and a search ends there");
      return;
    case SlotState::kGone:
      if (v.cell != 0 || v.life != 0) suspect(10, self() + ": a free slot names no cell");
      return;
    case SlotState::kClaimed:
      if (at_rest_) suspect(13, self() + ": a claim at rest");
      break;
    case SlotState::kNamed:
      break;
  }
  if (v.cell >= kCells || v.cell >= pool::marked(head().cells_used, kCells)) {
    suspect(11, self() + ": no such cell; cells_used is " + number(head().cells_used.load()));
    return;
  }
  const Pair cell = cell_if_any(v.cell);
  const CellValue c = CellValue::of(cell);
  const Body seen = body(v.cell);
  const auto still = [&] { return slot_word(index) == word; };
  const bool in_use = v.state == SlotState::kClaimed ? c.state == CellState::kMaking || c.state == CellState::kLeaving
                                                     : c.state >= CellState::kMaking && c.state <= CellState::kLeaving;
  if (c.life != v.life || !in_use) {
    if (still()) suspect(11, self() + ": names " + the_cell(v.cell, cell));
    return;
  }
  bool on_path = v.tag == tag_of(seen.hash);
  if (on_path) {
    on_path = false;
    for (uint32_t level = 0; level < kLevels && !on_path; ++level) {
      for (uint32_t i = 0; i < kWindow && !on_path; ++i) on_path = slot_index(seen.hash, level, i) == index;
    }
  }
  if (!on_path) {
    if (still())
      suspect(11, self() + ": not where a key with the hash " + pool::hex(seen.hash) + " of " + the_cell(v.cell, cell) +
                      " is looked for");
    return;
  }
  if (v.state == SlotState::kNamed) named(index, word, seen, cell);
}

void Look::named(uint32_t index, Pair word, const Body& seen, Pair cell) {
  const SlotValue v = SlotValue::of(word);
  const CellValue c = CellValue::of(cell);
  const auto key = key_of(seen);
  std::vector<std::pair<int, std::string>> wrong;
  const auto is = [&](int invariant, std::string what) { wrong.emplace_back(invariant, std::move(what)); };
  if (seen.key_bytes == 0 || seen.key_bytes > kMaxKey || seen.text_bytes > kMaxText || seen.parts > kMaxParts) {
    is(12, "key of " + number(seen.key_bytes) + " bytes, description of " + number(seen.text_bytes) + ", " +
               number(seen.parts) + " blocks: more or less than there can be");
  } else {
    const bool needed = seen.parts > 1 || !fits(seen);
    if (needed != (seen.overflow.nonce != 0)) {
      is(12, needed ? "has no overflow block for what does not fit" : "has an overflow block without need");
    } else if (needed) {
      const std::string out = part(seen.overflow);
      if (!out.empty()) {
        is(12, "overflow block: " + out);
      } else if (!overflow(seen)) {
        is(12, "overflow block: " + number(overflow_bytes(seen)) + " bytes do not fit into " + the_part(seen.overflow));
      }
    }
    if (wrong.empty() && (!key || hash_of(*key) != seen.hash))
      is(11,
         "the key's hash is " + (key ? pool::hex(hash_of(*key)) : "unknown") + ", expected " + pool::hex(seen.hash));
    if (seen.parts == 0 && seen.first.nonce != 0) is(12, "a ticket, and no blocks");
    if (wrong.empty()) {
      for (const Part& p : parts_of(seen)) {
        if (const std::string out = part(p); !out.empty()) is(12, out);
      }
    }
  }
  if (c.state == CellState::kStanding && seen.owner != 0) is(11, "bound to " + owner_of(seen.owner) + ", and standing");
  if (c.state == CellState::kBound && seen.owner != c.owner)
    is(11, "bound to " + owner_of(seen.owner) + ", and its cell to " + owner_of(c.owner));
  std::vector<std::string> wrong_beside;
  beside(v.cell, seen, c, &wrong_beside);
  for (std::string& what : wrong_beside) is(14, std::move(what));
  const StandingValue known = standing(v.cell);
  // What was read is of one moment, if the slot still is the same.
  if (slot_word(index) != word) return;
  if (known.file != 0) {
    const auto [at, fresh] = files_.try_emplace(known.file, Named{index, v.cell, seen.hash, word});
    const Named& other = at->second;
    if (!fresh && slot_word(other.slot) == other.word && standing(other.cell).file == known.file &&
        standing(v.cell).file == known.file && slot_word(index) == word)
      is(14, "has the file " + pool::hex(known.file) + " of " + the_slot(other.slot, other.word));
  }
  if ((known.flags & kSpilled) != 0 && key) report_.spilled.push_back({*key, known.file});
  for (const auto& [invariant, what] : wrong)
    suspect(invariant,
            the_slot(index, word) + (key ? the_key(*key) : "") + ", " + the_cell(v.cell, cell) + ": " + what);
  if (key && is_mark(*key)) {
    ++report_.marks;
  } else {
    ++report_.names;
  }
  named_.push_back({index, v.cell, seen.hash, word});
}

// What is known of a value beside its cell: of this life from before a slot names it, and of no other until none does.
void Look::beside(uint32_t index, const Body& seen, const CellValue& v, std::vector<std::string>* wrong) {
  const auto is = [&](std::string what) { wrong->push_back(std::move(what)); };
  if (!memory_.has(offsets::kUsesAt + uint64_t{index} * sizeof(Use))) return is("nothing is known beside it");
  const Use& use = reinterpret_cast<const Use*>(file_ + offsets::kUsesAt)[index];
  const Pair word = use.standing.load();
  const StandingValue known = StandingValue::of(word);
  const uint64_t claim = use.claim.load(std::memory_order_seq_cst);
  const uint64_t bytes = use.bytes.load(std::memory_order_relaxed);
  if (known.life != v.life) return is("what is known beside it is of life " + number(known.life));
  if ((word.lo >> 8 & 0xff) > static_cast<uint64_t>(Policy::kPin) ||
      (word.lo & 0xff & ~uint64_t{kSpilled | kWritten | kReadBack}) != 0 || (word.lo >> 16 & 0xffff) != 0)
    is("no policy and flags are " + pool::hex(word.lo & 0xffffffff));
  if (known.file != 0 &&
      (known.file >> 32 >= kCells || static_cast<uint32_t>(known.file) == 0 ||
       static_cast<uint32_t>(known.file) > CellValue::of(cell_if_any(static_cast<uint32_t>(known.file >> 32))).life))
    is("no cell ever wrote its file " + pool::hex(known.file));
  if (claim != 0) {
    if (const std::string out = owner(claim); !out.empty()) is("claimed, and " + out);
  }
  if ((known.flags & kSpilled) != 0) {
    if (known.file == 0) is("on disk, and no file has it");
    if (seen.parts != 0) is("on disk, and " + number(seen.parts) + " blocks in memory");
    if (seen.owner != 0) is("on disk, and bound");
    return;
  }
  uint64_t sum = 0;
  for (const Part& p : parts_of(seen)) {
    const auto extent = p.block < arena_.pages() ? arena_.extent(p.block) : std::nullopt;
    sum += extent ? extent->length : 0;
  }
  // One that came back may have longer blocks: whole pages.
  if (bytes > sum) is("of " + number(bytes) + " bytes, and its blocks have " + number(sum));
}

// Two slots that both still are what they were have been so at one moment.
void Look::twice() {
  const auto both = [&](const Named& a, const Named& b) {
    return slot_word(a.slot) == a.word && slot_word(b.slot) == b.word;
  };
  const auto pairs = [&](auto same, auto what) {
    for (size_t i = 1; i < named_.size() && !enough(); ++i) {
      if (same(named_[i - 1], named_[i]) && both(named_[i - 1], named_[i])) what(named_[i - 1], named_[i]);
    }
  };
  std::sort(named_.begin(), named_.end(), [](const Named& a, const Named& b) { return a.cell < b.cell; });
  pairs([](const Named& a, const Named& b) { return a.cell == b.cell; },
        [&](const Named& a, const Named& b) {
          suspect(11, the_slot(b.slot, b.word) + ": names the cell of " + the_slot(a.slot, a.word));
        });
  std::sort(named_.begin(), named_.end(), [](const Named& a, const Named& b) { return a.hash < b.hash; });
  pairs(
      [&](const Named& a, const Named& b) {
        if (a.hash != b.hash || a.cell == b.cell) return false;
        const auto first = key_of(body(a.cell)), second = key_of(body(b.cell));
        return first && second && *first == *second;
      },
      [&](const Named& a, const Named& b) {
        const auto key = key_of(body(b.cell));
        suspect(11, the_slot(b.slot, b.word) + (key ? the_key(*key) : "") + ": the same key as " +
                        the_slot(a.slot, a.word));
      });
}

// ---- cells

void Look::cells() {
  each(offsets::kWordsAt, sizeof(CellWord), kCells, [&](uint32_t index) {
    if (const Pair word = cell_word(index); word != Pair{}) cell(index, word);
  });
}

// Empty, or what is wrong with an owner.
std::string Look::owner(uint64_t owner) const {
  const uint64_t next = arena_.header().next_incarnation.load(std::memory_order_seq_cst);
  if ((owner & 0xfff) < pool::kMaxLeases && owner >> 12 != 0 && owner >> 12 < next) return "";
  return "no lease was ever " + owner_of(owner);
}

void Look::cell(uint32_t index, Pair word) {
  const CellValue v = CellValue::of(word);
  const auto self = [&] { return the_cell(index, word); };
  const auto still = [&] { return cell_word(index) == word; };
  if (index >= pool::marked(head().cells_used, kCells))
    suspect(10, self() + ": beyond cells_used " + number(head().cells_used.load()) + ", where no sweep looks");
  const Body seen = body(index);
  if (v.state == CellState::kFree) {
    const Body empty;
    if (v.owner != 0) suspect(10, self() + ": a free cell is nobody's");
    if (std::memcmp(static_cast<const void*>(&seen), static_cast<const void*>(&empty), sizeof seen) != 0 && still())
      suspect(10, self() + ": a free cell's body is zero");
    return;
  }
  ++report_.cells;
  if (v.state > CellState::kReleasing) {
    suspect(10, self() + ": state " + number(static_cast<uint64_t>(v.state)) + ", expected 0 to 5");
    return;
  }
  if (v.life == 0) suspect(10, self() + ": a cell in use has a life");
  if (v.state == CellState::kStanding) {
    if (v.owner != 0) suspect(10, self() + ": a standing cell is nobody's");
  } else if (const std::string wrong = owner(v.owner); !wrong.empty()) {
    suspect(10, self() + ": " + wrong);
  }
  const bool stands = v.state == CellState::kStanding || v.state == CellState::kBound;
  if (stands && !referred(index, v.life, seen.hash) && still())
    suspect(11, self() + ": no slot names it where the hash " + pool::hex(seen.hash) + " leads");
  if (at_rest_ && !stands) suspect(13, self() + ": between two states at rest");
  if (at_rest_ && v.state == CellState::kBound && !arena_.is_copy()) {
    const auto slot = static_cast<uint32_t>(v.owner & 0xfff);
    if (slot < pool::kMaxLeases && (arena_.lease(slot).word.load() != pool::lease_word(v.owner >> 12) ||
                                    pool::Membership::dead(arena_, pool::kNobody, slot)))
      suspect(13, self() + ": a bound name, and its owner is dead");
  }
  // Whatever its state: tickets are written down before they become a name's, and stay so until the last was given up.
  std::vector<Part> all = parts_of(seen);
  if (seen.overflow.nonce != 0) all.push_back(seen.overflow);
  for (const Part& p : all) {
    if (p.nonce == 0 || p.ticket >= pool::kTickets) continue;
    const auto [at, fresh] = kept_.try_emplace(issue_of(p.ticket, p.nonce), index);
    if (!fresh && stands && still())
      suspect(12, self() + ": " + the_part(p) + " is listed " +
                      (at->second == index ? "twice" : "by cell " + number(at->second) + " too"));
  }
}

bool Look::referred(uint32_t cell, uint32_t life, uint64_t hash) const {
  for (uint32_t level = levels(); level-- > 0;) {
    for (uint32_t i = 0; i < kWindow; ++i) {
      const SlotValue v = SlotValue::of(slot_if_any(slot_index(hash, level, i)));
      if (v.state == SlotState::kEmpty) break;
      if (v.state == SlotState::kNamed && v.cell == cell && v.life == life) return true;
    }
  }
  return false;
}

// ---- what they keep alive

// Empty, or why that does not keep its block alive.
std::string Look::part(const Part& part) const {
  if (part.block >= arena_.pages() || part.ticket >= pool::kTickets)
    return the_part(part) + ": no such block or ticket";
  const Pair ticket = arena_.ticket(part.ticket).value.load();
  const TicketValue t = TicketValue::of(ticket);
  if (t.sender != TicketValue::kName || t.nonce != part.nonce || t.block != part.block)
    return the_part(part) + " is not out for it: " + words(ticket) + " = block " + number(t.block) + ", sender " +
           pool::hex(t.sender) + ", nonce " + number(t.nonce);
  const Pair block = arena_.block(part.block).value.load();
  const BlockValue b = BlockValue::of(block);
  if (!b.live || b.generation != part.generation)
    return the_part(part) + ": the block is " + words(block) + " = generation " + number(b.generation) +
           (b.live ? ", live" : ", free");
  return "";
}

// What the overflow block holds; nothing when it does not live or is too short. Its pages are there: it is a name's.
std::optional<std::string_view> Look::overflow(const Body& body) const {
  if (!part(body.overflow).empty()) return std::nullopt;
  const auto extent = arena_.extent(body.overflow.block);
  if (!extent || extent->offset > data_.size() || extent->length > data_.size() - extent->offset ||
      overflow_bytes(body) > extent->length) {
    return std::nullopt;
  }
  return std::string_view(reinterpret_cast<const char*>(data_.data()) + extent->offset, extent->length);
}

std::optional<std::string> Look::key_of(const Body& body) const {
  if (body.key_bytes > kMaxKey || body.text_bytes > kMaxText || body.parts > kMaxParts) return std::nullopt;
  if (fits(body)) return std::string(reinterpret_cast<const char*>(body.text), body.key_bytes);
  const auto bytes = overflow(body);
  if (!bytes) return std::nullopt;
  return std::string(bytes->substr(list_bytes(body), body.key_bytes));
}

std::vector<Part> Look::parts_of(const Body& body) const {
  std::vector<Part> parts;
  if (body.parts == 0 || body.parts > kMaxParts) return parts;
  parts.push_back(body.first);
  if (body.parts == 1) return parts;
  // A list that is still being written may have a ticket that is not the name's yet.
  const auto extent = body.overflow.block < arena_.pages() ? arena_.extent(body.overflow.block) : std::nullopt;
  const BlockValue b = extent ? BlockValue::of(arena_.block(body.overflow.block).value.load()) : BlockValue{};
  if (!b.live || b.generation != body.overflow.generation || extent->length < list_bytes(body) ||
      extent->offset + extent->length > data_.size()) {
    return parts;
  }
  const std::byte* list = data_.data() + extent->offset;
  for (uint32_t i = 1; i < body.parts; ++i) {
    Part part;
    std::memcpy(&part, list + (i - 1) * sizeof(Part), sizeof part);
    parts.push_back(part);
  }
  return parts;
}

// A name's ticket that no cell lists is nobody's to give up: its block would live for ever.
void Look::orphans(const std::vector<uint32_t>& tickets) {
  for (const uint32_t index : tickets) {
    if (enough()) return;
    const Pair word = arena_.ticket(index).value.load();
    const TicketValue t = TicketValue::of(word);
    if (t.sender != TicketValue::kName || kept_.contains(issue_of(index, t.nonce))) continue;
    suspect(12, "ticket " + number(index) + " " + words(word) + " = block " + number(t.block) + ", nonce " +
                    number(t.nonce) + ": a name's, and no cell lists it");
  }
}

}  // namespace

std::string CatalogueReport::first() const {
  if (violations.empty()) return "";
  return "invariant " + std::to_string(violations[0].invariant) + ": " + violations[0].what;
}

Result<CatalogueName> catalogue_name(int catalogue, uint64_t at) {
  auto size = os::file_size(catalogue);
  if (!size) return std::move(size.status());
  if (at == 0 ? *size != offsets::kTotal : *size < at + offsets::kTotal)
    return Status(Code::kInvalid, "not a torchshm catalogue, or one of another version");
  auto file = os::Mapping::map(os::Mapping::Kind::kReadOnly, catalogue, sizeof(Header), at);
  if (!file) return std::move(file.status());
  const Header& header = *reinterpret_cast<const Header*>(file->data());
  if (header.magic != kMagic) return Status(Code::kInvalid, "not a torchshm catalogue");
  return CatalogueName{header.pool_id, std::string(header.name, ::strnlen(header.name, sizeof header.name))};
}

Result<CatalogueReport> check_catalogue(int catalogue, const pool::Arena& arena, bool at_rest, uint64_t at) {
  auto named = catalogue_name(catalogue, at);
  if (!named) return std::move(named.status());
  if (named->pool_id != arena.header().pool_id) return Status(Code::kForeign, "the catalogue belongs to another pool");
  auto file = os::Mapping::map(os::Mapping::Kind::kReadOnly, catalogue, offsets::kTotal, at);
  if (!file) return std::move(file.status());
  auto data = os::Mapping::map(os::Mapping::Kind::kReadOnly, arena.data_fd(), uint64_t{arena.chunks()} * pool::kChunk,
                               arena.data_at());
  if (!data) return std::move(data.status());
  return pool::insist<CatalogueReport>([&] { return Look(catalogue, at, file->data(), arena, *data, at_rest).look(); },
                                       at_rest);
}

}  // namespace torchshm::store
