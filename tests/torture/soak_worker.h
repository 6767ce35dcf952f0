// One process of a soak: it does what programs do with a pool, at random, and verifies every byte that it may look at.
//
// Shared: the pool and the board. Private: what it holds and what it expects to read there. One thread.
// When a process dies here: that is the test.
#pragma once

#include <map>
#include <random>
#include <vector>

#include "pool/member.h"
#include "soak_board.h"

namespace torchshm::torture {

class Worker {
 public:
  Worker(pool::Member& member, Board& board, Entry* entry, uint32_t index, uint64_t seed)
      : member_(&member), board_(board), entry_(entry), index_(index), random_(seed) {}

  // Until it leaves by itself, or is killed.
  void run(uint64_t steps);
  // One operation. may_fork: also those that only a worker does.
  void step(bool may_fork);
  // Receives one message from a worker's pipe and drops it again; false when there is none.
  bool drain(uint32_t index);
  void release_all();
  // A block that is held to the end.
  void keep(uint64_t bytes);
  void verify_kept();
  uint64_t held() const;

  // Around a fork: what both sides would write to is not written to any more; then, in the child, another process with the same items.
  void before_fork();
  void become(pool::Member& member, Entry* entry, uint32_t index, uint64_t seed);

  // In a build with failpoints: to be killed or stopped at one of the next few that are passed.
  static void arm(Board& board, uint64_t random);

  // An entry for the calling process; null when all are taken.
  static Entry* enter(Board& board);
  // A crash is a finding. In the conductor's children.
  static void watch_for_crashes(Board& board);

 private:
  struct Item {
    std::byte* data = nullptr;
    uint64_t bytes = 0, seed = 0;
    uint32_t block = 0;
    pool::Mode mode = pool::Mode::kReadWrite;
    bool shared_writes = false;  // holders write to it: the low byte of each word is anything
    bool own = false;            // came in a message that was made for this process
    bool whole = false;          // consists of whole pages
  };
  struct Message {
    pool::Handle handle;
    uint64_t seed, bytes;
    pool::Mode mode;
    bool shared_writes, own, whole, copy;
    uint32_t from;
  };
  static_assert(sizeof(Message) <= 64, "a pipe takes it whole or not at all");

  class Timed;
  uint64_t pick(uint64_t n) { return random_() % n; }
  void allocate();
  void send();
  bool receive();
  void again();
  void view();
  void write();
  void release(size_t i);
  void fork_off();
  void park();
  void take(const Message& message, bool first);
  void post(const Message& message);
  void fill(const Item& item) const;
  bool verify(const Item& item, const char* when);
  void count_descriptors();

  pool::Member* member_;
  Board& board_;
  Entry* entry_;
  uint32_t index_;
  std::mt19937_64 random_;
  std::vector<Item> items_;
  std::vector<Message> remembered_;
  std::map<uint32_t, uint64_t>
      written_;  // blocks whose copy-on-write view this process has written to, and with which seed
  uint32_t forked_ = 0, depth_ = 0;
  size_t kept_ = 0;  // the first so many items
  uint64_t descriptors_ = 0;
};

}  // namespace torchshm::torture
