#include "pool/space.h"

#include <algorithm>
#include <cerrno>

#include "base/failpoint.h"
#include "os/mapping.h"
#include "os/memory.h"
#include "pool/mark.h"
#include "pool/taking.h"

namespace torchshm::pool {
namespace {

constexpr size_t kRecent = 32;  // arbitrary: more than the batches that a DataLoader worker has under way
constexpr int kAttempts = 64;   // others took the run that was found; after so many the pool is as good as full
constexpr uint64_t kReserve = uint64_t{32} << 20;       // left of a cgroup's headroom, for everything that is not ours
constexpr uint64_t kCountTables = uint64_t{128} << 20;  // a limit from which on the control file counts; arbitrary
constexpr uint64_t kMostTables = 32;                    // of the limit, the part that it may take away
constexpr uint64_t kBeyond = 64;                        // of the limit, a part

constexpr uint32_t kSurplus = 32;  // pages of a chunk; fewer are not worth a call
constexpr uint64_t kScarce = 4;    // of the limit, a part: with less of it left

Status full(const std::string& why) { return Status(Code::kFull, why); }

}  // namespace

Space::Space(Arena& arena, uint32_t slot, std::function<void()> before_growth)
    : arena_(arena), slot_(slot), before_growth_(std::move(before_growth)), mapped_(arena.chunks()) {}

bool Space::all_idle(uint32_t first, uint32_t n) const {
  for (uint32_t i = 0; i < n; ++i) {
    if (value(first + i).state != ChunkState::kIdle) return false;
  }
  return true;
}

bool Space::replace(uint32_t chunk, ChunkValue expected, ChunkValue desired) {
  return replace_chunk(arena_, chunk, expected, desired);
}

uint64_t Space::committed() const {
  uint64_t pages = 0;
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) pages += value(i).committed;
  return pages * kPage;
}

uint64_t Space::idle() const {
  uint64_t pages = 0;
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) {
    const ChunkValue v = value(i);
    if (v.state == ChunkState::kIdle) pages += v.committed;
  }
  return pages * kPage;
}

bool Space::unsettled() const {
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) {
    const ChunkValue v = value(i);
    if ((v.state == ChunkState::kTrimming && v.owner != kNobody) || v.state == ChunkState::kBacking) return true;
    if (v.state == ChunkState::kRun && v.head == i &&
        !BlockValue::of(arena_.block(i * kPagesPerChunk).value.load()).live)
      return true;
  }
  return false;
}

// Own idle chunks that were in use as such a run first (warm in this process's page tables too), then of all runs of idle ones the shortest
// that is long enough, so that long ones stay; then whatever is not in use.
std::optional<uint32_t> Space::find_run(uint32_t n) const {
  const uint32_t used = arena_.chunks_used();
  for (auto head = recent_.rbegin(); head != recent_.rend(); ++head) {
    uint32_t i = 0;
    for (; i < n && *head + i < used; ++i) {
      const ChunkValue v = value(*head + i);
      if (v.state != ChunkState::kIdle || v.owner != slot_) break;
    }
    if (i == n) return *head;
  }
  struct Run {
    uint32_t end, length;
    bool own;  // its first n
  };
  std::optional<Run> best;
  std::optional<uint32_t> any;
  uint32_t own_length = 0, idle_length = 0, any_length = 0;
  bool own = false;
  const auto end_run = [&](uint32_t end) {
    if (idle_length >= n && (!best || idle_length < best->length || (idle_length == best->length && own && !best->own)))
      best = Run{end, idle_length, own};
  };
  for (uint32_t i = 0; i < used; ++i) {
    const ChunkValue v = value(i);
    const bool is_idle = v.state == ChunkState::kIdle;
    if (!is_idle) end_run(i);
    own_length = is_idle && v.owner == slot_ ? own_length + 1 : 0;
    idle_length = is_idle ? idle_length + 1 : 0;
    if (n == 1 && own_length == 1) return i;
    if (idle_length == n) own = own_length >= n;
    any_length = is_idle || v.state == ChunkState::kHole ? any_length + 1 : 0;
    if (!any && any_length == n) any = i + 1 - n;
  }
  end_run(used);
  if (best) return best->end - best->length;
  if (any) return any;
  const uint32_t start = used - any_length;
  if (uint64_t{start} + n <= arena_.chunks()) return start;
  return std::nullopt;
}

