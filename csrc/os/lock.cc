#include "os/lock.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "base/failpoint.h"

namespace torchshm::os {
namespace {

struct flock byte_range(short type, uint64_t byte) {
  struct flock range {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(byte);
  range.l_len = 1;
  return range;
}

}  // namespace

Result<bool> try_lock(int fd, uint64_t byte, bool shared) {
  struct flock range = byte_range(shared ? F_RDLCK : F_WRLCK, byte);
  int error = TORCHSHM_INJECT("os.lock");
  if (error == 0) {
    if (::fcntl(fd, F_OFD_SETLK, &range) == 0) return true;
    error = errno;
  }
  if (error == EAGAIN || error == EACCES) return false;
  return Status::system("fcntl F_OFD_SETLK", std::to_string(byte), error);
}

Status unlock(int fd, uint64_t byte) {
  struct flock range = byte_range(F_UNLCK, byte);
  int error = TORCHSHM_INJECT("os.unlock");
  if (error == 0 && ::fcntl(fd, F_OFD_SETLK, &range) != 0) error = errno;
  if (error != 0) return Status::system("fcntl F_OFD_SETLK", std::to_string(byte), error);
  return {};
}

bool locked_by_other(int fd, uint64_t byte) {
  struct flock range = byte_range(F_WRLCK, byte);
  if (TORCHSHM_INJECT("os.getlock") != 0) return true;
  if (::fcntl(fd, F_OFD_GETLK, &range) != 0) return true;
  return range.l_type != F_UNLCK;
}

}  // namespace torchshm::os
