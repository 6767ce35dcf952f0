// A descriptor that is readable while something is in a queue: for waiting on queues together with other things.
//
// Private: all of it. A thread of this process sleeps on the queue as any taker does, and turns the descriptor on; whoever finds the queue
// empty turns it off. So senders pay for it no more than for a sleeping taker, and a sender's death costs at most a slice of time.
// When a process dies here: nothing is shared. A forked child has no such thread, and must make a watch of its own.
// Thread safety: all functions, from any thread; the destructor once, by the process that made it.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "os/event_fd.h"
#include "pool/queue.h"

namespace torchshm::pool {

class QueueWatch {
 public:
  // REQUIRES: the queue outlives it.
  static Result<std::unique_ptr<QueueWatch>> start(Queue& queue);
  ~QueueWatch();

  int fd() const { return fd_.get(); }
  // Sets the descriptor right: readable exactly if something is there now. To be called when a message has been taken.
  void settle();
  // Whether it was made by a process that this one was forked from: it is then to be left as it is.
  bool left_behind() const;

 private:
  explicit QueueWatch(Queue& queue, os::Fd fd) : queue_(queue), fd_(std::move(fd)) {}
  void run();

  Queue& queue_;
  os::Fd fd_;
  std::mutex mutex_;
  bool on_ = false;
  std::atomic<uint32_t> turned_off_{0};
  std::atomic<bool> ending_{false};
  uint64_t epoch_ = Queue::epoch();
  std::thread thread_;
};

}  // namespace torchshm::pool
