#include "store/spill_file.h"

#include <atomic>
#include <cerrno>
#include <optional>
#include <utility>

#include "base/failpoint.h"
#include "os/directory.h"
#include "os/futex.h"
#include "os/memory.h"
#include "os/process.h"
#include "store/spill_names.h"
#include "store/spill_transfer.h"

namespace torchshm::store {
namespace {

constexpr const char* kAlive = "alive";
constexpr const char* kPersistent = "persistent";
constexpr const char* kUnsynced = "unsynced";  // there: files are left to the page cache
constexpr uint32_t kSticky = 01000, kSetgid = 02000, kGroupWrites = 0020, kOthersWrite = 0002;
// How often something may be swept away under make() before it gives up: arbitrary, twice does not happen by itself.
constexpr int kTries = 100;
constexpr uint64_t kLookAgain = 500'000'000;  // ns between looks at how much memory the machine has left
constexpr uint64_t kToSpare =
    4;  // of what there may be at all, a part: with more than that left the page cache is used
constexpr uint64_t kKeptSpare = 1'000'000'000;  // ns
// Files of so many bytes are read by one call, and copied: a call costs some 30 us, the copy 5.
constexpr uint64_t kAllAtOnce = uint64_t{128} << 10;

// Whether files may stay in the page cache, where they are had again without the disk: memory that the system takes back whenever somebody
// wants it.
bool memory_to_spare() {
  static std::atomic<uint64_t> looked{0};  // when, and in the last bit what was found
  const uint64_t now = os::boot_time();
  uint64_t last = looked.load(std::memory_order_relaxed);
  if (now - last > kLookAgain) {
    const bool spare = os::memory_headroom() >= os::memory_allowed() / kToSpare;
    last = (now & ~uint64_t{1}) | (spare ? 1 : 0);
    looked.store(last, std::memory_order_relaxed);
  }
  return (last & 1) != 0;
}

bool is_missing(const Status& status) { return status.error() == ENOENT; }

Status damaged(const std::string& path, const Status& why) { return Status(Code::kCorrupt, path + " " + why.what()); }

// Where nobody but this user, and whom the store is for, can put something in the place of what we make.
Status check_place(const std::string& dir, const os::FileInfo& info, int64_t group) {
  const uint32_t self = os::effective_user();
  if (info.owner != self && info.owner != 0) {
    return Status(Code::kInvalid, "the directory " + dir + " for spilled values belongs to user " +
                                      std::to_string(info.owner) + "; give one that belongs to you");
  }
  if ((info.mode & kSticky) != 0) return {};  // as /tmp: anybody may add names there, nobody can touch ours
  if ((info.mode & kOthersWrite) != 0) {
    return Status(Code::kInvalid, "others may write to the directory " + dir +
                                      " for spilled values; chmod o-w it, or give a directory of your own");
  }
  const bool ours = info.group == os::effective_group() || (group >= 0 && info.group == static_cast<uint64_t>(group));
  if ((info.mode & kGroupWrites) != 0 && !ours) {
    return Status(Code::kInvalid, "group " + std::to_string(info.group) + " may write to the directory " + dir +
                                      " for spilled values; chmod g-w it, or give a directory of your own");
  }
  return {};
}

// The directory that the user named; made where it is missing.
Result<os::Fd> open_place(const std::string& dir, int64_t group) {
  const uint32_t mode = group >= 0 ? 0770 : 0700;
  auto made = os::make_directory(dir, mode);
  if (!made) {
    if (!is_missing(made.status())) return std::move(made.status());
    return Status(Code::kInvalid, "the directory in which " + dir + " for spilled values should be made does not exist",
                  ENOENT);
  }
  auto place = os::open_directory(dir);
  if (!place) return std::move(place.status());
  if (*made) {
    auto given = os::set_access(place->get(), mode, group);
    if (!given.ok()) return given;
  }
  auto info = os::info_of(place->get());
  if (!info) return std::move(info.status());
  auto checked = check_place(dir, *info, group);
  if (!checked.ok()) return checked;
  return place;
}

// Whether the name still is the file behind the descriptor.
Result<bool> still_there(int directory, const std::string& name, int fd) {
  auto opened = os::info_of(fd);
  if (!opened) return std::move(opened.status());
  auto named = os::info_at(directory, name);
  if (!named) {
    if (is_missing(named.status())) return false;
    return std::move(named.status());
  }
  return named->inode == opened->inode && named->device == opened->device;
}

// Locks the file, and says whether the name still is that file: false when somebody else has it locked, or swept it away.
Result<bool> lock_named(int directory, const std::string& name, int fd, bool shared, os::Patience wait) {
  auto locked = os::lock_file(fd, shared, wait);
  if (!locked || !*locked) return locked;
  return still_there(directory, name, fd);
}

// Of a dead store; the lock is held exclusively. `alive` goes last: while it is there, the next sweep knows what this is.
bool remove_all(int place, const std::string& name, int directory) {
  auto names = os::list_names(directory);
  if (!names) return false;
  for (const std::string& file : *names) {
    if ((spill::parse(file) || spill::is_spare(file)) && !os::remove_file_at(directory, file).ok()) return false;
    TORCHSHM_POINT("spill.swept");
  }
  if (Status gone = os::remove_file_at(directory, kUnsynced); !gone && !is_missing(gone)) return false;
  if (!os::remove_file_at(directory, kAlive).ok()) return false;
  TORCHSHM_POINT("spill.alive_swept");
  return os::remove_directory_at(place, name).ok();
}

bool sweep_one(int place, const std::string& name) {
  auto directory = os::open_directory_at(place, name);
  if (!directory) return false;
  auto info = os::info_of(directory->get());
  if (!info || info->owner != os::effective_user()) return false;
  auto alive = os::open_lock_file(directory->get(), kAlive, false);
  if (!alive) {
    // A process died when it had made the directory, or when it had swept it. One that still makes it starts again.
    if (!is_missing(alive.status())) return false;
    if (os::remove_directory_at(place, name).ok()) return true;
    // Or a thread wrote when its process had left already.
    alive = os::open_lock_file(directory->get(), kAlive, true);
    if (!alive) return false;
  }
  auto dead = os::lock_file(alive->get(), false, os::Patience::kNone);
  if (!dead || !*dead) return false;
  TORCHSHM_POINT("spill.sweeping");
  auto kept = os::info_at(directory->get(), kPersistent);
  if (kept || !is_missing(kept.status())) return false;
  return remove_all(place, name, directory->get());
}

}  // namespace

Status SpillReader::read(const std::vector<std::byte*>& into) {
  if (into.size() != head().lengths.size())
    return Status(Code::kInvalid, "a spilled value has as many blocks as it had when it was written");
  if (whole_) {
    if (spill::copy_body(whole_.data(), decoded_.shape, head().lengths, decoded_.checksums, into)) return {};
    return Status(Code::kCorrupt, file_->path() + " is damaged");
  }
  return spill::read_body(*file_, decoded_.shape, head().lengths, decoded_.checksums, into);
}

Result<std::unique_ptr<SpillDirectory>> SpillDirectory::make(const std::string& dir, const std::string& store,
                                                             uint64_t pool_id, bool persistent, int64_t group,
                                                             std::optional<bool> synced) {
  auto place = open_place(dir, group);
  if (!place) return std::move(place.status());
  const std::string name = spill::directory_name(store, pool_id);
  for (int i = 0; i < kTries; ++i) {
    auto made = os::make_directory_at(place->get(), name, 0700);
    if (!made) return std::move(made.status());
    TORCHSHM_POINT("spill.directory_made");
    auto directory = os::open_directory_at(place->get(), name);
    if (!directory) {
      if (is_missing(directory.status())) continue;
      return std::move(directory.status());
    }
    auto info = os::info_of(directory->get());
    if (!info) return std::move(info.status());
    if (info->owner != os::effective_user()) {
      return Status(Code::kInvalid, "the directory " + dir + "/" + name + " belongs to user " +
                                        std::to_string(info->owner) + "; remove it, or give another one to spill to");
    }
    auto given = os::set_access(directory->get(), group >= 0 ? kSetgid | 0770 : 0700, group);
    if (!given.ok()) return given;
    auto alive = os::open_lock_file(directory->get(), kAlive, true);
    if (!alive) {
      if (is_missing(alive.status())) continue;
      return std::move(alive.status());
    }
    given = os::set_access(alive->get(), group >= 0 ? 0660 : 0600, group);
    if (!given.ok()) return given;
    TORCHSHM_POINT("spill.alive_made");
    auto locked = lock_named(directory->get(), kAlive, alive->get(), true, os::Patience::kAny);
    if (!locked) return std::move(locked.status());
    if (!*locked) continue;
    TORCHSHM_POINT("spill.joined");
    if (persistent) {
      auto mark = os::open_lock_file(directory->get(), kPersistent, true);
      if (!mark) return std::move(mark.status());
    }
    if (synced && *synced) {
      if (Status gone = os::remove_file_at(directory->get(), kUnsynced); !gone && !is_missing(gone)) return gone;
    } else if (synced) {
      auto mark = os::open_lock_file(directory->get(), kUnsynced, true);
      if (!mark) return std::move(mark.status());
    }
    return joined(directory.take(), alive.take(), pool_id);
  }
  return Status(Code::kSystem, "the directory " + dir + "/" + name + " is removed again and again");
}

Result<std::unique_ptr<SpillDirectory>> SpillDirectory::join(os::Fd directory, uint64_t pool_id) {
  auto alive = os::open_lock_file(directory.get(), kAlive, false);
  if (!alive) {
    if (!is_missing(alive.status())) return std::move(alive.status());
    return Status(Code::kMissing, os::path_of(directory.get()) + " is no directory of a living store");
  }
  auto locked = lock_named(directory.get(), kAlive, alive->get(), true, os::Patience::kNone);
  if (!locked) return std::move(locked.status());
  if (!*locked) return Status(Code::kMissing, os::path_of(directory.get()) + " is being removed: its store is dead");
  return joined(std::move(directory), alive.take(), pool_id);
}

Result<std::unique_ptr<SpillDirectory>> SpillDirectory::joined(os::Fd directory, os::Fd alive, uint64_t pool_id) {
  auto info = os::info_of(directory.get());
  if (!info) return std::move(info.status());
  const uint32_t mode = (info->mode & kGroupWrites) != 0 ? 0660 : 0600;
  auto unsynced = os::info_at(directory.get(), kUnsynced);
  if (!unsynced && !is_missing(unsynced.status())) return std::move(unsynced.status());
  return std::unique_ptr<SpillDirectory>(
      new SpillDirectory(std::move(directory), std::move(alive), pool_id, mode, !unsynced));
}

// A forked child may have the same description: only a description of its own tells.
void SpillDirectory::leave() {
  if (left_.exchange(true)) return;
  alive_.reset();
  const std::string path = this->path();
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos || slash == 0) return;
  const std::string name = path.substr(slash + 1);
  auto place = os::open_directory(path.substr(0, slash));
  if (!place) return;
  auto same = still_there(place->get(), name, fd());
  if (same && *same) (void)sweep_one(place->get(), name);
}