// Takes an idle chunk or a hole. The pages it is going to have are announced in the same exchange, before they are committed: a death in
// between leaves the sum too high, never too low. What scans are bounded by is raised first, so that no taken chunk is ever out of sight.
bool Space::take(uint32_t chunk, ChunkValue wanted, Taken* taken) {
  const ChunkValue found = value(chunk);
  if (found.state != ChunkState::kIdle && found.state != ChunkState::kHole) return false;
  raise(arena_.header().chunks_used, chunk + 1);
  TORCHSHM_POINT("claim.in_sight");
  wanted.owner = slot_;
  wanted.committed = std::max(found.committed, wanted.committed);
  if (!replace(chunk, found, wanted)) return false;
  TORCHSHM_POINT("claim.taken");
  *taken = {found.committed, wanted};
  if (found.state == ChunkState::kIdle)
    arena_.header().idle_estimate.fetch_sub(found.committed * kPage, std::memory_order_relaxed);
  TORCHSHM_POINT("claim.told");
  return true;
}

void Space::put_back(uint32_t chunk, const Taken& taken) {
  ChunkValue next;
  next.state = taken.had == 0 ? ChunkState::kHole : ChunkState::kIdle;
  next.owner = taken.had == 0 ? 0 : slot_;
  next.committed = taken.had;
  if (taken
          .refused) {  // nobody knows which pages are there: as a chunk of the dead that the system would not take back
    next.state = ChunkState::kTrimming;
    next.owner = kNobody;
    next.committed = taken.word.committed;
  }
  if (!replace(chunk, taken.word, next) || taken.refused) return;
  TORCHSHM_POINT("claim.put_back");
  if (taken.had != 0) arena_.header().idle_estimate.fetch_add(taken.had * kPage, std::memory_order_relaxed);
}

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
  return full("the pool's limit of " + std::to_string(limit) + " bytes is reached");
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
    return full("the machine or its cgroup has less than " + std::to_string(bytes) + " bytes left");
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

Status Space::prefault() {
  const uint64_t bytes = arena_.header().limit.load(std::memory_order_relaxed) / kChunk * kChunk;
  auto run = claim_run(bytes);
  if (!run) {
    return Status(run.code(),
                  "prefault: " + std::to_string(bytes) + " bytes are not to be had now: " + run.status().what());
  }
  TORCHSHM_POINT("prefault.claimed");
  abandon_run(*run);
  return {};
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

Result<uint32_t> Space::claim_run(uint64_t bytes) {
  const uint64_t pages = (bytes + kPage - 1) / kPage;
  if (bytes == 0 || pages > arena_.pages())
    return Status(Code::kFull, "larger than the address space that the pool was made with", EFBIG);
  if (const uint64_t set = arena_.header().limit.load(std::memory_order_relaxed); bytes > set)
    return Status(Code::kFull, "larger than the pool's limit of " + std::to_string(set) + " bytes", EFBIG);
  const auto n = static_cast<uint32_t>((pages + kPagesPerChunk - 1) / kPagesPerChunk);
  std::vector<Taken>& taken = taken_;
  std::vector<uint32_t>& need = need_;
  taken.assign(n, {});
  need.assign(n, kPagesPerChunk);
  // A reserved huge page is there as a whole or not at all, and is counted so.
  if (backing() != os::Backing::kReserved)
    need.back() = static_cast<uint32_t>(pages - uint64_t{n - 1} * kPagesPerChunk);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto head = find_run(n);
    if (!head) return full("no " + std::to_string(n) + " neighbouring chunks are free");
    if (attempt == 0 && !all_idle(*head, n)) {
      before_growth_();
      continue;
    }
    if (Status possible = may_grow(*head, need); !possible) return possible;
    if (Status reserved = arena_.reserve_chunks(*head + n); !reserved) return reserved;
    const auto [held, generation] = take_run(*head, need, taken);
    Status backed = held == n ? within_limit() : Status();
    // Where all that is warm is in the run, what its last chunk has too much may be what is missing: tables have grown since.
    if (!backed && cut(*head + n - 1, need.back(), &taken.back())) backed = within_limit();
    const bool allowed = held == n && backed;
    if (allowed) backed = back_with_pages(*head, taken, need);
    if (held == n && backed) {
      give_up_surplus(*head + n - 1, need.back(), &taken.back());
      map_pages(*head, need);
      recent_.erase(std::remove(recent_.begin(), recent_.end(), *head), recent_.end());
      if (recent_.size() == kRecent) recent_.erase(recent_.begin());
      recent_.push_back(*head);
      TORCHSHM_POINT("claim_run.backed");
      return *head * kPagesPerChunk;
    }
    if (allowed) give_up_pages(*head, taken, need);
    for (uint32_t i = held; i > 0; --i) put_back(*head + i - 1, taken[i - 1]);
    if (!backed) return backed;
  }
  return full("other processes took every run of " + std::to_string(n) + " chunks first");
}

