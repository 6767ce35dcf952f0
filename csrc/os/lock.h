// One byte of a file locked by an open file description (F_OFD_SETLK): the kernel's own word on who is alive, and on who has what.
//
// The lock goes when the last descriptor of that description is closed, which the kernel does when the processes that hold it die,
// however they die. A forked child that has not closed its copy keeps the lock: the safe direction, since it also still sees the memory.
// POSIX record locks were rejected: closing any descriptor of the file drops them, and a living member would be taken for dead.
#pragma once

#include <cstdint>

#include "base/status.h"

namespace torchshm::os {

// True when this description holds the byte afterwards; false when another one does. shared: others may hold it too, if all do so shared.
Result<bool> try_lock(int fd, uint64_t byte, bool shared = false);
Status unlock(int fd, uint64_t byte);
// Whether a description other than fd's own holds the byte. Says true when the kernel does not tell.
bool locked_by_other(int fd, uint64_t byte);

}  // namespace torchshm::os
