// Ordinary files as the memory of a store: made and opened, locked as a whole, given their blocks before they are touched, written out.
//
// Shared: the file, with everybody who may open it. Unlike a memory file it can't be sealed: whoever may write to it can cut it short, and
// a process that touches what is gone gets SIGBUS. Private: descriptors.
// When a process dies here: its locks go with its descriptions; what it has written to a mapping is in the file, for others at once and
// for the disk when the kernel or sync_file() writes it.
// Thread safety: all of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::os {

enum class FileSystem : uint8_t {
  kDisk,       // pages are a cache of the disk
  kMemory,     // tmpfs, ramfs: pages are memory
  kHugePages,  // hugetlbfs
  kNetwork     // locks and mappings of different machines do not see one another
};

struct FileFacts {
  bool regular = false;
  uint32_t uid = 0;
  uint32_t mode = 0;  // permissions
  uint64_t size = 0;
  uint64_t device = 0, inode = 0;
  FileSystem system = FileSystem::kDisk;
};

Result<FileFacts> file_facts(int fd);
// For reading and writing, 0600 if it is made here.
Result<Fd> open_or_create(const std::string& path);
// kMissing when there is none.
Result<Fd> open_to_read(const std::string& path);
// Whether the path still leads to that file.
bool is_at(const std::string& path, int fd);

// Whether another description holds any byte of [from, from + count) (os/lock.h). Also for a description that may only read.
bool any_locked(int fd, uint64_t from, uint64_t count);

// The file's length; what is new is a hole. kUnsupported where RLIMIT_FSIZE forbids it.
Status set_length(int fd, uint64_t size);
// Gives a range its place on the disk, or in memory, so that no later write to it can fail. kFull when there is none left. What has it
// already is left alone.
Status reserve(int fd, uint64_t offset, uint64_t length);
// What of [from, to), counted from `base`, looks like a hole. Costs little where there are none.
Status reserve_holes(int fd, uint64_t base, uint64_t from, uint64_t to);
// The same through a mapping, for a file system that knows no such thing, or where this process has closed its descriptors: the pages are
// made. REQUIRES: page boundaries, a kShared mapping.
Status reserve_mapped(std::byte* at, uint64_t length);
Status write_at(int fd, const void* from, uint64_t length, uint64_t offset);
// False at the end of the file.
Result<bool> read_at(int fd, void* to, uint64_t length, uint64_t offset);
// Bytes that the file system has left for this user.
uint64_t free_space(int fd);

// Returns when everything, written through mappings too, would survive a loss of power.
Status sync_file(int fd);
// The same for the directory's entry of a file.
Status sync_directory_of(const std::string& path);

// Tells one boot of the machine from another; zero where the kernel does not say.
std::array<uint64_t, 2> boot_id();

}  // namespace torchshm::os