// Takes the chunks from `head` on until one is gone. Returns how many are held, and the generation that their block will have.
std::pair<uint32_t, uint64_t> Space::take_run(uint32_t head, const std::vector<uint32_t>& need,
                                              std::vector<Taken>& taken) {
  ChunkValue wanted;
  wanted.state = ChunkState::kRun;
  wanted.head = head;
  const Block& first = arena_.block(head * kPagesPerChunk);
  uint32_t held = 0;
  for (; held < need.size(); ++held) {
    wanted.committed = need[held];
    wanted.generation = (BlockValue::of(first.value.load()).generation + 1) & BlockValue::kGenerationMask;
    if (!take(head + held, wanted, &taken[held])) break;
    if (held == 0) {
      // Now that the head is ours the generation is what it is; it was read a moment before that.
      ChunkValue exact = taken[0].word;
      exact.generation = (BlockValue::of(first.value.load()).generation + 1) & BlockValue::kGenerationMask;
      if (exact.generation != wanted.generation && !replace(head, taken[0].word, exact))
        return {0, 0};  // an old releaser took it for the run that was here before
      taken[0].word = exact;
    }
    TORCHSHM_POINT("claim_run.chunk");
  }
  return {held, wanted.generation};
}

void Space::release_run(uint32_t block, uint64_t generation) {
  const auto extent = arena_.extent(block);
  if (!extent || block % kPagesPerChunk != 0) return;
  const uint32_t head = block / kPagesPerChunk;
  // The head goes last: until then nobody can start a new run there, and the descriptor's length stays what it was.
  const auto n = static_cast<uint32_t>((extent->length + kChunk - 1) / kChunk);
  for (uint32_t i = n; i-- > 0;) {
    for (;;) {
      const ChunkValue found = value(head + i);
      if (found.state != ChunkState::kRun || found.head != head || found.generation != generation) break;
      ChunkValue next = found;
      next.state = ChunkState::kIdle;
      next.head = 0;
      next.generation = 0;
      if (replace(head + i, found, next)) {
        TORCHSHM_POINT("release_run.idle");
        arena_.header().idle_estimate.fetch_add(found.committed * kPage, std::memory_order_relaxed);
        TORCHSHM_POINT("release_run.chunk");
        break;
      }
    }
  }
}

std::optional<uint32_t> Space::adopt_orphan() {
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) {
    const ChunkValue found = value(i);
    if (found.state != ChunkState::kSmall || found.owner != kNobody) continue;
    ChunkValue adopted = found;
    adopted.owner = slot_;
    if (!replace(i, found, adopted)) continue;
    TORCHSHM_POINT("claim_small.adopted");
    // Its pages are not mapped in advance: until a block of ours is live in it, others may find it empty and give its pages back, and mapping
    // them would make new ones that nobody counts.
    return i;
  }
  return std::nullopt;
}

