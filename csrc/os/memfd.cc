#include "os/memfd.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/failpoint.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace torchshm::os {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

}  // namespace

void Fd::reset() {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

Result<Fd> create_memfd(const std::string& name, uint64_t size) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < size) {
    return Status(Code::kUnsupported, "the limit on file sizes (ulimit -f) is below the " + std::to_string(size) +
                                          " bytes that a pool reserves; raise it or set a smaller TORCHSHM_LIMIT");
  }
  int error = TORCHSHM_INJECT("os.memfd_create");
  int raw = -1;
  if (error == 0) {
    raw = ::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    // Kernels before 6.3 do not know the flag.
    if (raw < 0 && errno == EINVAL) raw = ::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
    error = errno;
  }
  if (raw < 0) return Status::system("memfd_create", name, error);
  Fd fd(raw);
  error = TORCHSHM_INJECT("os.fchmod");
  if (error == 0 && ::fchmod(fd.get(), 0600) != 0) error = errno;
  if (error != 0) return Status::system("fchmod", name, error);
  error = TORCHSHM_INJECT("os.ftruncate");
  if (error == 0 && ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) error = errno;
  if (error != 0) return Status::system("ftruncate", name, error);
  error = TORCHSHM_INJECT("os.seal");
  if (error == 0 && ::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) error = errno;
  if (error != 0) return Status::system("fcntl F_ADD_SEALS", name, error);
  return fd;
}

Result<Fd> open_memfd(const std::string& path) {
  const int error = TORCHSHM_INJECT("os.open_memfd");
  const int raw = error == 0 ? ::open(path.c_str(), O_RDWR | O_CLOEXEC) : -1;
  if (raw < 0) return Status::system("open", path, error != 0 ? error : errno);
  return Fd(raw);
}

Result<uint64_t> check_memfd(int fd) {
  int error = TORCHSHM_INJECT("os.get_seals");
  if (error != 0) return Status::system("fcntl F_GET_SEALS", std::to_string(fd), error);
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0) return Status(Code::kInvalid, "descriptor " + std::to_string(fd) + " is no memory file", errno);
  if ((seals & (F_SEAL_SHRINK | F_SEAL_GROW)) != (F_SEAL_SHRINK | F_SEAL_GROW)) {
    return Status(Code::kInvalid, "memory file " + std::to_string(fd) + " is not sealed against truncation");
  }
  struct stat st {};
  error = TORCHSHM_INJECT("os.fstat");
  if (error == 0 && ::fstat(fd, &st) != 0) error = errno;
  if (error != 0) return Status::system("fstat", std::to_string(fd), error);
  return static_cast<uint64_t>(st.st_size);
}

Result<uint64_t> file_size(int fd) {
  struct stat st {};
  if (::fstat(fd, &st) != 0) return Status::system("fstat", std::to_string(fd), errno);
  return static_cast<uint64_t>(st.st_size);
}

Range next_data(int fd, uint64_t from, uint64_t size, uint64_t base) {
  if (from >= size) return {size, size};
  if (TORCHSHM_INJECT("os.seek_data") != 0) return {from, size};
  const off_t begin = ::lseek(fd, static_cast<off_t>(base + from), SEEK_DATA);
  if (begin < 0) return errno == ENXIO ? Range{size, size} : Range{from, size};
  const off_t end = ::lseek(fd, begin, SEEK_HOLE);
  const auto last = end <= begin ? size : std::min(size, static_cast<uint64_t>(end) - base);
  return {std::min(size, static_cast<uint64_t>(begin) - base), last};
}

Result<Fd> reopen(int fd) {
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  int error = TORCHSHM_INJECT("os.reopen");
  int raw = -1;
  if (error == 0) {
    raw = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    error = errno;
  }
  if (raw < 0) return Status::system("open", path, error);
  return Fd(raw);
}

Status give_to_group(int fd, uint32_t group) {
  if (::fchown(fd, static_cast<uid_t>(-1), group) != 0 || ::fchmod(fd, 0660) != 0)
    return Status::system("fchown", "to group " + std::to_string(group), errno);
  return {};
}

Result<Fd> duplicate(int fd) {
  int error = TORCHSHM_INJECT("os.duplicate");
  int raw = -1;
  if (error == 0) {
    raw = ::fcntl(fd, F_DUPFD_CLOEXEC, 3);
    error = errno;
  }
  if (raw < 0) return Status::system("fcntl F_DUPFD_CLOEXEC", std::to_string(fd), error);
  return Fd(raw);
}

Result<FileId> file_id(int fd) {
  struct stat st {};
  int error = TORCHSHM_INJECT("os.fstat");
  if (error == 0 && ::fstat(fd, &st) != 0) error = errno;
  if (error != 0) return Status::system("fstat", std::to_string(fd), error);
  return FileId{static_cast<uint64_t>(st.st_dev), static_cast<uint64_t>(st.st_ino)};
}

}  // namespace torchshm::os
