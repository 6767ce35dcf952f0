// Where a store of a name is found: <directory>/<name>.sock, and beside it <name>.lock, which its service holds locked.
//
// Shared: the two files. A service that dies leaves the socket; its lock is gone, so whoever takes the lock next may remove the socket.
// The directory is $XDG_RUNTIME_DIR/torchshm, else /run/torchshm for root, else /tmp/torchshm-<uid>. In it
// only that user can make or remove files; what a group may use has the group's own mode.
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
// Where a client looks: in the directory, and then in root's, where stores are that root serves to a group.
std::vector<std::string> places_to_look(const std::string& name);
// Whether whoever serves `path` may be believed to be what this user means: this user, root, or who owns the directory, where it was named
// by XDG_RUNTIME_DIR and nobody else could have put it there.
bool trusted(const std::string& path, uint32_t uid);
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