std::string SpillDirectory::path() const { return os::path_of(fd()); }

// Locked as a part is, before it has the name of one. Another user's is left alone: it would be under his quota.
std::optional<SpillDirectory::Part> SpillDirectory::take_spare(uint64_t id, uint64_t bytes) {
  const auto shelf = spill::shelf_for(bytes);
  for (uint64_t place = 0; shelf && place < shelf->places; ++place) {
    const std::string spare = shelf->name(place);
    auto info = os::info_at(fd(), spare);
    if (!info || info->owner != os::effective_user()) continue;
    auto file = os::File::open_to_write(fd(), spare, true);
    if (!file) continue;
    auto locked = lock_named(fd(), spare, (*file)->fd(), false, os::Patience::kNone);
    if (!locked || !*locked) continue;
    TORCHSHM_POINT("spill.spare_locked");
    Status renamed;
    std::string name;
    for (int attempt = 1; attempt == 1 || renamed.error() == EEXIST; ++attempt) {
      name = spill::part_name(id, attempt);
      renamed = os::rename_to_new_at(fd(), spare, name);
    }
    if (!renamed) continue;  // it was swept
    TORCHSHM_POINT("spill.spare_taken");
    // Or swept, and another one put in its place: that is a part now, and nobody writes it.
    auto same = still_there(fd(), name, (*file)->fd());
    if (!same || !*same) continue;
    (*file)->renamed(path() + "/" + name);
    return Part{file.take(), std::move(name), true};
  }
  return std::nullopt;
}

