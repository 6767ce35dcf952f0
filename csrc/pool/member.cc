#include "pool/member.h"

#include <algorithm>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/mapping.h"
#include "pool/member_work.h"

namespace torchshm::pool {
namespace {

// Bytes seen copy-on-write; below, looking what was written costs more than the faults that it saves.
constexpr uint64_t kWorthALook = 256 << 10;
}  // namespace

Member::Member(Arena arena, Membership membership, Holds holds)
    : arena_(std::move(arena)),
      membership_(std::move(membership)),
      holds_(std::move(holds)),
      pool_id_(arena_.header().pool_id),
      fork_detector_(os::fork_detector()) {}

Member::~Member() {
  TORCHSHM_POINT("leave");
  os::drop_fork_detector(fork_detector_);
}

Result<std::unique_ptr<Member>> Member::make(Arena arena) {
  auto holds = Holds::create(arena.pages());
  if (!holds) return std::move(holds.status());
  auto membership = Membership::join(arena);
  // Every slot is taken, but perhaps by the dead only, with nobody there to reap them.
  const bool succeeds = membership.code() == Code::kNoSlot;
  if (succeeds) membership = Membership::succeed(arena, 0);
  if (!membership) return std::move(membership.status());
  std::unique_ptr<Member> member(new Member(std::move(arena), membership.take(), holds.take()));
  member->start();
  while (succeeds && !member->work_->reaper.end_own()) {
    auto next = Membership::succeed(member->arena_, member->membership_.slot() + 1);
    if (!next) return std::move(next.status());
    member->membership_ = next.take();
    member->work_.reset();
    member->start();
  }
  if (succeeds) member->membership_.renew(member->arena_);
  (void)member->work_->reaper.reap_all();
  return member;
}

Result<std::unique_ptr<Member>> Member::create(uint64_t family, const Limits& limits) {
  auto arena = Arena::create(family, limits);
  if (!arena) return std::move(arena.status());
  auto member = make(arena.take());
  if (!member || !limits.pages.prefault) return member;
  if (Status done = (*member)->work_->space.prefault(); !done) return done;
  return member;
}

Result<std::unique_ptr<Member>> Member::attach(os::Fd data, os::Fd control) {
  auto arena = Arena::attach(std::move(data), std::move(control));
  if (!arena) return std::move(arena.status());
  return make(arena.take());
}

Result<std::unique_ptr<Member>> Member::beside(const Member& other) {
  auto arena = other.arena_.alias();
  if (!arena) return std::move(arena.status());
  return make(arena.take());
}

// In a forked child: heap, chunks and janitor thread are the parent's, and joining a thread that is not there would hang. Leaked.
void Member::leave_work() { (void)work_.release(); }

void Member::start() {
  leave_work();
  work_ = std::make_unique<Work>(*this, membership_.slot());
  Lease& lease = arena_.lease(membership_.slot());
  lease.allocations.store(0, std::memory_order_relaxed);
  lease.fallbacks.store(0, std::memory_order_relaxed);
  lease.grown.store(0, std::memory_order_relaxed);
  TORCHSHM_POINT("start.counters");
  work_->hints_seen = lease.hints_end.load(std::memory_order_acquire);
}

// ---- release

void Member::freed(uint32_t block, uint64_t generation) {
  if (arena_.block(block).queue.load(std::memory_order_relaxed) == static_cast<uint32_t>(generation))
    work_->queue_ended = true;
  const ChunkValue chunk = work_->space.value(block / kPagesPerChunk);
  if (chunk.state == ChunkState::kRun) {
    work_->space.release_run(block, generation);
    work_->janitor.look();
    return;
  }
  if (chunk.state != ChunkState::kSmall) return;
  if (chunk.owner == membership_.slot()) {
    (void)work_->heap.give_back(block);
  } else if (chunk.owner == kNobody) {
    work_->space.take_if_empty(block / kPagesPerChunk);
  } else if (chunk.owner < kMaxLeases) {
    Lease& owner = arena_.lease(chunk.owner);
    const uint32_t at = owner.hints_end.fetch_add(1, std::memory_order_acq_rel) % kHints;
    TORCHSHM_POINT("freed.hint_counted");
    const bool lost = owner.hints[at].exchange(block + 1, std::memory_order_acq_rel) != 0;
    TORCHSHM_POINT("freed.hint_written");
    if (lost) {
      owner.hints_lost.store(1, std::memory_order_release);
      TORCHSHM_POINT("freed.loss_told");
    }
  }
}

void Member::retain(uint32_t block, Mode mode) {
  const std::lock_guard lock(mutex_);
  holds_.add_further(block, mode);
}

void Member::release_made(uint32_t block) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  const auto made = std::find(making_.begin(), making_.end(), block);
  if (made != making_.end()) making_.erase(made);
  release_locked(block, Mode::kReadWrite);
}

