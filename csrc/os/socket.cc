#include "os/socket.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/failpoint.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace torchshm::os {
namespace {

constexpr size_t kMostDescriptors = 4;

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path)
    return Status(Code::kInvalid, path + " is longer than a socket's name may be (" +
                                      std::to_string(sizeof address.sun_path - 1) + " bytes)");
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return address;
}

Result<Fd> open_socket() {
  int error = TORCHSHM_INJECT("os.socket");
  const int raw = error == 0 ? ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0) : -1;
  if (error == 0 && raw < 0) error = errno;
  if (error != 0) return Status::system("socket", "AF_UNIX", error);
  return Fd(raw);
}

}  // namespace

Result<Fd> listen_at(const std::string& path, uint32_t mode, int64_t group) {
  auto address = address_of(path);
  if (!address) return std::move(address.status());
  auto socket = open_socket();
  if (!socket) return std::move(socket.status());
  // A socket's file is created with the mode of its inode, less the umask, which is the process's and not ours to change.
  int error = TORCHSHM_INJECT("os.bind");
  if (error == 0 && ::fchmod(socket->get(), mode) != 0) error = errno;
  if (error == 0 && ::bind(socket->get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address) != 0)
    error = errno;
  if (error == 0 && group >= 0 && ::chown(path.c_str(), static_cast<uid_t>(-1), static_cast<gid_t>(group)) != 0)
    error = errno;
  if (error == 0 && ::chmod(path.c_str(), mode) != 0) error = errno;
  if (error == 0 && ::listen(socket->get(), 128) != 0) error = errno;
  if (error != 0) return Status::system("bind", path, error);
  return socket;
}

Result<Fd> connect_to(const std::string& path) {
  auto address = address_of(path);
  if (!address) return std::move(address.status());
  auto socket = open_socket();
  if (!socket) return std::move(socket.status());
  int error = TORCHSHM_INJECT("os.connect");
  if (error == 0 && ::connect(socket->get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address) != 0)
    error = errno;
  if (error == ENOENT || error == ECONNREFUSED || error == EAGAIN)
    return Status(Code::kMissing, "nobody listens at " + path, error);
  if (error != 0) return Status::system("connect", path, error);
  return socket;
}

Result<Fd> accept_from(int listening) {
  int error = TORCHSHM_INJECT("os.accept");
  const int raw = error == 0 ? ::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;
  if (raw >= 0) return Fd(raw);
  if (error == 0) error = errno;
  if (error == EAGAIN || error == EINTR || error == ECONNABORTED) return Fd();
  return Status::system("accept4", "a store's socket", error);
}

Status send_message(int socket, const void* bytes, size_t length, const std::vector<int>& descriptors) {
  iovec part{const_cast<void*>(bytes), length};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMostDescriptors)] = {};
  if (!descriptors.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * descriptors.size());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * descriptors.size());
    std::memcpy(CMSG_DATA(header), descriptors.data(), sizeof(int) * descriptors.size());
  }
  const int injected = TORCHSHM_INJECT("os.sendmsg");
  if (injected != 0) return Status::system("sendmsg", "a store's socket", injected);
  while (::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    if (errno == EINTR) continue;
    if (errno == EAGAIN) return Status(Code::kFull, "the other end does not read", errno);
    return Status::system("sendmsg", "a store's socket", errno);
  }
  return {};
}

Result<Received> receive_message(int socket, void* bytes, size_t most, int milliseconds) {
  pollfd ready{socket, POLLIN, 0};
  // A signal begins the wait anew: what arrives often is no reason to fail, and the other end answers at once.
  int polled = 0;
  do {
    polled = ::poll(&ready, 1, milliseconds);
  } while (polled < 0 && errno == EINTR);
  if (polled == 0) return Status::system("recvmsg", "a store's socket", ETIMEDOUT);
  iovec part{bytes, most};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMostDescriptors)] = {};
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const int injected = TORCHSHM_INJECT("os.recvmsg");
  const ssize_t length = injected == 0 ? ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) : -1;
  Received received;
  // The other end has closed without reading what was sent.
  if (length < 0 && injected == 0 && errno == ECONNRESET) return received;
  if (length < 0) return Status::system("recvmsg", "a store's socket", injected != 0 ? injected : errno);
  received.length = static_cast<size_t>(length);
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    for (size_t at = 0; at + sizeof(int) <= header->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + at, sizeof fd);
      received.descriptors.emplace_back(fd);
    }
  }
  if ((message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) return Status(Code::kInvalid, "the message is too long");
  return received;
}

