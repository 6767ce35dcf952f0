#include "store/catalogue.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/mapped_file.h"
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

std::string Catalogue::file_name(const std::string& store) { return "torchshm-" + store + "-catalogue"; }

Result<std::unique_ptr<Catalogue>> Catalogue::create(pool::Member& member, const std::string& name,
                                                     const Settings& settings) {
  if (name.empty() || name.size() >= sizeof(Header::name))
    return Status(Code::kInvalid, "a store's name has 1 to " + std::to_string(sizeof(Header::name) - 1) + " bytes");
  auto fd = os::create_memfd(file_name(name), offsets::kTotal);
  if (!fd) return std::move(fd.status());
  auto catalogue = over(member, fd.take(), 0);
  if (catalogue) (*catalogue)->write_header(name, settings);
  return catalogue;
}

Result<std::unique_ptr<Catalogue>> Catalogue::over(pool::Member& member, os::Fd fd, uint64_t at) {
  auto file = os::Mapping::map(os::Mapping::Kind::kShared, fd.get(), offsets::kTotal, at, at == 0);
  if (!file) return std::move(file.status());
  auto id = os::file_id(fd.get());
  if (!id) return std::move(id.status());
  return std::unique_ptr<Catalogue>(new Catalogue(member, std::move(fd), *id, file.take()));
}

void Catalogue::write_header(const std::string& name, const Settings& settings) {
  Header& made = header();
  made.magic = kMagic;
  made.version = kVersion;
  made.layout_hash = kLayoutHash;
  made.pool_id = member_.pool_id();
  made.size = offsets::kTotal;
  made.created = os::real_time();
  made.place = settings.place;
  std::memcpy(made.name, name.c_str(), name.size() + 1);
  made.levels.store(1, std::memory_order_relaxed);
  made.default_ttl.store(settings.default_ttl, std::memory_order_relaxed);
  made.policy.store(static_cast<uint32_t>(settings.policy), std::memory_order_relaxed);
  made.patience.store(settings.patience, std::memory_order_relaxed);
  made.clock.store(1, std::memory_order_relaxed);
  TORCHSHM_POINT("catalogue.before_ready");
  made.ready.store(1, std::memory_order_release);  // publishes the header to whoever attaches
}

Result<std::unique_ptr<Catalogue>> Catalogue::attach(pool::Member& member, os::Fd fd) {
  auto size = os::check_memfd(fd.get());
  if (!size) return std::move(size.status());
  if (*size != offsets::kTotal) {
    return Status(Code::kInvalid,
                  "not a torchshm catalogue, or one of another version; use the same version of "
                  "torchshm in every process");
  }
  auto catalogue = over(member, std::move(fd), 0);
  if (!catalogue) return catalogue;
  if (Status valid = (*catalogue)->validate(); !valid) return valid;
  return catalogue;
}

Status Catalogue::validate() const {
  if (header().ready.load(std::memory_order_acquire) != 1 || header().magic != kMagic)
    return Status(Code::kInvalid, "not a torchshm catalogue");
  if (header().version != kVersion || header().layout_hash != kLayoutHash) {
    return Status(Code::kInvalid, "the store was made by another version of torchshm (catalogue layout " +
                                      std::to_string(header().version) + "); use the same version in every process");
  }
  if (header().pool_id != member_.pool_id()) return Status(Code::kForeign, "the catalogue belongs to another pool");
  return {};
}

// ---- in a file

Result<std::unique_ptr<Catalogue>> Catalogue::create_in(pool::Member& member, std::shared_ptr<Backing> backing,
                                                        const std::string& name, const Settings& settings) {
  auto fd = backing->share();
  if (!fd) return std::move(fd.status());
  auto catalogue = over(member, fd.take(), kCatalogueAt);
  if (!catalogue) return catalogue;
  Catalogue& made = **catalogue;
  made.backing_ = std::move(backing);
  if (Status reserved = made.reserve(0, offsets::kSlotsAt); !reserved) return reserved;
  if (Status reserved = made.reserve_level(0); !reserved) return reserved;
  made.write_header(name, settings);
  return catalogue;
}

