#include "pool/member.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "base/failpoint.h"
#include "os/futex.h"
#include "os/mapping.h"
#include "pool/member_work.h"

namespace torchshm::pool {
namespace {

constexpr uint32_t kMinGranules = kPage / kGranule;
constexpr uint32_t kEmptyKept = 4;  // chunks of small blocks; arbitrary: 8 MiB
// Bytes seen copy-on-write; below, looking what was written costs more than the faults that it saves.
constexpr uint64_t kWorthALook = 256 << 10;
constexpr int kRunAttempts = 8;
constexpr int kRoomSteps =
    8;  // the last ones wait, 1 to 16 ms, for chunks that somebody is just giving back to the system
constexpr int kOwnSteps = 1;  // what nobody misses

// Of this thread: see Member::Restraint.
thread_local bool restrained = false, beyond = false;

uint64_t granules_for(uint64_t bytes, bool whole_pages) {
  const uint64_t unit = whole_pages ? kPage : kGranule;
  const uint64_t rounded = (std::max<uint64_t>(bytes, 1) + unit - 1) / unit * unit;
  return std::max<uint64_t>(rounded / kGranule, kMinGranules);
}

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

// ---- allocate

void Member::take_hints() {
  Lease& lease = arena_.lease(membership_.slot());
  const uint32_t end = lease.hints_end.load(std::memory_order_acquire);
  if (end == work_->hints_seen) return;
  if (end - work_->hints_seen > kHints) work_->hints_seen = end - kHints;
  if (lease.hints_lost.exchange(0, std::memory_order_acq_rel) != 0) work_->hints_uncertain = true;
  TORCHSHM_POINT("hints.loss_seen");
  for (; work_->hints_seen != end; ++work_->hints_seen) {
    const uint32_t hint = lease.hints[work_->hints_seen % kHints].exchange(0, std::memory_order_acq_rel);
    TORCHSHM_POINT("hints.taken");
    if (hint == 0) {
      work_->hints_uncertain = true;  // counted but not written yet
    } else if (hint <= arena_.pages()) {
      (void)work_->heap.give_back(hint - 1);
    }
  }
  keep_few_empty();
}

Result<uint32_t> Member::allocate_small(uint32_t granules, bool whole_pages) {
  for (;;) {
    auto place = work_->heap.place(granules, whole_pages);
    if (!place && work_->hints_uncertain) {
      work_->hints_uncertain = false;
      work_->heap.rescan();
      place = work_->heap.place(granules, whole_pages);
    }
    if (!place) {
      auto chunk = work_->space.claim_small();
      if (!chunk) return std::move(chunk.status());
      if (work_->heap.owns(chunk->chunk)) work_->heap.lose(chunk->chunk);  // taken away once, and now come back
      work_->heap.add(chunk->chunk, chunk->adopted);
      continue;
    }
    if (work_->ledger.allocate(place->block, place->first, granules)) return place->block;
    // Somebody has taken the chunk, or is looking whether it is empty; what is live in it stays so.
    work_->heap.cancel(*place, granules);
    work_->heap.lose(place->block / kPagesPerChunk);
  }
}

Result<uint32_t> Member::allocate_block(uint64_t bytes, bool whole_pages) {
  if (bytes > uint64_t{arena_.pages()} * kPage)
    return Status(Code::kFull, "larger than the address space that the pool was made with, four times its first limit",
                  EFBIG);
  const uint64_t granules = granules_for(bytes, whole_pages);
  if (granules * kGranule <= kSmallMax) return allocate_small(static_cast<uint32_t>(granules), whole_pages);
  if (granules > UINT32_MAX) return Status(Code::kFull, "larger than 4 TiB", EFBIG);
  for (int attempt = 0; attempt < kRunAttempts; ++attempt) {
    auto run = work_->space.claim_run(granules * kGranule);
    if (!run || work_->ledger.allocate(*run, 0, static_cast<uint32_t>(granules))) return run;
    work_->space.abandon_run(*run);
  }
  return Status(Code::kFull, "others are busy where the free runs are");
}

// Chunks of small blocks in which nothing is live: our own, and those of others, who may be asleep.
void Member::release_empty() {
  take_hints();
  work_->heap.rescan();
  while (const auto empty = work_->heap.remove_empty(0)) work_->space.release_small(*empty);
  work_->space.take_empty();
}

// Empty chunks beyond a few become idle, which everyone can use and the watermark counts.
void Member::keep_few_empty() {
  if (work_->heap.empty_chunks() <= 2 * kEmptyKept) return;
  while (const auto empty = work_->heap.remove_empty(kEmptyKept)) work_->space.release_small(*empty);
  work_->janitor.look();
}

// Whether the same step again may give more.
bool Member::make_room_step(int step, uint64_t bytes) {
  (void)reap_locked();
  switch (step) {
    case 0:
      release_empty();
      break;
    case 1: {
      const bool more = work_->tickets.take_back(0, true, bytes) > 0;
      release_empty();
      return more;
    }
    case 2: {
      const bool more =
          work_->tickets.take_back(arena_.header().ticket_age.load(std::memory_order_relaxed), false, bytes) > 0;
      release_empty();
      return more;
    }
    default:
      // Bounded, whatever the other does: a paused one costs this much once, and the chunk counts as used.
      // So do pages that others have announced and may not get: claims at the limit refuse one another, and one must come first.
      if (step == 3) work_->janitor.settle();
      if (work_->space.unsettled())
        std::this_thread::sleep_for(std::chrono::microseconds((500 + membership_.slot() * 37 % 500) << (step - 3)));
      break;
  }
  return false;
}

Member::Restraint::Restraint(bool beyond_limit) : before_(restrained), beyond_before_(beyond) {
  restrained = true;
  beyond = beyond_limit;
}

Member::Restraint::~Restraint() {
  restrained = before_;
  beyond = beyond_before_;
}

void Member::add_room_maker(std::weak_ptr<RoomMaker> maker) {
  const std::lock_guard lock(mutex_);
  std::erase_if(room_makers_, [](const auto& known) { return known.expired(); });
  room_makers_.push_back(std::move(maker));
}

bool Member::idle(size_t room_makers) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return false;
  const auto living =
      std::count_if(room_makers_.begin(), room_makers_.end(), [](const auto& known) { return !known.expired(); });
  if (static_cast<size_t>(living) > room_makers) return false;
  const uint64_t end = std::min<uint64_t>(arena_.lease(membership_.slot()).ledger_end.load(std::memory_order_relaxed),
                                          arena_.pages() / 64);
  for (uint64_t word = 0; word < end; ++word) {
    if (arena_.ledger(membership_.slot(), word).load(std::memory_order_relaxed) != 0) return false;
  }
  return true;
}

std::shared_ptr<RoomMaker> Member::room_maker() {
  const std::lock_guard lock(mutex_);
  for (const auto& known : room_makers_) {
    if (auto maker = known.lock()) return maker;
  }
  return nullptr;
}

Result<Member::View> Member::allocate(uint64_t bytes, bool whole_pages, bool in_the_making) {
  auto view = allocate_here(bytes, whole_pages, in_the_making, kOwnSteps);
  if (view || view.code() != Code::kFull || view.status().too_large()) return view;
  // Messages are taken back when nothing else helps.
  const auto maker = room_maker();
  if (maker != nullptr && restrained) return view;
  // What is given up may lie scattered: more each time.
  for (uint64_t enough = bytes; maker != nullptr && maker->make_room(enough) != 0; enough *= 2) {
    view = allocate_here(bytes, whole_pages, in_the_making, kOwnSteps);
    if (view || view.code() != Code::kFull) return view;
  }
  return allocate_here(bytes, whole_pages, in_the_making, kRoomSteps);
}

Result<Member::View> Member::allocate_here(uint64_t bytes, bool whole_pages, bool in_the_making, int steps) {
  const std::lock_guard lock(mutex_);
  notice_fork();
  if (stranded_) return Status(Code::kNoSlot, stranded_why_);
  take_hints();
  work_->space.set_beyond(beyond);
  auto block = allocate_block(bytes, whole_pages);
  uint64_t enough = bytes;
  for (int step = 0; block.code() == Code::kFull && !block.status().too_large() && step < steps;) {
    // What comes back may lie scattered: ask for more of it before the next, harsher step.
    if (make_room_step(step, enough)) {
      enough *= 2;
    } else {
      ++step;
    }
    block = allocate_block(bytes, whole_pages);
  }
  if (!block) {
    if (block.code() != Code::kFull) return std::move(block.status());
    std::shared_ptr<RoomMaker> maker;
    for (const auto& known : room_makers_) {
      if (maker == nullptr) maker = known.lock();
    }
    return Status(Code::kFull,
                  "no room for " + std::to_string(bytes) + " bytes: " + block.status().what() + " (" +
                      summary(collect(arena_)) + "). Drop arrays that are no longer needed, " +
                      (maker == nullptr ? "or raise the limit (torchshm.register(limit=...) or TORCHSHM_LIMIT)"
                                        : maker->advice()),
                  block.status().error());
  }
  Lease& lease = arena_.lease(membership_.slot());
  // Relaxed store: statistics with a single writer.
  lease.allocations.store(lease.allocations.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  TORCHSHM_POINT("allocate.told");
  holds_.add(*block, Mode::kReadWrite, work_->ledger.value(*block).generation);
  if (in_the_making) making_.push_back(*block);
  // The caller writes as many bytes as it asked for, so what the descriptor says now is not believed when it is less.
  const auto extent = arena_.extent(*block);
  if (!extent || extent->length < bytes) {
    if (in_the_making) making_.pop_back();
    release_locked(*block, Mode::kReadWrite);
    return Status(Code::kCorrupt, "somebody else wrote to the descriptor of a block that was just made");
  }
  return View{arena_.data() + extent->offset, *block, extent->length};
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
