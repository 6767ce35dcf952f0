#include "os/huge_pages.h"

#include <linux/magic.h>
#include <sys/vfs.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "base/failpoint.h"

namespace torchshm::os {
namespace {

uint64_t figure(const char* name) {
  std::ifstream file("/sys/kernel/mm/hugepages/hugepages-2048kB/" + std::string(name));
  uint64_t value = 0;
  file >> value;
  return value;
}

}  // namespace

HugePages huge_pages() {
  HugePages out;
  out.total = figure("nr_hugepages");
  const uint64_t free = figure("free_hugepages"), announced = figure("resv_hugepages");
  const uint64_t more = figure("nr_overcommit_hugepages"), made = figure("surplus_hugepages");
  out.free = free - std::min(free, announced) + more - std::min(more, made);
  return out;
}

bool in_huge_pages(int fd) {
  struct statfs about {};
  return TORCHSHM_INJECT("os.fstatfs") == 0 && ::fstatfs(fd, &about) == 0 && about.f_type == HUGETLBFS_MAGIC;
}

}  // namespace torchshm::os
