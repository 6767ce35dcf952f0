#include "pool/space.h"

#include <algorithm>
#include <cerrno>

#include "base/failpoint.h"
#include "os/mapping.h"
#include "pool/mark.h"
#include "pool/taking.h"

namespace torchshm::pool {
namespace {

constexpr size_t kRecent = 32;  // arbitrary: more than the batches that a DataLoader worker has under way
constexpr int kAttempts = 64;   // others took the run that was found; after so many the pool is as good as full

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

}  // namespace torchshm::pool
