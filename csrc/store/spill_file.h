// The files that spilled values lie in: <dir>/<store>-<pool id>/<id>.spill, written whole or not at all.
//
// Shared: the directory, with every process that has the store, and through its descriptor also where its path means nothing. In it lies a
// file `alive` that each of them holds a shared flock on through a description of its own: whoever gets it exclusively knows that they are
// all dead. A write goes to <id>.part, which its writer holds locked, and is renamed when nothing can fail any more. A process that dies
// leaves a part at most; what it had renamed is whole. A forked child inherits the descriptors: the store lives as long as it does.
// Where files must be with the disk, one whose value is done with is kept as a `.spare` for a second, to be written anew: it has its place on
// the disk already.
// docs/spill.md has the steps. Private: the objects here.
// Thread safety: any thread, several at once.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "os/fd.h"
#include "os/file.h"
#include "store/spill_format.h"

namespace torchshm::store {

class SpillReader {
 public:
  const SpillHead& head() const { return decoded_.head; }
  uint64_t file_bytes() const { return decoded_.shape.file_bytes; }
  // All blocks, each of as many bytes as the head's lengths say. kCorrupt when they are not what was written, kSystem with the errno when the
  // disk fails: then the blocks hold anything. May be called again.
  Status read(const std::vector<std::byte*>& into);

 private:
  friend class SpillDirectory;
  SpillReader(std::unique_ptr<os::File> file, spill::Decoded decoded, spill::Buffer whole)
      : file_(std::move(file)), decoded_(std::move(decoded)), whole_(std::move(whole)) {}

  std::unique_ptr<os::File> file_;
  spill::Decoded decoded_;
  spill::Buffer whole_;  // the file, when it is so small that one call read it; else empty
};

class SpillDirectory {
 public:
  // Makes `dir` where it is missing, and in it the store's own, and joins that. group >= 0: its members can use it too. kInvalid when others
  // may write to `dir`, or own it; the error says what to do.
  // synced: whether a file is with the disk when it is written, or with the kernel; for all who have the directory, and unless it is said, as it
  // was, at first with the disk.
  static Result<std::unique_ptr<SpillDirectory>> make(const std::string& dir, const std::string& store,
                                                      uint64_t pool_id, bool persistent, int64_t group,
                                                      std::optional<bool> synced = std::nullopt);
  // A descriptor of the store's own directory. kMissing when the store is dead, and this is being removed.
  static Result<std::unique_ptr<SpillDirectory>> join(os::Fd directory, uint64_t pool_id);
  ~SpillDirectory() { leave(); }
  SpillDirectory(const SpillDirectory&) = delete;
  SpillDirectory& operator=(const SpillDirectory&) = delete;
  // From here on this one does not keep the directory any more; the last one removes it.
  void leave();

  int fd() const { return directory_.get(); }
  std::string path() const;  // for messages
  uint64_t pool_id() const { return pool_id_; }

  // All of it or nothing; an older file of the id is replaced. An error says which file and has the errno (ENOSPC, EIO, ...), and leaves
  // what was there before. The blocks must not change meanwhile. REQUIRES: head.pool_id == pool_id()
  Status write(const SpillHead& head, const std::vector<const std::byte*>& blocks);
  // kMissing; kCorrupt when its head is damaged, or another value's, or the file has not its size. kCorrupt also when it was discarded meanwhile,
  // here and in what the reader reads: who is told so looks whether it still is the file of the value that he wants. unread: nobody has read
  // the file before.
  Result<SpillReader> open(uint64_t id, bool unread = false);
  // True when there was one. Who reads it goes on to the end.
  bool remove(uint64_t id);
  // The same at once and for little: the file may be written anew for another value. If it is not, where it lay is given back by the next
  // sweep, which may take ten milliseconds a file.
  bool discard(uint64_t id);

  struct File {
    uint64_t id = 0;
    bool part = false;
    uint64_t bytes = 0;  // its length; of a part, as much as it will have
  };
  std::vector<File> list();
  // Removes the parts that nobody writes any more. Returns how many.
  uint32_t sweep_parts();
  // Removes the spares that nobody took for a second, or all.
  struct Spares {
    uint32_t removed = 0, left = 0;
  };
  Spares sweep_spares(bool all);
  // From here on files are read past the page cache also where there is memory to spare; to measure it, and to test it.
  void read_past_cache() { read_past_cache_.store(true); }
  bool synced() const { return synced_; }
  uint64_t free_bytes();  // 0 when the system does not tell
  // What was written so far survives also a loss of power.
  Status sync();

 private:
  SpillDirectory(os::Fd directory, os::Fd alive, uint64_t pool_id, uint32_t file_mode, bool synced)
      : directory_(std::move(directory)),
        alive_(std::move(alive)),
        pool_id_(pool_id),
        file_mode_(file_mode),
        synced_(synced),
        keeps_room_(os::keeps_room_for_cache(directory_.get())) {}
  static Result<std::unique_ptr<SpillDirectory>> joined(os::Fd directory, os::Fd alive, uint64_t pool_id);
  struct Part {
    std::unique_ptr<os::File> file;
    std::string name;
    bool past_cache;  // it should go there
  };
  Result<Part> make_part(uint64_t id);
  std::optional<Part> take_spare(uint64_t id, uint64_t bytes);
  Status write_part(const SpillHead& head, const spill::Shape& shape, const std::vector<const std::byte*>& blocks,
                    const Part& part);
  // It has its name afterwards, or none.
  Status fill(const SpillHead& head, const spill::Shape& shape, const std::vector<const std::byte*>& blocks,
              const Part& part);

  const os::Fd directory_;
  os::Fd alive_;
  std::atomic<bool> left_{false};
  const uint64_t pool_id_;
  const uint32_t file_mode_;
  const bool synced_;
  const bool keeps_room_;
  std::atomic<bool> read_past_cache_{false};
};

// Removes the directories in `dir` of this user's stores that nobody has any more, but those with a file named `persistent`. Returns how many.
uint32_t sweep_dead(const std::string& dir);

}  // namespace torchshm::store