Result<std::unique_ptr<Catalogue>> Catalogue::attach_in(pool::Member& member, std::shared_ptr<Backing> backing) {
  auto fd = backing->share();
  if (!fd) return std::move(fd.status());
  auto catalogue = over(member, fd.take(), kCatalogueAt);
  if (!catalogue) return catalogue;
  if (Status valid = (*catalogue)->validate(); !valid) return valid;
  (*catalogue)->clock_ = backing->clock();
  (*catalogue)->cells_reserved_.store((*catalogue)->cells_used(), std::memory_order_relaxed);
  (*catalogue)->backing_ = std::move(backing);
  return catalogue;
}

std::string Catalogue::name() const { return {header().name, ::strnlen(header().name, sizeof header().name)}; }

void Catalogue::rename(const std::string& name, uint64_t place) {
  std::memset(header().name, 0, sizeof header().name);
  std::memcpy(header().name, name.c_str(), std::min(name.size(), sizeof header().name - 1));
  header().place = place;
}

Status Catalogue::reserve_all() {
  const auto table = [&](uint64_t from, uint64_t to) {
    return os::reserve_holes(fd_.get(), kCatalogueAt, from / pool::kPage * pool::kPage,
                             std::min(offsets::align(to), offsets::kTotal));
  };
  const uint64_t slots = level_start(levels() - 1) + uint64_t{level_size(levels() - 1)}, cells = cells_used();
  Status done = table(0, offsets::kSlotsAt + sizeof(Slot) * slots);
  if (done) done = table(offsets::kWordsAt, offsets::kWordsAt + sizeof(CellWord) * cells);
  if (done) done = table(offsets::kBodiesAt, offsets::kBodiesAt + sizeof(Body) * cells);
  if (done) done = table(offsets::kUsesAt, offsets::kUsesAt + sizeof(Use) * cells);
  if (done.code() == Code::kFull)
    return Status(Code::kFull, "the file system of " + backing_->path() + " is full", done.error());
  return done.code() == Code::kUnsupported ? Status() : std::move(done);
}

uint64_t Catalogue::now() const { return os::boot_time() + static_cast<uint64_t>(clock_); }

Status Catalogue::reserve(uint64_t from, uint64_t to) {
  from = from / pool::kPage * pool::kPage;
  to = std::min(offsets::align(to), offsets::kTotal);
  Status done(Code::kUnsupported, "");
  if (is_file(fd_.get())) done = os::reserve(fd_.get(), kCatalogueAt + from, to - from);
  if (done.code() == Code::kUnsupported) done = os::reserve_mapped(file_.data() + from, to - from);
  TORCHSHM_POINT("reserve.catalogue");
  if (done.code() == Code::kFull)
    return Status(Code::kFull, "the file system of " + backing_->path() + " is full", done.error());
  return done;
}

// Every table with an entry for each cell.
Status Catalogue::reserve_cells(uint32_t end) {
  constexpr uint32_t kStep = 1024;  // 272 KiB; arbitrary
  // Relaxed: a mark of this process, and what is reserved twice costs a system call.
  uint32_t from = cells_reserved_.load(std::memory_order_relaxed);
  if (!backing_ || end <= from) return {};
  const uint32_t to = std::min((end + kStep - 1) / kStep * kStep, kCells);
  Status done = reserve(offsets::kWordsAt + sizeof(CellWord) * uint64_t{from},
                        offsets::kWordsAt + sizeof(CellWord) * uint64_t{to});
  if (done)
    done =
        reserve(offsets::kBodiesAt + sizeof(Body) * uint64_t{from}, offsets::kBodiesAt + sizeof(Body) * uint64_t{to});
  if (done)
    done = reserve(offsets::kUsesAt + sizeof(Use) * uint64_t{from}, offsets::kUsesAt + sizeof(Use) * uint64_t{to});
  if (!done) return done;
  while (from < to && !cells_reserved_.compare_exchange_weak(from, to, std::memory_order_relaxed)) {
  }
  return {};
}

Status Catalogue::reserve_level(uint32_t level) {
  if (!backing_ || level >= kLevels) return {};
  const uint64_t at = offsets::kSlotsAt + sizeof(Slot) * uint64_t{level_start(level)};
  return reserve(at, at + sizeof(Slot) * uint64_t{level_size(level)});
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

Body Catalogue::read_body(uint32_t cell) const { return load_bounded_body(file_.data(), cell); }

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
  if (!may_have_key(body, key)) return false;
  if (fits(body)) return has_key(body, key, nullptr, 0);
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return false;  // gone meanwhile
  const bool same = has_key(body, key, view->data, view->length);
  member_.release(view->block, Mode::kReadWrite);
  return same;
}

