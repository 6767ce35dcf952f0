#include "store/catalogue.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/memfd.h"
#include "pool/mark.h"

namespace torchshm::store {
namespace {

using pool::Handle;
using pool::Mode;
using pool::Pair;

constexpr uint32_t kBatch = 64;  // cells looked at before the table grows; arbitrary
constexpr uint64_t kMost = uint64_t{1} << 60;

// Not secret and not seeded: the same in every process and every build.
uint64_t hash_of(std::string_view text) {
  constexpr uint64_t kMultiplier = 0x9fb21c651e98df25;
  uint64_t hash = text.size() * 0x9e3779b97f4a7c15;
  while (!text.empty()) {
    uint64_t word = 0;
    const size_t n = std::min<size_t>(text.size(), sizeof word);
    std::memcpy(&word, text.data(), n);
    text.remove_prefix(n);
    hash = (hash ^ word) * kMultiplier;
    hash ^= hash >> 32;
  }
  hash *= kMultiplier;
  return hash ^ hash >> 29;
}

uint32_t bell_of(uint64_t hash) { return static_cast<uint32_t>(hash >> 20) % kBells; }

// The i-th slot of a level in which a name with this hash may be.
uint32_t slot_index(uint64_t hash, uint32_t level, uint32_t i) {
  return level_start(level) + ((static_cast<uint32_t>(hash) + i) & (level_size(level) - 1));
}

bool is_mark(std::string_view name) { return !name.empty() && name[0] == '\0'; }

Part part_of(const Handle& handle) { return {handle.block, handle.ticket, handle.generation, handle.nonce}; }

void pause(int attempt) {
  thread_local std::minstd_rand random(std::random_device{}());
  const int most = 1 << std::min(attempt, 10);
  std::this_thread::sleep_for(std::chrono::microseconds(random() % static_cast<unsigned>(most)));
}

}  // namespace

struct Catalogue::Key {
  explicit Key(std::string_view key) : text(key), hash(hash_of(key)), tag(static_cast<uint32_t>(hash >> 34)) {}
  std::string_view text;
  uint64_t hash;
  uint32_t tag;
};

// ---- the file

Catalogue::Catalogue(pool::Member& member, os::Fd fd, os::FileId id, os::Mapping file)
    : member_(member), fd_(std::move(fd)), id_(id), file_(std::move(file)) {}

Result<std::unique_ptr<Catalogue>> Catalogue::create(pool::Member& member, const std::string& name,
                                                     uint64_t default_ttl, uint64_t place) {
  if (name.empty() || name.size() >= sizeof(Header::name))
    return Status(Code::kInvalid, "a store's name has 1 to " + std::to_string(sizeof(Header::name) - 1) + " bytes");
  auto fd = os::create_memfd("torchshm-" + name + "-catalogue", offsets::kTotal);
  if (!fd) return std::move(fd.status());
  auto file = os::Mapping::map(os::Mapping::Kind::kShared, fd->get(), offsets::kTotal);
  if (!file) return std::move(file.status());
  auto id = os::file_id(fd->get());
  if (!id) return std::move(id.status());
  std::unique_ptr<Catalogue> catalogue(new Catalogue(member, fd.take(), *id, file.take()));
  Header& header = catalogue->header();
  header.magic = kMagic;
  header.version = kVersion;
  header.layout_hash = kLayoutHash;
  header.pool_id = member.pool_id();
  header.size = offsets::kTotal;
  header.created = os::real_time();
  header.place = place;
  std::memcpy(header.name, name.c_str(), name.size() + 1);
  header.levels.store(1, std::memory_order_relaxed);
  header.default_ttl.store(default_ttl, std::memory_order_relaxed);
  TORCHSHM_POINT("catalogue.before_ready");
  header.ready.store(1, std::memory_order_release);  // publishes the header to whoever attaches
  return catalogue;
}

Result<std::unique_ptr<Catalogue>> Catalogue::attach(pool::Member& member, os::Fd fd) {
  auto size = os::check_memfd(fd.get());
  if (!size) return std::move(size.status());
  if (*size != offsets::kTotal) {
    return Status(Code::kInvalid,
                  "not a torchshm catalogue, or one of another version; use the same version of "
                  "torchshm in every process");
  }
  auto file = os::Mapping::map(os::Mapping::Kind::kShared, fd.get(), offsets::kTotal);
  if (!file) return std::move(file.status());
  auto id = os::file_id(fd.get());
  if (!id) return std::move(id.status());
  std::unique_ptr<Catalogue> catalogue(new Catalogue(member, std::move(fd), *id, file.take()));
  const Header& header = catalogue->header();
  if (header.ready.load(std::memory_order_acquire) != 1 || header.magic != kMagic)
    return Status(Code::kInvalid, "not a torchshm catalogue");
  if (header.version != kVersion || header.layout_hash != kLayoutHash) {
    return Status(Code::kInvalid, "the store was made by another version of torchshm (catalogue layout " +
                                      std::to_string(header.version) + "); use the same version in every process");
  }
  if (header.pool_id != member.pool_id()) return Status(Code::kForeign, "the catalogue belongs to another pool");
  return catalogue;
}

std::optional<Catalogue::Stamp> Catalogue::stamp_of(int fd, const std::string& name) {
  const auto size = os::check_memfd(fd);
  if (!size.ok() || *size != offsets::kTotal) return std::nullopt;
  auto mapped = os::Mapping::map(os::Mapping::Kind::kReadOnly, fd, sizeof(Header));
  if (!mapped) return std::nullopt;
  const Header& header = *reinterpret_cast<const Header*>(mapped->data());
  if (header.ready.load(std::memory_order_acquire) != 1 || header.magic != kMagic) return std::nullopt;
  if (std::strncmp(header.name, name.c_str(), sizeof header.name) != 0) return std::nullopt;
  return Stamp{header.pool_id, header.created, header.place};
}

Result<os::Fd> Catalogue::reopen() const {
  auto description = os::reopen(fd_.get());
  if (description && is_file(description->get())) return description;
  if (!description && description.status().error() != ENOENT) return description;
  return Status(Code::kUnsupported, "this process has closed the store's descriptors");
}

bool Catalogue::is_file(int fd) const {
  const auto id = os::file_id(fd);
  return id.ok() && *id == id_;
}

uint64_t Catalogue::hash(std::string_view name) { return hash_of(name); }

uint32_t Catalogue::cells_used() const { return pool::marked(header().cells_used, kCells); }
uint32_t Catalogue::levels() const { return std::max(pool::marked(header().levels, kLevels), 1U); }

// Word by word and relaxed: a cell may be written while somebody reads it who then finds that its slot has moved.
Body Catalogue::read_body(uint32_t cell) const {
  const auto* from = reinterpret_cast<const std::atomic<uint64_t>*>(file_.data() + offsets::kBodiesAt) +
                     uint64_t{cell} * (sizeof(Body) / sizeof(uint64_t));
  std::array<uint64_t, sizeof(Body) / sizeof(uint64_t)> words;
  for (size_t i = 0; i < words.size(); ++i) words[i] = from[i].load(std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_acquire);
  Body body;
  std::memcpy(static_cast<void*>(&body), words.data(), sizeof body);
  // Copied once, then checked: nothing below goes beyond these.
  body.key_bytes = std::min(body.key_bytes, kMaxKey);
  body.text_bytes = static_cast<uint32_t>(std::min<uint64_t>(body.text_bytes, kMaxText));
  body.parts = std::min(body.parts, kMaxParts);
  return body;
}

void Catalogue::write_body(uint32_t cell, const Body& body) {
  auto* to = reinterpret_cast<std::atomic<uint64_t>*>(file_.data() + offsets::kBodiesAt) +
             uint64_t{cell} * (sizeof(Body) / sizeof(uint64_t));
  std::array<uint64_t, sizeof(Body) / sizeof(uint64_t)> words;
  std::memcpy(words.data(), static_cast<const void*>(&body), sizeof body);
  for (size_t i = 0; i < words.size(); ++i) to[i].store(words[i], std::memory_order_relaxed);  // published by a slot
}

bool Catalogue::change_cell(uint32_t cell, CellValue& found, CellState state, uint64_t owner) {
  CellValue next = found;
  next.state = state;
  next.owner = owner;
  ++next.step;
  Pair expected = found.pair();
  const bool done = word(cell).value.exchange_if(expected, next.pair());
  found = done ? next : CellValue::of(expected);
  return done;
}

bool Catalogue::change_slot(Place& place, SlotState state, uint32_t cell, uint32_t life) {
  SlotValue next = place.value;
  next.state = state;
  next.cell = cell;
  next.life = life;
  ++next.sequence;
  Pair expected = place.value.pair();
  const bool done = slot(place.index).value.exchange_if(expected, next.pair());
  place.value = done ? next : SlotValue::of(expected);
  return done;
}

// ---- search

bool Catalogue::same_key(const Body& body, const Key& key) {
  if (body.hash != key.hash || body.key_bytes != key.text.size()) return false;
  if (body.key_bytes + body.text_bytes <= kInline) return std::memcmp(body.text, key.text.data(), key.text.size()) == 0;
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return false;  // gone meanwhile
  const uint64_t at = uint64_t{body.parts > 0 ? body.parts - 1 : 0} * sizeof(Part);
  const bool same =
      at + key.text.size() <= view->length && std::memcmp(view->data + at, key.text.data(), key.text.size()) == 0;
  member_.release(view->block, Mode::kReadWrite);
  return same;
}

std::optional<Catalogue::Found> Catalogue::search(const Key& key, SlotState state, uint32_t except) {
  // The largest level first: most names are there.
  for (uint32_t level = levels(); level-- > 0;) {
    for (uint32_t i = 0; i < kWindow; ++i) {
      Found found;
      found.place.index = slot_index(key.hash, level, i);
      if (found.place.index == except) continue;
      for (;;) {
        found.place.value = SlotValue::of(slot(found.place.index).value.load());
        const SlotValue& value = found.place.value;
        if (value.state != state || value.tag != key.tag || value.cell >= kCells) break;
        found.body = read_body(value.cell);
        const bool same = same_key(found.body, key);
        // The cell stays as it is while the slot does.
        if (SlotValue::of(slot(found.place.index).value.load()) != value) continue;
        if (same) return found;
        break;
      }
      if (found.place.value.state == SlotState::kEmpty) break;
    }
  }
  return std::nullopt;
}

std::optional<Catalogue::Found> Catalogue::look(const Key& key) {
  for (;;) {
    auto found = search(key, SlotState::kNamed);
    if (!found || found->body.expires == 0 || found->body.expires > os::boot_time()) return found;
    if (replace(*found, nullptr)) header().expired.fetch_add(1, std::memory_order_relaxed);
  }
}

std::optional<Entry> Catalogue::entry_of(const Body& body) {
  Entry entry;
  entry.created = body.created;
  entry.expires = body.expires;
  entry.owner = body.owner;
  entry.pid = body.pid;
  entry.blocks.reserve(body.parts);
  if (body.parts > 0) entry.blocks.push_back({body.first.block, body.first.generation});
  const bool fits = body.key_bytes + body.text_bytes <= kInline;
  const char* text = reinterpret_cast<const char*>(body.text);
  if (fits) {
    entry.key.assign(text, body.key_bytes);
    entry.text.assign(text + body.key_bytes, body.text_bytes);
  }
  if (fits && body.parts <= 1) return entry;
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return std::nullopt;
  const uint64_t list = uint64_t{body.parts > 0 ? body.parts - 1 : 0} * sizeof(Part);
  const bool whole = list + (fits ? 0 : uint64_t{body.key_bytes} + body.text_bytes) <= view->length;
  if (whole) {
    for (uint32_t i = 1; i < body.parts; ++i) {
      Part part;
      std::memcpy(&part, view->data + (i - 1) * sizeof(Part), sizeof part);
      entry.blocks.push_back({part.block, part.generation});
    }
    if (!fits) {
      text = reinterpret_cast<const char*>(view->data + list);
      entry.key.assign(text, body.key_bytes);
      entry.text.assign(text + body.key_bytes, body.text_bytes);
    }
  }
  member_.release(view->block, Mode::kReadWrite);
  if (!whole) return std::nullopt;
  return entry;
}

Result<Entry> Catalogue::find(std::string_view name) {
  const Key key(name);
  // Its overflow block may go between the search and the look; then the name has gone or changed, and is looked for again. Bounded, in
  // case the file is corrupt.
  for (int attempt = 0; attempt < 1000; ++attempt) {
    const auto found = look(key);
    if (!found) return Status(Code::kMissing, "no such name");
    if (auto entry = entry_of(found->body)) return std::move(*entry);
  }
  return Status(Code::kCorrupt, "the name's entry contradicts itself");
}

bool Catalogue::contains(std::string_view key) { return look(Key(key)).has_value(); }

// ---- save

std::optional<std::pair<uint32_t, CellValue>> Catalogue::claim_cell() {
  const uint64_t me = member_.identity();
  const auto take = [&](uint32_t cell) -> std::optional<std::pair<uint32_t, CellValue>> {
    CellValue found = cell_value(cell);
    if (found.state != CellState::kFree) return std::nullopt;
    ++found.life;
    CellValue before = found;
    --before.life;
    CellValue next = found;
    next.state = CellState::kMaking;
    next.owner = me;
    ++next.step;
    Pair expected = before.pair();
    if (!word(cell).value.exchange_if(expected, next.pair())) return std::nullopt;
    return std::make_pair(cell, next);
  };
  // Relaxed: where to begin is a matter of taste.
  uint32_t cursor = cursor_.load(std::memory_order_relaxed);
  for (uint32_t i = 0; i < kBatch && cells_used() > 0; ++i) {
    const uint32_t cell = (cursor + i) % cells_used();
    if (auto taken = take(cell)) {
      cursor_.store(cell + 1, std::memory_order_relaxed);
      return taken;
    }
  }
  for (;;) {
    const uint32_t used = cells_used();
    if (used == kCells) break;
    pool::raise(header().cells_used, std::min(used + kBatch, kCells));
    TORCHSHM_POINT("save.cells_raised");
    for (uint32_t cell = used; cell < std::min(used + kBatch, kCells); ++cell) {
      if (auto taken = take(cell)) {
        cursor_.store(cell + 1, std::memory_order_relaxed);
        return taken;
      }
    }
  }
  for (uint32_t cell = 0; cell < kCells; ++cell) {
    if (auto taken = take(cell)) return taken;
  }
  return std::nullopt;
}

// Issues a ticket for everything, writes down each before the next, and makes them the name's when all is written.
Status Catalogue::fill(uint32_t cell, const Key& key, std::string_view text, const std::vector<uint32_t>& blocks,
                       const SaveOptions& options) {
  Body body;
  body.hash = key.hash;
  body.created = os::real_time();
  // A bound name lives as long as its owner, not as long as the store's data.
  const uint64_t standard = options.bound ? 0 : header().default_ttl.load(std::memory_order_relaxed);
  const uint64_t ttl = options.ttl != 0 ? options.ttl : standard;
  if (ttl != 0) body.expires = os::boot_time() + std::min(ttl, kMost);
  body.owner = options.bound ? member_.identity() : 0;
  body.pid = member_.pid();
  body.key_bytes = static_cast<uint32_t>(key.text.size());
  body.text_bytes = static_cast<uint32_t>(text.size());
  const bool fits = key.text.size() + text.size() <= kInline;
  if (fits) {
    std::memcpy(body.text, key.text.data(), key.text.size());
    std::memcpy(body.text + key.text.size(), text.data(), text.size());
  }
  write_body(cell, body);
  TORCHSHM_POINT("save.body");

  std::vector<Handle> handles;
  handles.reserve(blocks.size() + 1);
  const uint64_t list = blocks.size() > 1 ? (blocks.size() - 1) * sizeof(Part) : 0;
  std::optional<pool::Member::View> overflow;
  Status failed;
  if (list != 0 || !fits) {
    auto made = member_.allocate(list + (fits ? 0 : key.text.size() + text.size()), false, true);
    if (!made) return std::move(made.status());
    overflow = *made;
    if (!fits) {
      std::memcpy(made->data + list, key.text.data(), key.text.size());
      std::memcpy(made->data + list + key.text.size(), text.data(), text.size());
    }
    if (auto handle = member_.issue(made->block)) {
      handles.push_back(*handle);
      body.overflow = part_of(*handle);
      write_body(cell, body);
      TORCHSHM_POINT("save.overflow");
    } else {
      failed = std::move(handle.status());
    }
  }
  for (size_t i = 0; failed && i < blocks.size(); ++i) {
    auto handle = member_.issue(blocks[i]);
    if (!handle) {
      failed = std::move(handle.status());
      break;
    }
    handles.push_back(*handle);
    const Part part = part_of(*handle);
    if (i == 0) {
      body.first = part;
    } else {
      std::memcpy(overflow->data + (i - 1) * sizeof(Part), &part, sizeof part);
    }
    body.parts = static_cast<uint32_t>(i + 1);
    std::atomic_thread_fence(std::memory_order_release);  // the list before its length
    write_body(cell, body);
    TORCHSHM_POINT("save.part");
  }
  for (const Handle& handle : handles) {
    if (!failed) break;
    if (!member_.keep(handle)) failed = Status(Code::kFull, "a full pool has taken back what was being saved");
    TORCHSHM_POINT("save.kept");
  }
  if (overflow) member_.release_made(overflow->block);
  return failed;
}

std::optional<Catalogue::Place> Catalogue::claim_slot(uint32_t cell, uint32_t life, const Key& key) {
  for (;;) {
    const uint32_t used = levels();
    for (uint32_t level = used; level-- > 0;) {
      for (uint32_t i = 0; i < kWindow; ++i) {
        Place place;
        place.index = slot_index(key.hash, level, i);
        place.value = SlotValue::of(slot(place.index).value.load());
        if (place.value.state != SlotState::kEmpty && place.value.state != SlotState::kGone) continue;
        SlotValue next{SlotState::kClaimed, key.tag, cell, life, place.value.sequence + 1};
        Pair expected = place.value.pair();
        if (!slot(place.index).value.exchange_if(expected, next.pair())) continue;
        place.value = next;
        return place;
      }
      if (level + 1 == used && used < kLevels) break;  // the next level is empty; better than the crowded ones below
    }
    if (used == kLevels) return std::nullopt;
    pool::raise(header().levels, used + 1);
    TORCHSHM_POINT("save.level_raised");
  }
}

// Whoever claims a slot for a name looks, after that, at all others: for rivals, whose claims it ends, and for the name. Of two rivals one
// at least sees the other, so no two can both succeed; and one that is ended tries again.
Status Catalogue::publish(uint32_t cell, uint32_t life, const Key& key, bool overwrite) {
  for (int attempt = 0;; ++attempt) {
    if (const auto found = look(key)) {
      if (!overwrite) return Status(Code::kExists, "the name is taken");
      const SlotValue successor{SlotState::kNamed, key.tag, cell, life, 0};
      if (replace(*found, &successor)) return {};
      continue;
    }
    auto place = claim_slot(cell, life, key);
    if (!place) return Status(Code::kFull, "the catalogue has no room for a further name");
    TORCHSHM_POINT("save.claimed");
    while (auto rival = search(key, SlotState::kClaimed, place->index)) {
      (void)change_slot(rival->place, SlotState::kGone, 0, 0);
      TORCHSHM_POINT("save.rival_ended");
    }
    if (search(key, SlotState::kNamed)) {
      (void)change_slot(*place, SlotState::kGone, 0, 0);  // or a rival has done it
      TORCHSHM_POINT("save.unclaimed");
      continue;
    }
    if (change_slot(*place, SlotState::kNamed, cell, life)) return {};
    pause(attempt);
  }
}

Status Catalogue::save(std::string_view name, std::string_view text, const std::vector<uint32_t>& blocks,
                       const SaveOptions& options) {
  if (name.empty() || name.size() > kMaxKey)
    return Status(Code::kInvalid, "a name has 1 to " + std::to_string(kMaxKey) + " bytes");
  if (blocks.size() > kMaxParts || text.size() > kMaxText)
    return Status(Code::kInvalid, "too many parts for one name; save them under several");
  const Key key(name);
  // Before the work: most that fail, fail here.
  if (!options.overwrite && look(key)) return Status(Code::kExists, "the name is taken");
  auto claimed = claim_cell();
  if (!claimed && sweep() > 0) claimed = claim_cell();
  if (!claimed) return Status(Code::kFull, "the catalogue has no room for a further name");
  auto [cell, mine] = *claimed;
  TORCHSHM_POINT("save.cell");
  Status status = fill(cell, key, text, blocks, options);
  TORCHSHM_POINT("save.filled");
  if (status) status = publish(cell, mine.life, key, options.overwrite);
  TORCHSHM_POINT("save.published");
  if (!status) {
    if (change_cell(cell, mine, CellState::kReleasing, mine.owner)) release_cell(cell);
    return status;
  }
  // Unless somebody has taken the name away already.
  (void)change_cell(cell, mine, options.bound ? CellState::kBound : CellState::kStanding,
                    options.bound ? mine.owner : 0);
  TORCHSHM_POINT("save.standing");
  header().saved.fetch_add(1, std::memory_order_relaxed);
  ring(name);
  return {};
}

// ---- remove

// Marks the cell first, so that it is known whose work it is when this process dies between the exchange and the release. Marks are taken
// over from anyone: whoever finds that the slot has let go of the cell, by its own exchange or another's, lets the cell go.
bool Catalogue::replace(const Found& found, const SlotValue* successor) {
  Place place = found.place;
  const uint32_t cell = place.value.cell, life = place.value.life;
  const uint64_t me = member_.identity();
  CellValue marked = cell_value(cell);
  do {
    if (marked.life != life || marked.state == CellState::kFree || marked.state == CellState::kReleasing) return false;
  } while (!change_cell(cell, marked, CellState::kLeaving, me));
  TORCHSHM_POINT("replace.marked");
  const bool done = successor != nullptr ? change_slot(place, SlotState::kNamed, successor->cell, successor->life)
                                         : change_slot(place, SlotState::kGone, 0, 0);
  TORCHSHM_POINT("replace.exchanged");
  // A sweeper moves the sequence alone.
  const bool still =
      !done && place.value.state == SlotState::kNamed && place.value.cell == cell && place.value.life == life;
  if (!still) let_go(cell, life);
  return done;
}

// REQUIRES: no slot names the cell any more in this life.
void Catalogue::let_go(uint32_t cell, uint32_t life) {
  const uint64_t me = member_.identity();
  CellValue found = cell_value(cell);
  do {
    if (found.life != life || found.state == CellState::kFree || found.state == CellState::kReleasing) return;
  } while (!change_cell(cell, found, CellState::kReleasing, me));
  TORCHSHM_POINT("replace.releasing");
  release_cell(cell);
}

// REQUIRES: the cell is kReleasing and this process's. The overflow block goes last, since it lists the others.
void Catalogue::release_cell(uint32_t cell) {
  Body body = read_body(cell);
  const auto give_up = [&](const Part& part) {
    if (part.nonce != 0) member_.give_up({member_.pool_id(), part.generation, part.block, part.ticket, part.nonce});
    TORCHSHM_POINT("release.part");
  };
  if (body.overflow.nonce != 0) {
    if (auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite)) {
      for (uint32_t i = 1; i < body.parts && i * sizeof(Part) <= view->length; ++i) {
        Part part;
        std::memcpy(&part, view->data + (i - 1) * sizeof(Part), sizeof part);
        give_up(part);
      }
      member_.release(view->block, Mode::kReadWrite);
    }
  }
  if (body.parts > 0) give_up(body.first);
  give_up(body.overflow);
  write_body(cell, Body{});
  TORCHSHM_POINT("release.cleared");
  CellValue found = cell_value(cell);
  if (found.state == CellState::kReleasing) (void)change_cell(cell, found, CellState::kFree, 0);
}

