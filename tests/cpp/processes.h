// Real child processes for tests: a body in a fork, its exit status, and a pool to share.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <functional>
#include <memory>

#include "os/memfd.h"
#include "pool/member.h"

namespace torchshm::tests {

// Runs body in a forked child; true from it is exit status 0.
inline pid_t start(const std::function<bool()>& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::alarm(60);  // a hang ends as a failure
    ::_exit(body() ? 0 : 1);
  }
  return pid;
}

// A hang of this process ends as a failure; of this test alone, since others may follow in the same process.
class Watchdog {
 public:
  explicit Watchdog(unsigned seconds) { ::alarm(seconds); }
  ~Watchdog() { ::alarm(0); }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
};

inline int wait_for(pid_t pid) {
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

inline bool succeeds(const std::function<bool()>& body) {
  const int status = wait_for(start(body));
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

inline std::unique_ptr<pool::Member> fresh_pool(uint64_t limit = uint64_t{256} << 20) {
  pool::Limits limits;
  limits.limit = limit;
  auto member = pool::Member::create(1, limits);
  EXPECT_TRUE(member.ok()) << member.status().what();
  return member.take();
}

inline std::unique_ptr<pool::Member> join(pool::Member& other) {
  auto member = pool::Member::attach(os::duplicate(other.arena().data_fd()).take(),
                                     os::duplicate(other.arena().control_fd()).take());
  EXPECT_TRUE(member.ok()) << member.status().what();
  return member.take();
}

}  // namespace torchshm::tests
