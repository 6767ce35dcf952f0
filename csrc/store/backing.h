// The file of a persistent store: making one, opening one that is there, and who has it.
//
// Shared: the file (store/file_layout.h). Private: descriptors and a mapping of the superblock.
// One service has the file at a time: it holds the file locked as a whole (flock), by a description that nobody else gets. Readers without
// a service hold the same lock shared. When a process dies here: the lock goes; a file that was not finished is made anew.
// Thread safety: one thread at a time, but for touch().
#pragma once

#include <memory>
#include <string>

#include "base/status.h"
#include "os/directory.h"
#include "os/fd.h"
#include "os/mapping.h"
#include "pool/arena.h"
#include "store/file_layout.h"

namespace torchshm::store {

class Backing {
 public:
  // For a service. kExists when another one has it, or readers; kInvalid when it is no store's.
  static Result<std::unique_ptr<Backing>> open(const std::string& path);
  // For a client, with the descriptor that the service, run by user `served_by`, has sent.
  static Result<std::unique_ptr<Backing>> receive(os::Fd fd, uint32_t served_by);

  // Nothing in it yet. Then: layout(), the pool and the catalogue in it, finish().
  bool fresh() const { return fresh_; }
  // Gives the file its length and its superblock, for that limit; 0: the smaller of half of the memory and half of the disk's free space.
  Result<uint64_t> layout(uint64_t limit);
  void finish(uint64_t pool_id);
  // Removes a file that was made here and not finished.
  void abandon();

  // Of one that is not fresh: whether some living process has joined it.
  bool in_use() const;
  // Whether the machine was started anew since.
  bool rebooted() const;
  // Whether the disk may have less than what was acknowledged.
  bool damaged_by_power_loss() const;
  // Written out when it was closed.
  bool clean() const { return superblock().state.load() == kClean; }
  // A new boot's clock. REQUIRES: nobody uses it.
  void begin_boot();

  // Everything to the disk. state: kClean when nobody will change it any more.
  Status sync(uint32_t state);
  // Before a change of what was clean. Cheap when it was not.
  void touch() {
    if (superblock().state.load(std::memory_order_relaxed) != kOpen) reopen_clean();
  }

  Superblock& superblock() const { return *reinterpret_cast<Superblock*>(map_.data()); }
  pool::Regions regions() const;
  int64_t clock() const { return superblock().clock; }
  const std::string& path() const { return path_; }
  // The same now: it may have been renamed. Ends in " (deleted)" when it is gone.
  std::string where() const { return os::path_of(fd_.get()); }
  // A further descriptor of the file, of the description that clients share.
  Result<os::Fd> share() const { return os::duplicate(fd_.get()); }
  // Lets others have it; also in a forked child.
  void unlock() { lock_.reset(); }

 private:
  Status map_superblock();
  void reopen_clean();
  os::Fd fd_, lock_;
  os::Mapping map_;
  std::string path_;
  bool fresh_ = false;
};

// Whether a superblock is one that this build reads, of a file of `size` bytes. `whole`: the file must have the length that it says; else
// what is used of it, as far as can be told here, must be there.
Status check_superblock(const Superblock& superblock, uint64_t size, bool whole, const std::string& path);
// Holes and all, as it was at one moment. For a file that others may change.
Result<std::unique_ptr<Superblock>> read_superblock(int fd, const std::string& path);

}  // namespace torchshm::store
