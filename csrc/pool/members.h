// The pools that this process is a member of, and what happens to them around fork().
//
// Private: the list. Members are never destroyed before the process ends, since arrays may outlive everything else; the kernel ends their
// leases. Thread safety: all functions.
#pragma once

#include <memory>
#include <mutex>

#include "pool/member.h"

namespace torchshm::pool {

// One addition to the list. As long as it is under way there is no other, and no fork: no child has a member that its handlers don't know.
class Adoption {
 public:
  Adoption();
  // A member that was not kept leaves its pool.
  ~Adoption();
  // Whether one more may be added.
  bool room() const;
  // Takes a member over. REQUIRES: room(); once.
  Member* hold(std::unique_ptr<Member> member);
  // Ends this, and adds the member that it holds, if any. The pointer stays valid until the process ends.
  void keep();

 private:
  std::unique_lock<std::mutex> adding_;
  std::unique_ptr<Member> fresh_;
};
// Null when there is no room. The pointer stays valid until the process ends.
Member* adopt(std::unique_ptr<Member> member);
inline constexpr const char* kTooMany = "this process is a member of too many pools";
Member* find_pool(uint64_t pool_id);
// The member whose data file an address lies in.
Member* find_address(const void* address);

}  // namespace torchshm::pool
