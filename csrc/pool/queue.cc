#include "pool/queue.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/mapping.h"

namespace torchshm::pool {
namespace {

// ns without sleeping, before a wait. Sleeping costs a system call here, one for who wakes, and the processor; looking keeps a processor
// from whoever is to send, when it is the same. So it is longer after it was of use, and shorter after it was not; and now and then, after
// a short sleep, it is tried whether it would be.
constexpr uint64_t kLeastSpin = 500;
constexpr uint64_t kMostSpin = 20'000;
constexpr uint32_t kWaitsPerTrial = 64;
constexpr uint64_t kSlice = 100'000'000;  // ns; who was to wake may have died
constexpr int kMostAttempts = 1 << 20;  // each retry means that somebody else has got on; so many mean a corrupt queue
constexpr uint64_t kPatience = 1'000'000;  // ns, of who sleeps anyway, for one who is busy
constexpr uint64_t kOffsetMask = 0xffffffff;

uint64_t rounded(uint64_t bytes) { return (bytes + kMessageUnit - 1) / kMessageUnit * kMessageUnit; }
uint64_t tickets_bytes(uint64_t tickets) { return rounded(tickets * sizeof(MessageTicket)); }

void advance(std::atomic<uint64_t>& counter, uint64_t from) {
  (void)counter.compare_exchange_strong(from, from + 1, std::memory_order_acq_rel);
}

}  // namespace

// Also after forks that run no handlers, where the system tells.
uint64_t Queue::epoch() {
  static uint64_t* detector = os::fork_detector();
  static std::atomic<uint64_t> count{1};
  if (detector == nullptr) {
    static const int hooked = ::pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
    (void)hooked;
    return count.load(std::memory_order_relaxed);
  }
  // 0: nobody in this process has looked; 2: somebody is just counting; 1: it is counted, as at the start.
  const std::atomic_ref<uint64_t> looked(*detector);
  while (looked.load(std::memory_order_acquire) != 1) {
    uint64_t nobody = 0;
    if (!looked.compare_exchange_strong(nobody, 2)) continue;
    count.fetch_add(1, std::memory_order_relaxed);
    looked.store(1, std::memory_order_release);
  }
  return count.load(std::memory_order_relaxed);
}

Queue::Queue(Member& member, Member::View view, QueueRef ref)
    : member_(member), view_(view), ref_(ref), cells_(header().cells) {
  epoch_ = epoch();
  deaths_.store(member.arena().header().reaped.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

Queue::~Queue() {
  close_parcel();
  member_.release(view_.block, Mode::kReadWrite);
  // If only the dead have it still, it ends now.
  const BlockValue left = BlockValue::of(member_.arena().block(ref_.block).value.load());
  if (left.live && left.generation == ref_.generation) (void)member_.reap();
}

Result<std::unique_ptr<Queue>> Queue::create(Member& member, uint64_t maxsize) {
  auto view = member.allocate(kQueueBytes, false);
  if (!view) return std::move(view.status());
  std::memset(view->data, 0, kQueueBytes);
  auto* header = new (view->data) QueueHeader{};
  header->magic = kQueueMagic;
  header->layout = kQueueLayout;
  header->maxsize = maxsize;
  header->cells = maxsize == 0 ? kMostCells
                               : static_cast<uint32_t>(std::clamp<uint64_t>(
                                     std::bit_ceil(std::min<uint64_t>(maxsize, kMostCells)), kFewestCells, kMostCells));
  TORCHSHM_POINT("queue.made");
  return std::unique_ptr<Queue>(new Queue(member, *view, member.make_queue(view->block)));
}

Result<std::unique_ptr<Queue>> Queue::open(Member& member, const Handle& handle) {
  auto view = member.redeem(handle, Mode::kReadWrite);
  if (!view) return std::move(view.status());
  const auto* header = reinterpret_cast<const QueueHeader*>(view->data);
  const bool sound = view->length >= kQueueBytes && header->magic == kQueueMagic && header->layout == kQueueLayout;
  std::unique_ptr<Queue> queue;
  if (sound) queue.reset(new Queue(member, *view, {view->block, handle.generation}));
  if (!sound || queue->cells_ == 0 || queue->cells_ > kMostCells) {
    if (!sound) member.release(view->block, Mode::kReadWrite);  // else the queue does
    return Status(Code::kInvalid, "the handle's block is no queue of this version");
  }
  queue->deaths_.store(0, std::memory_order_relaxed);  // who knows what others have seen
  return queue;
}

// ---- cells

AtomicPair* Queue::cell_in(uint64_t block, uint64_t position) const {
  const auto& arena = member_.arena();
  if (block >= arena.pages()) return nullptr;
  const auto extent = arena.extent(static_cast<uint32_t>(block));
  if (!extent || extent->length < segment_bytes()) return nullptr;
  std::byte* data = arena.data() + extent->offset;
  if (reinterpret_cast<const SegmentHeader*>(data)->magic != kSegmentMagic) return nullptr;
  return reinterpret_cast<AtomicPair*>(data + sizeof(SegmentHeader)) + position % cells_;
}

Queue::Found Queue::look(uint64_t position) const {
  const uint64_t segment = position / cells_;
  const Pair at = entry(segment).load();
  if (at.lo < segment + 1) return {};
  // Its segment was used again, or its block is on the way to another place: it was taken long ago.
  if (at.lo > segment + 1 || at.hi == 0) return {Found::kAfter, nullptr, {}};
  AtomicPair* cell = cell_in(at.hi - 1, position);
  if (cell == nullptr) return {Found::kCorrupt, nullptr, {}};
  const Pair value = cell->load();
  const uint64_t message = 2 * position + 1;
  return {value.lo < message ? Found::kBefore : value.lo == message ? Found::kMessage : Found::kAfter, cell, value};
}

uint64_t Queue::settled_head() {
  for (int attempt = 0;; ++attempt) {
    const uint64_t head = header().head.load(std::memory_order_acquire);
    if (attempt == kMostAttempts || look(head).state != Found::kAfter) return head;
    advance(header().head, head);
  }
}

uint64_t Queue::settled_tail() {
  for (int attempt = 0;; ++attempt) {
    const uint64_t tail = header().tail.load(std::memory_order_acquire);
    const auto state = look(tail).state;
    if (attempt == kMostAttempts || (state != Found::kMessage && state != Found::kAfter)) return tail;
    advance(header().tail, tail);
  }
}

uint64_t Queue::size() {
  const uint64_t head = settled_head(), tail = settled_tail();
  return tail > head ? tail - head : 0;
}

// ---- blocks

// A block that belongs to the queue from the moment on in which this process does not hold it. Its head is there before the ticket is: who
// finds a ticket out sees what it keeps.
template <class Head>
Result<Queue::Made> Queue::make_block(uint64_t bytes, Head head) {
  auto view = member_.allocate(bytes, false, true);
  if (!view) return std::move(view.status());
  head(view->data);
  TORCHSHM_POINT("queue.block");
  auto issued = member_.issue(view->block, &ref_);
  TORCHSHM_POINT("queue.block_kept");
  member_.release_made(view->block);
  if (!issued) return std::move(issued.status());
  return Made{view->data, *issued};
}

Result<Queue::Made> Queue::make_parcel(uint64_t bytes, uint64_t filler, uint64_t left) {
  auto made = make_block(bytes, [&](std::byte* data) { new (data) ParcelHeader{kParcelMagic, 0, 0, 0, filler, left}; });
  if (!made) return made;
  auto& parcel = *reinterpret_cast<ParcelHeader*>(made->data);
  parcel.ticket = made->handle.ticket;
  parcel.nonce = made->handle.nonce;
  parcel.generation = made->handle.generation;
  return made;
}

uint64_t Queue::segment_bytes() const { return sizeof(SegmentHeader) + cells_ * sizeof(AtomicPair); }

// The block of a segment of which all is taken, out of its entry; or a new one.
Result<Queue::Spare> Queue::spare_segment(uint64_t segment) {
  const uint64_t drained = settled_head() / cells_;  // segments below are
  const auto steal = [&](uint64_t index) -> std::optional<Spare> {
    Pair found = entry(index).load();
    if (found.lo == 0 || found.lo - 1 >= drained || found.hi == 0) return std::nullopt;
    const Pair out{found.lo, 0};
    if (!entry(index).exchange_if(found, out)) return std::nullopt;
    TORCHSHM_POINT("queue.segment_out");
    return Spare{static_cast<uint32_t>(found.hi - 1), std::nullopt, index, out};
  };
  if (drained > 0) {
    if (const auto spare = steal(drained - 1)) return *spare;
    for (uint64_t i = 0; i < std::min<uint64_t>(segment, kQueueSegments); ++i) {
      if (const auto spare = steal(i)) return *spare;
    }
  }
  auto made = make_block(segment_bytes(), [&](std::byte* data) {
    std::memset(data, 0, segment_bytes());
    new (data) SegmentHeader{kSegmentMagic};
  });
  if (!made) return std::move(made.status());
  return Spare{made->handle.block, made->handle, 0, {}};
}

// Gives a segment its cells, unless somebody else has.
Status Queue::install(uint64_t segment) {
  AtomicPair& at = entry(segment);
  Pair found = at.load();
  if (found.lo >= segment + 1) return {};
  if (found.lo != 0 && found.lo - 1 >= settled_head() / cells_)
    return Status(Code::kFull,
                  "a queue holds " + std::to_string(uint64_t{kQueueSegments} * cells_) + " messages at most");
  if (found.hi != 0) {  // what lay here is drained
    (void)at.exchange_if(found, {segment + 1, found.hi});
    TORCHSHM_POINT("queue.segment_in");
    return {};
  }
  auto spare = spare_segment(segment);
  if (!spare) return std::move(spare.status());
  while (found.lo < segment + 1 && found.hi == 0) {
    if (at.exchange_if(found, {segment + 1, uint64_t{spare->block} + 1})) {
      TORCHSHM_POINT("queue.segment_in");
      return {};
    }
  }
  // Somebody was first. A spare goes back to where it was: in any other drained segment's entry its cells might look as if nothing had been
  // put there yet. If that is used again meanwhile it comes back when the queue ends.
  if (spare->handle) {
    member_.give_up(*spare->handle);
  } else {
    (void)entry(spare->from).exchange_if(spare->out, {spare->out.lo, uint64_t{spare->block} + 1});
  }
  TORCHSHM_POINT("queue.segment_in");
  return {};
}

// ---- parcels

void Queue::notice_fork() {
  const uint64_t now = epoch();
  if (now == epoch_) return;
  epoch_ = now;
  open_ = {};  // the parent's
}

std::optional<Queue::At> Queue::at(uint64_t place) const {
  const auto& arena = member_.arena();
  const uint64_t block = place >> 32;
  if (block >= arena.pages()) return std::nullopt;
  const auto extent = arena.extent(static_cast<uint32_t>(block));
  if (!extent) return std::nullopt;
  const uint64_t offset = (place & kOffsetMask) * kMessageUnit;
  if (offset < sizeof(ParcelHeader) || offset + sizeof(MessageHeader) > extent->length) return std::nullopt;
  std::byte* start = arena.data() + extent->offset;
  const auto* header = reinterpret_cast<const MessageHeader*>(start + offset);
  // Each once: a corrupt queue may have them change meanwhile.
  const uint64_t tickets = __atomic_load_n(&header->tickets, __ATOMIC_RELAXED);
  const uint64_t length = __atomic_load_n(&header->length, __ATOMIC_RELAXED);
  const uint64_t room = extent->length - offset - sizeof(MessageHeader);
  if (reinterpret_cast<ParcelHeader*>(start)->magic != kParcelMagic || tickets > kTickets ||
      tickets_bytes(tickets) > room || length > room - tickets_bytes(tickets))
    return std::nullopt;
  std::byte* list = start + offset + sizeof(MessageHeader);
  return At{reinterpret_cast<ParcelHeader*>(start),
            {list + tickets_bytes(tickets), length, place, 0, {reinterpret_cast<MessageTicket*>(list), tickets}}};
}

void Queue::end_if_read(ParcelHeader& parcel, uint32_t block, uint64_t less) {
  const Handle handle{member_.pool_id(), parcel.generation, block, parcel.ticket, parcel.nonce};
  if (parcel.left.fetch_sub(less, std::memory_order_acq_rel) != less) return;
  TORCHSHM_POINT("queue.parcel_read");
  member_.give_up(handle);
}

void Queue::close_parcel() {
  notice_fork();
  if (open_.data == nullptr) return;
  const Busy busy(*this);
  close_open();
}

void Queue::close_open() {
  const Open open = std::exchange(open_, {});
  auto& parcel = *reinterpret_cast<ParcelHeader*>(open.data);
  parcel.filler.store(0, std::memory_order_release);
  end_if_read(parcel, open.block, kOpenParcel - open.put);
}

Queue::Message Queue::write_header(std::byte* parcel, uint32_t block, uint64_t offset, uint64_t length,
                                   std::span<const Handle> tickets, uint64_t epoch) {
  auto* header = new (parcel + offset) MessageHeader{length, tickets.size()};
  auto* list = reinterpret_cast<MessageTicket*>(header + 1);
  for (size_t i = 0; i < tickets.size(); ++i) list[i] = tickets[i].nonce << 24 | tickets[i].ticket;
  return {reinterpret_cast<std::byte*>(list) + tickets_bytes(tickets.size()),
          length,
          uint64_t{block} << 32 | offset / kMessageUnit,
          epoch,
          {list, tickets.size()}};
}

Result<Queue::Message> Queue::reserve(uint64_t length, std::span<const Handle> tickets) {
  notice_fork();
  if (length > uint64_t{1} << 42) return Status(Code::kFull, "larger than 4 TiB");
  const uint64_t epoch = enter();
  auto message = reserve_busy(length, tickets, epoch);
  if (!message) leave(epoch);
  return message;
}

Result<Queue::Message> Queue::reserve_busy(uint64_t length, std::span<const Handle> tickets, uint64_t epoch) {
  const uint64_t bytes = rounded(sizeof(MessageHeader) + tickets_bytes(tickets.size()) + length);
  if (bytes > kParcel / 4) {
    auto made = make_parcel(sizeof(ParcelHeader) + bytes, 0, 1);
    if (!made) return std::move(made.status());
    return write_header(made->data, made->handle.block, sizeof(ParcelHeader), length, tickets, epoch);
  }
  if (open_.data != nullptr && open_.used + bytes > kParcel) {
    auto& left = reinterpret_cast<ParcelHeader*>(open_.data)->left;
    if (left.load(std::memory_order_acquire) == kOpenParcel - open_.put) {
      left.store(kOpenParcel, std::memory_order_relaxed);  // all is read: from the start again
      open_.used = sizeof(ParcelHeader);
      open_.put = 0;
    } else {
      close_open();
    }
  }
  if (open_.data == nullptr) {
    auto made = make_parcel(kParcel, identity(), kOpenParcel);
    if (!made) return std::move(made.status());
    open_ = {made->data, made->handle.block, sizeof(ParcelHeader), 0};
  }
  const uint64_t offset = open_.used;
  open_.used += bytes;
  ++open_.put;
  return write_header(open_.data, open_.block, offset, length, tickets, epoch);
}

// ---- messages

Result<bool> Queue::publish(const Message& message) {
  if (message.epoch != epoch()) return Status(Code::kStale, "the message is that of the process before the fork");
  QueueHeader& queue = header();
  for (int attempt = 0; attempt < kMostAttempts; ++attempt) {
    const uint64_t tail = queue.tail.load(std::memory_order_acquire);
    Found at = look(tail);
    if (at.state == Found::kCorrupt) break;
    if (at.state == Found::kMessage || at.state == Found::kAfter) {
      advance(queue.tail, tail);
      continue;
    }
    if (queue.maxsize != 0) {
      const uint64_t head = settled_head();
      if (head > tail) continue;  // looked at in between
      if (tail - head >= queue.maxsize) return false;
    }
    if (at.state == Found::kNone) {
      Status installed = install(tail / cells_);
      if (!installed) return installed;
      continue;
    }
    TORCHSHM_POINT("queue.put");
    if (!at.cell->exchange_if(at.value, {2 * tail + 1, message.place})) continue;
    TORCHSHM_POINT("queue.published");
    advance(queue.tail, tail);
    TORCHSHM_POINT("queue.tail_moved");
    ring(queue.arrived);
    unpark(message);
    leave(message.epoch);
    return true;
  }
  return Status(Code::kCorrupt, "the queue contradicts itself");
}

Result<std::optional<Queue::Message>> Queue::take() {
  QueueHeader& queue = header();
  std::optional<Busy> busy;
  for (int attempt = 0; attempt < kMostAttempts; ++attempt) {
    const uint64_t head = queue.head.load(std::memory_order_acquire);
    Found found = look(head);
    if (found.state == Found::kCorrupt) break;
    if (found.state == Found::kNone || found.state == Found::kBefore) return std::optional<Message>();
    if (found.state == Found::kMessage) {
      if (!busy) busy.emplace(*this);
      TORCHSHM_POINT("queue.take");
      if (!found.cell->exchange_if(found.value, {2 * head + 2, 0})) continue;
      TORCHSHM_POINT("queue.taken");
    }
    advance(queue.head, head);
    TORCHSHM_POINT("queue.head_moved");
    if (found.state != Found::kMessage) continue;
    if (queue.maxsize != 0) ring(queue.left);
    auto there = at(found.value.hi);
    if (!there) return Status(Code::kCorrupt, "a message of the queue lies outside its block");
    there->message.epoch = busy->keep();
    return std::optional<Message>(there->message);
  }
  return Status(Code::kCorrupt, "the queue contradicts itself");
}

void Queue::finish(const Message& message) {
  if (message.epoch != epoch()) return;  // the parent's
  unpark(message);
  if (const auto there = at(message.place)) end_if_read(*there->parcel, static_cast<uint32_t>(message.place >> 32), 1);
  leave(message.epoch);
}

bool Queue::task_done() {
  QueueHeader& queue = header();
  uint64_t done = queue.done.load(std::memory_order_acquire);
  do {
    if (done >= settled_tail()) return false;
  } while (!queue.done.compare_exchange_weak(done, done + 1, std::memory_order_acq_rel));
  TORCHSHM_POINT("queue.task_done");
  if (done + 1 >= settled_tail()) ring(queue.finished, true);
  return true;
}

void Queue::set_flag(bool on) {
  header().flag.store(on ? 1 : 0, std::memory_order_seq_cst);
  TORCHSHM_POINT("queue.flag_set");
  if (on) ring(header().finished, true);
}

// ---- waiting

QueueBell& Queue::bell(For what) {
  return what == For::kMessage ? header().arrived : what == For::kRoom ? header().left : header().finished;
}

bool Queue::ready(For what) {
  switch (what) {
    case For::kMessage:
      return !empty();
    case For::kRoom:
      return !full();
    case For::kAllDone:
      return all_done();
    default:
      return flag();
  }
}

// What is waited for has been made true before, by an exchange or a store that no load passes.
void Queue::ring(QueueBell& bell, bool all) {
  uint32_t waiting = bell.waiting.load(std::memory_order_seq_cst);
  if (waiting == 0) return;
  bell.rung.fetch_add(1, std::memory_order_seq_cst);
  TORCHSHM_POINT("queue.rung");
  if (all) {
    os::wake_all(bell.rung);
  } else if (os::wake_one(bell.rung) != 0) {
    return;
  }
  // Nobody slept. Who came since has counted up, and is not forgotten.
  bell.waiting.compare_exchange_strong(waiting, 0, std::memory_order_seq_cst);
}

void Queue::pass_wake_on() { ring(header().arrived); }

void Queue::wake_takers() {
  header().arrived.rung.fetch_add(1, std::memory_order_seq_cst);
  os::wake_all(header().arrived.rung);
}

void Queue::wait(For what, uint64_t nanoseconds) {
  // Relaxed: an estimate.
  const uint64_t budget = std::min<uint64_t>(spin_.load(std::memory_order_relaxed), nanoseconds);
  const uint64_t start = os::boot_time();
  uint64_t spent = 0;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready(what)) {
        const uint64_t useful = std::min(4 * spent, kMostSpin);
        if (useful > budget) spin_.store(static_cast<uint32_t>(useful), std::memory_order_relaxed);
        return;
      }
      __builtin_ia32_pause();
    }
    spent = os::boot_time() - start;
  } while (spent < budget);
  spin_.store(static_cast<uint32_t>(std::max(budget / 2, kLeastSpin)), std::memory_order_relaxed);
  if (nanoseconds <= budget) return;
  QueueBell& slept = bell(what);
  const uint32_t seen = slept.rung.load(std::memory_order_seq_cst);  // first: see ring()
  slept.waiting.fetch_add(1, std::memory_order_seq_cst);
  TORCHSHM_POINT("queue.waiting");
  if (!ready(what)) (void)os::wait(slept.rung, seen, std::min(nanoseconds - budget, kSlice));
  salvage(kPatience);
  if (waits_.fetch_add(1, std::memory_order_relaxed) % kWaitsPerTrial != 0) return;
  if (const uint64_t took = os::boot_time() - start; took < kMostSpin)
    spin_.store(static_cast<uint32_t>(std::min(2 * took, kMostSpin)), std::memory_order_relaxed);
}

}  // namespace torchshm::pool
