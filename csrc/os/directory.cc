#include "os/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <memory>
#include <utility>

#include "base/failpoint.h"

namespace torchshm::os {
namespace {

constexpr int kDirectory = O_RDONLY | O_DIRECTORY | O_CLOEXEC;

struct Close {
  void operator()(DIR* stream) const { ::closedir(stream); }
};

FileInfo info(const struct stat& st) {
  return {static_cast<uint64_t>(st.st_dev),
          static_cast<uint64_t>(st.st_ino),
          static_cast<uint64_t>(st.st_size),
          static_cast<uint64_t>(st.st_ctim.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(st.st_ctim.tv_nsec),
          st.st_uid,
          st.st_gid,
          st.st_mode & 07777U,
          static_cast<uint32_t>(st.st_nlink),
          S_ISREG(st.st_mode),
          S_ISDIR(st.st_mode)};
}

Result<Fd> open_one(int at, const std::string& name, int flags) {
  int error = TORCHSHM_INJECT("os.open_directory");
  int raw = -1;
  if (error == 0) {
    raw = ::openat(at, name.c_str(), flags);
    error = errno;
  }
  if (raw < 0) return Status::system("open", name, error);
  return Fd(raw);
}

}  // namespace

Result<Fd> open_directory(const std::string& path) { return open_one(AT_FDCWD, path, kDirectory); }

Result<Fd> open_directory_at(int directory, const std::string& name) {
  return open_one(directory, name, kDirectory | O_NOFOLLOW);
}

Result<bool> make_directory(const std::string& path, uint32_t mode) { return make_directory_at(AT_FDCWD, path, mode); }

Result<bool> make_directory_at(int directory, const std::string& name, uint32_t mode) {
  int error = TORCHSHM_INJECT("os.make_directory");
  if (error == 0 && ::mkdirat(directory, name.c_str(), mode) != 0) error = errno;
  if (error == EEXIST) return false;
  if (error != 0) return Status::system("mkdir", name, error);
  return true;
}

Result<std::vector<std::string>> list_names(int directory) {
  auto own = open_one(directory, ".", kDirectory);  // its own position
  if (!own) return std::move(own.status());
  const std::unique_ptr<DIR, Close> stream(::fdopendir(own->get()));
  if (stream == nullptr) return Status::system("fdopendir", path_of(directory), errno);
  (void)own->release();
  std::vector<std::string> names;
  for (;;) {
    errno = TORCHSHM_INJECT("os.list");
    const dirent* entry = errno == 0 ? ::readdir(stream.get()) : nullptr;
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (errno != 0) return Status::system("readdir", path_of(directory), errno);
  return names;
}

Result<FileInfo> info_of(int fd) {
  struct stat st {};
  int error = TORCHSHM_INJECT("os.fstat");
  if (error == 0 && ::fstat(fd, &st) != 0) error = errno;
  if (error != 0) return Status::system("fstat", path_of(fd), error);
  return info(st);
}

Result<FileInfo> info_at(int directory, const std::string& name) {
  struct stat st {};
  int error = TORCHSHM_INJECT("os.fstatat");
  if (error == 0 && ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) error = errno;
  if (error != 0) return Status::system("fstatat", name, error);
  return info(st);
}

Status rename_at(int directory, const std::string& from, const std::string& to) {
  int error = TORCHSHM_INJECT("os.rename");
  if (error == 0 && ::renameat(directory, from.c_str(), directory, to.c_str()) != 0) error = errno;
  if (error != 0) return Status::system("rename", path_of(directory) + "/" + to, error);
  return {};
}

Status rename_to_new_at(int directory, const std::string& from, const std::string& to) {
  int error = TORCHSHM_INJECT("os.rename_to_new");
  if (error == 0 && ::renameat2(directory, from.c_str(), directory, to.c_str(), RENAME_NOREPLACE) != 0) error = errno;
  if (error != 0) return Status::system("renameat2", path_of(directory) + "/" + to, error);
  return {};
}

Status remove_file_at(int directory, const std::string& name) {
  int error = TORCHSHM_INJECT("os.remove");
  if (error == 0 && ::unlinkat(directory, name.c_str(), 0) != 0) error = errno;
  if (error != 0) return Status::system("unlink", path_of(directory) + "/" + name, error);
  return {};
}

Status remove_directory_at(int directory, const std::string& name) {
  int error = TORCHSHM_INJECT("os.remove_directory");
  if (error == 0 && ::unlinkat(directory, name.c_str(), AT_REMOVEDIR) != 0) error = errno;
  if (error != 0) return Status::system("rmdir", path_of(directory) + "/" + name, error);
  return {};
}

Status set_access(int fd, uint32_t mode, int64_t group) {
  int error = TORCHSHM_INJECT("os.set_access");
  // The group first: giving a file away clears its setgid bit.
  if (error == 0 && group >= 0 && ::fchown(fd, static_cast<uid_t>(-1), static_cast<gid_t>(group)) != 0) error = errno;
  if (error != 0) return Status::system("fchown", path_of(fd) + ", group " + std::to_string(group), error);
  if (::fchmod(fd, mode) != 0) return Status::system("fchmod", path_of(fd), errno);
  return {};
}

Result<Fd> open_lock_file(int directory, const std::string& name, bool make) {
  int error = TORCHSHM_INJECT("os.open_lock_file");
  int raw = -1;
  if (error == 0) {
    raw = ::openat(directory, name.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | (make ? O_CREAT : 0), 0600);
    error = errno;
  }
  if (raw < 0) return Status::system("open", path_of(directory) + "/" + name, error);
  return Fd(raw);
}

Result<bool> lock_file(int fd, bool shared, Patience wait) {
  const int operation = (shared ? LOCK_SH : LOCK_EX) | (wait == Patience::kNone ? LOCK_NB : 0);
  int error = 0;
  do {
    error = TORCHSHM_INJECT("os.flock");
    if (error == 0 && ::flock(fd, operation) != 0) error = errno;
  } while (error == EINTR);
  if (error == EWOULDBLOCK) return false;
  if (error != 0) return Status::system("flock", path_of(fd), error);
  return true;
}

Result<uint64_t> free_bytes(int fd) {
  struct statvfs st {};
  int error = TORCHSHM_INJECT("os.statvfs");
  if (error == 0 && ::fstatvfs(fd, &st) != 0) error = errno;
  if (error != 0) return Status::system("fstatvfs", path_of(fd), error);
  return static_cast<uint64_t>(st.f_bavail) * st.f_frsize;
}

Status sync_file_system(int fd) {
  int error = TORCHSHM_INJECT("os.syncfs");
  if (error == 0 && ::syncfs(fd) != 0) error = errno;
  if (error != 0) return Status::system("syncfs", path_of(fd), error);
  return {};
}

uint64_t file_clock() {
  timespec now{};
  (void)::clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

uint32_t effective_group() { return ::getegid(); }

std::string path_of(int fd) {
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  std::array<char, 4096> path;
  const ssize_t length = ::readlink(link.c_str(), path.data(), path.size());
  return length < 0 ? link : std::string(path.data(), static_cast<size_t>(length));
}

}  // namespace torchshm::os
