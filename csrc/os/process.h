// Who a process is, beyond its pid: start time and pid namespace, and whether it has a memory file mapped. Reads /proc only.
#pragma once

#include <cstdint>
#include <string>

namespace torchshm::os {

struct ProcessId {
  uint32_t pid = 0;
  uint64_t started = 0;     // clock ticks since boot (field 22 of /proc/<pid>/stat); 0 when unknown
  uint64_t namespace_ = 0;  // inode of /proc/<pid>/ns/pid; 0 when unknown
};

ProcessId self();
uint32_t effective_user();
std::string self_name();  // at most 15 characters

// True when the process, certainly the same one, is alive and has the file mapped: what counts when it has closed all its descriptors.
// Says true when the kernel does not tell (no descriptor left to look with).
bool maps_file(const ProcessId& process, uint64_t inode);

}  // namespace torchshm::os
