// An advisory lock of a store: one byte of the catalogue file, locked through an open file description of its own (os/lock.h).
//
// Shared: nothing but the kernel's word on who has which byte. The catalogue has no other locks; the bytes begin where no file ends.
// Private: the descriptor, and a list of the locks that this process has.
// When a process dies here: the kernel closes its descriptors, and the lock is free; no bell is rung. A forked child closes its copies
// before the fork returns in it. A fork that runs no handlers (a bare clone) leaves it a copy: the lock is then free when it is released,
// or when both have died.
// Thread safety: all functions, from any thread. Two Locks of one process exclude one another as those of two processes do.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"
#include "os/fd.h"
#include "store/catalogue.h"

namespace torchshm::store {

class Lock {
 public:
  // key: any bytes; the empty one is the store's own. Keys whose hashes agree in 62 bits share a lock.
  Lock(std::shared_ptr<Catalogue> catalogue, std::string_view key);
  // Lets go, if it is held.
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

  // True when it is held afterwards, with others (shared) or alone. False when somebody else, or this one already, has it.
  Result<bool> try_acquire(bool shared);
  // Wakes those who wait. kMissing when it is not held; kSystem when the descriptors of this process were closed meanwhile, and the lock
  // with them.
  Status release();
  bool held() const;
  // Whether it was held when this process was forked, and not here since.
  bool left_to_parent() const;

  // What is rung when the lock is released.
  std::string_view bell() const { return name_; }
  Catalogue& catalogue() { return *catalogue_; }

  // For fork handlers.
  void forget_in_child();

 private:
  Status let_go();

  std::shared_ptr<Catalogue> catalogue_;
  std::string name_;
  uint64_t byte_;
  os::Fd description_;
  bool left_to_parent_ = false;
};

}  // namespace torchshm::store
