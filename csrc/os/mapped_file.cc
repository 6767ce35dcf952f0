#include "os/mapped_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>

#include "base/failpoint.h"
#include "os/memfd.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace torchshm::os {
namespace {

FileSystem system_of(int fd) {
  struct statfs facts {};
  if (::fstatfs(fd, &facts) != 0) return FileSystem::kDisk;
  switch (static_cast<uint64_t>(facts.f_type) & 0xffffffff) {
    case TMPFS_MAGIC:
    case RAMFS_MAGIC:
      return FileSystem::kMemory;
    case HUGETLBFS_MAGIC:
      return FileSystem::kHugePages;
    case NFS_SUPER_MAGIC:
    case 0xff534d42:  // cifs
    case 0xfe534d42:  // smb2
    case 0x00c36400:  // ceph
    case 0x0bd00bd0:  // lustre
    case 0x01021997:  // 9p
      return FileSystem::kNetwork;
    default:
      return FileSystem::kDisk;
  }
}

std::string on(int fd) { return "descriptor " + std::to_string(fd); }

}  // namespace

Result<FileFacts> file_facts(int fd) {
  struct stat st {};
  int error = TORCHSHM_INJECT("os.fstat");
  if (error == 0 && ::fstat(fd, &st) != 0) error = errno;
  if (error != 0) return Status::system("fstat", on(fd), error);
  FileFacts facts;
  facts.regular = S_ISREG(st.st_mode);
  facts.uid = st.st_uid;
  facts.mode = st.st_mode & 07777;
  facts.size = static_cast<uint64_t>(st.st_size);
  facts.device = static_cast<uint64_t>(st.st_dev);
  facts.inode = static_cast<uint64_t>(st.st_ino);
  facts.system = system_of(fd);
  return facts;
}

Result<Fd> open_or_create(const std::string& path) {
  int error = TORCHSHM_INJECT("os.open_file");
  const int raw = error == 0 ? ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
  if (raw >= 0) return Fd(raw);
  if (error == 0) error = errno;
  if (error == ENOSPC || error == EDQUOT) return Status(Code::kFull, "the file system of " + path + " is full", error);
  return Status::system("open", path, error);
}

Result<Fd> open_to_read(const std::string& path) {
  int error = TORCHSHM_INJECT("os.open_file");
  const int raw = error == 0 ? ::open(path.c_str(), O_RDONLY | O_CLOEXEC) : -1;
  if (raw >= 0) return Fd(raw);
  if (error == 0) error = errno;
  if (error == ENOENT) return Status(Code::kMissing, "there is no file " + path, error);
  return Status::system("open", path, error);
}

bool is_at(const std::string& path, int fd) {
  struct stat mine {
  }, there{};
  return ::fstat(fd, &mine) == 0 && ::stat(path.c_str(), &there) == 0 && mine.st_ino == there.st_ino &&
         mine.st_dev == there.st_dev;
}

bool any_locked(int fd, uint64_t from, uint64_t count) {
  if (count == 0) return false;
  struct flock range {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(from);
  range.l_len = static_cast<off_t>(count);
  if (TORCHSHM_INJECT("os.getlock") != 0 || ::fcntl(fd, F_OFD_GETLK, &range) != 0) return true;
  return range.l_type != F_UNLCK;
}

Status set_length(int fd, uint64_t size) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < size) {
    return Status(Code::kUnsupported, "the limit on file sizes (ulimit -f) is below the " + std::to_string(size) +
                                          " bytes that the store's file reserves; raise it or set a smaller limit");
  }
  int error = TORCHSHM_INJECT("os.ftruncate");
  if (error == 0 && ::ftruncate(fd, static_cast<off_t>(size)) != 0) error = errno;
  if (error == EFBIG || error == EINVAL)
    return Status(Code::kUnsupported, "the file system takes no file of " + std::to_string(size) + " bytes", error);
  if (error != 0) return Status::system("ftruncate", on(fd), error);
  return {};
}

Status reserve(int fd, uint64_t offset, uint64_t length) {
  int error = TORCHSHM_INJECT("os.fallocate");
  if (error == 0) {
    int rc = 0;
    do {
      rc = ::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(length));
    } while (rc != 0 && errno == EINTR);
    if (rc == 0) return {};
    error = errno;
  }
  const bool full = error == ENOSPC || error == EDQUOT;
  const bool unknown = error == EOPNOTSUPP || error == ENOSYS;
  return Status(full      ? Code::kFull
                : unknown ? Code::kUnsupported
                          : Code::kSystem,
                full ? "the disk is full" : "fallocate", error);
}

