// Another kernel, other limits, other files of the system: for one child process and what it forks.
//
// A seccomp filter makes a real system call return an errno; a mount namespace of its own shows other contents under /proc and /sys. Both
// last until the process ends, so they are for bodies that tests::start() or tests::succeeds() runs. False where it is not permitted.
#pragma once

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "processes.h"

namespace torchshm::tests {

// `call` fails with `error` from now on; with an argument's index, only where (that argument & mask) == value.
inline bool refuse(long call, int error, int argument = -1, uint32_t value = 0, uint32_t mask = 0xffffffff) {
  const auto nr = static_cast<uint32_t>(call);
  const auto low =
      static_cast<uint32_t>(offsetof(seccomp_data, args) + 8 * static_cast<size_t>(argument < 0 ? 0 : argument));
  const uint32_t any = argument < 0 ? 0 : 0xffffffff;
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 4),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, low),
      BPF_STMT(BPF_ALU | BPF_AND | BPF_K, mask & any),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value & any, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<uint32_t>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{static_cast<unsigned short>(std::size(code)), code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// A mount namespace of this process's own.
inline bool private_mounts() {
  if (::unshare(CLONE_NEWNS) != 0 && ::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
  return ::mount("none", "/", "none", MS_REC | MS_PRIVATE, nullptr) == 0;
}

inline bool write_file(const std::string& path, const std::string& content) {
  const int fd = ::open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return false;
  const bool whole = ::write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size());
  return ::close(fd) == 0 && whole;
}

// A directory of this test's own, gone with the object.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    char path[] = "/tmp/torchshm-test-XXXXXX";
    if (::mkdtemp(path) == nullptr) ADD_FAILURE() << "no directory below /tmp";
    path_ = path;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// An existing file reads as `content` here. REQUIRES: private_mounts().
inline bool show(const std::string& path, const std::string& content) {
  char name[] = "/tmp/torchshm-test-XXXXXX";
  const int fd = ::mkstemp(name);
  if (fd < 0) return false;
  ::close(fd);
  const bool shown = write_file(name, content) && ::mount(name, path.c_str(), "none", MS_BIND, nullptr) == 0;
  ::unlink(name);
  return shown;
}

inline std::string of_self(const std::string& file) { return "/proc/" + std::to_string(::getpid()) + "/" + file; }

// An empty /sys/fs/cgroup to write files into. REQUIRES: private_mounts().
inline bool empty_cgroups() { return ::mount("none", "/sys/fs/cgroup", "tmpfs", 0, nullptr) == 0; }

// A limit of this process (RLIMIT_...) that is lowered for as long as this lives.
class Limited {
 public:
  Limited(__rlimit_resource resource, uint64_t value) : resource_(resource) {
    rlimit lower{};
    good_ = ::getrlimit(resource_, &before_) == 0;
    lower.rlim_cur = value;
    lower.rlim_max = before_.rlim_max;
    good_ = good_ && ::setrlimit(resource_, &lower) == 0;
  }
  ~Limited() { (void)::setrlimit(resource_, &before_); }
  Limited(const Limited&) = delete;
  Limited& operator=(const Limited&) = delete;
  explicit operator bool() const { return good_; }

 private:
  __rlimit_resource resource_;
  rlimit before_{};
  bool good_ = false;
};

// Valgrind makes system calls of its own and manages the address space.
inline bool under_valgrind() {
  const char* preloaded = std::getenv("LD_PRELOAD");
  return preloaded != nullptr && std::string(preloaded).find("vgpreload") != std::string::npos;
}

// Whether this machine lets a process do all that to itself; tests that need it skip otherwise.
inline bool permitted(const std::function<bool()>& step) { return succeeds(step); }

}  // namespace torchshm::tests

#define TORCHSHM_NEEDS_MOUNTS() \
  if (!tests::permitted(tests::private_mounts)) GTEST_SKIP() << "no mount namespaces for this user"
#define TORCHSHM_NEEDS_SECCOMP()                                                        \
  if (tests::under_valgrind()) GTEST_SKIP() << "valgrind's own calls would be refused"; \
  if (!tests::permitted([] { return tests::refuse(SYS_getppid, EPERM); })) GTEST_SKIP() << "no seccomp filters here"