void Member::release(uint32_t block, Mode mode) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  release_locked(block, mode);
}

bool Member::drop_copy(const Arena::Extent& extent) {
  std::byte* copy = arena_.address(Mode::kCopyOnWrite, extent.offset);
  // What was only read is the block's own pages: left mapped, they need no faults in its next life.
  if (copy == nullptr || (extent.length >= kWorthALook && !os::privately_modified(copy, extent.length))) return true;
  return os::drop_private(copy, extent.length).ok();
}

// Tries again where it was refused. Until then such a range is not seen through that face.
bool Member::copy_is_clean(const Arena::Extent& extent) {
  bool clean = true;
  std::erase_if(spoiled_, [&](const Arena::Extent& old) {
    if (old.offset >= extent.offset + extent.length || extent.offset >= old.offset + old.length) return false;
    const bool dropped = drop_copy(old);
    clean = clean && dropped;
    return dropped;
  });
  return clean;
}

void Member::release_locked(uint32_t block, Mode mode) {
  const Holds::Removed removed = holds_.remove(block, mode);
  if (removed.last_copy) {
    // What was written here privately would shadow the block's next contents.
    if (const auto extent = arena_.extent(block); extent && !drop_copy(*extent)) spoiled_.push_back(*extent);
  }
  if (removed.left != 0 || stranded_) return;
  if (holds_.is_private(block)) {
    const auto extent = arena_.extent(block);
    // Kept for good where it can't be mapped as before: its next owner here would write to nobody's but this process's memory.
    if (!extent || !arena_.make_private(extent->offset, extent->length, false)) return;
    holds_.mark_private(block, false);
  }
  work_->ledger.drop(block);
  end_queues();
  keep_few_empty();
}

// Once the block of a queue is free, what belonged to the queue comes back. If this process dies before that, whoever reaps it does it.
// look: there may be such a one that nobody here has seen.
void Member::end_queues(bool look) {
  while (look || work_->queue_ended) {
    look = false;
    work_->queue_ended = false;
    TORCHSHM_POINT("end_queues.begin");
    (void)work_->tickets.end_queues();
  }
}

QueueRef Member::make_queue(uint32_t block) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  const uint64_t generation = work_->ledger.value(block).generation;
  // Zero says that it is none: the tickets of one queue in 2^32 are found by whoever reaps only.
  arena_.block(block).queue.store(static_cast<uint32_t>(generation), std::memory_order_relaxed);
  TORCHSHM_POINT("queue.marked");
  return {block, generation};
}

// ---- hand over

Result<Handle> Member::issue(uint32_t block, const QueueRef* queue) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return Status(Code::kNoSlot, stranded_why_);
  if (!work_->ledger.holds(membership_.slot(), block))
    return Status(Code::kStale, "the block was lost in a fork that ran no handlers");
  const uint64_t generation = work_->ledger.value(block).generation;
  const auto ticket = work_->tickets.issue(block, generation, queue);
  if (!ticket)
    return Status(Code::kFull, "no ticket is to be had: too many unreceived messages, or no room in the store's file");
  return Handle{pool_id_, generation, block, ticket->index, ticket->nonce};
}

