#include "store/catalogue.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/memfd.h"
#include "pool/mark.h"
#include "store/body.h"
#include "store/eviction.h"
#include "store/key.h"
#include "store/spill.h"

namespace torchshm::store {

using pool::Mode;
using pool::Pair;

// ---- the file

Catalogue::Catalogue(pool::Member& member, os::Fd fd, os::FileId id, os::Mapping file)
    : member_(member),
      fd_(std::move(fd)),
      id_(id),
      file_(std::move(file)),
      spill_(std::make_unique<Spill>(*this)),
      eviction_(std::make_unique<Eviction>(*this, *spill_)) {}

Catalogue::~Catalogue() = default;

Result<std::unique_ptr<Catalogue>> Catalogue::create(pool::Member& member, const std::string& name,
                                                     const Settings& settings) {
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
  header.place = settings.place;
  std::memcpy(header.name, name.c_str(), name.size() + 1);
  header.levels.store(1, std::memory_order_relaxed);
  header.default_ttl.store(settings.default_ttl, std::memory_order_relaxed);
  header.policy.store(static_cast<uint32_t>(settings.policy), std::memory_order_relaxed);
  header.patience.store(settings.patience, std::memory_order_relaxed);
  header.clock.store(1, std::memory_order_relaxed);
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

Body Catalogue::read_body(uint32_t cell) const {
  Body body = load_body(file_.data(), cell);
  // Copied once, then checked: nothing below goes beyond these.
  body.key_bytes = std::min(body.key_bytes, kMaxKey);
  body.text_bytes = static_cast<uint32_t>(std::min<uint64_t>(body.text_bytes, kMaxText));
  body.parts = std::min(body.parts, kMaxParts);
  return body;
}

void Catalogue::write_body(uint32_t cell, const Body& body) { store_body(file_.data(), cell, body); }

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
  if (fits(body)) return std::memcmp(body.text, key.text.data(), key.text.size()) == 0;
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return false;  // gone meanwhile
  const uint64_t at = list_bytes(body);
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

std::optional<Entry> Catalogue::entry_of(const Found& found) {
  const Body& body = found.body;
  Entry entry;
  entry.slot = found.place.index;
  entry.cell = found.place.value.cell;
  entry.life = found.place.value.life;
  const StandingValue known = standing(entry.cell);
  if (known.life != entry.life) return std::nullopt;  // another value's by now
  entry.policy = known.policy;
  entry.spilled = (known.flags & kSpilled) != 0;
  entry.bytes = use_of(entry.cell).bytes.load(std::memory_order_relaxed);
  entry.created = body.created;
  entry.expires = body.expires;
  entry.owner = body.owner;
  entry.pid = body.pid;
  entry.blocks.reserve(body.parts);
  if (body.parts > 0) entry.blocks.push_back({body.first.block, body.first.generation});
  const bool inside = fits(body);
  const char* text = reinterpret_cast<const char*>(body.text);
  if (inside) {
    entry.key.assign(text, body.key_bytes);
    entry.text.assign(text + body.key_bytes, body.text_bytes);
  }
  if (inside && body.parts <= 1) return entry;
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return std::nullopt;
  const bool whole = overflow_bytes(body) <= view->length;
  if (whole) {
    for (uint32_t i = 1; i < body.parts; ++i) {
      Part part;
      std::memcpy(&part, view->data + (i - 1) * sizeof(Part), sizeof part);
      entry.blocks.push_back({part.block, part.generation});
    }
    if (!inside) {
      text = reinterpret_cast<const char*>(view->data + list_bytes(body));
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
    if (auto entry = entry_of(*found)) return std::move(*entry);
  }
  return Status(Code::kCorrupt, "the name's entry contradicts itself");
}

std::optional<std::string> Catalogue::key_of(const Body& body) {
  if (fits(body)) return std::string(reinterpret_cast<const char*>(body.text), body.key_bytes);
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return std::nullopt;
  std::optional<std::string> key;
  if (overflow_bytes(body) <= view->length)
    key.emplace(reinterpret_cast<const char*>(view->data + list_bytes(body)), body.key_bytes);
  member_.release(view->block, Mode::kReadWrite);
  return key;
}

// ---- where a value is

bool Catalogue::set_policy(std::string_view name, Policy policy) {
  const Key key(name);
  while (const auto found = look(key)) {
    const Place& place = found->place;
    if (!change_standing(place.value.cell, place.value.life, [&](StandingValue& value) { value.policy = policy; }))
      continue;  // replaced, or brought back
    TORCHSHM_POINT("policy.changed");
    // Its successor may have been made before that. While it still stands, it looks itself: see succeed().
    const SlotValue now = SlotValue::of(slot(place.index).value.load());
    if (now.state != SlotState::kNamed || now.cell != place.value.cell || now.life != place.value.life) continue;
    header().policies.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  return false;
}

Result<Entry> Catalogue::load(std::string_view name) {
  auto entry = find(name);
  if (!entry || entry->spilled) return entry;
  // Relaxed: a mistake makes it go a little early or late.
  std::atomic<uint64_t>& used = use_of(entry->cell).used;
  const uint64_t now = header().clock.load(std::memory_order_relaxed);
  if (used.load(std::memory_order_relaxed) != now) used.store(now, std::memory_order_relaxed);
  count(counters().loads);
  return entry;
}

Status Catalogue::restore(std::string_view name, bool alone) {
  for (int attempt = 0; attempt < 1000; ++attempt) {
    auto entry = find(name);
    if (!entry) return entry.code() == Code::kMissing ? Status() : std::move(entry.status());
    if (!entry->spilled) return {};
    Status back = spill_->back(*entry, alone);
    if (back.code() != Code::kStale) return back;
  }
  return Status(Code::kBusy, "the value changes all the time");
}

Result<Catalogue::Writing> Catalogue::hold_for_writing(const Entry& entry) {
  Writing writing(*this);
  // First the flag, then the holds, then a look whether somebody is writing it out: who does that claims it first, and looks at holds and
  // flag afterwards. So one of the two sees the other.
  if (!change_standing(entry.cell, entry.life, [](StandingValue& value) { value.flags |= kWritten; }))
    return Status(Code::kStale, "the name has been replaced");
  TORCHSHM_POINT("writing.flagged");
  for (const Entry::Block& block : entry.blocks) {
    auto view = member_.attach(block.block, block.generation, Mode::kReadWrite);
    if (!view) return std::move(view.status());
    writing.blocks_.push_back(view->block);
  }
  TORCHSHM_POINT("writing.held");
  std::atomic<uint64_t>& claim = use_of(entry.cell).claim;
  uint64_t claimed = claim.load(std::memory_order_seq_cst);
  if (claimed != 0) {
    if (!member_.gone(claimed)) return Status(Code::kBusy, "the value is just being written to disk");
    (void)claim.compare_exchange_strong(claimed, 0, std::memory_order_seq_cst);
  }
  const SlotValue now = SlotValue::of(slot(entry.slot).value.load());
  if (now.state != SlotState::kNamed || now.cell != entry.cell || now.life != entry.life)
    return Status(Code::kStale, "the name has been replaced");
  // Its file is known to be old by the flag; of another name that has the same blocks this process knows nothing. Who holds them besides
  // may be one.
  std::unordered_map<uint32_t, uint32_t> own;  // tickets
  for (const Entry::Block& block : entry.blocks) ++own[block.block];
  if (std::any_of(own.begin(), own.end(), [&](const auto& block) {
        const auto value = pool::BlockValue::of(member_.arena().block(block.first).value.load());
        return value.count > block.second + 1;
      }))
    header().shared_writes.fetch_add(1, std::memory_order_seq_cst);
  return writing;
}

Catalogue::Writing::Writing(Writing&& other) noexcept
    : catalogue_(other.catalogue_), blocks_(std::exchange(other.blocks_, {})) {}

Catalogue::Writing::~Writing() {
  for (const uint32_t block : blocks_) catalogue_->member_.release(block, Mode::kReadWrite);
}

void Catalogue::use(std::unique_ptr<SpillDirectory> directory) { spill_->use(std::move(directory)); }

std::string Catalogue::directory() const {
  if (header().spilling.load(std::memory_order_acquire) == 0) return "";
  return {header().directory, ::strnlen(header().directory, sizeof(Header::directory))};
}

// REQUIRES: shorter than the field.
void Catalogue::set_directory(const std::string& path) {
  std::memcpy(header().directory, path.c_str(), path.size() + 1);
  header().spilling.store(1, std::memory_order_release);
}

int Catalogue::directory_fd() const { return spill_->directory_fd(); }

void Catalogue::leave_directory() { spill_->leave(); }

uint64_t Catalogue::make_room(uint64_t bytes) { return eviction_->make_room(bytes); }
uint64_t Catalogue::write_ahead() { return eviction_->write_ahead(); }
uint32_t Catalogue::sweep_files() { return spill_->sweep(); }
std::string Catalogue::trouble() const { return spill_->trouble(); }

// ---- statistics

Counters& Catalogue::counters() const {
  return reinterpret_cast<Counters*>(file_.data() + offsets::kCountersAt)[member_.membership().slot()];
}

// With a single writer, or as good as.
void Catalogue::count(std::atomic<uint64_t>& counter, uint64_t by) {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

void Catalogue::count_wait() { count(counters().room_waits); }

Catalogue::Totals Catalogue::totals() const {
  Totals sum;
  for (uint32_t i = 0; i < member_.arena().slots_used(); ++i) {
    const Counters& of = reinterpret_cast<const Counters*>(file_.data() + offsets::kCountersAt)[i];
    sum.loads += of.loads.load(std::memory_order_relaxed);
    sum.restores += of.restores.load(std::memory_order_relaxed);
    sum.restored_bytes += of.restored_bytes.load(std::memory_order_relaxed);
    sum.spills += of.spills.load(std::memory_order_relaxed);
    sum.spilled_bytes += of.spilled_bytes.load(std::memory_order_relaxed);
    sum.written += of.written.load(std::memory_order_relaxed);
    sum.written_bytes += of.written_bytes.load(std::memory_order_relaxed);
    sum.evictions += of.evictions.load(std::memory_order_relaxed);
    sum.spill_errors += of.spill_errors.load(std::memory_order_relaxed);
    sum.room_waits += of.room_waits.load(std::memory_order_relaxed);
  }
  if (header().spilling.load(std::memory_order_relaxed) == 0) return sum;
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    const CellValue found = cell_value(cell);
    if (found.state != CellState::kStanding || (standing(cell).flags & kSpilled) == 0) continue;
    ++sum.names_on_disk;
    sum.bytes_on_disk += use_of(cell).bytes.load(std::memory_order_relaxed);
  }
  return sum;
}

bool Catalogue::contains(std::string_view key) { return look(Key(key)).has_value(); }

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
      auto entry = entry_of({*place, body});
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
    if (fits(body) && body.key_bytes > 0 && body.text[0] == 0) continue;
    if (found.state == CellState::kStanding || found.state == CellState::kBound) {
      ++names;
    } else if (const auto place = referring(cell, found.life, body.hash)) {
      names += place->value.state == SlotState::kNamed ? 1 : 0;
    }
  }
  return names;
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
