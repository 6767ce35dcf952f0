// A descriptor that select, poll and epoll see as readable while it is on (eventfd).
//
// Private to the process, and to children that inherit it. Closed by the kernel when the process dies.
#pragma once

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::os {

Result<Fd> create_event_fd();
void turn(const Fd& event, bool on);

}  // namespace torchshm::os
