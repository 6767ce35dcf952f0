#include "os/process.h"

#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <sstream>

namespace torchshm::os {
namespace {

uint64_t start_time(uint32_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(stat, line)) return 0;
  const size_t name_end = line.rfind(')');  // the name may hold spaces and parentheses
  if (name_end == std::string::npos) return 0;
  std::istringstream rest(line.substr(name_end + 1));
  std::string field;
  for (int i = 3; i <= 22; ++i) {
    if (!(rest >> field)) return 0;
  }
  return std::strtoull(field.c_str(), nullptr, 10);
}

uint64_t pid_namespace() {
  struct stat st {};
  return ::stat("/proc/self/ns/pid", &st) == 0 ? static_cast<uint64_t>(st.st_ino) : 0;
}

}  // namespace

ProcessId self() {
  ProcessId id;
  id.pid = static_cast<uint32_t>(::getpid());
  id.started = start_time(id.pid);
  id.namespace_ = pid_namespace();
  return id;
}

std::string self_name() {
  std::array<char, 17> name{};
  (void)::prctl(PR_GET_NAME, name.data());
  return name.data();
}

bool maps_file(const ProcessId& process, uint64_t inode) {
  if (process.namespace_ != pid_namespace()) return false;
  if (process.started != 0 && start_time(process.pid) != process.started) return false;
  std::ifstream maps("/proc/" + std::to_string(process.pid) + "/maps");
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

}  // namespace torchshm::os
