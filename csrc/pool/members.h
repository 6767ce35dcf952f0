// The pools that this process is a member of, and what happens to them around fork().
//
// Private: the list. Members are never destroyed before the process ends, since arrays may outlive everything else; the kernel ends their
// leases. Thread safety: all functions.
#pragma once

#include <memory>

#include "pool/member.h"

namespace torchshm::pool {

// Adds a member and installs the fork handlers when it is the first. The pointer stays valid until the process ends.
Member* adopt(std::unique_ptr<Member> member);
Member* find_pool(uint64_t pool_id);
// The member whose data file an address lies in.
Member* find_address(const void* address);

}  // namespace torchshm::pool
