// Huge pages that the administrator has reserved (vm.nr_hugepages), of 2 MiB: how many there are, and which memory files consist of them.
//
// Shared: with every process of the machine, which may take them meanwhile. When a process dies: the pages of a file that nobody else holds
// are free again.
#pragma once

#include <cstdint>

namespace torchshm::os {

constexpr uint64_t kHugePage = uint64_t{2} << 20;

struct HugePages {
  uint64_t total = 0;  // reserved by the administrator
  uint64_t free =
      0;  // that nobody has, or has announced; with those that the kernel may still make (vm.nr_overcommit_hugepages)
};
// Of 2 MiB. Zeros where the kernel has none.
HugePages huge_pages();

// Whether a file's pages are reserved huge ones (hugetlbfs).
bool in_huge_pages(int fd);

}  // namespace torchshm::os
