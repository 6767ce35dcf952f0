// Directories, and the names in them, through descriptors: a name means the same file whatever anybody renames above it, and in whichever
// mount namespace the process is.
//
// Shared: what is on the file system. A process that dies between two calls leaves what the calls before made; a lock of lock_file() goes
// with the last descriptor of its description. Thread safety: any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::os {

// Follows links: the path is the user's own word.
Result<Fd> open_directory(const std::string& path);
// In `directory`, and no link. Error ENOENT, ENOTDIR, ELOOP.
Result<Fd> open_directory_at(int directory, const std::string& name);
// False when something of that name is there. Error ENOENT when what it should be in is not.
Result<bool> make_directory(const std::string& path, uint32_t mode);
Result<bool> make_directory_at(int directory, const std::string& name, uint32_t mode);
// All but "." and "..", in no order.
Result<std::vector<std::string>> list_names(int directory);

struct FileInfo {
  uint64_t device = 0, inode = 0, bytes = 0;
  uint64_t changed = 0;                                // when content, name or permissions did, ns of file_clock()
  uint32_t owner = 0, group = 0, mode = 0, links = 0;  // mode: the permissions
  bool regular = false, directory = false;
};
Result<FileInfo> info_of(int fd);
Result<FileInfo> info_at(int directory, const std::string& name);  // of a link itself

Status rename_at(int directory, const std::string& from, const std::string& to);
// Error EEXIST when something has the name, EINVAL where the file system can't tell.
Status rename_to_new_at(int directory, const std::string& from, const std::string& to);
Status remove_file_at(int directory, const std::string& name);
Status remove_directory_at(int directory, const std::string& name);
// The mode whatever the umask, and the group where there is one (>= 0).
Status set_access(int fd, uint32_t mode, int64_t group);

// For lock_file(); an empty one is made where it is missing and `make` says so. Error ENOENT.
Result<Fd> open_lock_file(int directory, const std::string& name, bool make);
// flock(): true when this description has the file afterwards, false when another one is in the way.
enum class Patience : uint8_t { kNone, kAny };
Result<bool> lock_file(int fd, bool shared, Patience wait);

// What an ordinary user can still write to the file system.
Result<uint64_t> free_bytes(int fd);
// All of the file system has reached the disk.
Status sync_file_system(int fd);

// The clock by which files have their times; it may be set.
uint64_t file_clock();

uint32_t effective_group();
// Where the kernel says that it is; for messages.
std::string path_of(int fd);

}  // namespace torchshm::os
