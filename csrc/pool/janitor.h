// A thread that gives idle chunks above the watermark back to the system, off the hot path.
//
// Private: the thread. It starts when first needed, blocks all signals, never touches Python, and does not survive a fork: a child makes
// its own when it needs one. It touches the chunk table only, through exchanges, so nothing waits for it and its death is a lease's death.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "pool/space.h"

namespace torchshm::pool {

class Janitor {
 public:
  Janitor(Space& space, Header& header) : space_(space), header_(header) {}
  // Ends the thread. Never run in a forked child, which has no such thread (Member leaves its parent's janitor alone), nor at exit.
  ~Janitor();
  // Called on the hot path: a load and a comparison unless there is something to do.
  void look();
  // Waits until the thread has nothing to do, for a second at most: what it is giving back is neither there nor gone meanwhile. It belongs to
  // this process, so it runs while the caller does.
  void settle();

 private:
  uint64_t watermark() const;
  void run();
  Space& space_;
  Header& header_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::thread thread_;
  bool wanted_ = false, at_work_ = false, ending_ = false;
};

}  // namespace torchshm::pool
