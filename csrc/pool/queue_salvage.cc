// What the dead have left in a queue: messages that were being written or read, with all that they refer to, and parcels half full. Nothing
// that a process does to send or take a message says so to others; so after a death what is out for the queue is compared with what can
// still be reached, and the rest is given back.
//
// A ticket that was out at the start is garbage when, after that,
//   1. every living member has once had nothing in hand: what it was writing then is published by now, or parked, or given up;
//   2. no parked message, and after those no unread one, refers to it or lies in its block;
//   3. every living member has once had nothing in hand again: what it had taken meanwhile is read, and its tickets used up;
// and it keeps no segment, nor a parcel that a living member fills. Nobody is waited for: if somebody is busy it is tried later.
#include <unordered_set>

#include "base/failpoint.h"
#include "os/futex.h"
#include "pool/queue.h"

namespace torchshm::pool {
namespace {

constexpr uint64_t kIncarnation = (uint64_t{1} << 40) - 1;
constexpr int kLooks = 100;                        // at a member that is busy
constexpr uint64_t kFirstPause = 20'000'000;       // ns, until it is tried again
constexpr uint64_t kLongestPause = 5'000'000'000;  // ns

bool lives(const Arena& arena, uint64_t identity) {
  const auto slot = static_cast<uint32_t>(identity & 0xfff);
  return slot < kMaxLeases && arena.lease(slot).word.load(std::memory_order_seq_cst) == lease_word(identity >> 12);
}

uint64_t generation_of(const Arena& arena, uint32_t block) {
  return BlockValue::of(arena.block(block).value.load()).generation;
}

// A word of a block that may be freed, and used for something else, at any moment.
uint64_t word_at(const std::byte* place) {
  return __atomic_load_n(reinterpret_cast<const uint64_t*>(place), __ATOMIC_ACQUIRE);
}

}  // namespace

// ---- in hand

uint64_t Queue::identity() {
  const uint64_t now = epoch();
  if (identity_epoch_.load(std::memory_order_acquire) == now) return identity_.load(std::memory_order_relaxed);
  // One thread at a time; another process's thread that was at it is not here.
  static std::atomic<uint64_t> entering{0};
  for (uint64_t at_it = entering.load();; at_it = entering.load()) {
    if (at_it != now && entering.compare_exchange_strong(at_it, now)) break;
    __builtin_ia32_pause();
  }
  const uint64_t identity = member_.identity();
  QueueParty& own = party(static_cast<uint32_t>(identity & 0xfff));
  const uint64_t incarnation = identity >> 12 & kIncarnation;
  if (own.busy.load(std::memory_order_relaxed) >> 24 != incarnation) {  // of an earlier lease in the slot
    own.parked.store(0, std::memory_order_relaxed);
    own.busy.store(incarnation << 24, std::memory_order_release);
  }
  identity_.store(identity, std::memory_order_relaxed);
  identity_epoch_.store(now, std::memory_order_release);
  entering.store(0);
  return identity;
}

uint64_t Queue::enter() {
  const uint64_t own = identity();
  party(static_cast<uint32_t>(own & 0xfff)).busy.fetch_add(1, std::memory_order_seq_cst);
  return epoch();
}

void Queue::leave(uint64_t of) {
  if (of != epoch()) return;  // the parent's
  const uint64_t own = identity();
  const uint64_t before = party(static_cast<uint32_t>(own & 0xfff)).busy.fetch_sub(1, std::memory_order_seq_cst);
  if ((before & 0xffffff) == 1) salvage();
}

void Queue::wait_for_room(const Message& message, uint64_t nanoseconds) {
  QueueParty& own = party(static_cast<uint32_t>(identity() & 0xfff));
  uint64_t nothing = 0;
  if (!own.parked.compare_exchange_strong(nothing, message.place)) return wait(For::kRoom, nanoseconds);
  TORCHSHM_POINT("queue.parked");
  leave(message.epoch);
  wait(For::kRoom, nanoseconds);
  (void)enter();
  own.parked.store(0, std::memory_order_seq_cst);
}

void Queue::keep_for_later(const Message& message) {
  for (const MessageTicket ticket : message.tickets)
    member_.adopt(static_cast<uint32_t>(ticket & 0xffffff), ticket >> 24);
}

// ---- salvage

// What can be reached.
struct Queue::Reach {
  std::unordered_set<MessageTicket> tickets;
  std::unordered_set<uint32_t> blocks;
  bool complete = true;

  explicit Reach(Queue& queue) : queue_(queue) {}
  ~Reach() { let_go(); }

