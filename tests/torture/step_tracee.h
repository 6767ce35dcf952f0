// A child process under ptrace: stepped one instruction at a time, run to the n-th time it comes to an address, killed there.
//
// Shared: nothing. The child is a fork without exec, so its code lies where ours does and its instructions can be read here.
// When the tracer dies here: the child is killed with it (PTRACE_O_EXITKILL).
// Thread safety: one thread, the one that started the child.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <string>

namespace torchshm::torture {

class Tracee {
 public:
  // Forks. In the child `prepare` runs freely, then it stops; what it does after that, `act`, is what is stepped.
  Tracee(const std::function<void()>& prepare, const std::function<void()>& act);
  ~Tracee();
  Tracee(const Tracee&) = delete;
  Tracee& operator=(const Tracee&) = delete;

  enum class Event {
    kStepped,
    kArrived,  // at the address, for the n-th time
    kForked,   // stopped; child() is its child, stopped at its first instruction
    kDone,     // act has returned
    kGone,     // it has exited or crashed: crash() says how
  };
  // Executes one instruction (one iteration of a string instruction; a system call is one instruction).
  Event step();
  // Runs until the instruction at `address` is the next one for the n-th time, counted from 1. The one it is at now counts.
  Event run_to(uint64_t address, uint32_t nth);
  Event run_to_end() { return run_to(0, 1); }
  bool run_to_fork();

  uint64_t rip() const;
  bool at_syscall() const { return at_syscall(rip()); }
  static bool at_syscall(uint64_t rip);

  // Goes over to the child that was forked: it is what steps from now on. The parent goes on freely, until the end.
  void follow_child();
  pid_t child() const { return child_; }
  // Lets the child that was forked go its way. It is the caller's to wait for.
  pid_t let_child_go();

  // SIGKILL; returns when the process is gone, with all its descriptors.
  void kill() { kill_one(pid_); }
  void kill_rest();  // it, its child and its parent, whatever there is
  pid_t pid() const { return pid_; }
  const std::string& crash() const { return crash_; }

 private:
  static void kill_one(pid_t& pid);
  Event wait_for_event(int request, int signal);
  pid_t pid_ = 0, child_ = 0, parent_ = 0;
  int pending_ = 0;  // signal to pass on
  std::string crash_;
};

// "function+offset", from the program's symbol table; of libraries "library: function+offset".
std::string symbol(uint64_t address);

}  // namespace torchshm::torture
