// UNIX sockets that keep message boundaries (SOCK_SEQPACKET) and carry descriptors, and the directories they lie in.
//
// Private: descriptors. The name of a socket outlives its process; service/address.h says how a stale one is told.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "os/fd.h"

namespace torchshm::os {

// A listening socket at `path`, created with `mode`. REQUIRES: nothing is there.
Result<Fd> listen_at(const std::string& path, uint32_t mode, int64_t group = -1);
// kMissing when nothing is there or nobody listens.
Result<Fd> connect_to(const std::string& path);
// Not valid when nobody is waiting.
Result<Fd> accept_from(int listening);

// Sends one message without waiting. kFull when the other end does not read.
Status send_message(int socket, const void* bytes, size_t length, const std::vector<int>& descriptors = {});
// Receives one message of at most `most` bytes and a few descriptors. Nothing is waited for beyond `milliseconds`; 0 length: the other end
// has closed. What is longer, or carries more descriptors than four, is kInvalid, and its descriptors are closed.
struct Received {
  size_t length = 0;
  std::vector<Fd> descriptors;
};
Result<Received> receive_message(int socket, void* bytes, size_t most, int milliseconds);

struct Peer {
  uint32_t pid = 0, uid = 0, gid = 0;
  std::vector<uint32_t> groups;
};
Result<Peer> peer_of(int socket);

// Readable once the process has ended. Of the process at the other end of a socket where the kernel tells (6.5), else of the pid.
Result<Fd> watch_peer(int socket, uint32_t pid);

// A directory in which only this user can make, list and remove files; made if it is not there, kInvalid if others could. group: that of
// something in it that others are to open by name, or -1. The files say who they are for; several groups may have some side by side.
Status private_directory(const std::string& path, int64_t group);

// Whether it is a directory of that user in which nobody else but root can make files.
bool only_writer(const std::string& path, uint32_t uid);

// Device and inode as one number; 0 when there is no such file.
uint64_t identity_of(const std::string& path);
void remove_file(const std::string& path);  // if it is there
Result<Fd> lock_file(const std::string& path,
                     uint32_t mode);  // opened and locked; kExists when another process holds it

class Poller {
 public:
  static Result<Poller> create();
  Status add(int fd, uint64_t token);
  void remove(int fd);
  // Tokens that are ready within `milliseconds`.
  std::vector<uint64_t> wait(int milliseconds);

 private:
  Fd epoll_;
};

// An eventfd: something to wake a Poller with.
Result<Fd> make_signal();
void raise_signal(int fd);

}  // namespace torchshm::os
