// On which nodes of the machine the pages of a memory file are put (mbind(2), by the raw system call: libnuma is not needed).
//
// Shared: the policy of a memory file belongs to the file, whoever touches a page first, so one process sets it once. It goes with the file.
// That of a file of reserved huge pages is the mapping's alone: each process sets it for the pages that it adds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace torchshm::os {

struct Numa {
  enum class Policy : uint8_t {
    kLocal,       // the node of who touches a page first
    kInterleave,  // in turn
    kBind,        // these nodes, and no others
    kPreferred    // this node while it has room
  };
  Policy policy = Policy::kLocal;
  std::vector<uint32_t> nodes;
};

// "" and "local"; "interleave", over all nodes; "interleave:0,1", "bind:0-3", "preferred:0". kInvalid for another text and for nodes that
// are not online, kUnsupported where the kernel knows no nodes.
Result<Numa> parse_numa(const std::string& text);

// Sets the policy of the mapped file. REQUIRES: a kShared mapping.
Status set_policy(std::byte* at, uint64_t length, const Numa& numa);

}  // namespace torchshm::os