bool Catalogue::remove(std::string_view name) {
  const Key key(name);
  while (const auto found = look(key)) {
    if (!replace(*found, nullptr)) continue;
    header().removed.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  return false;
}

// ---- all of them

std::optional<Catalogue::Place> Catalogue::referring(uint32_t cell, uint32_t life, uint64_t hash) const {
  for (uint32_t level = levels(); level-- > 0;) {
    for (uint32_t i = 0; i < kWindow; ++i) {
      const uint32_t index = slot_index(hash, level, i);
      const SlotValue value = SlotValue::of(slot(index).value.load());
      if (value.state == SlotState::kEmpty) break;
      if (value.state != SlotState::kGone && value.cell == cell && value.life == life) return Place{index, value};
    }
  }
  return std::nullopt;
}

void Catalogue::each(std::string_view prefix, const std::function<void(Entry)>& visit) {
  const uint64_t now = os::boot_time();
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    for (;;) {
      const CellValue found = cell_value(cell);
      if (found.state == CellState::kFree || found.state == CellState::kReleasing) break;
      const Body body = read_body(cell);
      const auto place = referring(cell, found.life, body.hash);
      if (!place || place->value.state != SlotState::kNamed || (body.expires != 0 && body.expires <= now)) break;
      auto entry = entry_of(body);
      if (SlotValue::of(slot(place->index).value.load()) != place->value) continue;
      const bool shown = entry && (!is_mark(entry->key) || is_mark(prefix));
      if (shown && std::string_view(entry->key).substr(0, prefix.size()) == prefix) visit(std::move(*entry));
      break;
    }
  }
}

