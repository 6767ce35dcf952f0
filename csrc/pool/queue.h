// A queue between processes: any number of senders and takers, first in, first out, and an event, which is a queue's block without them.
//
// Shared: the queue's block and what hangs on it (queue_layout.h). Private: the parcel that this process fills.
// A message's bytes are written where nobody looks; one exchange of one cell publishes it, and one takes it. The two counters only follow:
// whoever finds one behind the cells moves it on. There is no lock, and nobody waits for anybody who is in the middle of something.
//
// The queue's block is held by the processes that have the queue. All else that it consists of, and the arrays in its messages, are kept
// by tickets that belong to it (TicketValue::kQueue): when the last process has let go of the block, however it ended, they are void.
// When a process dies here: it has sent or it has not, it has taken or it has not. The room of what it was writing or reading, and the
// parcel that it was filling, come back when the queue ends. Sleepers wait in slices, so a wake that died with its sender costs one slice.
// A forked child has the queue by its own lease, and fills parcels of its own.
// Thread safety: reserve(), publish(), cancel(), finish() and close_parcel() by one thread at a time; all else from any thread.
#pragma once

#include <memory>
#include <optional>

#include "base/status.h"
#include "pool/member.h"
#include "pool/queue_layout.h"

namespace torchshm::pool {

class Queue {
 public:
  // maxsize: messages in it at most; 0: as many as there is room for.
  static Result<std::unique_ptr<Queue>> create(Member& member, uint64_t maxsize);
  static Result<std::unique_ptr<Queue>> open(Member& member, const Handle& handle);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  // For another process of the pool; open() uses it up.
  Result<Handle> handle() { return member_.issue(view_.block); }
  Member& member() { return member_; }
  const QueueRef& ref() const { return ref_; }
  uint64_t maxsize() const { return header().maxsize; }

  // Room for a message, which is to be published or cancelled. kFull: the pool has none.
  struct Message {
    std::byte* data = nullptr;
    uint64_t length = 0;
    uint64_t place = 0;  // a cell's `hi`
  };
  Result<Message> reserve(uint64_t length);
  // False when the queue is full; it can be tried again.
  Result<bool> publish(const Message& message);
  void cancel(const Message& message) { finish(message); }

  // The first message, or none. It is this process's alone, and readable until finish().
  Result<std::optional<Message>> take();
  void finish(const Message& message);

  // Of a moment.
  uint64_t size();
  bool empty() { return !message_at(settled_head()); }
  bool full() { return maxsize() != 0 && size() >= maxsize(); }

  // As many messages as have been put must be done. False: more are done than were put.
  bool task_done();
  bool all_done() { return header().done.load(std::memory_order_acquire) >= settled_tail(); }

  // Sleeps until it may be so, at most that long; first looks for a while without sleeping.
  enum class For : uint8_t { kMessage, kRoom, kAllDone, kFlag };
  void wait(For what, uint64_t nanoseconds);

  // Ends a wait for a message before its time.
  void wake_takers();

  bool flag() const { return header().flag.load(std::memory_order_acquire) != 0; }
  void set_flag(bool on);

  // When this process is not going to put more for a while: its parcel goes with the last message in it.
  void close_parcel();

  // How often this process, or one that it was forked from, has been the child of a fork.
  static uint64_t epoch();

 private:
  Queue(Member& member, Member::View view, QueueRef ref);
  QueueHeader& header() const { return *reinterpret_cast<QueueHeader*>(view_.data); }
  AtomicPair& entry(uint64_t segment) const {
    return reinterpret_cast<AtomicPair*>(view_.data + kQueueTableAt)[segment % kQueueSegments];
  }
  // The cell of a position, as it is.
  struct Found {
    enum { kNone, kBefore, kMessage, kAfter, kCorrupt } state = kNone;  // kNone: the segment is not there yet
    AtomicPair* cell = nullptr;
    Pair value;
  };
  Found look(uint64_t position) const;
  AtomicPair* cell_in(uint64_t block, uint64_t position) const;
  bool message_at(uint64_t position) const { return look(position).state == Found::kMessage; }
  uint64_t settled_head();
  uint64_t settled_tail();
  Status install(uint64_t segment);
  Result<uint32_t> spare_segment(uint64_t segment);
  Result<std::byte*> make_block(uint64_t bytes, uint32_t& block, Handle& handle);
  Result<Message> reserve_in(std::byte* parcel, uint32_t block, uint64_t offset, uint64_t length);
  ParcelHeader* parcel(uint64_t place) const;
  void end_if_read(ParcelHeader& parcel, uint32_t block, uint64_t less);
  bool ready(For what);
  QueueBell& bell(For what);
  static void ring(QueueBell& bell, bool all = false);
  void notice_fork();

  Member& member_;
  Member::View view_;
  QueueRef ref_;
  // The parcel that this process fills.
  struct Open {
    std::byte* data = nullptr;
    uint32_t block = 0;
    uint64_t used = 0;
    uint64_t put = 0;
  } open_;
  std::atomic<uint32_t> waits_{0};
  std::atomic<uint32_t> spin_{2000};  // ns, before a wait
  uint64_t epoch_ = 0;                // of the process that fills it
};

}  // namespace torchshm::pool
