// A member in a fork: what the child gets before the fork returns, what becomes private, and a fork that ran no handlers.
#include <bit>

#include "base/failpoint.h"
#include "pool/member_work.h"

namespace torchshm::pool {
namespace {

// Each may cost two mappings once its neighbours are released; vm.max_map_count is 65,530 for all that a process does.
constexpr int64_t kPrivateMost = 4096;

// Calls f(block) for every block that a lease holds.
template <class F>
void each_held(const Arena& arena, uint32_t slot, F f) {
  const uint64_t end =
      std::min<uint64_t>(arena.lease(slot).ledger_end.load(std::memory_order_relaxed), arena.pages() / 64);
  for (uint64_t word = 0; word < end; ++word) {
    for (uint64_t bits = arena.ledger(slot, word).load(std::memory_order_relaxed); bits != 0; bits &= bits - 1) {
      f(static_cast<uint32_t>(word * 64 + static_cast<uint64_t>(std::countr_zero(bits))));
    }
  }
}

}  // namespace

void Member::hold_again_for(const Membership& heir) {
  each_held(arena_, membership_.slot(), [&](uint32_t block) {
    (void)work_->ledger.attach_for(heir.slot(), block, work_->ledger.value(block).generation);
    TORCHSHM_POINT("fork.block");
  });
}

// What came in a message is the program's own: after a fork parent and child each have their own of it, as of any memory. From here on
// neither writes to the file's pages, so both see what was there at the fork until they write themselves.
void Member::part_with_child() {
  uint64_t start = 0, end = 0;
  const auto flush = [&] {
    if (end != start && !arena_.make_private(start, end - start, true)) return false;
    for (uint64_t page = start / kPage; page < end / kPage; ++page) {
      const auto block = static_cast<uint32_t>(page);
      if (holds_.is_exclusive(block)) holds_.mark_private(block, true);
    }
    return true;
  };
  bool mapped = true;
  int64_t room = kPrivateMost - holds_.private_blocks();
  each_held(arena_, membership_.slot(), [&](uint32_t block) {
    if (!mapped || !holds_.is_exclusive(block) || holds_.is_private(block)) return;
    const auto extent = arena_.extent(block);
    if (!extent || !extent->whole_pages()) return;
    if (--room < 0) return;  // docs/differences.md: beyond so many, writes are shared
    if (extent->offset != end || end == start) {
      mapped = flush();
      start = extent->offset;
    }
    end = extent->offset + extent->length;
  });
  if (mapped) (void)flush();
}

// As after a fork, for one block: whatever is written here from now on stays here.
bool Member::part(uint32_t block) {
  const auto extent = arena_.extent(block);
  if (!extent || !extent->whole_pages()) return false;
  if (holds_.private_blocks() >= kPrivateMost || !arena_.make_private(extent->offset, extent->length, true))
    return false;
  holds_.mark_private(block, true);
  return true;
}

void Member::prepare_fork() {
  mutex_.lock();
  if (stranded_) return;
  part_with_child();
  auto heir = Membership::join(arena_, true);
  if (!heir && heir.code() == Code::kNoSlot && work_->reaper.reap_all() > 0) heir = Membership::join(arena_, true);
  if (heir) {
    heir_.emplace(heir.take());
    TORCHSHM_POINT("fork.joined");
    hold_again_for(*heir_);
    return;
  }
  stranded_why_ = "this process was forked when no lease could be had: " + heir.status().what();
  // No slot for the child: what it inherits stays held by this lease, which lives as long as either of the two.
  each_held(arena_, membership_.slot(), [&](uint32_t block) { holds_.add_further(block, Mode::kReadWrite); });
}

void Member::parent_after_fork() {
  TORCHSHM_POINT("fork.parent");
  heir_.reset();  // closes our copy of the description; the child's keeps the lock
  TORCHSHM_POINT("fork.parent_apart");
  mutex_.unlock();
}

void Member::become(Membership membership) {
  TORCHSHM_POINT("become.child");
  membership_ = std::move(membership);  // closes our copy of the parent's description
  TORCHSHM_POINT("become.apart");
  membership_.sign(arena_);
  start();
}

void Member::child_after_fork() {
  if (heir_) {
    become(std::move(*heir_));
    heir_.reset();
  } else {
    stranded_ = true;
  }
  // Blocks that other threads of the parent were filling: those threads are not here.
  for (Unwritten& known : unwritten_) known = {};  // faults are counted from zero again
  std::vector<uint32_t> others;
  others.swap(making_);
  for (const uint32_t block : others) release_locked(block, Mode::kReadWrite);
  if (fork_detector_ != nullptr) *fork_detector_ = 1;
  mutex_.unlock();
}

void Member::notice_fork() {
  if (fork_detector_ == nullptr || *fork_detector_ != 0) return;
  // A fork that ran no handlers. The parent's lease is alive as long as its description is open here, and keeps what it has not dropped
  // since; that much can still be taken over.
  *fork_detector_ = 1;
  for (Unwritten& known : unwritten_) known = {};
  if (stranded_) return;
  auto heir = Membership::join(arena_);
  if (!heir) {
    stranded_ = true;
    stranded_why_ = "this process was forked when no lease could be had: " + heir.status().what();
    return;
  }
  TORCHSHM_POINT("notice_fork.joined");
  const uint32_t parent = membership_.slot();
  leave_work();
  work_ = std::make_unique<Work>(*this, heir->slot());
  each_held(arena_, parent, [&](uint32_t block) {
    // Of that generation: the parent may have dropped it and have another block in its place.
    if (holds_.count(block) > 0) (void)work_->ledger.attach(block, holds_.generation(block));
  });
  become(heir.take());
}

}  // namespace torchshm::pool