uint64_t Catalogue::size() {
  uint64_t names = 0;
  const uint64_t now = os::boot_time();
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    const CellValue found = cell_value(cell);
    if (found.state == CellState::kFree || found.state == CellState::kReleasing) continue;
    const Body body = read_body(cell);
    if (body.expires != 0 && body.expires <= now) continue;
    // Marks are short: they lie in the cell itself.
    if (body.key_bytes + body.text_bytes <= kInline && body.key_bytes > 0 && body.text[0] == 0) continue;
    if (found.state == CellState::kStanding || found.state == CellState::kBound) {
      ++names;
    } else if (const auto place = referring(cell, found.life, body.hash)) {
      names += place->value.state == SlotState::kNamed ? 1 : 0;
    }
  }
  return names;
}

// A dead owner's cell. First it becomes this process's, so that one of several sweepers goes on.
void Catalogue::finish(uint32_t cell, CellValue found) {
  const uint64_t me = member_.identity();
  if (found.state == CellState::kReleasing) {
    if (change_cell(cell, found, CellState::kReleasing, me)) release_cell(cell);
    return;
  }
  if (!change_cell(cell, found, CellState::kLeaving, me)) return;
  TORCHSHM_POINT("sweep.marked");
  const Body body = read_body(cell);
  for (;;) {
    auto place = referring(cell, found.life, body.hash);
    if (!place) {
      let_go(cell, found.life);
      return;
    }
    const bool stays = place->value.state == SlotState::kNamed && body.owner == 0;
    // Also where the name stays: an exchange of the slot that somebody prepared before this process marked the cell must fail, or its cell
    // would be nobody's work.
    const bool moved =
        stays ? change_slot(*place, SlotState::kNamed, cell, found.life) : change_slot(*place, SlotState::kGone, 0, 0);
    TORCHSHM_POINT("sweep.moved");
    if (moved && stays) {
      (void)change_cell(cell, found, CellState::kStanding, 0);
      return;
    }
  }
}

