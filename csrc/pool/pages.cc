#include "pool/pages.h"

#include <algorithm>

#include "os/huge_pages.h"

namespace torchshm::pool {

Result<Pages> parse_pages(const std::string& hugepages, bool prefault, const std::string& numa) {
  Pages pages;
  pages.prefault = prefault;
  if (hugepages == "never") {
    pages.kind = PageKind::kSmall;
  } else if (hugepages == "2MiB") {
    pages.kind = PageKind::kReserved;
  } else if (hugepages == "1GiB") {
    return Status(Code::kInvalid,
                  "hugepages='1GiB': a pool's memory comes and goes in chunks of 2 MiB, which pages of 1 GiB can't; "
                  "use hugepages='2MiB'");
  } else if (!hugepages.empty() && hugepages != "auto") {
    return Status(Code::kInvalid, "hugepages is auto, never or 2MiB, not '" + hugepages + "'");
  }
  auto policy = os::parse_numa(numa);
  if (!policy) return std::move(policy.status());
  pages.numa = policy.take();
  if (pages.kind == PageKind::kReserved && !pages.numa.nodes.empty() && pages.numa.nodes.back() > 63)
    return Status(Code::kInvalid, "numa: with reserved huge pages the nodes are 0 to 63, not '" + numa + "'");
  return pages;
}

Result<uint64_t> reserved_limit(uint64_t asked, uint64_t most) {
  const os::HugePages there = os::huge_pages();
  if (asked == 0 && there.free > 0)
    return std::min(there.free, std::max<uint64_t>(most / os::kHugePage, 1)) * os::kHugePage;
  const uint64_t needed = std::max<uint64_t>(asked / os::kHugePage + (asked % os::kHugePage != 0 ? 1 : 0), 1);
  if (needed <= there.free) return asked;
  return Status(
      Code::kUnsupported,
      (asked == 0 ? std::string("hugepages: no reserved page of 2 MiB is free")
                  : "hugepages: a limit of " + std::to_string(asked) + " bytes needs " + std::to_string(needed) +
                        " reserved pages of 2 MiB, and " + std::to_string(there.free) + " are free") +
          " (of " + std::to_string(there.total) + "). As root: sysctl vm.nr_hugepages=" +
          (asked == 0 ? "N" : std::to_string(there.total + needed - there.free)) +
          ", or leave hugepages= out: it takes transparent huge pages where the system has some");
}

}  // namespace torchshm::pool
