#include "store/backing.h"

#include <algorithm>
#include <cstring>

#include "base/failpoint.h"
#include "os/directory.h"
#include "os/futex.h"
#include "os/mapped_file.h"
#include "os/memfd.h"
#include "os/memory.h"
#include "os/process.h"
#include "os/socket.h"

namespace torchshm::store {
namespace {

constexpr int kAttempts = 100;  // at a path that leads to another file each time

std::string version_of(uint32_t file, uint32_t pool, uint32_t store) {
  return std::to_string(file) + "." + std::to_string(pool) + "." + std::to_string(store);
}

Status usable(const os::FileFacts& facts, const std::string& path) {
  if (!facts.regular) return Status(Code::kInvalid, path + " is no ordinary file");
  if (facts.system == os::FileSystem::kHugePages)
    return Status(Code::kUnsupported,
                  path +
                      " lies on hugetlbfs, whose pages are too large for a store's file; keep the file on a disk "
                      "or on tmpfs, or give hugepages= to a store in memory");
  if (facts.system == os::FileSystem::kNetwork)
    return Status(
        Code::kUnsupported,
        path + " lies on a network file system, where other machines' locks are not seen; keep it on a local disk");
  return {};
}

}  // namespace

Status check_superblock(const Superblock& s, uint64_t size, bool whole, const std::string& path) {
  if (s.magic != kFileMagic) return Status(Code::kInvalid, path + " is not the file of a torchshm store");
  const bool newer = s.version > kFileVersion || s.pool_version > pool::kVersion || s.store_version > kVersion;
  if (s.version != kFileVersion || s.pool_version != pool::kVersion || s.store_version != kVersion)
    return Status(Code::kUnsupported, path + " has layout " + version_of(s.version, s.pool_version, s.store_version) +
                                          ", and this torchshm reads layout " +
                                          version_of(kFileVersion, pool::kVersion, kVersion) + ": use " +
                                          (newer ? "a newer torchshm" : "the older torchshm that made it"));
  if (s.pool_hash != pool::kLayoutHash || s.store_hash != kLayoutHash)
    return Status(Code::kUnsupported, path + " was made by another build of torchshm, whose tables have other sizes");
  if (s.ready.load(std::memory_order_acquire) != 1)
    return Status(Code::kCorrupt,
                  path + " was never finished: its maker has died; torchshm.start(file=) makes it anew");
  const uint64_t chunks = s.data_size / pool::kChunk;
  if (s.catalogue_at != kCatalogueAt || s.catalogue_size != offsets::kTotal || s.control_at != kControlAt ||
      chunks < 1 || chunks > uint64_t{1} << 22 || s.data_size % pool::kChunk != 0 ||
      s.control_size != pool::Offsets::of(chunks).total ||
      s.data_at != (kControlAt + s.control_size + pool::kChunk - 1) / pool::kChunk * pool::kChunk ||
      s.size != s.data_at + s.data_size)
    return Status(Code::kCorrupt, path + ": the superblock contradicts itself");
  if (size < (whole ? s.size : s.data_at))
    return Status(Code::kCorrupt,
                  path + " has been cut short: it has " + std::to_string(size) + " bytes of " + std::to_string(s.size));
  return {};
}

Result<std::unique_ptr<Superblock>> read_superblock(int fd, const std::string& path) {
  auto made = std::make_unique<Superblock>();
  auto read = os::read_at(fd, made.get(), sizeof(Superblock), 0);
  if (!read) return std::move(read.status());
  if (!*read) return Status(Code::kInvalid, path + " is not the file of a torchshm store");
  return made;
}

Status Backing::map_superblock() {
  auto mapped = os::Mapping::map(os::Mapping::Kind::kShared, fd_.get(), pool::kPage, 0, false);
  if (!mapped) return std::move(mapped.status());
  map_ = mapped.take();
  return {};
}

Result<std::unique_ptr<Backing>> Backing::open(const std::string& path) {
  std::unique_ptr<Backing> backing(new Backing);
  backing->path_ = path;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    auto lock = os::open_or_create(path);
    if (!lock) return std::move(lock.status());
    auto facts = os::file_facts(lock->get());
    if (!facts) return std::move(facts.status());
    if (Status fits = usable(*facts, path); !fits) return fits;
    auto locked = os::lock_file(lock->get(), false, os::Patience::kNone);
    if (!locked) return std::move(locked.status());
    if (!*locked)
      return Status(Code::kExists,
                    path +
                        " is being served by another store's service, or read by torchshm.open(): stop that "
                        "(torchshm stop NAME), or connect to it by its name");
    TORCHSHM_POINT("backing.locked");
    if (!os::is_at(path, lock->get())) continue;  // replaced or removed meanwhile
    // What lies beside it is found by any of its names.
    backing->path_ = os::path_of(lock->get());
    // The lock's description is the service's alone: clients, who share the other one, would keep it locked.
    auto shared = os::reopen(lock->get());
    if (!shared) return std::move(shared.status());
    backing->lock_ = lock.take();
    backing->fd_ = shared.take();
    facts = os::file_facts(backing->fd_.get());
    if (!facts) return std::move(facts.status());
    backing->fresh_ = facts->size == 0;
    if (!backing->fresh_) {
      auto superblock = read_superblock(backing->fd_.get(), path);
      if (!superblock) return std::move(superblock.status());
      // One that was begun by this version and not finished holds nothing.
      backing->fresh_ = (*superblock)->magic == kFileMagic && (*superblock)->ready.load() != 1 &&
                        (*superblock)->version == kFileVersion;
      Status valid = check_superblock(**superblock, facts->size, true, path);
      if (!backing->fresh_ && !valid) return valid;
      if (backing->fresh_) {
        if (Status emptied = os::set_length(backing->fd_.get(), 0); !emptied) return emptied;
      }
    }
    if (!backing->fresh_) {
      if (Status mapped = backing->map_superblock(); !mapped) return mapped;
    }
    return backing;
  }
  return Status(Code::kSystem, path + " is another file whenever it is opened");
}