  // A message, if it is still there once its block is held: until then it may be read, and the block be used for something else.
  template <class Still>
  void message(uint64_t place, Still still) {
    const auto block = static_cast<uint32_t>(place >> 32);
    if (block >= queue_.member_.arena().pages()) return;
    if (!held_ || *held_ != block) {
      let_go();
      auto view = queue_.member_.attach(block, generation_of(queue_.member_.arena(), block), Mode::kReadWrite);
      if (view) held_ = block;
    }
    if (!still()) return;
    const auto found = held_ ? queue_.at(place) : std::nullopt;
    if (!found) {
      complete = false;
      return;
    }
    blocks.insert(block);
    tickets.insert(found->message.tickets.begin(), found->message.tickets.end());
  }

 private:
  void let_go() {
    if (held_) queue_.member_.release(*std::exchange(held_, std::nullopt), Mode::kReadWrite);
  }
  Queue& queue_;
  std::optional<uint32_t> held_;
};

Queue::Salvaged Queue::try_salvage() {
  Arena& arena = member_.arena();
  struct Out {
    uint32_t index;
    TicketValue ticket;
  };
  std::vector<Out> out;
  for (uint32_t i = 0, used = arena.tickets_used(); i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender == TicketValue::sender_of_queue(ref_.generation) && ticket.second == ref_.block &&
        ticket.block < arena.pages()) {
      out.push_back({i, ticket});
    }
  }
  const auto each_living = [&](auto&& see) {
    for (uint32_t slot = 0, used = arena.slots_used(); slot < used; ++slot) {
      const uint64_t word = arena.lease(slot).word.load(std::memory_order_seq_cst);
      if ((word & 0xff) == kLeaseLive && !see(slot, word >> 8 & kIncarnation)) return false;
    }
    return true;
  };
  const auto all_idle = [&] {
    return each_living([&](uint32_t slot, uint64_t incarnation) {
      for (int looks = 0; looks < kLooks; ++looks) {
        const uint64_t busy = party(slot).busy.load(std::memory_order_seq_cst);
        if (busy >> 24 != incarnation || (busy & 0xffffff) == 0) return true;
        __builtin_ia32_pause();
      }
      return false;
    });
  };
  if (!all_idle()) return Salvaged::kNotNow;
  Reach reach(*this);
  (void)each_living([&](uint32_t slot, uint64_t incarnation) {
    const auto& parked = party(slot).parked;
    const uint64_t place = parked.load(std::memory_order_seq_cst);
    if (place != 0 && party(slot).busy.load(std::memory_order_seq_cst) >> 24 == incarnation)
      reach.message(place, [&] { return parked.load(std::memory_order_seq_cst) == place; });
    return true;
  });
  for (uint64_t position = settled_head(), tail = settled_tail(); position < tail; ++position) {
    const Found found = look(position);
    if (found.state == Found::kMessage)
      reach.message(found.value.hi, [&] { return found.cell->load() == found.value; });
  }
  if (!reach.complete || !all_idle()) return Salvaged::kNotNow;
  TORCHSHM_POINT("queue.salvage");
  bool parcels = false;
  for (const Out& one : out) {
    const uint32_t block = one.ticket.block;
    const auto extent = arena.extent(block);
    if (!extent || reach.tickets.contains(one.ticket.nonce << 24 | one.index)) continue;
    const std::byte* data = arena.data() + extent->offset;
    const bool parcel = static_cast<uint32_t>(word_at(data)) == kParcelMagic;
    // Of one in use the dead may have read a part: it is looked at again.
    if (reach.blocks.contains(block) || (parcel && lives(arena, word_at(data + offsetof(ParcelHeader, filler))))) {
      parcels = true;
      continue;
    }
    if (word_at(data) == kSegmentMagic) continue;
    member_.give_up({member_.pool_id(), generation_of(arena, block), block, one.index, one.ticket.nonce});
    TORCHSHM_POINT("queue.salvaged");
  }
  return parcels ? Salvaged::kPerhapsMore : Salvaged::kAll;
}

void Queue::salvage() {
  // Relaxed: whoever has not heard of a death by now hears of it with a later message.
  const uint64_t deaths = member_.arena().header().reaped.load(std::memory_order_relaxed);
  const uint64_t due = not_before_.load(std::memory_order_relaxed);
  if (deaths == deaths_.load(std::memory_order_relaxed) && due == 0) return;
  const uint64_t now = os::boot_time();
  if (now < due) return;
  uint64_t at_it = salvaging_.load(std::memory_order_relaxed);
  if (at_it == epoch() || !salvaging_.compare_exchange_strong(at_it, epoch(), std::memory_order_acquire)) return;
  if (deaths != deaths_.exchange(deaths, std::memory_order_relaxed)) pause_ = kFirstPause;
  const Salvaged done = try_salvage();
  not_before_.store(done == Salvaged::kAll ? 0 : now + pause_, std::memory_order_relaxed);
  if (done == Salvaged::kPerhapsMore) pause_ = std::min(2 * pause_, kLongestPause);
  salvaging_.store(0, std::memory_order_release);
}

}  // namespace torchshm::pool
