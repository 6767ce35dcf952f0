#include "os/memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace torchshm::os {
namespace {

constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();

struct Group {
  std::string limit, usage;  // paths
};

uint64_t read_number(const std::string& path, uint64_t otherwise) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : otherwise;  // "max" is no number
}

// Every cgroup from ours up to the root, since any of them may be the tightest.
std::vector<Group> find_groups() {
  std::vector<Group> groups;
  std::ifstream membership("/proc/self/cgroup");
  std::string line;
  while (std::getline(membership, line)) {
    std::istringstream parts(line);
    std::string id, controllers, path;
    if (!std::getline(parts, id, ':') || !std::getline(parts, controllers, ':') || !std::getline(parts, path)) continue;
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    for (std::string at = path == "/" ? "" : path;; at.erase(at.rfind('/'))) {
      const std::string dir = root + at + "/";
      groups.push_back(v2 ? Group{dir + "memory.max", dir + "memory.current"}
                          : Group{dir + "memory.limit_in_bytes", dir + "memory.usage_in_bytes"});
      if (at.empty() || at.rfind('/') == std::string::npos) break;
    }
  }
  return groups;
}

uint64_t meminfo(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  uint64_t kib = 0;
  while (file >> name >> kib) {
    std::getline(file, unit);
    if (name == key) return kib * 1024;
  }
  return kNone;
}

}  // namespace

uint64_t memory_allowed() {
  uint64_t allowed = meminfo("MemTotal:");
  for (const Group& group : find_groups()) allowed = std::min(allowed, read_number(group.limit, kNone));
  return allowed;
}

uint64_t memory_headroom() {
  uint64_t headroom = meminfo("MemAvailable:");
  for (const Group& group : find_groups()) {
    const uint64_t limit = read_number(group.limit, kNone);
    if (limit == kNone) continue;
    const uint64_t usage = read_number(group.usage, 0);
    headroom = std::min(headroom, limit > usage ? limit - usage : 0);
  }
  return headroom;
}

}  // namespace torchshm::os
