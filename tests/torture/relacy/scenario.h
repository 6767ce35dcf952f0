// What every scenario starts from, watches at every step, and looks at when all is over.
#pragma once

#include "search.h"
#include "small_pool.h"

namespace torchshm::model {

// Relacy's operator new keeps book of everything and makes choices of its own; the pool's vectors are not what is looked for.
struct PlainNew : rl::context {
  static int rl::context::*counter() { return &PlainNew::disable_alloc_; }
};

constexpr uint32_t kA = 0, kB = 1, kC = 2, kD = 3, kUndertaker = 4;  // slots; the last joins when all is over
constexpr uint32_t kNothing = ~0U;

template <class Derived, int threads>
class Scenario : public rl::test_suite<Derived, threads> {
  struct Restart {
    Restart() { trace.restart(); }
  } restart_;

 public:
  SmallPool pool;
  rl::var<uint32_t> payload[2];       // of the blocks; only who holds one may touch it
  Word<uint64_t> message{"message"};  // in a pipe: generation, and the ticket's nonce and index
  std::array<uint32_t, 5> holding{kNothing, kNothing, kNothing, kNothing,
                                  kNothing};  // the block that the program in a slot uses
  std::array<uint64_t, 5> generation{};
  std::array<bool, 5> died{};

  // Leases that live at first; the fewer, the fewer words a recount looks at.
  static constexpr uint32_t kLiving = 3;

  void before() {
    rl::ctx().*PlainNew::counter() += 1;
    pool.header().next_incarnation.store(9, std::memory_order_relaxed);
    pool.header().slots_used.store(Derived::kLiving, std::memory_order_relaxed);
    for (uint32_t slot = 0; slot < Derived::kLiving; ++slot) {
      pool.lease(slot).lock.store(1, std::memory_order_relaxed);
      pool.lease(slot).word.store(pool::lease_word(slot + 1), std::memory_order_relaxed);
    }
    chunk_of(pool::kNobody);
    payload[0]($) = 0;
    payload[1]($) = 0;
    for (uint32_t slot = 0; slot < SmallPool::kLeaseSlots; ++slot) pool.custody(slot)($) = 0;
    self().arrange();
    trace.threads_running = true;
  }

  void thread(unsigned i) {
    trace.read(1);  // to have begun is a state of its own
    self().process(i);
  }

  // The pool's invariant, in every state.
  void invariant() {
    if (search.seen_before) return;
    for (uint32_t block = 0; block < 2; ++block) {
      const BlockValue v = pool.value(block);
      const uint32_t known = pool.bits_of(block) + pool.tickets_of(block);
      RL_ASSERT(v.live || v.count == 0);
      RL_ASSERT(v.count >= known && "the count is too low");
      RL_ASSERT(!v.live || v.count > 0);
      const ChunkState state = pool.chunk_now(0).state;
      RL_ASSERT(!(v.live && state != ChunkState::kSmall && state != ChunkState::kTaking) && "freed under a live block");
    }
    for (uint32_t slot = 0; slot < kUndertaker; ++slot) {
      if (holding[slot] == kNothing) continue;
      const BlockValue v = pool.value(holding[slot]);
      RL_ASSERT(v.live && v.generation == generation[slot] && "freed while held");
      RL_ASSERT((pool.lease(slot).bits.now() >> holding[slot] & 1) != 0 && "a hold was taken away");
    }
  }

  void after() {
    trace.threads_running = false;
    if (!search.seen_before) at_rest();
    rl::ctx().*PlainNew::counter() -= 1;
  }

  // The programs.

  // Runs f as the process in `slot`, which may be killed anywhere in it. True when it was.
  template <class F>
  bool mortal(uint32_t slot, F f) {
    const uint32_t thread = trace.thread();
    trace.mortal[thread] = true;
    try {
      f();
      may_die();
    } catch (const Killed&) {
      died[slot] = true;
    }
    trace.mortal[thread] = false;
    holding[slot] = kNothing;
    if (died[slot]) pool.lease(slot).lock.store(0, std::memory_order_seq_cst);
    return died[slot];
  }
  // f, killed at a point that is chosen, before anything else runs. For arrange().
  template <class F>
  void dies_in(uint32_t slot, F f) {
    trace.mortal[Trace::kSetUp] = true;
    try {
      f();
    } catch (const Killed&) {
    }
    trace.mortal[Trace::kSetUp] = false;
    holding[slot] = kNothing;
    died[slot] = true;
    pool.lease(slot).lock.store(0, std::memory_order_seq_cst);
  }
  void has(uint32_t slot, uint32_t block, uint64_t gen) {
    holding[slot] = block;
    generation[slot] = gen;
  }
  bool allocate(Process& p, uint32_t block) {
    if (!p.ledger.allocate(block, 0, 4)) return false;
    has(p.slot, block, p.ledger.value(block).generation);
    payload[block]($) = p.slot;
    return true;
  }
  void drop(Process& p, uint32_t block) {
    (void)static_cast<uint32_t>(payload[block]($));
    holding[p.slot] = kNothing;
    p.ledger.drop(block);
  }
  void send(Process& p, uint32_t block) {
    const uint64_t gen = generation[p.slot];
    const auto id = p.tickets.issue(block, gen);
    if (id) message.store(gen << 32 | id->nonce << 8 | id->index << 1 | 1, std::memory_order_release);
  }
  // Takes block 0 from the message if it has come. False when there is none, or it is stale.
  bool receive(Process& p, bool must_work) {
    const uint64_t m = message.load(std::memory_order_acquire);
    if (m == 0) return false;
    const uint64_t gen = m >> 32;
    if (!p.ledger.attach(0, gen)) {
      RL_ASSERT(!must_work && "the message's block is gone");
      return false;
    }
    has(p.slot, 0, gen);
    (void)static_cast<uint32_t>(payload[0]($));
    (void)p.tickets.redeem({static_cast<uint32_t>(m >> 1 & 127), m >> 8 & 0xffffff}, 0, gen);
    return true;
  }