Result<Member::View> Member::attach_locked(uint32_t block, uint64_t generation, Mode mode) {
  if (stranded_) return Status(Code::kNoSlot, stranded_why_);
  if (block >= arena_.pages()) return Status(Code::kInvalid, "the handle names no block of this pool");
  // Both are looked at: after a fork without handlers there may be objects that look at a block which is not held any more.
  if (holds_.count(block) > 0 && work_->ledger.holds(membership_.slot(), block)) {
    if (holds_.generation(block) != generation) return Status(Code::kStale, "the handle's block has been released");
  } else if (holds_.count(block) > 0 && holds_.generation(block) != generation) {
    return Status(Code::kStale, "arrays that were lost in a fork without handlers still look at the handle's place");
  } else if (!work_->ledger.attach(block, generation)) {
    return Status(Code::kStale, "the handle's block has been released");
  }
  const auto extent = arena_.extent(block);
  // Seen copy-on-write, a block must not share its pages with another.
  const bool whole = extent && extent->whole_pages();
  const bool seen = extent && (mode != Mode::kCopyOnWrite || (whole && copy_is_clean(*extent)));
  std::byte* data = seen ? arena_.address(mode, extent->offset) : nullptr;
  if (data == nullptr) {
    if (holds_.count(block) == 0) work_->ledger.drop(block);
    if (!extent) return Status(Code::kCorrupt, "the block's descriptor contradicts the pool's size");
    return Status(Code::kUnsupported, "no address space for this mode");
  }
  holds_.add(block, mode, generation);
  return View{data, block, extent->length};
}

Result<Member::View> Member::redeem(const Handle& handle, Mode mode, bool exclusive) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (handle.pool_id != pool_id_) return Status(Code::kForeign, "the handle belongs to another pool");
  if (handle.ticket >= kTickets) return Status(Code::kInvalid, "the handle names no block of this pool");
  auto view = attach_locked(handle.block, handle.generation, mode);
  if (!view) return view;
  if (exclusive) holds_.mark_exclusive(handle.block);
  (void)work_->tickets.redeem({handle.ticket, handle.nonce}, handle.block, handle.generation);
  return view;
}

// ---- names

bool Member::keep(const Handle& handle) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  return !stranded_ && work_->tickets.keep({handle.ticket, handle.nonce}, handle.block);
}

void Member::end(uint32_t ticket, const TicketValue& value) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return;
  (void)work_->tickets.end(ticket, value);
  end_queues();
}

void Member::adopt(uint32_t ticket, uint64_t nonce) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (!stranded_) (void)work_->tickets.adopt({ticket, nonce});
}

void Member::give_up(const Handle& handle) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_ || handle.ticket >= kTickets || handle.block >= arena_.pages()) return;
  (void)work_->tickets.redeem({handle.ticket, handle.nonce}, handle.block, handle.generation);
  end_queues();
}

Result<Member::View> Member::attach(uint32_t block, uint64_t generation, Mode mode) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  return attach_locked(block, generation, mode);
}

uint64_t Member::identity() {
  const std::lock_guard lock(mutex_);
  notice_fork();
  return membership_.incarnation() << 12 | membership_.slot();
}

bool Member::gone(uint64_t identity) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  const auto slot = static_cast<uint32_t>(identity & 0xfff);
  if (slot >= kMaxLeases) return true;  // a corrupt file's
  if (arena_.lease(slot).word.load(std::memory_order_seq_cst) != lease_word(identity >> 12)) return true;
  return Membership::dead(arena_, membership_.slot(), slot);
}

Result<Member::View> Member::view(uint32_t block, Mode mode) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (!work_->ledger.holds(membership_.slot(), block))
    return Status(Code::kStale, "the block was lost in a fork that ran no handlers");
  const auto extent = arena_.extent(block);
  if (!extent) return Status(Code::kCorrupt, "the block's descriptor contradicts the pool's size");
  if (mode == Mode::kCopyOnWrite && !extent->whole_pages()) {
    return Status(Code::kUnsupported, "the block shares pages with others");
  }
  if (mode == Mode::kCopyOnWrite && !copy_is_clean(*extent))
    return Status(Code::kUnsupported, "the system keeps what was written to an earlier view");
  std::byte* data = arena_.address(mode, extent->offset);
  if (data == nullptr) return Status(Code::kUnsupported, "no address space for this mode");
  holds_.add_further(block, mode);
  return View{data, block, extent->length};
}

