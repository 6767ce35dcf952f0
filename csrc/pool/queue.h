// A queue between processes: any number of senders and takers, first in, first out, and an event, which is a queue's block without them.
//
// Shared: the queue's block and what hangs on it (queue_layout.h). Private: the parcel that this process fills.
// A message's bytes are written where nobody looks; one exchange of one cell publishes it, and one takes it. The two counters only follow:
// whoever finds one behind the cells moves it on. There is no lock, and nobody waits for anybody who is in the middle of something.
//
// The queue's block is held by the processes that have the queue. All else that it consists of, and the arrays in its messages, are kept
// by tickets that belong to it (TicketValue::kQueue): when the last process has let go of the block, however it ended, they are void.
// When a process dies here: it has sent or it has not, it has taken or it has not. What it was writing or reading, with all that the message
// refers to, and the parcel that it was filling, are given back by the others (salvage()), or when the queue ends. Sleepers wait in slices,
// so a wake that died with its sender costs one slice.
// A forked child has the queue by its own lease, and fills parcels of its own.
// Thread safety: reserve(), publish(), cancel(), finish() and close_parcel() by one thread at a time; all else from any thread.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

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
    uint64_t epoch = 0;  // of the process that has it in hand: a forked child has not
    std::span<const MessageTicket> tickets;
  };
  // tickets: of the blocks that the message refers to, issued for this queue while it was busy.
  Result<Message> reserve(uint64_t length, std::span<const Handle> tickets = {});
  // False when the queue is full; it can be tried again, after wait_for_room().
  Result<bool> publish(const Message& message);
  void wait_for_room(const Message& message, uint64_t nanoseconds);
  void cancel(const Message& message) { finish(message); }

  // The first message, or none. It is this process's alone, and readable until finish().
  Result<std::optional<Message>> take();
  void finish(const Message& message);
  // Before finish(): what the message refers to and has not been received yet will be by whoever reads a copy of its bytes, some time; or
  // by nobody.
  void keep_for_later(const Message& message);
  void drop_rest(const Message& message);

  // While one lives this process has a message in hand. Whoever issues tickets for the queue has one until reserve() has returned.
  class Busy {
   public:
    explicit Busy(Queue& queue) : queue_(&queue), epoch_(queue.enter()) {}
    ~Busy() { end(); }
    void end() {
      if (Queue* queue = std::exchange(queue_, nullptr)) queue->leave(epoch_);
    }
    uint64_t keep() {  // beyond this object; who has what it returns leaves
      queue_ = nullptr;
      return epoch_;
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

   private:
    Queue* queue_;
    uint64_t epoch_;
  };

  // Gives back what the dead have left in the queue, if somebody has died since; else costs nothing. Called by whoever has just nothing in hand.
  // patience: nanoseconds to wait for one who is busy.
  void salvage(uint64_t patience = 0);

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

  // By who was woken by a message, and does not take it.
  void pass_wake_on();
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
  // Cells for a segment: new ones, with the ticket that keeps them, or those that were at an entry which is `out` since.
  struct Spare {
    uint32_t block;
    std::optional<Handle> handle;
    uint64_t from;
    Pair out;
  };
  Result<Spare> spare_segment(uint64_t segment);
  uint64_t segment_bytes() const;
  struct Made {
    std::byte* data;
    Handle handle;
  };
  template <class Head>
  Result<Made> make_block(uint64_t bytes, Head head);
  Result<Made> make_parcel(uint64_t bytes, uint64_t filler, uint64_t left);
  static Message write_header(std::byte* parcel, uint32_t block, uint64_t offset, uint64_t length,
                              std::span<const Handle> tickets, uint64_t epoch);
  Result<Message> reserve_busy(uint64_t length, std::span<const Handle> tickets, uint64_t epoch);
  void close_open();
  // Message and parcel at a place; nothing where that lies in no block, or the message does not fit into its block.
  struct At {
    ParcelHeader* parcel;
    Message message;
  };
  std::optional<At> at(uint64_t place) const;
  void end_if_read(ParcelHeader& parcel, uint32_t block, uint64_t less);
  bool ready(For what);
  QueueBell& bell(For what);
  static void ring(QueueBell& bell, bool all = false);
  void notice_fork();

  // Of this process's lease. enter() says for which process; leave() does nothing in another.
  uint64_t enter();
  void leave(uint64_t epoch);
  QueueParty& party(uint32_t slot) const {
    return reinterpret_cast<QueueParty*>(view_.data + kQueuePartiesAt)[party_index(slot)];
  }
  uint64_t identity();  // of this process's lease

  enum class Salvaged : uint8_t { kAll, kPerhapsMore, kNotNow };
  Salvaged try_salvage(uint64_t patience);
  bool all_idle(uint64_t patience);
  void unpark(const Message& message);
  template <class F>
  void each_unused(const Message& message, F use);  // of the message's tickets, those that are still the queue's
  struct Reach;

  Member& member_;
  Member::View view_;
  QueueRef ref_;
  uint32_t cells_;  // of a segment
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
  std::atomic<uint64_t> identity_{0}, identity_epoch_{0};
  std::atomic<uint64_t> salvaging_{0};   // epoch of who is at it, or 0
  std::atomic<uint64_t> deaths_{0};      // of the pool, when it was last looked for what they left
  std::atomic<uint64_t> not_before_{0};  // CLOCK_BOOTTIME; 0: nothing is left to do
  uint64_t pause_ = 0;                   // ns
};

}  // namespace torchshm::pool