  // Membership::join, for one slot.
  bool join(uint32_t slot) {
    if (!pool::looks_free(pool, slot)) return false;
    uint32_t unlocked = 0;
    if (!pool.lease(slot).lock.compare_exchange_strong(unlocked, 1, std::memory_order_seq_cst)) return false;
    died[slot] = false;
    if (pool::claim_slot(pool, slot) != 0) {
      pool.custody(slot)($) = 1;
      const SmallLease& lease = pool.lease(slot);
      RL_ASSERT(lease.bits.load(std::memory_order_relaxed) == 0 && "a new lease begins with a hold");
      RL_ASSERT(lease.intent.load(std::memory_order_relaxed) == 0 && "a new lease begins with an intent");
      RL_ASSERT(lease.reaping.load(std::memory_order_relaxed) == 0 && "a new lease begins as a reaper");
      return true;
    }
    pool.lease(slot).lock.store(0, std::memory_order_seq_cst);
    return false;
  }

  // For arrange().
  void chunk_of(uint32_t owner) {
    ChunkValue chunk;
    chunk.state = ChunkState::kSmall;
    chunk.owner = owner;
    pool.chunk(0).value.set(chunk.pair());
  }
  void live_at_first(uint32_t block, uint32_t count) {
    BlockValue v;
    v.generation = 1;
    v.live = true;
    v.count = count;
    v.granules = 4;
    pool.block(block).value.set(v.pair());
  }
  void holds_at_first(uint32_t slot, uint32_t block) {
    pool.lease(slot).bits.fetch_or(uint64_t{1} << block, std::memory_order_relaxed);
    pool.lease(slot).ledger_end.store(1, std::memory_order_relaxed);
    has(slot, block, 1);
  }
  void ticket_at_first(uint32_t index, uint32_t sender, uint32_t block) {
    TicketValue t;
    t.nonce = 1;
    t.sender = TicketValue::sender_of(sender, sender + 1);
    t.block = block;
    pool.ticket(index).value.set(t.pair());
    pool.header().tickets_used.store(index + 1, std::memory_order_relaxed);
    message.store(uint64_t{1} << 32 | 1 << 8 | index << 1 | 1, std::memory_order_relaxed);
  }

 private:
  Derived& self() { return *static_cast<Derived*>(this); }

  // Everybody has stopped. What the dead used comes back, counts are exact, and what the living drop is free.
  void at_rest() {
    pool.lease(kUndertaker).lock.store(1, std::memory_order_relaxed);
    pool.lease(kUndertaker).word.store(pool::lease_word(8), std::memory_order_relaxed);
    pool.header().slots_used.store(kUndertaker + 1, std::memory_order_relaxed);
    Process last(pool, kUndertaker, true);
    (void)last.reaper.reap_all();
    for (uint32_t slot = 0; slot < kUndertaker; ++slot) {
      const SmallLease& lease = pool.lease(slot);
      if (lease.lock.now() != 0) continue;
      RL_ASSERT(lease.word.now() == pool::kLeaseFree && "a dead lease is not taken back");
      RL_ASSERT(lease.bits.now() == 0 && "a dead lease's hold is left");
      RL_ASSERT(lease.intent.now() == 0 && "a dead lease's intent is left");
      RL_ASSERT(lease.reaping.now() == 0 && "a dead reaper keeps a slot");
      RL_ASSERT(pool.chunk_now(0).owner != slot && "a dead lease's chunk is left");
    }
    for (uint32_t block = 0; block < 2; ++block) {
      const BlockValue v = pool.value(block);
      RL_ASSERT(v.count == pool.bits_of(block) + pool.tickets_of(block) && "the count is not exact at rest");
    }
    for (uint32_t slot = 0; slot < kUndertaker; ++slot) {
      if (pool.lease(slot).lock.now() == 0) continue;
      Process p(pool, slot, true);
      holding[slot] = kNothing;
      for (uint32_t block = 0; block < 2; ++block) {
        if ((pool.lease(slot).bits.now() >> block & 1) != 0) p.ledger.drop(block);
      }
    }
    (void)last.tickets.take_back(0, false, ~uint64_t{0});
    for (uint32_t block = 0; block < 2; ++block) RL_ASSERT(!pool.value(block).live && "leaked");
    const ChunkState state = pool.chunk_now(0).state;
    RL_ASSERT(state != ChunkState::kTaking && "nobody ends the taking of a chunk");
  }
};

}  // namespace torchshm::model
