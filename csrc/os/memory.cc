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
  std::string limit, usage, stat;  // paths
  std::string cache;               // of stat: file pages that the kernel gives up by itself; they count as used
};

uint64_t read_number(const std::string& path, uint64_t otherwise) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : otherwise;  // "max" is no number
}

uint64_t read_key(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  uint64_t value = 0;
  while (file >> name >> value) {
    if (name == key) return value;
  }
  return 0;
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
      groups.push_back(v2 ? Group{dir + "memory.max", dir + "memory.current", dir + "memory.stat", "inactive_file"}
                          : Group{dir + "memory.limit_in_bytes", dir + "memory.usage_in_bytes", dir + "memory.stat",
                                  "total_inactive_file"});
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
    uint64_t usage = read_number(group.usage, 0);
    usage -= std::min(usage, read_key(group.stat, group.cache));
    headroom = std::min(headroom, limit > usage ? limit - usage : 0);
  }
  return headroom;
}

}  // namespace torchshm::os
