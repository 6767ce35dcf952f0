// Values that go to disk and come back: each is one exchange of a name's slot between two cells, by what overwrites names.
//
// Shared: cells, files, and a claim beside each cell, which keeps two from doing the same work and tells those who are about to write to a
// value that it is just being written out. Private: the directory's descriptor.
// When a process dies here: its claim is taken over by whoever wants the same; a file that no cell has is swept; a cell in the making is
// finished by Catalogue::sweep(). Memory is given up only when the file is complete.
// Thread safety: all functions, from any thread, after use().
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "base/status.h"
#include "store/catalogue.h"
#include "store/spill_file.h"

namespace torchshm::store {

class Spill {
 public:
  explicit Spill(Catalogue& catalogue) : catalogue_(catalogue) {}
  // Before other threads use this.
  void use(std::unique_ptr<SpillDirectory> directory) { directory_ = std::move(directory); }
  void leave() {
    if (directory_) directory_->leave();
  }
  bool ready() const { return directory_ != nullptr; }
  int directory_fd() const { return directory_ ? directory_->fd() : -1; }

  // Brings a spilled value back. kStale: it is not spilled like that any more; kBusy: another one is at it, and `alone` is asked for; kFull: there
  // is no room for it.
  Status back(const Entry& entry, bool alone);

  enum class How : uint8_t {
    kFree,   // give its memory up: drop it, or leave it to its file, where there is one
    kWrite,  // the same, and write that file
    kCopy    // write the file, and keep the memory
  };
  // Returns the bytes given up or written: 0 where the value is in use, stays as it is by its policy, or needs a file that may not be
  // written. kBusy: another one is at it. Other errors: the file could not be written.
  Result<uint64_t> out(uint32_t cell, uint32_t life, How how);

  void remove(uint64_t file);
  // Removes the files of the dead that no cell has, and says how many; nothing when values moved all the while: to be tried again.
  std::optional<uint32_t> sweep();
  // Gives back where discarded files lay that nobody took to write anew for a second; or all of them. Returns how many wait for that second.
  uint32_t sweep_discarded(bool all);
  // What keeps values from going to disk, as far as this process or the service have met it.
  std::string trouble() const;

 private:
  class Claim;
  struct Standing;
  bool unused(const Entry& entry) const;
  Status write(const Standing& what);
  Status fail(const std::string& doing, const std::string& key, Status status);

  Catalogue& catalogue_;
  std::unique_ptr<SpillDirectory> directory_;
  std::atomic<uint64_t> failed_bytes_{0}, failed_at_{0};  // of the last value that could not be written here; and when
  std::atomic<uint64_t> alone_since_{0};                  // the service that is gone, and whose spares this has swept
};

}  // namespace torchshm::store
