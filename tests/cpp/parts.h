// The parts of a member without the member, several over one mapping: for tests that put other steps between two steps of one.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "base/failpoint.h"
#include "pool/heap.h"
#include "pool/ledger.h"
#include "pool/membership.h"
#include "pool/reaper.h"
#include "pool/space.h"
#include "pool/tickets.h"
#include "processes.h"

namespace torchshm::tests {

// A lease with its ledger, tickets, space and reaper. What becomes free is noted, and a run's chunks are released.
struct Parts final : pool::FreedSink {
  explicit Parts(pool::Arena& shared)
      : arena(shared),
        membership(pool::Membership::join(shared).take()),
        slot(membership.slot()),
        ledger(shared, slot, *this),
        tickets(shared, ledger, slot),
        space(shared, slot, [this] { ++growths; }),
        reaper(shared, slot, ledger, space) {}

  void freed(uint32_t block, uint64_t generation) override {
    free_again.emplace_back(block, generation);
    if (space.value(block / pool::kPagesPerChunk).state == pool::ChunkState::kRun) space.release_run(block, generation);
  }

  // A live large block, held.
  uint32_t run(uint64_t bytes = uint64_t{3} << 20) {
    auto block = space.claim_run(bytes);
    EXPECT_TRUE(block.ok()) << block.status().what();
    EXPECT_TRUE(ledger.allocate(*block, 0, static_cast<uint32_t>(bytes / pool::kGranule)));
    return *block;
  }
  // A live block of a page at the start of a chunk of small blocks, held.
  uint32_t small() {
    auto chunk = space.claim_small();
    EXPECT_TRUE(chunk.ok()) << chunk.status().what();
    const uint32_t block = chunk->chunk * pool::kPagesPerChunk;
    EXPECT_TRUE(ledger.allocate(block, 0, 4));
    return block;
  }
  uint64_t generation(uint32_t block) const { return ledger.value(block).generation; }
  uint32_t count(uint32_t block) const { return ledger.value(block).count; }
  // As if the process had died: nothing of it runs any more, and its lock goes.
  void die() { membership.abandon(arena); }

  pool::Arena& arena;
  pool::Membership membership;
  uint32_t slot;
  pool::Ledger ledger;
  pool::Tickets tickets;
  pool::Space space;
  pool::Reaper reaper;
  std::vector<std::pair<uint32_t, uint64_t>> free_again;
  int growths = 0;
};

inline pool::Arena fresh_arena(uint64_t limit = uint64_t{64} << 20) {
  auto arena = pool::Arena::create(1, {limit, limit});
  EXPECT_TRUE(arena.ok()) << arena.status().what();
  return arena.take();
}

inline void set_chunk(pool::Arena& arena, uint32_t chunk, const pool::ChunkValue& value) {
  pool::Pair found = arena.chunk(chunk).value.load();
  while (!arena.chunk(chunk).value.exchange_if(found, value.pair())) {
  }
}

inline void set_block(pool::Arena& arena, uint32_t block, const pool::BlockValue& value) {
  pool::Pair found = arena.block(block).value.load();
  while (!arena.block(block).value.exchange_if(found, value.pair())) {
  }
}

inline void set_ticket(pool::Arena& arena, uint32_t index, const pool::TicketValue& value) {
  pool::Pair found = arena.ticket(index).value.load();
  while (!arena.ticket(index).value.exchange_if(found, value.pair())) {
  }
  if (arena.header().tickets_used.load() <= index) arena.header().tickets_used.store(index + 1);
}

// Both need a build with failpoints.
//
// While it lives, the steps run when this process passes the point, as another process's would in between: once, or each time.
class Between {
 public:
  enum Times { kOnce, kEachTime };
  Between(const char* point, std::function<void()> steps, Times times = kOnce) {
    current = {point, std::move(steps), times, 0};
    arm();
  }
  ~Between() { failpoint::disarm(); }
  Between(const Between&) = delete;
  Between& operator=(const Between&) = delete;
  static int passed() { return current.passed; }

 private:
  struct Plan {
    const char* point;
    std::function<void()> steps;
    Times times;
    int passed;
  };
  static void arm() {
    failpoint::Plan plan;
    plan.only = current.point;
    plan.watch = [](const char*, bool) {
      failpoint::disarm();  // the steps pass points themselves
      ++current.passed;
      current.steps();
      if (current.times == kEachTime) arm();
    };
    failpoint::arm(plan);
  }
  inline static Plan current{};
};

// While it lives, the call fails: from the at-th on, or only then.
class Failing {
 public:
  Failing(const char* call, int error, uint64_t at = 1, bool persistent = true) {
    failpoint::Plan plan;
    plan.action = failpoint::Action::kFail;
    plan.only = call;
    plan.error = error;
    plan.at = at;
    plan.persistent = persistent;
    failpoint::arm(plan);
  }
  ~Failing() { failpoint::disarm(); }
  Failing(const Failing&) = delete;
  Failing& operator=(const Failing&) = delete;
};

}  // namespace torchshm::tests
