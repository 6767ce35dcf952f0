// What other processes can see of a pool at one moment: the control file's bytes, how many pages the data file has, which leases are locked.
//
// Two moments at which all of it is the same are the same to every survivor, whatever the dead process had in its registers and in its own
// memory. That is what makes a kill at one instruction stand for the kills at its neighbours. The data file's bytes are not in it: the pool
// writes none, and the survivor's patterns are compared after every kill.
// Shared: read only. Thread safety: one thread.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "os/mapping.h"
#include "pool/arena.h"

namespace torchshm::torture {

class Picture {
 public:
  // Takes the first picture.
  explicit Picture(const pool::Arena& arena);
  // Looks again. True when something has changed since the last look. kernel: whether a system call may have been made meanwhile.
  bool look(bool kernel);
  // A number for what differs from the first picture: which words have other values (not which values: those hold pids and times), how
  // many pages there are and which leases are locked.
  uint64_t difference() const;

 private:
  struct Extent {
    uint64_t from, to;
  };
  void find_extents();
  uint64_t locks() const;

  const pool::Arena& arena_;
  const std::byte* control_;
  uint64_t size_;
  std::vector<Extent> extents_;  // of the control file that have pages; the rest is zero
  uint64_t control_blocks_ = 0, data_blocks_ = 0, locks_ = 0;
  os::Mapping first_, last_;
};

}  // namespace torchshm::torture