Status reserve_holes(int fd, uint64_t base, uint64_t from, uint64_t to) {
  while (from < to) {
    const Range data = next_data(fd, from, to, base);
    if (data.begin > from) {
      if (Status done = reserve(fd, base + from, data.begin - from); !done) return done;
    }
    from = std::max(data.end, data.begin);
    if (data.begin >= to) break;
  }
  return {};
}

Status reserve_mapped(std::byte* at, uint64_t length) {
  int error = TORCHSHM_INJECT("os.commit");
  if (error == 0) {
    int rc = 0;
    do {
      rc = ::madvise(at, length, MADV_POPULATE_WRITE);
    } while (rc != 0 && (errno == EINTR || errno == EAGAIN));
    if (rc == 0) return {};
    error = errno;
  }
  if (error == EINVAL)
    return Status(Code::kUnsupported, "neither the file system nor the kernel can reserve a file's pages", error);
  // EFAULT: what would have been SIGBUS.
  return Status(Code::kFull, "the disk, or the memory, is full", error);
}

Status write_at(int fd, const void* from, uint64_t length, uint64_t offset) {
  const auto* at = static_cast<const std::byte*>(from);
  while (length > 0) {
    const int error = TORCHSHM_INJECT("os.pwrite");
    const ssize_t n = error == 0 ? ::pwrite(fd, at, length, static_cast<off_t>(offset)) : -1;
    if (n < 0 && error == 0 && errno == EINTR) continue;
    if (n <= 0) return Status::system("pwrite", on(fd), error != 0 ? error : errno);
    at += n;
    offset += static_cast<uint64_t>(n);
    length -= static_cast<uint64_t>(n);
  }
  return {};
}

Result<bool> read_at(int fd, void* to, uint64_t length, uint64_t offset) {
  auto* at = static_cast<std::byte*>(to);
  while (length > 0) {
    const int error = TORCHSHM_INJECT("os.pread");
    const ssize_t n = error == 0 ? ::pread(fd, at, length, static_cast<off_t>(offset)) : -1;
    if (n < 0 && error == 0 && errno == EINTR) continue;
    if (n < 0) return Status::system("pread", on(fd), error != 0 ? error : errno);
    if (n == 0) return false;
    at += n;
    offset += static_cast<uint64_t>(n);
    length -= static_cast<uint64_t>(n);
  }
  return true;
}

uint64_t free_space(int fd) {
  struct statvfs facts {};
  if (::fstatvfs(fd, &facts) != 0) return 0;
  return static_cast<uint64_t>(facts.f_bavail) * facts.f_frsize;
}

Status sync_file(int fd) {
  int error = TORCHSHM_INJECT("os.fsync");
  if (error == 0 && ::fsync(fd) != 0) error = errno;
  if (error != 0) return Status::system("fsync", on(fd), error);
  return {};
}

Status sync_directory_of(const std::string& path) {
  std::string directory = std::filesystem::path(path).parent_path().native();
  if (directory.empty()) directory = ".";
  int error = TORCHSHM_INJECT("os.open_directory");
  const Fd fd(error == 0 ? ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1);
  if (!fd.valid()) return Status::system("open", directory, error != 0 ? error : errno);
  error = TORCHSHM_INJECT("os.fsync_directory");
  if (error == 0 && ::fsync(fd.get()) != 0 && errno != EINVAL) error = errno;
  if (error != 0) return Status::system("fsync", directory, error);
  return {};
}

std::array<uint64_t, 2> boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::array<uint64_t, 2> id{};
  size_t digits = 0;
  for (char c = 0; digits < 32 && file.get(c);) {
    const uint64_t digit = c >= '0' && c <= '9'   ? static_cast<uint64_t>(c - '0')
                           : c >= 'a' && c <= 'f' ? static_cast<uint64_t>(c - 'a' + 10)
                                                  : 16;
    if (digit == 16) continue;
    id[digits / 16] = id[digits / 16] << 4 | digit;
    ++digits;
  }
  return digits == 32 ? id : std::array<uint64_t, 2>{};
}

}  // namespace torchshm::os
