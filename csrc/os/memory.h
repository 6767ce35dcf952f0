// How much memory there is: of the machine, and of the cgroups this process is in (version 1 and 2). Bytes.
#pragma once

#include <cstdint>

namespace torchshm::os {

// The smaller of the machine's memory and the tightest cgroup limit.
uint64_t memory_allowed();

// What can still be taken before a cgroup's limit kills the process (fallocate past memory.max is SIGKILL, not ENOSPC), and before the
// machine has nothing available.
uint64_t memory_headroom();

}  // namespace torchshm::os
