// A process's membership of a pool: what the rooms above use. Allocates, hands over, receives, releases.
//
// Shared: through ledger, tickets and space. Private: the heap, the holds, one mutex.
// When a process dies here: see those. When it forks: the child gets a lease of its own that holds all that the parent held, made before
// the fork returns in either (prepare_fork); it is alive as long as either of them keeps the lock's description open.
// Thread safety: all public functions, from any thread; no function calls back into Python or waits for another process.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "pool/arena.h"
#include "pool/handle.h"
#include "pool/holds.h"
#include "pool/ledger.h"
#include "pool/membership.h"
#include "pool/stats.h"

namespace torchshm::pool {

// Who can give up memory that nobody uses, when a pool is full: the catalogue of a store.
class RoomMaker {
 public:
  virtual ~RoomMaker() = default;
  // Returns how many bytes of blocks were given up; 0 when there is nothing (more) to give up. May use the pool, and write files.
  virtual uint64_t make_room(uint64_t bytes) = 0;
  // What a user can do who finds no room. Must not use the pool.
  virtual std::string advice() const = 0;
};

class Member final : public FreedSink {
 public:
  static Result<std::unique_ptr<Member>> create(uint64_t family, const Limits& limits);
  static Result<std::unique_ptr<Member>> attach(os::Fd data, os::Fd control);

  // A further lease of this process over the same mappings: members as threads, which ThreadSanitizer can follow. For tests.
  // REQUIRES: the other one outlives it, and no fork meanwhile.
  // Of a pool whose files the caller has mapped.
  static Result<std::unique_ptr<Member>> over(Arena arena) { return make(std::move(arena)); }
  static Result<std::unique_ptr<Member>> beside(const Member& other);

  struct View {
    std::byte* data = nullptr;  // first byte of the block under the mode asked for
    uint32_t block = 0;
    uint64_t length = 0;  // bytes, rounded up to granules
  };
  // A fresh block, held once in kReadWrite mode. whole_pages: for blocks that will be seen copy-on-write.
  // in_the_making: until release_made() no object looks at it, and a child that is forked meanwhile does not keep it.
  // A full pool asks its room makers, with nothing held for it meanwhile.
  Result<View> allocate(uint64_t bytes, bool whole_pages, bool in_the_making = false);
  void add_room_maker(std::weak_ptr<RoomMaker> maker);
  // Whether this process holds no block, and has at most so many room makers.
  bool idle(size_t room_makers);
  // In this thread a full pool is full, while one lives: for what must not wait for files, and for room makers themselves, who may go
  // beyond the limit by a little to give up much.
  class Restraint {
   public:
    explicit Restraint(bool beyond_limit = false);
    ~Restraint();
    Restraint(const Restraint&) = delete;
    Restraint& operator=(const Restraint&) = delete;

   private:
    bool before_, beyond_before_;
  };
  void release_made(uint32_t block);

  // One more object, or one less, that looks at a held block. REQUIRES: held.
  void retain(uint32_t block, Mode mode);
  void release(uint32_t block, Mode mode);

  // A handle with a ticket of its own. REQUIRES: held.
  // queue: the ticket belongs to it, and ends with it.
  Result<Handle> issue(uint32_t block, const QueueRef* queue = nullptr);
  // From here on the block is a queue: when it is free, all tickets that belong to it are taken back. REQUIRES: held.
  QueueRef make_queue(uint32_t block);
  // The block of a handle, held once more. kStale, kForeign and kInvalid are told apart.
  // exclusive: the block was made for this message and belongs to whoever receives it.
  Result<View> redeem(const Handle& handle, Mode mode, bool exclusive = false);

  // For names. keep(): the handle's ticket belongs to a name from here on; false when it was taken back already.
  bool keep(const Handle& handle);
  // Ends a queue's ticket, if it is still that one. REQUIRES: the index of a ticket, as in adopt().
  void end(uint32_t ticket, const TicketValue& value);
  // The ticket of a queue's message is this process's own from here on.
  void adopt(uint32_t ticket, uint64_t nonce);
  // Ends it, whoever does it; once.
  void give_up(const Handle& handle);
  // A block that a name keeps alive, held once more. kStale when it is not that block any more.
  Result<View> attach(uint32_t block, uint64_t generation, Mode mode);
  // Of a block that is about to be attached, what that looks at first. Any number will do.
  void prefetch(uint32_t block) const {
    if (block >= arena_.pages()) return;
    holds_.prefetch(block);
    __builtin_prefetch(&arena_.block(block));
  }
  // Who this process is in the pool: slot:12 | incarnation:48, and whether such a one is gone. Never true of this process.
  uint64_t identity();
  uint32_t pid() const { return arena_.lease(membership_.slot()).pid.load(std::memory_order_relaxed); }
  bool gone(uint64_t identity);

