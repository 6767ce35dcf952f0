// A file on a disk, read and written at places: past the page cache (O_DIRECT) where that is asked for and the file system can.
//
// What is written directly is with the device when the call returns, errors included; what goes through the page cache is only after flush().
// Where the system refuses a direct transfer (EINVAL: a disk with larger sectors, or the rest of a transfer that stopped in the middle of one)
// the file goes on through the page cache. Private: the object. A process that dies leaves what was written so far.
// Thread safety: any thread, also several at once.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::os {

// What offsets, lengths and addresses of direct transfers must be multiples of.
inline constexpr uint64_t kDirectAlignment = 4096;

class File {
 public:
  // A new one, for reading and writing, through the page cache unless direct. Error EEXIST when the name is taken.
  static Result<std::unique_ptr<File>> create(int directory, const std::string& name, uint32_t mode, bool direct);
  // A regular file, and no link; for reading, or for both, through the page cache unless direct.
  static Result<std::unique_ptr<File>> open(int directory, const std::string& name, bool direct);
  static Result<std::unique_ptr<File>> open_to_write(int directory, const std::string& name, bool direct);

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }  // when it was opened, or renamed; for messages
  void renamed(std::string path) { path_ = std::move(path); }
  bool direct() const { return direct_.load(std::memory_order_relaxed); }

  // Whether the process may write so much to a file (ulimit -f): past that the kernel would send SIGXFSZ.
  Status may_have(uint64_t bytes) const;
  // That, its size, and room for all of it where the file system can promise that; else a write may still find the disk full. A
  // file that has that size is taken to have its room.
  Status preallocate(uint64_t bytes);
  // REQUIRES where direct(): everything is a multiple of kDirectAlignment.
  Status write_at(const std::byte* from, uint64_t bytes, uint64_t offset);
  // One range of memory after the other, in one transfer where the kernel takes it.
  struct Span {
    const std::byte* from;
    uint64_t bytes;
  };
  Status write_all(const std::vector<Span>& spans, uint64_t offset);
  // kCorrupt when the file ends before that.
  Status read_at(std::byte* into, uint64_t bytes, uint64_t offset);
  // What went through the page cache has reached the disk.
  Status flush();

 private:
  static Result<std::unique_ptr<File>> open(int directory, const std::string& name, int flags, bool direct);
  explicit File(Fd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  void go_direct();
  bool refused(int error, bool was_direct);

  Fd fd_;
  std::string path_;  // for messages
  // Relaxed: the kernel has the mode, this says how to align and whether to flush; who flushes has joined the threads that wrote.
  std::atomic<bool> direct_{false};
};

// Whether the file system there has kept a place on the disk for what its page cache takes: then a write tells of a full disk, and nothing
// is lost for want of room later. Only what is known to.
bool keeps_room_for_cache(int fd);

}  // namespace torchshm::os
