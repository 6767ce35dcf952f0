#include "store/store_file.h"

#include <cstring>

#include "base/failpoint.h"
#include "os/directory.h"
#include "os/futex.h"
#include "os/mapped_file.h"
#include "os/memfd.h"
#include "pool/mark.h"
#include "store/backing.h"

namespace torchshm::store {

using pool::kChunk;

Result<std::unique_ptr<StoreFile>> StoreFile::open(const std::string& path, bool any_state) {
  auto fd = os::open_to_read(path);
  if (!fd) return std::move(fd.status());
  auto facts = os::file_facts(fd->get());
  if (!facts) return std::move(facts.status());
  if (!facts->regular) return Status(Code::kInvalid, path + " is no ordinary file");
  auto locked = os::lock_file(fd->get(), true, os::Patience::kNone);
  if (!locked) return std::move(locked.status());
  if (!*locked)
    return Status(Code::kMissing, path +
                                      " is being served: connect to the store by its name, or read what its snapshot() "
                                      "writes");
  facts = os::file_facts(fd->get());  // as it is while it is locked
  if (!facts) return std::move(facts.status());
  auto superblock = read_superblock(fd->get(), path);
  if (!superblock) return std::move(superblock.status());
  const Superblock& s = **superblock;
  if (Status valid = check_superblock(s, facts->size, false, path); !valid) return valid;
  const bool clean = s.state.load() == kClean;
  const auto boot = os::boot_id();
  const bool same_boot = boot[0] == s.boot[0] && boot[1] == s.boot[1];
  if (!clean && os::any_locked(fd->get(), 0, pool::kMaxLeases))
    return Status(
        Code::kMissing,
        path +
            " has no service, but living processes still use it, as this one would that held arrays of it at close(): "
            "end them, or serve it again by torchshm.start(file=) and connect to it by its name");
  if (!clean && !same_boot && !any_state)
    return Status(Code::kCorrupt,
                  path +
                      " was in use when the machine went down, and may be half written: `torchshm check "
                      "--repair " +
                      path + "` keeps what store.sync() has recorded and is whole");

  std::unique_ptr<StoreFile> file(new StoreFile);
  const pool::Regions regions{s.control_at, s.control_size, s.data_at, s.data_size};
  auto again = os::duplicate(fd->get());
  if (!again) return std::move(again.status());
  auto arena = pool::Arena::inspect_in(again.take(), regions);
  if (!arena) return std::move(arena.status());
  file->arena_.emplace(arena.take());
  const uint64_t used = uint64_t{file->arena_->chunks_used()} * kChunk;
  if (facts->size < s.data_at + used)
    return Status(Code::kCorrupt, path + " has been cut short: it has " + std::to_string(facts->size) + " bytes, and " +
                                      std::to_string(s.data_at + used) + " are in use");
  auto catalogue = os::Mapping::map(os::Mapping::Kind::kReadOnly, fd->get(), offsets::kTotal, s.catalogue_at, false);
  if (!catalogue) return std::move(catalogue.status());
  file->catalogue_ = catalogue.take();
  const Header& header = file->header();
  if (header.ready.load(std::memory_order_acquire) != 1 || header.magic != kMagic ||
      header.pool_id != file->arena_->header().pool_id)
    return Status(Code::kCorrupt, path + ": its catalogue is damaged");
  if (used > 0) {
    auto data = os::Mapping::map(os::Mapping::Kind::kReadOnly, fd->get(), used, s.data_at);
    if (!data) return std::move(data.status());
    file->data_ = data.take();
  }
  file->fd_ = fd.take();
  file->data_at_ = s.data_at;
  file->bytes_ = facts->size;
  file->trusted_ = clean || same_boot;
  file->clock_ = same_boot ? s.clock : static_cast<int64_t>(os::real_time()) - static_cast<int64_t>(os::boot_time());
  return file;
}

uint64_t StoreFile::now() const { return os::boot_time() + static_cast<uint64_t>(clock_); }
uint64_t StoreFile::data_used() const { return data_.size(); }
std::string StoreFile::name() const { return {header().name, ::strnlen(header().name, sizeof header().name)}; }
uint32_t StoreFile::levels() const { return std::max(pool::marked(header().levels, kLevels), 1U); }

Result<StoreFile::Bytes> StoreFile::block(uint32_t index, uint64_t generation) const {
  if (index >= arena_->chunks_used() * pool::kPagesPerChunk)
    return Status(Code::kStale, "there is no such block in the file");
  const auto value = pool::BlockValue::of(arena_->block(index).value.load());
  const auto extent = arena_->extent(index);
  if (!value.live || value.generation != generation || !extent || extent->offset + extent->length > data_.size())
    return Status(Code::kStale, "the block is not that of the name any more");
  return Bytes{data_.data() + extent->offset, extent->length};
}

Result<StoreFile::Copy> StoreFile::copy(uint32_t index, uint64_t generation) const {
  auto bytes = block(index, generation);
  if (!bytes) return std::move(bytes.status());
  const auto at = static_cast<uint64_t>(bytes->data - data_.data());
  const uint64_t first = at / pool::kPage * pool::kPage;
  auto pages = os::Mapping::map(os::Mapping::Kind::kPrivate, fd_.get(), at - first + bytes->length, data_at_ + first);
  if (!pages) return std::move(pages.status());
  return Copy{pages.take(), at - first, bytes->length};
}

// The overflow block of a cell, if it has what the cell says.
std::optional<Entry> StoreFile::entry_of(const Body& body) const {
  if (whole_inside(body)) return entry_from(body, nullptr, 0);
  auto overflow = block(body.overflow.block, body.overflow.generation);
  if (!overflow) return std::nullopt;
  return entry_from(body, overflow->data, overflow->length);
}

// What is bound to a process has gone with it; its mark may still be there.
bool StoreFile::shown(const Body& body) const { return body.owner == 0 && (body.expires == 0 || body.expires > now()); }

std::optional<Found> StoreFile::look(const Key& key) const {
  auto found = search_index(catalogue_.data(), levels(), key, SlotState::kNamed, kSlots, [&](const Body& body) {
    if (!may_have_key(body, key)) return false;
    if (fits(body)) return has_key(body, key, nullptr, 0);
    auto overflow = block(body.overflow.block, body.overflow.generation);
    return overflow.ok() && has_key(body, key, overflow->data, overflow->length);
  });
  if (found && !shown(found->body)) return std::nullopt;
  return found;
}

Result<Entry> StoreFile::find(std::string_view name) const {
  const Key key(name);
  const auto found = look(key);
  if (!found) return Status(Code::kMissing, "no such name");
  if (auto entry = entry_of(found->body)) {
    entry->slot = found->place.index;
    entry->cell = found->place.value.cell;
    entry->life = found->place.value.life;
    entry->policy = standing_of(catalogue_.data(), entry->cell).policy;
    return std::move(*entry);
  }
  return Status(Code::kCorrupt, "the name's entry contradicts itself");
}

void StoreFile::each(std::string_view prefix, const std::function<void(Entry)>& visit) const {
  for (uint32_t cell = 0, used = pool::marked(header().cells_used, kCells); cell < used; ++cell) {
    const CellValue word = CellValue::of(word_of(catalogue_.data(), cell).value.load());
    if (word.state == CellState::kFree || word.state == CellState::kReleasing) continue;
    const Body body = load_bounded_body(catalogue_.data(), cell);
    if (!shown(body)) continue;
    const auto place = find_referring(catalogue_.data(), levels(), cell, word.life, body.hash);
    if (!place || place->value.state != SlotState::kNamed) continue;
    auto entry = entry_of(body);
    if (entry && !is_mark(entry->key) && std::string_view(entry->key).substr(0, prefix.size()) == prefix)
      visit(std::move(*entry));
  }
}

uint64_t StoreFile::size() const {
  uint64_t names = 0;
  each("", [&](const Entry&) { ++names; });
  return names;
}

}  // namespace torchshm::store