Result<SpillDirectory::Part> SpillDirectory::make_part(uint64_t id) {
  const bool past_cache = synced_ || !keeps_room_ || !memory_to_spare();
  for (int attempt = 1;; ++attempt) {
    std::string name = spill::part_name(id, attempt);
    auto file = os::File::create(fd(), name, file_mode_, past_cache);
    if (!file) {
      if (file.status().error() == EEXIST) continue;
      return std::move(file.status());
    }
    TORCHSHM_POINT("spill.part_made");
    auto locked = lock_named(fd(), name, (*file)->fd(), false, os::Patience::kNone);
    if (!locked) {
      (void)os::remove_file_at(fd(), name);
      return std::move(locked.status());
    }
    if (!*locked) continue;  // a sweeper was quicker; it removes the name
    return Part{file.take(), std::move(name), past_cache};
  }
}

Status SpillDirectory::fill(const SpillHead& head, const spill::Shape& shape,
                            const std::vector<const std::byte*>& blocks, const Part& part) {
  Status done = write_part(head, shape, blocks, part);
  if (done) done = os::rename_at(fd(), part.name, spill::spill_name(head.id));
  if (!done) {
    (void)os::remove_file_at(fd(), part.name);
    return done;
  }
  TORCHSHM_POINT("spill.renamed");
  return {};
}