  struct Found {
    uint32_t block;
    Mode mode;
    uint64_t offset;  // of the address in the block
    uint64_t length;  // of the block
    bool exclusive;   // it came in a message made for this process
  };
  // The held block in which an address lies. Constant time.
  std::optional<Found> find(const void* address);
  // Whether this process has written to [low, high) of a held block's copy-on-write view. Costs with the pages that are mapped here, unless
  // nothing in this process has faulted since it was last found unwritten.
  bool modified(const Found& found, const std::byte* low, const std::byte* high);
  // Whether [low, high) of a held block may be given a name as it is: the file has what is seen there, and what is written here later does
  // not reach the file, unless the program shares that memory by intent. What came in a message becomes private to this process by this.
  bool can_be_named(const Found& found, const std::byte* low, const std::byte* high);
  // Whether what is written here in kReadWrite mode would be seen by nobody else: the block is private since a fork, or since it was named.
  bool is_private(uint32_t block);
  // How many objects of this process look at a block.
  uint32_t objects(uint32_t block);
  // A further view of a held block under another mode. Fails with kUnsupported where the block does not consist of whole pages (for
  // kCopyOnWrite) or the face can't be mapped.
  Result<View> view(uint32_t block, Mode mode);

  uint32_t reap();
  // Takes back the tickets of messages whose senders are dead: nobody will receive them. REQUIRES: nobody else is, or was since the messages
  // were sent, a member.
  uint32_t drop_messages();
  uint64_t trim(uint64_t keep);
  // What is idle is kept for so many ns from now on, at most a minute: it is about to be needed again.
  void keep_warm(uint64_t time);
  // Gives back what is idle beyond the watermark, when the time of keep_warm() is over.
  void look_at_warm();
  Stats stats();
  // Of the chunks: bytes with pages behind them, and those of them that nobody uses.
  struct Usage {
    uint64_t committed = 0, idle = 0, limit = 0;
  };
  Usage usage() const;
  void set_ticket_age(uint32_t seconds) { arena_.header().ticket_age.store(seconds, std::memory_order_relaxed); }
  void count_fallback();

  uint64_t pool_id() const { return pool_id_; }
  uint64_t family() const { return arena_.header().family; }
  Arena& arena() { return arena_; }
  Membership& membership() { return membership_; }

  // Around fork(), in this order; prepare leaves the mutex locked, the other two unlock it.
  void prepare_fork();
  void parent_after_fork();
  void child_after_fork();

  // FreedSink; called with the mutex held.
  void freed(uint32_t block, uint64_t generation) override;

 private:
  Member(Arena arena, Membership membership, Holds holds);
  static Result<std::unique_ptr<Member>> make(Arena arena);
  void start();
  void leave_work();
  // Private state that belongs to a lease, made anew in a forked child.
  struct Work;
  void become(Membership membership);
  void notice_fork();
  void take_hints();
  void release_empty();
  void keep_few_empty();
  void release_locked(uint32_t block, Mode mode);
  void end_queues(bool look = false);
  void take_back_before_growth();
  uint32_t reap_locked();
  bool drop_copy(const Arena::Extent& extent);
  bool copy_is_clean(const Arena::Extent& extent);
  void part_with_child();
  bool part(uint32_t block);
  Result<View> allocate_here(uint64_t bytes, bool whole_pages, bool in_the_making, int steps);
  std::shared_ptr<RoomMaker> room_maker();
  Result<uint32_t> allocate_block(uint64_t bytes, bool whole_pages);
  Result<uint32_t> allocate_small(uint32_t granules, bool whole_pages);
  bool make_room_step(int step, uint64_t bytes);
  void hold_again_for(const Membership& heir);
  Result<View> attach_locked(uint32_t block, uint64_t generation, Mode mode);

  std::mutex mutex_;
  Arena arena_;
  Membership membership_;
  Holds holds_;
  std::unique_ptr<Work> work_;
  uint64_t pool_id_;
  uint64_t* fork_detector_;
  std::vector<std::weak_ptr<RoomMaker>> room_makers_;
  std::vector<uint32_t> making_;    // allocated and not yet released by a thread that fills a message
  std::optional<Membership> heir_;  // between prepare_fork and its end
  // Ranges that were unwritten when the process had had so many page faults; a first write to a page is a fault.
  struct Unwritten {
    const std::byte* low = nullptr;
    const std::byte* high = nullptr;
    uint64_t faults = 0;
  };
  Unwritten unwritten_[16];
  // Ranges of the copy-on-write face that show what was written to a view that is gone: the system refused to drop it.
  std::vector<Arena::Extent> spoiled_;
  bool stranded_ = false;  // forked when no slot was to be had: may read what it inherited, and nothing else
  std::string stranded_why_;

 public:
  ~Member() override;
};

}  // namespace torchshm::pool