std::optional<Found> Catalogue::search(const Key& key, SlotState state, uint32_t except) {
  return search_index(file_.data(), levels(), key, state, except,
                      [&](const Body& body) { return same_key(body, key); });
}

std::optional<Found> Catalogue::look(const Key& key) {
  for (;;) {
    auto found = search(key, SlotState::kNamed);
    if (!found || found->body.expires == 0 || found->body.expires > now()) return found;
    if (replace(*found, nullptr)) header().expired.fetch_add(1, std::memory_order_relaxed);
  }
}

std::optional<Entry> Catalogue::entry_of(const Found& found) {
  const Body& body = found.body;
  auto entry = whole_inside(body) ? entry_from(body, nullptr, 0) : entry_apart(body);
  if (!entry) return entry;
  entry->slot = found.place.index;
  entry->cell = found.place.value.cell;
  entry->life = found.place.value.life;
  const StandingValue known = standing(entry->cell);
  if (known.life != entry->life) return std::nullopt;  // another value's by now
  entry->policy = known.policy;
  entry->spilled = (known.flags & kSpilled) != 0;
  entry->bytes = use_of(entry->cell).bytes.load(std::memory_order_relaxed);
  return entry;
}

// Of a body with an overflow block.
std::optional<Entry> Catalogue::entry_apart(const Body& body) {
  auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite);
  if (!view) return std::nullopt;
  auto entry = entry_from(body, view->data, view->length);
  member_.release(view->block, Mode::kReadWrite);
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

bool Catalogue::contains(std::string_view key) { return look(Key(key)).has_value(); }

// ---- all of them

std::optional<Place> Catalogue::referring(uint32_t cell, uint32_t life, uint64_t hash) const {
  return find_referring(file_.data(), levels(), cell, life, hash);
}

// By slots and not by cells: whoever replaces a name, or moves its value to disk or back, gives it another cell and leaves it its slot.
// visit(body) gives false when the block that has the name is gone: the slot has changed then, and is looked at again.
template <class Visit>
void Catalogue::each_named(Visit visit) {
  const uint32_t last = levels() - 1;
  const uint64_t moment = now();
  const uint32_t end = level_start(last) + level_size(last);
  constexpr uint32_t kAhead = 24;  // slots; arbitrary
  for (uint32_t index = 0; index < end; ++index) {
    if (index + kAhead < end) {
      const SlotValue next = SlotValue::of(slot(index + kAhead).value.load());
      if (next.state == SlotState::kNamed && next.cell < kCells) prefetch_body(file_.data(), next.cell);
    }
    const Slot& at = slot(index);
    SlotValue value = SlotValue::of(at.value.load());
    for (bool done = false; !done && value.state == SlotState::kNamed && value.cell < kCells;) {
      TORCHSHM_POINT("names.slot_seen");
      const Body body = read_body(value.cell);
      const bool expired = body.expires != 0 && body.expires <= moment;
      done = SlotValue::of(at.value.load()) == value && (expired || visit(body));
      const SlotValue now = SlotValue::of(at.value.load());
      done = done || now == value;
      value = now;
    }
  }
}

std::vector<std::string> Catalogue::keys(std::string_view prefix) {
  std::vector<std::string> found;
  each_named([&](const Body& body) {
    std::optional<std::string> key = key_of(body);
    if (key && !key->empty() && (!is_mark(*key) || is_mark(prefix)) &&
        std::string_view(*key).substr(0, prefix.size()) == prefix)
      found.push_back(std::move(*key));
    return key.has_value();
  });
  std::sort(found.begin(), found.end());
  // Removed and saved again meanwhile, into another slot.
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

uint64_t Catalogue::size() {
  uint64_t names = 0;
  each_named([&](const Body& body) {
    if (body.key_bytes == 0) return true;
    // Only what lies in a block takes a look there.
    const std::optional<std::string> apart =
        fits(body) ? std::string(1, static_cast<char>(body.text[0])) : key_of(body);
    names += apart && !is_mark(*apart) ? 1 : 0;
    return apart.has_value();
  });
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
