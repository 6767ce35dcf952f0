// The pages of a lease's chunks: how many there may be, getting them from the system, and giving them back.
#include <algorithm>

#include "base/failpoint.h"
#include "os/mapping.h"
#include "os/memory.h"
#include "pool/space.h"

namespace torchshm::pool {
namespace {

constexpr uint64_t kReserve = uint64_t{32} << 20;       // left of a cgroup's headroom, for everything that is not ours
constexpr uint64_t kCountTables = uint64_t{128} << 20;  // a limit from which on the control file counts; arbitrary
constexpr uint64_t kMostTables = 32;                    // of the limit, the part that it may take away
constexpr uint64_t kBeyond = 64;                        // of the limit, a part

constexpr uint32_t kSurplus = 32;  // pages of a chunk; fewer are not worth a call
constexpr uint64_t kScarce = 4;    // of the limit, a part: with less of it left

}  // namespace

uint64_t Space::limit() const {
  const uint64_t set = arena_.header().limit.load(std::memory_order_relaxed);
  const uint64_t limit = beyond_ ? set + std::max(set / kBeyond, kChunk) : set;
  // The tables grow with the part of the file that was ever in use; beyond a little they are at the data's expense, up to a part: a look at
  // tables that were never in use gives them pages too. In small pools they are small.
  const uint64_t tables = set < kCountTables ? 0 : arena_.control_memory(), free = set / kBeyond;
  return limit - std::min(set / kMostTables, tables > free ? tables - free : 0);
}

// What trim() can get: what is idle, and what the system would not take back from the dead before.
uint64_t Space::to_give_back() const {
  uint64_t pages = 0;
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) {
    const ChunkValue v = value(i);
    if (v.state == ChunkState::kIdle || (v.state == ChunkState::kTrimming && v.owner == kNobody)) pages += v.committed;
  }
  return pages * kPage;
}

Status Space::reached(uint64_t limit) {
  return Status(Code::kFull, "the pool's limit of " + std::to_string(limit) + " bytes is reached");
}

// Warm pages are given back only where that is enough: in vain, others would have lost them.
Status Space::within_limit() {
  const uint64_t limit = this->limit(), sum = committed();
  if (sum <= limit) return {};
  const uint64_t excess = sum - limit;
  if (to_give_back() < excess) return reached(limit);
  const uint64_t warm = idle();
  (void)trim(warm > excess ? warm - excess : 0);
  return committed() <= limit ? Status() : reached(limit);
}

// Whether within_limit() can be had for that run, before it is taken: who announces pages that it can't have makes others believe that
// there is no room.
Status Space::may_grow(uint32_t first, const std::vector<uint32_t>& need) const {
  uint64_t growth = 0, own = 0;
  for (size_t i = 0; i < need.size(); ++i) {
    const ChunkValue v = value(first + static_cast<uint32_t>(i));
    if (v.state == ChunkState::kIdle) own += v.committed * kPage;
    growth += need[i] > v.committed ? (need[i] - v.committed) * kPage : 0;
  }
  if (growth == 0) return {};
  const uint64_t limit = this->limit(), warm = to_give_back();
  return committed() + growth <= limit + (warm > own ? warm - own : 0) ? Status() : reached(limit);
}

Status Space::check_headroom(uint64_t bytes) {
  // Looked up again before a small part of it is used up, since every member looks for itself; arbitrary: a sixteenth.
  if (headroom_ < headroom_seen_ / 16 * 15 + bytes + kReserve) headroom_ = headroom_seen_ = os::memory_headroom();
  if (headroom_ < bytes + kReserve) {
    headroom_ = headroom_seen_ = 0;
    return Status(Code::kFull, "the machine or its cgroup has less than " + std::to_string(bytes) + " bytes left");
  }
  headroom_ -= bytes;
  return {};
}

os::Backing Space::backing() const {
  switch (arena_.page_kind()) {
    case PageKind::kSmall:
      return os::Backing::kSmall;
    case PageKind::kReserved:
      return os::Backing::kReserved;
    default:
      return os::Backing::kAuto;
  }
}

Status Space::back_with_pages(uint32_t first, const std::vector<Taken>& taken, const std::vector<uint32_t>& need) {
  uint64_t growth = 0;
  for (size_t i = 0; i < need.size(); ++i) growth += need[i] > taken[i].had ? (need[i] - taken[i].had) * kPage : 0;
  if (growth == 0) return {};
  // Reserved huge pages are no longer part of what the machine has left, and a disk's pages are not memory.
  const bool apart = arena_.on_disk() || backing() == os::Backing::kReserved;
  if (Status enough = apart ? Status() : check_headroom(growth); !enough) {
    // What is warm elsewhere is as good, once the system has it.
    const uint64_t warm = idle();
    if (trim(warm - std::min(warm, growth + kReserve)) == 0) return enough;
    if (enough = check_headroom(growth); !enough) return enough;
  }
  arena_.lease(slot_).grown.fetch_add(growth, std::memory_order_relaxed);
  TORCHSHM_POINT("claim.growth_told");
  // Neighbouring ranges in one call.
  uint64_t start = 0, end = 0;
  for (size_t i = 0; i <= need.size(); ++i) {
    const bool more = i < need.size() && need[i] > taken[i].had;
    const uint64_t base = (uint64_t{first} + i) * kChunk;
    if (more && end == base + taken[i].had * kPage && end != start) {
      end = base + need[i] * kPage;
      continue;
    }
    if (end != start) {
      if (Status done = arena_.commit(start, end - start, backing()); !done) return done;
    }
    start = end = 0;
    if (more) {
      start = base + taken[i].had * kPage;
      end = base + need[i] * kPage;
    }
  }
  // What was just made is mapped here already.
  for (size_t i = 0; i < need.size(); ++i) {
    uint16_t& pages = mapped(first + i);
    if (need[i] > taken[i].had && pages >= taken[i].had) pages = static_cast<uint16_t>(need[i]);
  }
  return {};
}

