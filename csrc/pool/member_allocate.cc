// How a member gets a block: out of its own chunks, out of the pool's, and where there is no room, by making some.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "base/failpoint.h"
#include "os/mapping.h"
#include "pool/member.h"
#include "pool/member_work.h"

namespace torchshm::pool {
namespace {

constexpr uint32_t kMinGranules = kPage / kGranule;
constexpr uint32_t kEmptyKept = 4;  // chunks of small blocks; arbitrary: 8 MiB
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

}  // namespace torchshm::pool