Status SpillDirectory::write_part(const SpillHead& head, const spill::Shape& shape,
                                  const std::vector<const std::byte*>& blocks, const Part& part) {
  if (file_mode_ != 0600) {  // whatever the umask
    auto given = os::set_access(part.file->fd(), file_mode_, -1);
    if (!given.ok()) return given;
  }
  // What goes through the page cache gets its place when it is written out, if it is not done with by then; room is kept for it.
  auto allocated = part.past_cache ? part.file->preallocate(shape.file_bytes) : part.file->may_have(shape.file_bytes);
  if (!allocated.ok()) return allocated;
  TORCHSHM_POINT("spill.allocated");
  auto written = spill::write_value(*part.file, head, shape, blocks);
  if (!written.ok()) return written;
  TORCHSHM_POINT("spill.head_written");
  // The file system refused to go past the page cache, and what that could not write it tells here alone.
  if (part.past_cache && !part.file->direct()) {
    auto flushed = part.file->flush();
    if (!flushed.ok()) return flushed;
  }
  return {};
}

Status SpillDirectory::write(const SpillHead& head, const std::vector<const std::byte*>& blocks) {
  if (blocks.size() != head.lengths.size() || head.pool_id != pool_id_)
    return Status(Code::kInvalid, "a spilled value has one length for each block, and is one of its pool");
  if (left_.load()) return Status(Code::kUnsupported, "this process has left the store's spill directory");
  auto shape = spill::shape_of(head);
  if (!shape) return std::move(shape.status());
  if (auto spare = synced_ ? take_spare(head.id, shape->file_bytes) : std::nullopt) {
    if (fill(head, *shape, blocks, *spare)) return {};
    // Its place may be damaged, or it can't grow.
  }
  auto part = make_part(head.id);
  if (!part) return std::move(part.status());
  return fill(head, *shape, blocks, *part);
}

Result<SpillReader> SpillDirectory::open(uint64_t id, bool unread) {
  // A synced file has not been in the page cache yet, and most values come back once at most: what reads it again finds it there.
  const bool past_cache = read_past_cache_.load() || (unread && synced_) || !memory_to_spare();
  auto opened = os::File::open(fd(), spill::spill_name(id), past_cache);
  if (!opened) {
    if (!is_missing(opened.status())) return std::move(opened.status());
    return Status(Code::kMissing, path() + "/" + spill::spill_name(id) + " is not there", ENOENT);
  }
  os::File& file = **opened;
  auto info = os::info_of(file.fd());
  if (!info) return std::move(info.status());
  if (info->bytes < spill::kPage || info->bytes % spill::kPage != 0)
    return Status(Code::kCorrupt, file.path() + " has " + std::to_string(info->bytes) + " bytes: it is cut short");
  const auto no_memory = [] { return Status(Code::kFull, "no memory for the head of a spill file", ENOMEM); };
  const bool small = info->bytes <= kAllAtOnce;
  const uint64_t first = small ? info->bytes : spill::kPage;
  spill::Buffer bytes(first);
  if (!bytes) return no_memory();
  auto read = file.read_at(bytes.data(), first, 0);
  if (!read.ok()) return read;
  auto head = spill::head_bytes(bytes.data(), info->bytes);
  if (!head) return damaged(file.path(), head.status());
  if (*head > first) {
    bytes = spill::Buffer(*head);
    if (!bytes) return no_memory();
    read = file.read_at(bytes.data(), *head, 0);
    if (!read.ok()) return read;
  }
  auto decoded = spill::decode(bytes.data(), *head, info->bytes);
  if (!decoded) return damaged(file.path(), decoded.status());
  if (decoded->head.pool_id != pool_id_ || decoded->head.id != id)
    return Status(Code::kCorrupt, file.path() + " holds a value of another store, or another one of this");
  return SpillReader(opened.take(), decoded.take(), small ? std::move(bytes) : spill::Buffer());
}

