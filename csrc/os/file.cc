#include "os/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <utility>

#include "base/failpoint.h"
#include "os/directory.h"

namespace torchshm::os {
namespace {

// Linux transfers at most 0x7ffff000 bytes at once.
constexpr uint64_t kMost = uint64_t{1} << 30;

// How much to ask for. The errno that "os.short" is made to fail with is a number of bytes.
size_t ask_for(uint64_t bytes) {
  const int most = TORCHSHM_INJECT("os.short");
  return static_cast<size_t>(std::min(bytes, most != 0 ? static_cast<uint64_t>(most) : kMost));
}

}  // namespace

Result<std::unique_ptr<File>> File::create(int directory, const std::string& name, uint32_t mode, bool direct) {
  int error = TORCHSHM_INJECT("os.create_file");
  int raw = -1;
  if (error == 0) {
    raw = ::openat(directory, name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    error = errno;
  }
  std::string path = path_of(directory) + "/" + name;
  if (raw < 0) return Status::system("open", path, error);
  std::unique_ptr<File> file(new File(Fd(raw), std::move(path)));
  if (direct) file->go_direct();
  return file;
}

Result<std::unique_ptr<File>> File::open(int directory, const std::string& name, int flags, bool direct) {
  int error = TORCHSHM_INJECT("os.open_file");
  int raw = -1;
  if (error == 0) {
    raw = ::openat(directory, name.c_str(), flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    error = errno;
  }
  std::string path = path_of(directory) + "/" + name;
  if (raw < 0) return Status::system("open", path, error);
  std::unique_ptr<File> file(new File(Fd(raw), std::move(path)));
  auto info = info_of(raw);
  if (!info) return std::move(info.status());
  if (!info->regular) return Status(Code::kCorrupt, file->path_ + " is no regular file");
  if (direct) file->go_direct();
  return file;
}

Result<std::unique_ptr<File>> File::open(int directory, const std::string& name, bool direct) {
  return open(directory, name, O_RDONLY, direct);
}

Result<std::unique_ptr<File>> File::open_to_write(int directory, const std::string& name, bool direct) {
  return open(directory, name, O_RDWR, direct);
}

// After the open: an open() with O_DIRECT may make the file and fail then.
void File::go_direct() {
  if (TORCHSHM_INJECT("os.direct") != 0) return;
  const int flags = ::fcntl(fd_.get(), F_GETFL);
  direct_ = flags >= 0 && ::fcntl(fd_.get(), F_SETFL, flags | O_DIRECT) == 0;
}

bool File::refused(int error, bool was_direct) {
  if (error != EINVAL || !was_direct) return false;
  const int flags = ::fcntl(fd_.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd_.get(), F_SETFL, flags & ~O_DIRECT) != 0) return false;
  direct_ = false;
  return true;
}

Status File::may_have(uint64_t bytes) const {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < bytes)
    return Status::system("fallocate (ulimit -f)", path_, EFBIG);
  return {};
}

Status File::preallocate(uint64_t bytes) {
  if (Status may = may_have(bytes); !may) return may;
  auto info = info_of(fd_.get());
  if (!info) return std::move(info.status());
  if (info->bytes == bytes) return {};
  int error = 0;
  do {
    error = TORCHSHM_INJECT("os.file_allocate");
    if (error == 0 && ::fallocate(fd_.get(), 0, 0, static_cast<off_t>(bytes)) != 0) error = errno;
  } while (error == EINTR);
  if (error == EOPNOTSUPP || error == ENOSYS || (error == 0 && info->bytes > bytes)) {
    error = TORCHSHM_INJECT("os.file_truncate");
    if (error == 0 && ::ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0) error = errno;
  }
  if (error != 0) return Status::system("fallocate", path_ + ", " + std::to_string(bytes) + " bytes", error);
  return {};
}

Status File::write_at(const std::byte* from, uint64_t bytes, uint64_t offset) {
  while (bytes != 0) {
    const bool was_direct = direct();  // another thread may change it meanwhile
    int error = TORCHSHM_INJECT("os.pwrite");
    ssize_t written = -1;
    if (error == 0) {
      written = ::pwrite(fd_.get(), from, ask_for(bytes), static_cast<off_t>(offset));
      error = errno;
    }
    if (written < 0 && (error == EINTR || refused(error, was_direct))) continue;
    if (written <= 0) return Status::system("pwrite", path_, written < 0 ? error : ENOSPC);
    from += written;
    bytes -= static_cast<uint64_t>(written);
    offset += static_cast<uint64_t>(written);
  }
  return {};
}

Status File::write_all(const std::vector<Span>& spans, uint64_t offset) {
  uint64_t written = 0;
  if (spans.size() > 1 && spans.size() <= IOV_MAX && TORCHSHM_INJECT("os.pwritev") == 0) {
    std::vector<iovec> parts;
    for (const Span& span : spans) parts.push_back({const_cast<std::byte*>(span.from), span.bytes});
    const int count = TORCHSHM_INJECT("os.short_pwritev") != 0 ? 1 : static_cast<int>(parts.size());
    const ssize_t got = ::pwritev(fd_.get(), parts.data(), count, static_cast<off_t>(offset));
    if (got > 0) written = static_cast<uint64_t>(got);
  }
  // The rest, and whatever that call could not do, with its error.
  for (const Span& span : spans) {
    const uint64_t done = std::min(written, span.bytes);
    written -= done;
    auto status = write_at(span.from + done, span.bytes - done, offset + done);
    if (!status.ok()) return status;
    offset += span.bytes;
  }
  return {};
}

Status File::read_at(std::byte* into, uint64_t bytes, uint64_t offset) {
  while (bytes != 0) {
    const bool was_direct = direct();
    int error = TORCHSHM_INJECT("os.pread");
    ssize_t got = -1;
    if (error == 0) {
      got = ::pread(fd_.get(), into, ask_for(bytes), static_cast<off_t>(offset));
      error = errno;
    }
    if (got < 0 && (error == EINTR || refused(error, was_direct))) continue;
    if (got < 0) return Status::system("pread", path_, error);
    if (got == 0) return Status(Code::kCorrupt, path_ + " ends at byte " + std::to_string(offset));
    into += got;
    bytes -= static_cast<uint64_t>(got);
    offset += static_cast<uint64_t>(got);
  }
  return {};
}

Status File::flush() {
  int error = 0;
  do {
    error = TORCHSHM_INJECT("os.fdatasync");
    if (error == 0 && ::fdatasync(fd_.get()) != 0) error = errno;
  } while (error == EINTR);
  if (error != 0) return Status::system("fdatasync", path_, error);
  return {};
}

bool keeps_room_for_cache(int fd) {
  struct statfs facts {};
  if (TORCHSHM_INJECT("os.fstatfs") != 0 || ::fstatfs(fd, &facts) != 0) return false;
  switch (static_cast<uint64_t>(facts.f_type) & 0xffffffff) {
    case EXT4_SUPER_MAGIC:  // delayed allocation, which reserves; ext2 and ext3 have the same number, and allocate at once
    case BTRFS_SUPER_MAGIC:
    case TMPFS_MAGIC:
    case F2FS_SUPER_MAGIC:
    case OVERLAYFS_SUPER_MAGIC:  // a container's; over one of these in practice
    case 0x58465342:             // xfs
    case 0x2fc12fc1:             // zfs
      return true;
    default:
      return false;
  }
}

}  // namespace torchshm::os
