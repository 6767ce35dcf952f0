// The data file's chunks: holes, idle (warm) chunks, runs that are one large block each, and chunks that a lease cuts small blocks from.
//
// Shared: the chunk table, one 16-byte word per 2 MiB. Private: which chunks this process has mapped, and where it looks first.
// Equations:  committed bytes = 4096 * sum of `committed` over the table <= limit;  every chunk is in exactly one state.
// No lock and no list: a chunk changes hands in one exchange, idle chunks of different sizes merge because they lie side by side, and what
// is free is what the table says.
// When a process dies here: its chunks carry its slot, and the reaper decides each one by the block it belongs to (see inherit()).
// Thread safety: one thread of a lease at a time; trim(), committed() and idle() at any time (they touch the table only).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "base/status.h"
#include "os/mapping.h"
#include "pool/arena.h"

namespace torchshm::pool {

class Space {
 public:
  // before_growth: called once before pages are committed that the pool did not have; what the dead left may do instead.
  Space(Arena& arena, uint32_t slot, std::function<void()> before_growth);

  // Takes a run for one large block of `bytes`, its pages committed and mapped. Returns the block (the run's first page).
  // The chunk words carry the generation that the block will get. kFull when the limit forbids it.
  Result<uint32_t> claim_run(uint64_t bytes);
  // Makes the chunks of a freed run idle; whoever ended the last hold calls it. Idempotent.
  void release_run(uint32_t block, uint64_t generation);

  // Takes one whole chunk for small blocks: an orphan first (adopted = true: live blocks may lie in it), else an idle one or a hole.
  struct SmallChunk {
    uint32_t chunk;
    bool adopted;
  };
  Result<SmallChunk> claim_small();
  // Gives back a chunk of small blocks in which nothing is live. REQUIRES: owned by this lease.
  void release_small(uint32_t chunk);

  // Makes a chunk of another lease's small blocks, or an orphan, idle when nothing in it is live: its owner may be asleep.
  void take_if_empty(uint32_t chunk);
  void take_empty();  // all of them
  // Commits all that the limit allows, as idle chunks. REQUIRES: a new pool. kFull when there is not that much memory.
  Status prefault();
  // A run that was claimed but not used.
  void abandon_run(uint32_t block);

  // Decides about every chunk of a dead lease: what a living block needs becomes an orphan, the rest is idle. Re-entrant.
  void inherit(uint32_t dead);

  // Gives idle chunks back to the system until at most `keep` bytes are idle. Returns the bytes given back.
  uint64_t trim(uint64_t keep);

  // Whether claims may go beyond the limit by a sixty-fourth, or a chunk: to give up much more.
  void set_beyond(bool on) { beyond_ = on; }

  uint64_t committed() const;  // bytes
  uint64_t idle() const;       // bytes
  bool unsettled() const;      // somebody is giving a chunk back, or getting pages for one, right now
  ChunkValue value(uint32_t chunk) const { return ChunkValue::of(arena_.chunk(chunk).value.load()); }

 private:
  std::optional<uint32_t> find_run(uint32_t chunks) const;
  bool all_idle(uint32_t first, uint32_t chunks) const;
  std::optional<uint32_t> adopt_orphan();
  // What a chunk had before it was taken: pages, and the word that is there now.
  struct Taken {
    uint32_t had = 0;
    ChunkValue word;
    bool refused = false;  // the system would not take back the pages that it got since
  };
  std::pair<uint32_t, uint64_t> take_run(uint32_t head, const std::vector<uint32_t>& need, std::vector<Taken>& taken);
  bool take(uint32_t chunk, ChunkValue wanted, Taken* taken);
  void put_back(uint32_t chunk, const Taken& taken);
  void give_to_system(uint32_t chunk, ChunkValue found);
  uint64_t limit() const;
  uint64_t to_give_back() const;
  static Status reached(uint64_t limit);
  Status within_limit();
  Status may_grow(uint32_t first, const std::vector<uint32_t>& need) const;
  os::Backing backing() const;
  Status back_with_pages(uint32_t first, const std::vector<Taken>& taken, const std::vector<uint32_t>& need);
  Status check_headroom(uint64_t bytes);
  void give_up_pages(uint32_t first, std::vector<Taken>& taken, const std::vector<uint32_t>& need);
  bool cut(uint32_t chunk, uint32_t need, Taken* taken);
  void give_up_surplus(uint32_t chunk, uint32_t need, Taken* taken);
  void map_pages(uint32_t first, const std::vector<uint32_t>& need);
  bool replace(uint32_t chunk, ChunkValue expected, ChunkValue desired);

  Arena& arena_;
  uint32_t slot_;
  std::function<void()> before_growth_;
  // Of each chunk.
  struct Mapped {
    uint32_t punched = 0;  // what Block::punched was
    uint16_t pages = 0;    // that this process has had in its page tables since
  };
  uint16_t& mapped(uint32_t chunk);
  Status punch(uint32_t chunk, uint64_t from = 0);
  std::vector<Mapped> mapped_;
  std::vector<uint32_t> recent_;  // heads of runs that this lease had lately
  std::vector<Taken> taken_;      // of the claim under way; members, so that a claim allocates nothing
  std::vector<uint32_t> need_;    // pages of each of its chunks
  bool beyond_ = false;
  uint64_t headroom_seen_ = 0;
  uint64_t headroom_ = 0;  // what was left when last looked
};

}  // namespace torchshm::pool
