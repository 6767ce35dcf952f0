// Where a store of a name is found: <directory>/<name>.sock, and beside it <name>.lock, which its service holds locked.
//
// Shared: the two files. A service that dies leaves the socket; its lock is gone, so whoever takes the lock next may remove the socket.
// The directory is $XDG_RUNTIME_DIR/torchshm, else /run/torchshm for root, else /tmp/torchshm-<uid>; 0700.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::service {

// Letters, digits, '.', '_' and '-', not first a '.'; at most 63.
Status check_name(const std::string& name);
std::string directory();
std::string socket_path(const std::string& name);
std::string lock_path(const std::string& name);
// Names of sockets in the directory, whether somebody serves them or not.
std::vector<std::string> names();

// Tells one directory from another: stores of one name in two of them have nothing to do with each other. 0: there is none.
uint64_t place();

// The three files of a store of this directory that some living process of this user still has, though nobody may serve it. kMissing when
// there is none.
struct Files {
  os::Fd data, control, catalogue;
};
Result<Files> find_files(const std::string& name);

}  // namespace torchshm::service
