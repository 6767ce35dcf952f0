// The pool that this process puts its own data in, and the settings of the reducers.
//
// Private to the process. Thread safety: with the GIL.
#pragma once

#include <utility>
#include <vector>

#include "pool/members.h"
#include "python/numpy_api.h"

namespace torchshm::python {

struct Settings {
  // Smaller buffers travel inside the pickle. Measured (benchmarks/inline_threshold.py): from 4 KiB up the pool is quicker, and no block is
  // smaller than that.
  uint64_t min_bytes = 4096;
};

Settings& settings();
// Null until create() or attach() has made this process a member.
pool::Member* member();
void set_member(pool::Member* member);
// What lies in that pool is sent by reference from now on, as if it had been this process's pool before.
void refer_to(pool::Member* member);
// The member in whose pool an address lies, when that was this process's pool before it changed to another one, or refer_to() named it:
// what the program put there for others to see goes on by reference. Else null.
pool::Member* former_member(const void* address);
// All of those, oldest first.
const std::vector<pool::Member*>& former_members();
// The member for a handle's pool. Tries to join the family's pool by torchshm._family.find() when it is not known yet. Null with an
// exception set when there is none.
pool::Member* member_of(uint64_t pool_id);

// A worker's batch on its way out (torchshm/data/_parcel.py): memory for everybody to write goes by reference only where nobody else looks at
// it, neither in this process once the batch is gone nor in the same message. All else is copied, as it is without a pool.
struct Batch {
  enum class Kind {
    kArray,
    kBorrowed,  // a storage over an array's memory
    kStorage    // torch's own, which it shares with the receiver anyhow
  };
  struct Referred {
    pool::Member* member;
    uint32_t block;
    Kind kind;
    auto place() const { return std::pair(member, block); }
  };
  bool on = false;
  std::vector<Referred> referred;
  std::vector<Referred> to_copy;

  // Whether it may go by reference; notes it if so.
  bool refer(pool::Member& member, const pool::Member::Found& found, uint64_t bytes, Kind kind);
  // After the batch is gone: fills to_copy, returns whether there is anything in it.
  bool look();
};

// What this thread is doing to the pickles it makes.
struct Scope {
  int inline_depth = 0;              // with torchshm.inline()
  std::vector<pool::Handle> issued;  // while sharing: what a failure has to take back
  bool sharing = false;              // inside share(): every array goes to the pool, in whole pages, or it is an error
  pool::Mode mode = pool::Mode::kReadWrite;  // of the arrays that share() makes
  Batch batch;
  // While a message for a queue is pickled: tickets of that pool belong to the queue.
  const pool::QueueRef* queue = nullptr;
  pool::Member* queue_member = nullptr;
  std::vector<pool::Handle> in_message;
};
// A ticket for what is being pickled.
Result<pool::Handle> issue(pool::Member& member, uint32_t block);

Scope& scope();

}  // namespace torchshm::python