// A commit that failed half-way has left pages that nobody would count.
void Space::give_up_pages(uint32_t first, std::vector<Taken>& taken, const std::vector<uint32_t>& need) {
  for (size_t i = 0; i < need.size(); ++i) {
    if (need[i] <= taken[i].had) continue;
    taken[i].refused = !punch(first + static_cast<uint32_t>(i), taken[i].had * kPage);
  }
}

// What the last chunk has beyond the block is of use to nobody as long as the block lives: where memory is scarce it goes back.
void Space::give_up_surplus(uint32_t chunk, uint32_t need, Taken* taken) {
  // A disk's pages are not memory; and what is to stay warm as a whole is not cut.
  if (taken->word.committed < need + kSurplus || arena_.on_disk()) return;
  const uint64_t limit = this->limit();
  if (arena_.header().warm.load(std::memory_order_relaxed) >= arena_.header().limit.load(std::memory_order_relaxed))
    return;
  const uint64_t enough = limit - limit / kScarce, there = committed();
  if (there <= enough || there - std::min(there, idle()) <= enough) return;
  (void)cut(chunk, need, taken);
}

// REQUIRES: the chunk is this lease's, of a claim under way.
bool Space::cut(uint32_t chunk, uint32_t need, Taken* taken) {
  if (taken->word.committed <= need || backing() == os::Backing::kReserved) return false;
  if (!punch(chunk, need * kPage)) return false;  // the word still counts what may be there
  TORCHSHM_POINT("claim.surplus_given_up");
  ChunkValue next = taken->word;
  next.committed = need;
  if (!replace(chunk, taken->word, next)) return false;
  taken->word = next;
  taken->had = std::min(taken->had, need);
  return true;
}

// The page tables of all members lose what one of them gives back.
uint16_t& Space::mapped(uint32_t chunk) {
  const uint32_t punched = arena_.block(chunk * kPagesPerChunk).punched.load(std::memory_order_relaxed);
  if (mapped_[chunk].punched != punched) mapped_[chunk] = {punched, 0};
  return mapped_[chunk].pages;
}

// REQUIRES: the chunk is this lease's; whoever has it next sees the change.
Status Space::punch(uint32_t chunk, uint64_t from) {
  arena_.block(chunk * kPagesPerChunk).punched.fetch_add(1, std::memory_order_relaxed);
  std::byte* const at = arena_.data() + uint64_t{chunk} * kChunk + from;
  Status punched = os::punch(at, kChunk - from);
  if (punched && from != 0 && !os::absent(at, kChunk - from))
    return Status(Code::kFull, "a part of a huge page that is pinned can't go back");
  return punched;
}

// Page tables in large steps instead of a fault for every page.
void Space::map_pages(uint32_t first, const std::vector<uint32_t>& need) {
  for (size_t i = 0; i < need.size();) {
    if (mapped(first + static_cast<uint32_t>(i)) >= need[i]) {
      ++i;
      continue;
    }
    const size_t from = i;
    uint64_t length = 0;
    for (; i < need.size() && mapped(first + static_cast<uint32_t>(i)) < need[i]; ++i) {
      length = (i - from) * kChunk + need[i] * kPage;
      mapped(first + static_cast<uint32_t>(i)) = static_cast<uint16_t>(need[i]);
    }
    os::populate(arena_.data() + (uint64_t{first} + from) * kChunk, length, arena_.on_disk());
  }
}

// Through kTrimming, so that a death on the way is finished by the next. What the system refuses to take is nobody's from then on, since
// the dead lease will be forgotten: the next trim() tries again.
void Space::give_to_system(uint32_t chunk, ChunkValue found) {
  ChunkValue trimming = found;
  trimming.state = ChunkState::kTrimming;
  trimming.owner = slot_;
  trimming.head = 0;
  trimming.generation = 0;
  if (!replace(chunk, found, trimming)) return;
  TORCHSHM_POINT("inherit.trimming");
  ChunkValue next;
  if (!punch(chunk)) {
    next = trimming;
    next.owner = kNobody;
  }
  (void)replace(chunk, trimming, next);
  TORCHSHM_POINT("inherit.given_back");
}

uint64_t Space::trim(uint64_t keep) {
  uint64_t given = 0, left = idle();
  // From the end, so that the file's used part stays compact.
  for (uint32_t i = arena_.chunks_used(); i-- > 0;) {
    const ChunkValue found = value(i);
    if (found.state == ChunkState::kTrimming && found.owner == kNobody) give_to_system(i, found);
    if (left <= keep || found.state != ChunkState::kIdle) continue;
    ChunkValue claimed = found;
    claimed.state = ChunkState::kTrimming;
    claimed.owner = slot_;
    if (!replace(i, found, claimed)) continue;
    TORCHSHM_POINT("trim.claimed");
    const Status punched = punch(i);
    TORCHSHM_POINT("trim.punched");
    (void)replace(i, claimed, punched ? ChunkValue{} : found);
    TORCHSHM_POINT("trim.done");
    left -= std::min<uint64_t>(left, found.committed * kPage);
    if (!punched) continue;  // idle as before
    arena_.header().idle_estimate.fetch_sub(found.committed * kPage, std::memory_order_relaxed);
    given += found.committed * kPage;
  }
  return given;
}

}  // namespace torchshm::pool
