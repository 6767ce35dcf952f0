#include "os/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <sstream>

#include "base/failpoint.h"
#include "os/fd.h"

namespace torchshm::os {
namespace {

// 0, or the errno that says why there is no text.
int read_text(const std::string& path, std::string& text) {
  if (const int error = TORCHSHM_INJECT("os.proc")) return error;
  const Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.valid()) return errno;
  std::array<char, 4096> part;
  for (;;) {
    const ssize_t got = ::read(file.get(), part.data(), part.size());
    if (got == 0) return 0;
    if (got > 0) {
      text.append(part.data(), static_cast<size_t>(got));
    } else if (errno != EINTR) {
      return errno;
    }
  }
}

// The kernel says that there is no such process, rather than that it can't tell just now.
bool says_gone(int error) { return error == ENOENT || error == ESRCH; }

// 0 when the text is not what /proc/<pid>/stat looks like.
uint64_t start_time(const std::string& stat) {
  const size_t name_end = stat.rfind(')');  // the name may hold spaces and parentheses
  if (name_end == std::string::npos) return 0;
  std::istringstream rest(stat.substr(name_end + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i) {
    if (!(rest >> field)) return 0;
  }
  return std::strtoull(field.c_str(), nullptr, 10);
}

std::string of_process(uint32_t pid, const char* file) { return "/proc/" + std::to_string(pid) + "/" + file; }

// Whether one of these mappings is of that memory file.
bool mentions(const std::string& text, uint64_t inode) {
  std::istringstream maps(text);
  std::string line;
  while (std::getline(maps, line)) {
    if (line.find("memfd:torchshm") == std::string::npos) continue;
    std::istringstream fields(line);
    std::string range, permissions, offset, device;
    uint64_t found = 0;
    if (fields >> range >> permissions >> offset >> device >> found && found == inode) return true;
  }
  return false;
}

// 0 when unknown.
uint64_t pid_namespace() {
  struct stat st {};
  if (TORCHSHM_INJECT("os.namespace") != 0) return 0;
  return ::stat("/proc/self/ns/pid", &st) == 0 ? static_cast<uint64_t>(st.st_ino) : 0;
}

}  // namespace

uint32_t effective_user() { return ::geteuid(); }

ProcessId self() {
  ProcessId id;
  id.pid = static_cast<uint32_t>(::getpid());
  std::string stat;
  if (read_text(of_process(id.pid, "stat"), stat) == 0) id.started = start_time(stat);
  id.namespace_ = pid_namespace();
  return id;
}

std::string self_name() {
  std::array<char, 17> name{};
  (void)::prctl(PR_GET_NAME, name.data());
  return name.data();
}

bool maps_file(const ProcessId& process, uint64_t inode) {
  const uint64_t here = pid_namespace();
  if (here == 0) return true;
  if (process.namespace_ != here) return false;
  std::string text;
  if (process.started != 0) {
    if (const int error = read_text(of_process(process.pid, "stat"), text)) return !says_gone(error);
    if (start_time(text) != process.started) return false;
    text.clear();
  }
  int error = read_text(of_process(process.pid, "maps"), text);
  if (error == 0 && !text.empty()) return mentions(text, inode);
  if (error != 0 && !says_gone(error)) return true;
  // Its first thread has ended, and perhaps all: what is mapped is to be seen through the others.
  const std::string tasks = of_process(process.pid, "task");
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(tasks.c_str()), &::closedir);
  if (folder == nullptr) return !says_gone(errno);
  while (const dirent* task = ::readdir(folder.get())) {
    if (task->d_name[0] == '.') continue;
    text.clear();
    error = read_text(tasks + "/" + task->d_name + "/maps", text);
    if (error != 0 && !says_gone(error)) return true;
    if (mentions(text, inode)) return true;
  }
  return false;
}

}  // namespace torchshm::os
