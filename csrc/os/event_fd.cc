#include "os/event_fd.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "base/failpoint.h"

namespace torchshm::os {

Result<Fd> create_event_fd() {
  if (const int error = TORCHSHM_INJECT("os.eventfd")) return Status::system("eventfd", "a queue's reader", error);
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) return Status::system("eventfd", "a queue's reader", errno);
  return Fd(fd);
}

void turn(const Fd& event, bool on) {
  uint64_t count = 1;
  const ssize_t done = on ? ::write(event.get(), &count, sizeof count) : ::read(event.get(), &count, sizeof count);
  (void)done;
}

}  // namespace torchshm::os