Result<Space::SmallChunk> Space::claim_small() {
  if (const auto orphan = adopt_orphan()) return SmallChunk{*orphan, true};
  ChunkValue wanted;
  wanted.state = ChunkState::kBacking;  // not yet to be taken away as empty
  wanted.committed = kPagesPerChunk;
  const std::vector<uint32_t> need(1, kPagesPerChunk);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto chunk = find_run(1);
    if (!chunk) return full("no chunk is free");
    if (attempt == 0 && !all_idle(*chunk, 1)) {
      before_growth_();
      if (const auto orphan = adopt_orphan()) return SmallChunk{*orphan, true};
      continue;
    }
    std::vector<Taken> taken(1);
    if (Status possible = may_grow(*chunk, need); !possible) return possible;
    if (Status reserved = arena_.reserve_chunks(*chunk + 1); !reserved) return reserved;
    if (!take(*chunk, wanted, &taken[0])) continue;
    TORCHSHM_POINT("claim_small.taken");
    Status backed = within_limit();
    const bool allowed = backed.ok();
    if (allowed) backed = back_with_pages(*chunk, taken, need);
    if (!backed) {
      if (allowed) give_up_pages(*chunk, taken, need);
      put_back(*chunk, taken[0]);
      return backed;
    }
    map_pages(*chunk, need);
    TORCHSHM_POINT("claim_small.backed");
    ChunkValue ready = taken[0].word;
    ready.state = ChunkState::kSmall;
    const bool mine = replace(*chunk, taken[0].word, ready);
    TORCHSHM_POINT("claim_small.ready");
    if (mine) return SmallChunk{*chunk, false};
  }
  return full("other processes took every free chunk first");
}

void Space::release_small(uint32_t chunk) {
  const ChunkValue found = value(chunk);
  ChunkValue next = found;
  next.state = ChunkState::kIdle;
  if (found.state == ChunkState::kSmall && found.owner == slot_ && replace(chunk, found, next)) {
    TORCHSHM_POINT("release_small.idle");
    arena_.header().idle_estimate.fetch_add(found.committed * kPage, std::memory_order_relaxed);
  }
}

void Space::take_if_empty(uint32_t chunk) { pool::take_if_empty(arena_, slot_, chunk); }

void Space::take_empty() {
  for (uint32_t i = 0, used = arena_.chunks_used(); i < used; ++i) take_if_empty(i);
}

void Space::abandon_run(uint32_t block) {
  const uint32_t head = block / kPagesPerChunk;
  const auto belongs = [&](const ChunkValue& v) {
    return v.state == ChunkState::kRun && v.owner == slot_ && v.head == head;
  };
  uint32_t end = head;
  while (end < arena_.chunks_used() && belongs(value(end))) ++end;
  // The head goes last, as in release_run().
  while (end-- > head) {
    if (const ChunkValue found = value(end); belongs(found)) put_back(end, {found.committed, found});
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

void Space::inherit(uint32_t dead) {
  // From the end, so that of a run the head goes last: as long as it is there nobody can start a new one with the same generation.
  for (uint32_t i = arena_.chunks_used(); i-- > 0;) {
    ChunkValue found = value(i);
    while (found.state != ChunkState::kHole && found.owner == dead) {
      ChunkValue next = found;
      next.owner = kNobody;
      TORCHSHM_POINT("inherit.chunk");
      switch (found.state) {
        case ChunkState::kTaking:
          finish_taking(arena_, slot_, i, dead);
          break;
        // Whether its pages are there is not known.
        case ChunkState::kBacking:
        case ChunkState::kTrimming:
          give_to_system(i, found);
          break;
        case ChunkState::kRun: {
          const bool named = found.head < arena_.chunks();
          const BlockValue head =
              named ? BlockValue::of(arena_.block(found.head * kPagesPerChunk).value.load()) : BlockValue{};
          if (named && head.generation == found.generation) {
            if (!head.live) {  // freed and being released
              next.state = ChunkState::kIdle;
              next.head = 0;
              next.generation = 0;
            }
            (void)replace(i, found, next);
          } else {
            give_to_system(i, found);  // never made live
          }
          break;
        }
        case ChunkState::kSmall:
          if (replace(i, found, next)) take_if_empty(i);
          break;
        default:
          (void)replace(i, found, next);
          break;
      }
      TORCHSHM_POINT("inherit.decided");
      const ChunkValue now = value(i);
      if (now.pair() == found.pair()) break;
      found = now;
    }
  }
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
