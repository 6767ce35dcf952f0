// What the dead have left in a queue: messages that were being written or read, with all that they refer to, and parcels half full. Nothing
// that a process does to send or take a message says so to others; so after a death what is out for the queue is compared with what can
// still be reached, and the rest is given back.
//
// A ticket that was out at the start, and kept no segment then nor a parcel that a living member filled, is garbage when, after that,
//   1. every living member has once had nothing in hand: what it was writing then is published by now, or parked, or given up;
//   2. no parked message, and after those no unread one, refers to it or lies in its block;
//   3. every living member has once had nothing in hand again: what it had taken meanwhile is read, and its tickets used up or adopted;
// and it is still that ticket. Nobody is waited for: if somebody is busy it is tried later.
#include <algorithm>
#include <new>
#include <thread>
#include <unordered_set>
#include <vector>

#include "base/failpoint.h"
#include "os/futex.h"
#include "pool/queue.h"

namespace torchshm::pool {
namespace {

constexpr uint64_t kIncarnation = (uint64_t{1} << 40) - 1;
constexpr int kLooks = 100;                        // at a member that is busy
constexpr uint64_t kFirstPause = 20'000'000;       // ns, until it is tried again
constexpr uint64_t kBusyPause = 500'000'000;       // ns, at most where somebody was busy
constexpr uint64_t kLongestPause = 5'000'000'000;  // ns

bool lives(const Arena& arena, uint64_t identity) {
  const auto slot = static_cast<uint32_t>(identity & 0xfff);
  return slot < kMaxLeases && arena.lease(slot).word.load(std::memory_order_seq_cst) == lease_word(identity >> 12);
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
  uint64_t before = own.busy.load(std::memory_order_relaxed);
  while (before >> 24 != incarnation) {  // of an earlier lease in the slot
    own.parked.store(0, std::memory_order_relaxed);
    if (own.busy.compare_exchange_strong(before, incarnation << 24)) break;
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

// What is parked stays so while it is tried to publish it: whoever finds it parked no more finds it published, or given up.
void Queue::wait_for_room(const Message& message, uint64_t nanoseconds) {
  if (message.epoch != epoch()) return;  // the parent's
  QueueParty& own = party(static_cast<uint32_t>(identity() & 0xfff));
  uint64_t nothing = 0;
  if (!own.parked.compare_exchange_strong(nothing, message.place) && nothing != message.place)
    return wait(For::kRoom, nanoseconds);
  TORCHSHM_POINT("queue.parked");
  leave(message.epoch);
  wait(For::kRoom, nanoseconds);
  (void)enter();
}

void Queue::unpark(const Message& message) {
  auto& parked = party(static_cast<uint32_t>(identity() & 0xfff)).parked;
  uint64_t place = message.place;
  if (parked.load(std::memory_order_relaxed) == place) parked.compare_exchange_strong(place, 0);
}

template <class F>
void Queue::each_unused(const Message& message, F use) {
  for (const MessageTicket ticket : message.tickets) {
    const auto index = static_cast<uint32_t>(ticket & 0xffffff);
    if (index >= kTickets) continue;
    const TicketValue value = TicketValue::of(member_.arena().ticket(index).value.load());
    if (value.of_queue() && value.nonce == ticket >> 24) use(index, value);
  }
}

void Queue::keep_for_later(const Message& message) {
  each_unused(message, [&](uint32_t index, const TicketValue& value) { member_.adopt(index, value.nonce); });
}

void Queue::drop_rest(const Message& message) {
  each_unused(message, [&](uint32_t index, const TicketValue& value) { member_.end(index, value); });
}

// ---- salvage

// What can be reached.
struct Queue::Reach {
  std::unordered_set<MessageTicket> tickets;
  std::unordered_set<uint32_t> blocks;
  bool complete = true;

  // What a message says, if it is still there afterwards: until then its block may be used for something else at any moment.
  template <class Still>
  void message(const Queue& queue, uint64_t place, Still still) {
    std::vector<MessageTicket> said;
    const auto found = queue.at(place);
    if (found) {
      for (const MessageTicket& ticket : found->message.tickets)
        said.push_back(__atomic_load_n(&ticket, __ATOMIC_RELAXED));
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    if (!still()) return;
    complete = complete && found;
    blocks.insert(static_cast<uint32_t>(place >> 32));
    tickets.insert(said.begin(), said.end());
  }
};

bool Queue::all_idle(uint64_t patience) {
  const Arena& arena = member_.arena();
  for (uint32_t slot = 0, used = arena.slots_used(); slot < used; ++slot) {
    const uint64_t word = arena.lease(slot).word.load(std::memory_order_seq_cst);
    if ((word & 0xff) != kLeaseLive) continue;
    const uint64_t start = patience != 0 ? os::boot_time() : 0;
    for (int looks = 0;; ++looks) {
      const uint64_t busy = party(slot).busy.load(std::memory_order_seq_cst);
      if (busy >> 24 != (word >> 8 & kIncarnation) || (busy & 0xffffff) == 0) break;
      if (looks < kLooks) {
        __builtin_ia32_pause();
        continue;
      }
      if (member_.gone(word >> 8 << 12 | slot)) (void)member_.reap();  // and is looked at no more the next time
      if (patience == 0 || os::boot_time() - start > patience) return false;
      std::this_thread::yield();
    }
  }
  return true;
}

Queue::Salvaged Queue::try_salvage(uint64_t patience) try {
  Arena& arena = member_.arena();
  if (!all_idle(patience)) return Salvaged::kNotNow;  // before the long way through the tickets
  struct Out {
    uint32_t index;
    TicketValue ticket;
    bool parcel;
  };
  std::vector<Out> out;
  bool parcels = false;  // of one in use the dead may have read a part: it is looked at again
  for (uint32_t i = 0, used = arena.tickets_used(); i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender != TicketValue::sender_of_queue(ref_.generation) || ticket.second != ref_.block ||
        ticket.block >= arena.pages())
      continue;
    const auto extent = arena.extent(ticket.block);
    if (!extent) continue;
    const std::byte* data = arena.data() + extent->offset;
    if (word_at(data) == kSegmentMagic) continue;
    const bool parcel = static_cast<uint32_t>(word_at(data)) == kParcelMagic;
    if (parcel && lives(arena, word_at(data + offsetof(ParcelHeader, filler)))) {
      parcels = true;
      continue;
    }
    out.push_back({i, ticket, parcel});
  }
  TORCHSHM_POINT("queue.salvage_begun");
  if (!all_idle(patience)) return Salvaged::kNotNow;
  TORCHSHM_POINT("queue.salvage_idle");
  Reach reach;
  for (uint32_t slot = 0, used = arena.slots_used(); slot < used; ++slot) {
    const auto& parked = party(slot).parked;
    const uint64_t place = parked.load(std::memory_order_seq_cst), word = arena.lease(slot).word.load();
    if (place == 0 || (word & 0xff) != kLeaseLive ||
        party(slot).busy.load(std::memory_order_seq_cst) >> 24 != (word >> 8 & kIncarnation))
      continue;
    reach.message(*this, place, [&] { return parked.load(std::memory_order_seq_cst) == place; });
  }
  TORCHSHM_POINT("queue.salvage_parked");
  const uint64_t head = settled_head(), tail = settled_tail();
  if (tail > head + uint64_t{kQueueSegments} * cells_) return Salvaged::kNotNow;  // it contradicts itself
  for (uint64_t position = head; position < tail; ++position) {
    const Found found = look(position);
    reach.complete = reach.complete && found.state != Found::kCorrupt;
    if (found.state == Found::kMessage)
      reach.message(*this, found.value.hi, [&] { return found.cell->load() == found.value; });
  }
  if (!reach.complete || !all_idle(patience)) return Salvaged::kNotNow;
  TORCHSHM_POINT("queue.salvage");
  for (const Out& one : out) {
    if (reach.blocks.contains(one.ticket.block)) {
      parcels = parcels || one.parcel;
    } else if (!reach.tickets.contains(one.ticket.nonce << 24 | one.index)) {
      member_.end(one.index, one.ticket);
      TORCHSHM_POINT("queue.salvaged");
    }
  }
  return parcels ? Salvaged::kPerhapsMore : Salvaged::kAll;
} catch (const std::bad_alloc&) {
  return Salvaged::kNotNow;
}

void Queue::salvage(uint64_t patience) {
  // Relaxed: whoever has not heard of a death by now hears of it with a later message.
  const uint64_t deaths = member_.arena().header().reaped.load(std::memory_order_relaxed);
  const uint64_t due = not_before_.load(std::memory_order_relaxed);
  if (deaths == deaths_.load(std::memory_order_relaxed) && due == 0) return;
  const uint64_t now = os::boot_time();
  if (now < due) return;
  uint64_t at_it = salvaging_.load(std::memory_order_relaxed);
  if (at_it == epoch() || !salvaging_.compare_exchange_strong(at_it, epoch(), std::memory_order_acquire)) return;
  if (deaths != deaths_.exchange(deaths, std::memory_order_relaxed)) pause_ = kFirstPause;
  const Salvaged done = try_salvage(patience);
  not_before_.store(done == Salvaged::kAll ? 0 : now + pause_, std::memory_order_relaxed);
  pause_ = std::min(2 * pause_, done == Salvaged::kNotNow ? std::max(pause_, kBusyPause) : kLongestPause);
  salvaging_.store(0, std::memory_order_release);
}

}  // namespace torchshm::pool
