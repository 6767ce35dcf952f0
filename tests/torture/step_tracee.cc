#include "step_tracee.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

namespace torchshm::torture {
namespace {

// Inline, so that no instruction of libc counts as the operation's.
inline void mark(long pid, long signal) {
  long result = SYS_kill;
  asm volatile("syscall" : "+a"(result) : "D"(pid), "S"(signal) : "rcx", "r11", "memory");
}

void set_debug_register(pid_t pid, int index, uint64_t value) {
  if (::ptrace(PTRACE_POKEUSER, pid, offsetof(user, u_debugreg) + 8 * static_cast<size_t>(index), value) != 0) {
    std::perror("step: PTRACE_POKEUSER of a debug register");
    std::exit(2);
  }
}

}  // namespace

Tracee::Tracee(const std::function<void()>& prepare, const std::function<void()>& act) {
  std::fflush(nullptr);
  pid_ = ::fork();
  if (pid_ == 0) {
    (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)::ptrace(PTRACE_TRACEME, 0, 0, 0);
    prepare();
    const long self = ::getpid();
    mark(self, SIGSTOP);
    act();
    mark(::getpid(), SIGUSR1);  // asked anew: it may be the child of a fork by now
    ::_exit(0);
  }
  int status = 0;
  pid_t stopped = ::waitpid(pid_, &status, 0);
  while (stopped == pid_ && WIFSTOPPED(status) && WSTOPSIG(status) == SIGCHLD) {
    (void)::ptrace(PTRACE_CONT, pid_, 0, SIGCHLD);
    stopped = ::waitpid(pid_, &status, 0);
  }
  if (stopped != pid_ || !WIFSTOPPED(status) || WSTOPSIG(status) != SIGSTOP) {
    std::fprintf(stderr, "step: a preparation failed, status %x\n", static_cast<unsigned>(status));
    std::exit(2);
  }
  (void)::ptrace(PTRACE_SETOPTIONS, pid_, 0, PTRACE_O_EXITKILL | PTRACE_O_TRACEFORK);
}

Tracee::~Tracee() { kill_rest(); }

Tracee::Event Tracee::wait_for_event(int request, int signal) {
  int status = 0;
  if (::ptrace(static_cast<__ptrace_request>(request), pid_, 0, signal) != 0 ||
      ::waitpid(pid_, &status, __WALL) != pid_)
    return Event::kGone;
  if (!WIFSTOPPED(status)) {
    crash_ = WIFSIGNALED(status) ? std::string("signal ") + strsignal(WTERMSIG(status))
                                 : "exit " + std::to_string(WEXITSTATUS(status));
    pid_ = 0;
    return Event::kGone;
  }
  if (status >> 8 == (SIGTRAP | PTRACE_EVENT_FORK << 8)) {
    unsigned long message = 0;
    (void)::ptrace(PTRACE_GETEVENTMSG, pid_, 0, &message);
    child_ = static_cast<pid_t>(message);
    (void)::waitpid(child_, &status, __WALL);
    return Event::kForked;
  }
  switch (WSTOPSIG(status)) {
    case SIGTRAP:
      return Event::kStepped;
    case SIGUSR1:
      return Event::kDone;
    case SIGSEGV:
    case SIGBUS:
    case SIGILL:
    case SIGABRT:
      crash_ = std::string("signal ") + strsignal(WSTOPSIG(status)) + " at " + symbol(rip());
      kill();
      return Event::kGone;
    default:
      pending_ = WSTOPSIG(status);
      return Event::kStepped;
  }
}

Tracee::Event Tracee::step() { return wait_for_event(PTRACE_SINGLESTEP, std::exchange(pending_, 0)); }

Tracee::Event Tracee::run_to(uint64_t address, uint32_t nth) {
  if (address != 0) {
    set_debug_register(pid_, 0, address);
    set_debug_register(pid_, 7, 1);  // enabled, on execution
  }
  for (;;) {
    const Event event = wait_for_event(PTRACE_CONT, std::exchange(pending_, 0));
    if (event == Event::kForked || (event == Event::kStepped && pending_ != 0)) continue;
    if (event == Event::kStepped && --nth != 0) continue;  // the kernel sets RF: the instruction is not hit twice
    if (address != 0 && event != Event::kGone) set_debug_register(pid_, 7, 0);
    return event == Event::kStepped ? Event::kArrived : event;
  }
}

bool Tracee::run_to_fork() {
  for (;;) {
    const Event event = wait_for_event(PTRACE_CONT, std::exchange(pending_, 0));
    if (event == Event::kForked) return true;
    if (event != Event::kStepped) return false;
  }
}

uint64_t Tracee::rip() const {
  return static_cast<uint64_t>(::ptrace(PTRACE_PEEKUSER, pid_, offsetof(user_regs_struct, rip), 0));
}

bool Tracee::at_syscall(uint64_t rip) {
  unsigned char code[2];
  std::memcpy(code, reinterpret_cast<const void*>(rip), sizeof code);
  return code[0] == 0x0f && code[1] == 0x05;
}

void Tracee::follow_child() {
  (void)::ptrace(PTRACE_DETACH, pid_, 0, 0);
  parent_ = pid_;
  pid_ = std::exchange(child_, 0);
  // Until it sleeps it may still have copies of what the child's death is to close.
  for (int i = 0; i < 1000; ++i) {
    std::ifstream file("/proc/" + std::to_string(parent_) + "/stat");
    std::string line;
    std::getline(file, line);
    if (line.find(") S ") != std::string::npos) return;
    ::usleep(100);
  }
}

pid_t Tracee::let_child_go() {
  if (child_ != 0) (void)::ptrace(PTRACE_DETACH, child_, 0, 0);
  return std::exchange(child_, 0);
}

void Tracee::kill_one(pid_t& pid) {
  if (pid == 0) return;
  (void)::kill(pid, SIGKILL);
  int status = 0;
  while (::waitpid(pid, &status, __WALL) == pid && !WIFEXITED(status) && !WIFSIGNALED(status)) {
  }
  pid = 0;
}

void Tracee::kill_rest() {
  kill();
  kill_one(child_);
  kill_one(parent_);
}

std::string symbol(uint64_t address) {
  Dl_info info{};
  char text[64];
  if (::dladdr(reinterpret_cast<void*>(address), &info) == 0) {
    std::snprintf(text, sizeof text, "0x%lx", static_cast<unsigned long>(address));
    return text;
  }
  const auto base = reinterpret_cast<uint64_t>(info.dli_fbase);
  const char* slash = std::strrchr(info.dli_fname, '/');
  std::string where = slash != nullptr ? slash + 1 : info.dli_fname;
  // The names of the core's functions are hidden from dladdr: read the object's own symbol table.
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::vector<char> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::string best;
  uint64_t offset = address - base;
  if (image.size() > sizeof(Elf64_Ehdr)) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
    for (unsigned i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB && sections[i].sh_type != SHT_DYNSYM) continue;
      const auto* symbols = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
      const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
      for (size_t n = 0; n < sections[i].sh_size / sizeof(Elf64_Sym); ++n) {
        const Elf64_Sym& s = symbols[n];
        if (ELF64_ST_TYPE(s.st_info) != STT_FUNC || address - base < s.st_value ||
            address - base >= s.st_value + s.st_size)
          continue;
        best = names + s.st_name;
        offset = address - base - s.st_value;
      }
    }
  }
  std::snprintf(text, sizeof text, "+0x%lx", static_cast<unsigned long>(offset));
  int failed = 0;
  const std::unique_ptr<char, decltype(&std::free)> plain(abi::__cxa_demangle(best.c_str(), nullptr, nullptr, &failed),
                                                          &std::free);
  return where + ": " + (plain ? plain.get() : best.c_str()) + text;
}

}  // namespace torchshm::torture