Result<std::unique_ptr<Backing>> Backing::receive(os::Fd fd, uint32_t served_by) {
  std::unique_ptr<Backing> backing(new Backing);
  backing->path_ = os::path_of(fd.get());
  auto facts = os::file_facts(fd.get());
  if (!facts) return std::move(facts.status());
  if (Status fits = usable(*facts, backing->path_); !fits) return fits;
  if ((facts->uid != os::effective_user() && facts->uid != served_by && facts->uid != 0) || (facts->mode & 2) != 0)
    return Status(Code::kInvalid, backing->path_ + " belongs to somebody else, or everybody may write to it");
  auto superblock = read_superblock(fd.get(), backing->path_);
  if (!superblock) return std::move(superblock.status());
  if (Status valid = check_superblock(**superblock, facts->size, true, backing->path_); !valid) return valid;
  backing->fd_ = std::move(fd);
  if (Status mapped = backing->map_superblock(); !mapped) return mapped;
  return backing;
}

Result<uint64_t> Backing::layout(uint64_t limit) {
  if (limit == 0) limit = std::min(os::memory_allowed() / 2, os::free_space(fd_.get()) / 2);
  limit = std::max(limit, pool::kChunk);
  const pool::Regions regions = pool::Regions::of(limit, kControlAt);
  // Known for what it is before it has a length: one that is not finished can be told from somebody else's file.
  Superblock made{};
  made.magic = kFileMagic;
  made.version = kFileVersion;
  made.pool_version = pool::kVersion;
  made.store_version = kVersion;
  made.pool_hash = pool::kLayoutHash;
  made.store_hash = kLayoutHash;
  made.catalogue_at = kCatalogueAt;
  made.catalogue_size = offsets::kTotal;
  made.control_at = regions.control_at;
  made.control_size = regions.control_size;
  made.data_at = regions.data_at;
  made.data_size = regions.data_size;
  made.size = regions.data_at + regions.data_size;
  std::array<std::byte, pool::kPage> page{};
  std::memcpy(page.data(), static_cast<const void*>(&made), sizeof made);
  if (Status written = os::write_at(fd_.get(), page.data(), page.size(), 0); !written) {
    if (written.error() == ENOSPC) return Status(Code::kFull, "the file system of " + path_ + " is full", ENOSPC);
    return written;
  }
  TORCHSHM_POINT("backing.begun");
  if (Status sized = os::set_length(fd_.get(), made.size); !sized) return sized;
  TORCHSHM_POINT("backing.sized");
  if (Status mapped = map_superblock(); !mapped) return mapped;
  return limit;
}

void Backing::finish(uint64_t pool_id) {
  superblock().pool_id = pool_id;
  begin_boot();
  TORCHSHM_POINT("backing.before_ready");
  superblock().ready.store(1, std::memory_order_release);
  fresh_ = false;
}

void Backing::abandon() {
  if (fresh_ && os::is_at(path_, fd_.get())) os::remove_file(path_);
}

bool Backing::in_use() const { return os::any_locked(lock_.get(), 0, pool::kMaxLeases); }

bool Backing::rebooted() const {
  const auto now = os::boot_id();
  return superblock().boot[0] != now[0] || superblock().boot[1] != now[1];
}

bool Backing::damaged_by_power_loss() const { return rebooted() && superblock().state.load() != kClean; }

void Backing::begin_boot() {
  // The clock first: a death in between, and the next start does it again.
  superblock().clock = static_cast<int64_t>(os::real_time()) - static_cast<int64_t>(os::boot_time());
  TORCHSHM_POINT("backing.clock");
  const auto now = os::boot_id();
  superblock().boot[0] = now[0];
  superblock().boot[1] = now[1];
}

Status Backing::sync(uint32_t state) {
  Status written = os::sync_file(fd_.get());
  if (!written) return Status(Code::kSystem, path_ + " could not be written out: " + written.what(), written.error());
  TORCHSHM_POINT("backing.written");
  superblock().synced = os::real_time();
  superblock().state.store(state, std::memory_order_release);
  written = os::sync_file(fd_.get());
  if (!written) {
    superblock().state.store(kOpen, std::memory_order_release);
    return written;
  }
  // Where it is now; one that was removed is in none.
  const std::string now = where();
  return os::is_at(now, fd_.get()) ? os::sync_directory_of(now) : Status();
}

// On the disk before the change is: after a loss of power it would pass for clean.
void Backing::reopen_clean() {
  superblock().state.store(kOpen, std::memory_order_release);
  (void)os::sync_file(fd_.get());
}

pool::Regions Backing::regions() const {
  const Superblock& s = superblock();
  return {s.control_at, s.control_size, s.data_at, s.data_size};
}

}  // namespace torchshm::store
