// What pages a pool's data file consists of, and when and where they come. Chosen by whoever creates the pool, for all its members: the kind
// is seen from the file and its header, the rest belongs to the file or is done at once.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "os/numa.h"

namespace torchshm::pool {

// Of Header::pages, so never renumbered.
enum class PageKind : uint32_t {
  kAuto = 0,     // huge pages where the system has some, small ones otherwise
  kSmall = 1,    // of 4 KiB only
  kReserved = 2  // huge pages of 2 MiB that the administrator has reserved: they come and go a whole chunk at a time
};

struct Pages {
  PageKind kind = PageKind::kAuto;
  bool prefault = false;  // all that the limit allows is committed at the start, and stays warm
  os::Numa numa;
};

// hugepages: "" or "auto", "never", "2MiB". kInvalid for anything else, and what parse_numa() says.
Result<Pages> parse_pages(const std::string& hugepages, bool prefault, const std::string& numa);

// The limit of a pool of reserved huge pages: what is asked for, if so many are free; for 0, all that are free, `most` bytes at most.
Result<uint64_t> reserved_limit(uint64_t asked, uint64_t most);

}  // namespace torchshm::pool