uint32_t Catalogue::sweep() {
  uint32_t finished = 0;
  const uint64_t now = os::boot_time();
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    const CellValue found = cell_value(cell);
    if (found.state == CellState::kFree) continue;
    if (found.state == CellState::kStanding) {
      const Body body = read_body(cell);
      if (body.expires == 0 || body.expires > now) continue;
      const auto place = referring(cell, found.life, body.hash);
      if (place && place->value.state == SlotState::kNamed && replace({*place, body}, nullptr)) {
        header().expired.fetch_add(1, std::memory_order_relaxed);
        ++finished;
      }
      continue;
    }
    if (!member_.gone(found.owner)) continue;
    finish(cell, found);
    ++finished;
  }
  return finished;
}

// ---- waiting

namespace {

Bell& bell_at(const os::Mapping& file, uint64_t hash) {
  return reinterpret_cast<Bell*>(file.data() + offsets::kBellsAt)[bell_of(hash)];
}

}  // namespace

uint32_t Catalogue::bell(std::string_view key) {
  return bell_at(file_, hash_of(key)).rung.load(std::memory_order_acquire);
}

bool Catalogue::wait(std::string_view key, uint32_t seen, uint64_t ns) {
  Bell& bell = bell_at(file_, hash_of(key));
  // Before the sleep, which looks at `rung` once more: who rings moves that first and looks at this second.
  bell.waiting.store(1, std::memory_order_seq_cst);
  return os::wait(bell.rung, seen, ns) != os::Wait::kInterrupted;
}

void Catalogue::ring(std::string_view key) {
  Bell& bell = bell_at(file_, hash_of(key));
  bell.rung.fetch_add(1, std::memory_order_seq_cst);
  if (bell.waiting.exchange(0, std::memory_order_seq_cst) != 0) os::wake_all(bell.rung);
}

}  // namespace torchshm::store