Result<Peer> peer_of(int socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  int error = TORCHSHM_INJECT("os.peercred");
  if (error == 0 && ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) error = errno;
  if (error != 0) return Status::system("getsockopt SO_PEERCRED", "a store's socket", error);
  Peer peer{static_cast<uint32_t>(credentials.pid), credentials.uid, credentials.gid, {}};
  std::vector<gid_t> groups(256);
  size = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &size) == 0)
    peer.groups.assign(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(size / sizeof(gid_t)));
  return peer;
}

Result<Fd> watch_peer(int socket, uint32_t pid) {
  int fd = -1;
  if (const int error = TORCHSHM_INJECT("os.pidfd"); error != 0)
    return Status::system("pidfd_open", std::to_string(pid), error);
  socklen_t size = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &size) == 0 && fd >= 0) return Fd(fd);
  fd = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  if (fd < 0) return Status::system("pidfd_open", std::to_string(pid), errno);
  return Fd(fd);
}

Status private_directory(const std::string& path, int64_t group) {
  int error = TORCHSHM_INJECT("os.mkdir");
  if (error == 0 && ::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) error = errno;
  if (error != 0) return Status::system("mkdir", path, error);
  struct stat found {};
  if (::lstat(path.c_str(), &found) != 0) return Status::system("lstat", path, errno);
  if (!S_ISDIR(found.st_mode) || found.st_uid != ::geteuid() || (found.st_mode & 0022) != 0) {
    return Status(Code::kInvalid, path +
                                      " is not a directory that only this user can write to; remove it, or set "
                                      "XDG_RUNTIME_DIR to one");
  }
  if (group >= 0) {
    if (::chmod(path.c_str(), 0711) != 0) return Status::system("chmod", path, errno);
  } else if ((found.st_mode & 0044) != 0) {
    return Status(Code::kInvalid, path + " can be read by others; chmod 700 it, or set XDG_RUNTIME_DIR");
  }
  return {};
}

bool only_writer(const std::string& path, uint32_t uid) {
  struct stat found {};
  if (::lstat(path.c_str(), &found) != 0 || !S_ISDIR(found.st_mode)) return false;
  return (found.st_uid == uid || found.st_uid == 0) && (found.st_mode & 0022) == 0;
}

void remove_file(const std::string& path) { (void)::unlink(path.c_str()); }

uint64_t identity_of(const std::string& path) {
  struct stat st {};
  if (::stat(path.c_str(), &st) != 0) return 0;
  return static_cast<uint64_t>(st.st_ino) ^ static_cast<uint64_t>(st.st_dev) << 40;
}

Result<Fd> lock_file(const std::string& path, uint32_t mode) {
  for (;;) {
    const int raw = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, mode);
    if (raw < 0) return Status::system("open", path, errno);
    Fd fd(raw);
    int error = TORCHSHM_INJECT("os.flock");
    if (error == 0 && ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) error = errno;
    if (error == EWOULDBLOCK) return Status(Code::kExists, path + " is locked", error);
    if (error != 0) return Status::system("flock", path, error);
    // Whoever held it before may have removed the file between the two: then the lock is of a file that nobody finds any more.
    struct stat mine {
    }, there{};
    if (::fstat(fd.get(), &mine) != 0) return Status::system("fstat", path, errno);
    if (::stat(path.c_str(), &there) == 0 && mine.st_ino == there.st_ino && mine.st_dev == there.st_dev) return fd;
  }
}

Result<Poller> Poller::create() {
  int error = TORCHSHM_INJECT("os.epoll_create");
  const int raw = error == 0 ? ::epoll_create1(EPOLL_CLOEXEC) : -1;
  if (error == 0 && raw < 0) error = errno;
  if (error != 0) return Status::system("epoll_create1", "a store's service", error);
  Poller poller;
  poller.epoll_ = Fd(raw);
  return poller;
}

Status Poller::add(int fd, uint64_t token) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = token;
  int error = TORCHSHM_INJECT("os.epoll_add");
  if (error == 0 && ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) error = errno;
  if (error != 0) return Status::system("epoll_ctl", "a store's service", error);
  return {};
}

void Poller::remove(int fd) { (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

std::vector<uint64_t> Poller::wait(int milliseconds) {
  std::array<epoll_event, 64> events{};
  const int n = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), milliseconds);
  std::vector<uint64_t> tokens;
  for (int i = 0; i < n; ++i) {
    const uint64_t token = events[static_cast<size_t>(i)].data.u64;  // the struct is packed: no reference into it
    tokens.push_back(token);
  }
  return tokens;
}

Result<Fd> make_signal() {
  int error = TORCHSHM_INJECT("os.eventfd");
  const int raw = error == 0 ? ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : -1;
  if (error == 0 && raw < 0) error = errno;
  if (error != 0) return Status::system("eventfd", "a store's service", error);
  return Fd(raw);
}

void raise_signal(int fd) {
  const uint64_t one = 1;
  (void)!::write(fd, &one, sizeof one);
}

}  // namespace torchshm::os
