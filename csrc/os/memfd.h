// Sealed memory files: the only kind of shared memory here. No names, nothing to sweep, not bound to /dev/shm.
//
// What is shared: the file itself, with whoever holds its descriptor. It is 0600, CLOEXEC, not executable, and sealed against
// shrinking and growing before anyone else sees it. When the last process that holds it dies, the kernel takes it back.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::os {

// A sparse file of `size` bytes, sealed. Fails with kUnsupported where RLIMIT_FSIZE forbids the size (ftruncate would raise SIGXFSZ).
Result<Fd> create_memfd(const std::string& name, uint64_t size);

// Another process's memory file, through its entry in /proc/<pid>/fd; for reading and writing.
Result<Fd> open_memfd(const std::string& path);

// Size in bytes of a memory file received from someone else, after checking that it is sealed and so can't be cut short under us.
Result<uint64_t> check_memfd(int fd);

// Size in bytes of any file.
Result<uint64_t> file_size(int fd);

// The first range at or after `from` that has memory behind it (SEEK_DATA); empty at the end of the file. Where the system does not tell,
// everything. Reading the rest through a mapping would give it pages.
struct Range {
  uint64_t begin = 0, end = 0;
};
// base: of the file where it is one region of a larger one; `from` and the answer count from there.
Range next_data(int fd, uint64_t from, uint64_t size, uint64_t base = 0);

// A new open file description of the same file (through /proc/self/fd), for locks of its own.
Result<Fd> reopen(int fd);

// From now on members of the group can open the file as its user can.
Status give_to_group(int fd, uint32_t group);

// A close-on-exec duplicate.
Result<Fd> duplicate(int fd);

// Which file it is. The inode number is what /proc/<pid>/maps shows for its mappings; alone it proves nothing, since every file system
// has its own.
struct FileId {
  uint64_t device = 0, inode = 0;
  friend bool operator==(const FileId&, const FileId&) = default;
};
Result<FileId> file_id(int fd);

}  // namespace torchshm::os