std::optional<Member::Found> Member::find(const void* address) {
  const auto located = arena_.locate(address);
  if (!located) return std::nullopt;
  const auto [mode, offset] = *located;
  const std::lock_guard lock(mutex_);
  const auto chunk_index = static_cast<uint32_t>(offset / kChunk);
  const ChunkValue chunk = work_->space.value(chunk_index);
  // What is held decides; the chunk's word only leads from the middle of a run to its head.
  std::optional<uint32_t> block;
  if (chunk.state == ChunkState::kRun && chunk.head < arena_.chunks()) {
    block = chunk.head * kPagesPerChunk;
  } else {
    block = holds_.start_at_or_before(static_cast<uint32_t>(offset / kPage));
    // A block may start later in the same page than the address lies.
    if (block && *block == offset / kPage && *block % kPagesPerChunk != 0) {
      const auto extent = arena_.extent(*block);
      if (extent && extent->offset > offset) block = holds_.start_at_or_before(*block - 1);
    }
  }
  if (!block || holds_.count(*block) == 0) return std::nullopt;
  const auto extent = arena_.extent(*block);
  if (!extent || offset < extent->offset || offset >= extent->offset + extent->length) return std::nullopt;
  return Found{*block, mode, offset - extent->offset, extent->length, holds_.is_exclusive(*block)};
}

bool Member::modified(const Found& found, const std::byte* low, const std::byte* high) {
  const std::lock_guard lock(mutex_);
  Unwritten& known = unwritten_[found.block / kPagesPerChunk % std::size(unwritten_)];
  const uint64_t faults = os::page_faults();  // before the look: a write during it moves the number
  if (faults != 0 && known.faults == faults && known.low <= low && high <= known.high) return false;
  if (os::privately_modified(low, static_cast<uint64_t>(high - low))) return true;
  known = {low, high, faults};
  return false;
}

bool Member::can_be_named(const Found& found, const std::byte* low, const std::byte* high) {
  if (found.exclusive) {
    const std::lock_guard lock(mutex_);
    notice_fork();
    if (stranded_) return false;
    if (!holds_.is_private(found.block)) return part(found.block);
  } else if (found.mode != Mode::kCopyOnWrite) {
    return true;
  }
  return !modified(found, low, high);
}

bool Member::is_private(uint32_t block) {
  const std::lock_guard lock(mutex_);
  return block < arena_.pages() && holds_.count(block) != 0 && holds_.is_private(block);
}

uint32_t Member::objects(uint32_t block) {
  const std::lock_guard lock(mutex_);
  return block < arena_.pages() ? holds_.count(block) : 0;
}

// ---- the rest

// With the queues whose last member had died, whoever has reaped that one.
uint32_t Member::reap_locked() {
  const uint32_t reaped = work_->reaper.reap_all();
  end_queues(true);
  return reaped;
}

// Whoever has just reaped the last member of a queue may not have come to its tickets yet.
void Member::take_back_before_growth() {
  (void)work_->reaper.reap_all();
  const uint64_t deaths = arena_.header().reaped.load(std::memory_order_relaxed);
  end_queues(std::exchange(work_->deaths_seen, deaths) != deaths);
}

uint32_t Member::reap() {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return 0;
  return reap_locked();
}

uint32_t Member::drop_messages() {
  const std::lock_guard lock(mutex_);
  notice_fork();
  const uint32_t dropped = work_->tickets.take_back(0, true, UINT64_MAX);
  end_queues(true);
  return dropped;
}

uint64_t Member::trim(uint64_t keep) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return 0;
  (void)reap_locked();
  release_empty();
  return work_->space.trim(keep);
}

void Member::keep_warm(uint64_t time) {
  arena_.header().keep_until.store(os::boot_time() + time, std::memory_order_relaxed);
}

void Member::look_at_warm() {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return;
  arena_.header().idle_estimate.store(work_->space.idle(), std::memory_order_relaxed);  // deaths let it drift
  work_->janitor.look();
}

Stats Member::stats() {
  (void)reap();
  return collect(arena_);
}

Member::Usage Member::usage() const {
  Usage usage;
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) {
    const ChunkValue chunk = ChunkValue::of(arena_.chunk(i).value.load());
    usage.committed += chunk.committed * kPage;
    if (chunk.state == ChunkState::kIdle) usage.idle += chunk.committed * kPage;
  }
  usage.limit = arena_.header().limit.load(std::memory_order_relaxed);
  return usage;
}

void Member::count_fallback() { arena_.lease(membership_.slot()).fallbacks.fetch_add(1, std::memory_order_relaxed); }

}  // namespace torchshm::pool