bool SpillDirectory::remove(uint64_t id) {
  const bool removed = os::remove_file_at(fd(), spill::spill_name(id)).ok();
  TORCHSHM_POINT("spill.removed");
  return removed;
}

bool SpillDirectory::discard(uint64_t id) {
  if (synced_) {
    auto info = os::info_at(fd(), spill::spill_name(id));
    if (!info) return false;
    const auto shelf = spill::shelf_for(info->bytes);
    for (uint64_t place = 0; shelf && place < shelf->places; ++place) {
      const Status kept = os::rename_to_new_at(fd(), spill::spill_name(id), shelf->name(place));
      TORCHSHM_POINT("spill.spare_made");
      if (kept) return true;
      if (is_missing(kept)) return false;
      if (kept.error() != EEXIST) break;
    }
  }
  const bool renamed = os::rename_at(fd(), spill::spill_name(id), spill::discarded_name(id)).ok();
  TORCHSHM_POINT("spill.discarded");
  return renamed;
}

std::vector<SpillDirectory::File> SpillDirectory::list() {
  std::vector<File> files;
  auto names = os::list_names(fd());
  if (!names) return files;
  for (const std::string& name : *names) {
    const auto parsed = spill::parse(name);
    if (!parsed) continue;
    auto info = os::info_at(fd(), name);
    if (info) files.push_back({parsed->id, parsed->part, info->bytes});
  }
  return files;
}

uint32_t SpillDirectory::sweep_parts() {
  uint32_t removed = 0;
  auto names = os::list_names(fd());
  if (!names) return removed;
  for (const std::string& name : *names) {
    const auto parsed = spill::parse(name);
    if (!parsed || !parsed->part) continue;
    auto part = os::open_lock_file(fd(), name, false);
    if (!part) continue;
    auto locked = lock_named(fd(), name, part->get(), false, os::Patience::kNone);
    if (!locked || !*locked) continue;  // the name may be another writer's by now
    TORCHSHM_POINT("spill.part_sweeping");
    removed += os::remove_file_at(fd(), name).ok() ? 1 : 0;
  }
  return removed;
}

// Without a lock, which a forked child may have: who is about to take one finds out. All there may be: some of them are of processes that
// joined when files were still to be with the disk.
SpillDirectory::Spares SpillDirectory::sweep_spares(bool all) {
  Spares spares;
  for (uint64_t octave = spill::kFirstOctave; octave <= spill::kLastOctave; ++octave) {
    const spill::Shelf these = spill::shelf(octave);
    for (uint64_t place = 0; place < these.places; ++place) {
      const std::string name = these.name(place);
      auto info = os::info_at(fd(), name);
      if (!info) continue;
      const uint64_t age = os::file_clock() - info->changed;  // huge where the clock was set back
      const bool removed = (all || age > kKeptSpare) && os::remove_file_at(fd(), name).ok();
      TORCHSHM_POINT("spill.spare_swept");
      ++(removed ? spares.removed : spares.left);
    }
  }
  return spares;
}

uint64_t SpillDirectory::free_bytes() {
  auto bytes = os::free_bytes(fd());
  return bytes ? *bytes : 0;
}

Status SpillDirectory::sync() { return os::sync_file_system(fd()); }

uint32_t sweep_dead(const std::string& dir) {
  uint32_t swept = 0;
  auto place = os::open_directory(dir);
  if (!place) return swept;
  auto names = os::list_names(place->get());
  if (!names) return swept;
  for (const std::string& name : *names) {
    if (!spill::is_directory_name(name)) continue;
    swept += sweep_one(place->get(), name) ? 1 : 0;
  }
  return swept;
}

}  // namespace torchshm::store
