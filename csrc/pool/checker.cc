#include "pool/checker.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>

#include "pool/look.h"
#include "pool/membership.h"

namespace torchshm::pool {

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

namespace {

constexpr uint32_t kGranulesPerPage = kPage / kGranule;
constexpr uint32_t kLeastGranules = kPage / kGranule, kMostGranules = kSmallMax / kGranule;

// ---- words in words

std::string describe(BlockValue v, Pair p) {
  return words(p) + " = generation " + number(v.generation) + ", sequence " + number(v.sequence) + ", count " +
         number(v.count) + (v.live ? ", live, " : ", free, ") +
         (v.granules != 0 ? number(v.granules) + " granules from " + number(v.first) : "large");
}

std::string the_block(uint32_t block, Pair p) {
  return "block " + number(block) + " " + describe(BlockValue::of(p), p);
}

const char* name_of(ChunkState state) {
  constexpr std::array<const char*, 7> kNames = {"hole", "idle", "run", "small", "trimming", "backing", "taking"};
  const auto index = static_cast<size_t>(state);
  return index < kNames.size() ? kNames[index] : "no state";
}

std::string the_chunk(uint32_t chunk, Pair p) {
  const ChunkValue v = ChunkValue::of(p);
  return "chunk " + number(chunk) + " " + words(p) + " = " + name_of(v.state) + ", owner " +
         (v.owner == kNobody ? "nobody" : "lease " + number(v.owner)) + ", " + number(v.committed) + " pages, head " +
         number(v.head) + ", generation " + number(v.generation);
}

std::string the_ticket(uint32_t ticket, Pair p) {
  const TicketValue v = TicketValue::of(p);
  return "ticket " + number(ticket) + " " + words(p) + " = block " + number(v.block) + ", sender " + hex(v.sender) +
         ", nonce " + number(v.nonce);
}

std::string the_lease(uint32_t slot, uint64_t word) {
  return "lease " + number(slot) + " " + hex(word) + " = incarnation " + number(word >> 8) +
         ((word & 0xff) == kLeaseFree ? ", free" : "");
}

// ---- one look

struct SeenLease {
  uint64_t word = 0, intent = 0;
  bool present() const { return word != 0; }
};

struct SeenBlock {
  uint32_t block = 0;
  Pair word;
  uint32_t bits = 0, tickets = 0;
  std::array<uint32_t, 4> holders{};  // the first ones
};

class Look {
 public:
  Look(const Arena& arena, const CheckOptions& options)
      : arena_(arena), options_(options), offsets_(Offsets::of(arena.chunks())), leases_(kMaxLeases) {}

  // Blocks before intents, intents before bits and tickets; then intents and blocks again: a block whose word has not moved, and which no
  // intent named at either time, was left alone while its bits and tickets were counted.
  CheckReport look() {
    control_ = Memory(arena_.control_fd(), offsets_.total, arena_.control_at());
    header();
    blocks();
    leases();
    chunks();
    ledgers();
    tickets();
    counts();
    places();
    if (!arena_.is_copy()) pages();
    return std::move(report_);
  }

 private:
  // Calls f(index) for the entries of a table that have memory. Until there are enough suspects.
  template <class F>
  void each(uint64_t table, uint64_t size, uint64_t count, F f) const {
    control_.each(
        table, size, count, [this] { return !enough(); }, f);
  }

  bool enough() const { return suspects_.enough(); }
  void suspect(int invariant, std::string what) { suspects_.add(invariant, std::move(what)); }

  Pair block_word(uint32_t block) const { return arena_.block(block).value.load(); }
  Pair chunk_word(uint32_t chunk) const { return arena_.chunk(chunk).value.load(); }
  SeenBlock* find(uint32_t block) {
    const auto at = std::lower_bound(live_.begin(), live_.end(), block,
                                     [](const SeenBlock& seen, uint32_t wanted) { return seen.block < wanted; });
    return at != live_.end() && at->block == block ? &*at : nullptr;
  }
  // Whether an intent, of whatever lease, named the block when leases() looked, or does now.
  bool named(uint32_t block) const {
    for (uint32_t slot = 0; slot < kMaxLeases; ++slot) {
      if (!leases_[slot].present()) continue;
      for (const uint64_t intent : {leases_[slot].intent, arena_.lease(slot).intent.load(std::memory_order_seq_cst)}) {
        if (intent >> 32 != 0 && static_cast<uint32_t>(intent) == block) return true;
      }
    }
    return false;
  }

  void header();
  void blocks();
  void leases();
  void chunks();
  void chunk(uint32_t index, Pair word);
  void run(uint32_t index, Pair word);
  void ledgers();
  void tickets();
  void counts();
  void places();
  void small_place(const SeenBlock& seen);
  void large_place(const SeenBlock& seen, uint64_t granules);
  void pages();

  const Arena& arena_;
  const CheckOptions& options_;
  const Offsets offsets_;
  Memory control_;
  std::vector<SeenLease> leases_;
  std::vector<SeenBlock> live_;  // by block
  CheckReport report_;
  Suspects suspects_{report_.violations};
};

void Look::header() {
  const Header& h = arena_.header();
  const auto expect = [&](const char* field, uint64_t found, uint64_t wanted) {
    if (found != wanted) suspect(1, std::string("header ") + field + " is " + hex(found) + ", expected " + hex(wanted));
  };
  const auto at_most = [&](int invariant, const char* field, uint64_t found, uint64_t most) {
    if (found > most)
      suspect(invariant, std::string("header ") + field + " is " + number(found) + ", more than " + number(most));
  };
  expect("magic", h.magic, kMagic);
  expect("version", h.version, kVersion);
  expect("layout_hash", h.layout_hash, kLayoutHash);
  expect("chunks", h.chunks, arena_.chunks());
  expect("data_size", h.data_size, uint64_t{arena_.chunks()} * kChunk);
  expect("control_size", h.control_size, offsets_.total);
  expect("ready", h.ready.load(std::memory_order_acquire), 1);
  if (h.pool_id == 0) suspect(1, "header pool_id is 0, expected a random number");
  if (h.secret == 0) suspect(1, "header secret is 0, expected a random number");
  at_most(2, "slots_used", h.slots_used.load(std::memory_order_acquire), kMaxLeases);
  at_most(1, "chunks_used", h.chunks_used.load(std::memory_order_acquire), arena_.chunks());
  at_most(3, "tickets_used", h.tickets_used.load(std::memory_order_acquire), kTickets);
}

void Look::blocks() {
  each(offsets_.blocks, sizeof(Block), arena_.pages(), [&](uint32_t block) {
    const Pair word = block_word(block);
    if (word == Pair{}) return;
    const BlockValue v = BlockValue::of(word);
    if ((word.hi & 0xf) > 1) {
      suspect(3, the_block(block, word) + ": state " + number(word.hi & 0xf) + ", expected 0 or 1");
    } else if (v.live != (v.count > 0)) {
      suspect(3, the_block(block, word) + ": live exactly while the count is not 0");
    }
    if (!v.live) return;
    if (v.generation == 0) suspect(9, the_block(block, word) + ": a block that was ever live has a generation");
    live_.push_back({block, word, 0, 0, {}});
  });
  report_.blocks = live_.size();
}

void Look::leases() {
  struct Claimed {
    uint64_t incarnation;
    uint32_t slot;
  };
  std::vector<Claimed> claimed;
  each(offsets_.leases, sizeof(Lease), kMaxLeases, [&](uint32_t slot) {
    const Lease& lease = arena_.lease(slot);
    const uint64_t word = lease.word.load(std::memory_order_seq_cst);
    const uint64_t intent = lease.intent.load(std::memory_order_seq_cst);
    const uint32_t reaping = lease.reaping.load(std::memory_order_seq_cst);
    const uint64_t end = lease.ledger_end.load(std::memory_order_relaxed);
    leases_[slot] = {word, intent};
    const auto self = [&] { return the_lease(slot, word); };  // costly, and nearly never said
    if (end > arena_.pages() / 64)
      suspect(2, self() + ": ledger_end is " + number(end) + ", more than " + number(arena_.pages() / 64));
    if (intent != 0 && (intent >> 32 == 0 || intent >> 32 > static_cast<uint64_t>(Op::kRetake) ||
                        static_cast<uint32_t>(intent) >= arena_.pages())) {
      suspect(6, self() + ": intent " + hex(intent) + " names no operation on a block");
    }
    if (reaping > arena_.slots_used() || reaping == slot + 1)
      suspect(6, self() + ": reaping " + number(reaping) + " names no other lease");
    if (word == kLeaseFree) {
      if (intent != 0) suspect(6, self() + ": intent " + hex(intent) + " stands, and nobody will settle it");
      if (reaping != 0) suspect(6, self() + ": announces the reaping of lease " + number(reaping - 1));
      return;
    }
    if ((word & 0xff) != kLeaseLive || word >> 8 == 0)
      suspect(2, self() + ": expected 0, or an incarnation in state 1");
    if (slot >= arena_.slots_used())
      suspect(2, self() + ": beyond slots_used " + number(arena_.slots_used()) + ", where no reaper looks");
    claimed.push_back({word >> 8, slot});
    ++report_.leases;
    if (!options_.at_rest) return;
    if (reaping != 0) suspect(6, self() + ": announces the reaping of lease " + number(reaping - 1) + " at rest");
    if (intent != 0) suspect(6, self() + ": intent " + hex(intent) + " stands at rest");
    if (!arena_.is_copy() && Membership::dead(arena_, kNobody, slot))
      suspect(2, self() + ": its process (pid " + number(lease.pid.load(std::memory_order_relaxed)) +
                     ") is dead, and it was not taken back");
  });
  const uint64_t next = arena_.header().next_incarnation.load(std::memory_order_seq_cst);
  std::sort(claimed.begin(), claimed.end(),
            [](const Claimed& a, const Claimed& b) { return a.incarnation < b.incarnation; });
  for (size_t i = 0; i < claimed.size(); ++i) {
    const auto self = [&] { return the_lease(claimed[i].slot, leases_[claimed[i].slot].word); };
    if (claimed[i].incarnation >= next) suspect(2, self() + ": not below next_incarnation " + number(next));
    if (i > 0 && claimed[i].incarnation == claimed[i - 1].incarnation)
      suspect(2, self() + ": the same incarnation as lease " + number(claimed[i - 1].slot));
  }
}

void Look::chunks() {
  uint64_t committed = 0;
  each(offsets_.chunks, sizeof(Chunk), arena_.chunks(), [&](uint32_t index) {
    const Pair word = chunk_word(index);
    if (word == Pair{}) return;
    committed += ChunkValue::of(word).committed * kPage;
    chunk(index, word);
  });
  const uint64_t limit = arena_.header().limit.load(std::memory_order_relaxed);
  if (options_.at_rest && options_.limit && committed > limit)
    suspect(1, "the chunks have " + number(committed) + " bytes of pages, more than the limit of " + number(limit));
}

void Look::chunk(uint32_t index, Pair word) {
  const ChunkValue v = ChunkValue::of(word);
  const auto self = [&] { return the_chunk(index, word); };
  if (index >= arena_.chunks_used())
    suspect(1, self() + ": beyond chunks_used " + number(arena_.chunks_used()) + ", where nobody looks");
  if (v.committed > kPagesPerChunk) suspect(1, self() + ": more pages than a chunk's " + number(kPagesPerChunk));
  if (v.owner >= kMaxLeases && v.owner != kNobody) suspect(2, self() + ": the owner is no lease");
  const bool plain = v.head == 0 && v.generation == 0;
  bool orphan = false;
  switch (v.state) {
    case ChunkState::kHole:
      suspect(1, self() + ": a hole is all zero");
      return;
    case ChunkState::kIdle:
      if (!plain || v.committed == 0) suspect(1, self() + ": an idle chunk has pages, and no head or generation");
      return;
    case ChunkState::kRun:
      orphan = true;
      break;
    case ChunkState::kSmall:
      orphan = true;
      [[fallthrough]];
    case ChunkState::kBacking:
    case ChunkState::kTaking:
      if (!plain || v.committed != kPagesPerChunk)
        suspect(1, self() + ": a chunk of small blocks has all pages, and no head or generation");
      break;
    case ChunkState::kTrimming:
      orphan = true;  // nobody's: the system refused its pages, and the next trim asks again
      if (!plain) suspect(1, self() + ": expected no head or generation");
      break;
    default:
      suspect(1, self() + ": state " + number(static_cast<uint64_t>(v.state)) + ", expected 0 to 6");
      return;
  }
  // Only its owner, or who reaps that, will ever move it on.
  const bool nobody = v.owner == kNobody;
  if (nobody && !orphan) suspect(2, self() + ": nobody will finish that");
  if (v.owner < kMaxLeases && !leases_[v.owner].present()) suspect(2, self() + ": the owner's lease is free");
  const bool moving = v.state == ChunkState::kBacking || v.state == ChunkState::kTaking ||
                      (v.state == ChunkState::kTrimming && !nobody);
  if (options_.at_rest && moving) suspect(6, self() + ": between two states at rest");
  if (v.state == ChunkState::kRun) run(index, word);
}

// A chunk of a run belongs to the live block at its head; or to one that its owner is going to make live; or, until an intent is off, to
// one that has been freed.
void Look::run(uint32_t index, Pair word) {
  const ChunkValue v = ChunkValue::of(word);
  const auto self = [&] { return the_chunk(index, word); };
  if (v.head > index) {
    suspect(1, self() + ": the head lies behind it");
    return;
  }
  const uint32_t block = v.head * kPagesPerChunk;
  const Pair head = block_word(block);
  const BlockValue b = BlockValue::of(head);
  const bool owner_lives = v.owner < kMaxLeases && leases_[v.owner].present();
  if (b.live && b.generation == v.generation) {
    const uint64_t bytes = arena_.block(block).granules.load(std::memory_order_relaxed) * kGranule;
    const uint64_t before = uint64_t{index - v.head} * kChunk;
    // One that a failed claim has not given up yet can name the same head and generation.
    if (before >= bytes && (options_.at_rest || !owner_lives))
      suspect(1, self() + ": behind the end of its " + the_block(block, head) + " of " + number(bytes) + " bytes");
    return;
  }
  if (!options_.at_rest && (owner_lives || named(block))) return;
  suspect(b.live ? 9 : 1,
          self() + ": expected a live block of that generation at its head, found " + the_block(block, head));
}

void Look::ledgers() {
  const uint64_t words = arena_.pages() / 64;
  for (uint32_t slot = 0; slot < kMaxLeases && !enough(); ++slot) {
    const SeenLease& lease = leases_[slot];
    each(offsets_.ledgers + offsets_.ledger_stride * slot, sizeof(uint64_t), words, [&](uint32_t word) {
      uint64_t bits = arena_.ledger(slot, word).load(std::memory_order_seq_cst);
      if (bits == 0) return;
      const uint64_t end = arena_.lease(slot).ledger_end.load(std::memory_order_seq_cst);
      // Of the word only the bit: the others move while the lease is at work.
      const auto bit = [&](uint32_t block) {
        return the_lease(slot, lease.word) + ": ledger bit of block " + number(block);
      };
      const auto lowest = static_cast<uint32_t>(uint64_t{word} * 64 + static_cast<uint64_t>(std::countr_zero(bits)));
      if (word >= end) suspect(2, bit(lowest) + ", at or above ledger_end " + number(end) + ", where no reaper looks");
      if (!lease.present()) suspect(2, bit(lowest) + ", a hold of a free lease");
      for (; bits != 0 && !enough(); bits &= bits - 1) {
        const auto block = static_cast<uint32_t>(uint64_t{word} * 64 + static_cast<uint64_t>(std::countr_zero(bits)));
        if (SeenBlock* seen = find(block)) {
          if (seen->bits < seen->holders.size()) seen->holders[seen->bits] = slot;
          ++seen->bits;
          continue;
        }
        const Pair now = block_word(block);
        if (!BlockValue::of(now).live) suspect(3, bit(block) + ", a hold of a free one: " + the_block(block, now));
      }
    });
  }
}

void Look::tickets() {
  each(offsets_.tickets, sizeof(Ticket), kTickets, [&](uint32_t index) {
    const Pair word = arena_.ticket(index).value.load();
    const TicketValue v = TicketValue::of(word);
    if (v.sender == 0) return;
    ++report_.tickets;
    const auto self = [&] { return the_ticket(index, word); };
    if (index >= arena_.tickets_used())
      suspect(3, self() + ": beyond tickets_used " + number(arena_.tickets_used()) + ", where no recount looks");
    const uint32_t slot = v.sender & 0xfff;
    const uint64_t next = arena_.header().next_incarnation.load(std::memory_order_seq_cst);
    const bool named = v.sender == TicketValue::kName;
    if (named) ++report_.named;
    if (!named && !v.of_queue() &&
        (slot == 0 || slot > arena_.slots_used() || (next <= 0xfff && (v.sender >> 12 >= next || v.sender >> 12 == 0))))
      suspect(2, self() + ": no lease was ever that sender");
    if (v.block >= arena_.pages()) {
      suspect(3, self() + ": no such block");
    } else if (SeenBlock* seen = find(v.block)) {
      ++seen->tickets;
    } else if (const Pair now = block_word(v.block); !BlockValue::of(now).live) {
      suspect(3, self() + ": a ticket for a free block: " + the_block(v.block, now));
    }
  });
}

void Look::counts() {
  for (const SeenBlock& seen : live_) {
    const uint32_t count = BlockValue::of(seen.word).count, sum = seen.bits + seen.tickets;
    if (enough()) return;
    if (sum == count || (sum < count && named(seen.block)) || block_word(seen.block) != seen.word) continue;
    std::string who;
    for (uint32_t i = 0; i < std::min<size_t>(seen.bits, seen.holders.size()); ++i)
      who += (i == 0 ? " of leases " : ", ") + number(seen.holders[i]);
    if (seen.bits > seen.holders.size()) who += ", ...";
    suspect(3, the_block(seen.block, seen.word) + ": " + number(seen.bits) + " ledger bits" + who + " and " +
                   number(seen.tickets) + " tickets; expected " +
                   (sum > count ? "no more than the count" : "the count, since no intent names the block"));
  }
}

void Look::places() {
  uint64_t free_from = 0;  // granules of the data file
  const SeenBlock* before = nullptr;
  for (const SeenBlock& seen : live_) {
    if (enough()) return;
    const BlockValue v = BlockValue::of(seen.word);
    // Relaxed: ordered by the load of the word, which does not move while the block is live with this generation.
    const uint64_t granules =
        v.granules != 0 ? v.granules : arena_.block(seen.block).granules.load(std::memory_order_relaxed);
    const uint64_t start = uint64_t{seen.block} * kGranulesPerPage + v.first;
    if (start < free_from && block_word(seen.block) == seen.word && block_word(before->block) == before->word)
      suspect(1, the_block(seen.block, seen.word) + ": lies in " + the_block(before->block, before->word));
    if (start + granules > free_from) {
      free_from = start + granules;
      before = &seen;
    }
    if (v.granules != 0) {
      small_place(seen);
    } else {
      large_place(seen, granules);
    }
  }
}

void Look::small_place(const SeenBlock& seen) {
  const BlockValue v = BlockValue::of(seen.word);
  const uint32_t start = seen.block % kPagesPerChunk * kGranulesPerPage + v.first;
  const Pair chunk = chunk_word(seen.block / kPagesPerChunk);
  const ChunkState state = ChunkValue::of(chunk).state;
  if (block_word(seen.block) != seen.word) return;  // freed, so the chunk may be anything
  const auto self = [&] { return the_block(seen.block, seen.word); };
  if (v.granules < kLeastGranules || v.granules > kMostGranules)
    suspect(1, self() + ": a small block has " + number(kLeastGranules) + " to " + number(kMostGranules) + " granules");
  if (start + v.granules > kGranulesPerChunk) suspect(1, self() + ": reaches over the end of its chunk");
  if (state != ChunkState::kSmall && state != ChunkState::kTaking)
    suspect(1, self() + ": a small block in " + the_chunk(seen.block / kPagesPerChunk, chunk));
}

void Look::large_place(const SeenBlock& seen, uint64_t granules) {
  const auto self = [&] { return the_block(seen.block, seen.word) + ", " + number(granules) + " granules"; };
  const uint32_t head = seen.block / kPagesPerChunk;
  const uint64_t bytes = granules * kGranule;
  std::string wrong;
  if (seen.block % kPagesPerChunk != 0 || BlockValue::of(seen.word).first != 0) {
    wrong = "a large block starts with its chunk";
  } else if (bytes <= kSmallMax) {
    wrong = "a large block has more than " + number(kMostGranules);
  } else if (bytes > uint64_t{arena_.chunks() - head} * kChunk) {
    wrong = "reaches over the end of the data file";
  }
  const uint64_t n = wrong.empty() ? (bytes + kChunk - 1) / kChunk : 0;
  for (uint32_t i = 0; i < n && wrong.empty(); ++i) {
    const Pair word = chunk_word(head + i);
    const ChunkValue chunk = ChunkValue::of(word);
    const uint64_t pages = std::min<uint64_t>((bytes - i * kChunk + kPage - 1) / kPage, kPagesPerChunk);
    if (chunk.state != ChunkState::kRun || chunk.head != head || chunk.committed < pages) {
      wrong = "expected " + number(pages) + " pages of its run in " + the_chunk(head + i, word);
    } else if (chunk.generation != BlockValue::of(seen.word).generation) {
      if (block_word(seen.block) != seen.word) return;
      suspect(9, self() + ": expected its generation in " + the_chunk(head + i, word));
      return;
    }
  }
  if (!wrong.empty() && block_word(seen.block) == seen.word) suspect(1, self() + ": " + wrong);
}

// Pages that are counted on are there, and holes have none.
void Look::pages() {
  const int fd = arena_.data_fd();
  const uint64_t size = uint64_t{arena_.chunks()} * kChunk;
  const Memory memory(fd, size, arena_.data_at());
  const std::vector<os::Range>& data = memory.ranges();
  auto range = data.begin();
  for (uint32_t index = 0; index < arena_.chunks() && !enough(); ++index) {
    const uint64_t begin = index * kChunk;
    while (range != data.end() && range->end <= begin) ++range;
    const bool any = range != data.end() && range->begin < begin + kChunk;
    if (index >= arena_.chunks_used() && !any) {
      if (range == data.end()) return;
      index = static_cast<uint32_t>(range->begin / kChunk) - 1;
      continue;
    }
    const Pair word = chunk_word(index);
    const ChunkValue v = ChunkValue::of(word);
    uint64_t wanted = 0;  // pages from its start
    switch (v.state) {
      case ChunkState::kHole:
        if (options_.at_rest && any && chunk_word(index) == word)
          suspect(1, the_chunk(index, word) + ": has memory, at byte " + number(std::max(range->begin, begin)) +
                         " of the data file; a hole has none");
        break;
      case ChunkState::kIdle:
      case ChunkState::kSmall:
      case ChunkState::kTaking:
        wanted = std::min(v.committed, kPagesPerChunk);
        break;
      case ChunkState::kRun: {
        // While it is being claimed its pages are only announced. What the block does not need is not counted on.
        const uint32_t head = v.head <= index ? v.head * kPagesPerChunk : 0;
        const BlockValue b = BlockValue::of(block_word(head));
        const uint64_t bytes = arena_.block(head).granules.load(std::memory_order_relaxed) * kGranule;
        const uint64_t before = uint64_t{index - head / kPagesPerChunk} * kChunk;
        if (b.live && b.generation == v.generation && before < bytes)
          wanted = std::min<uint64_t>((bytes - before + kPage - 1) / kPage, kPagesPerChunk);
        break;
      }
      default:
        break;
    }
    if (arena_.in_file()) continue;
    const uint64_t end = begin + wanted * kPage;
    uint64_t missing = begin;
    for (auto r = range; r != data.end() && r->begin <= missing && missing < end; ++r) missing = r->end;
    if (missing >= end) continue;
    const os::Range now = os::next_data(fd, missing, size, arena_.data_at());
    if (now.begin == missing || chunk_word(index) != word) continue;
    suspect(1, the_chunk(index, word) + ": page " + number((missing - begin) / kPage) + " (block " +
                   number(missing / kPage) + ") has no memory; expected " + number(wanted) + " pages");
  }
}

}  // namespace

std::string CheckReport::first() const {
  if (violations.empty()) return "";
  return "invariant " + std::to_string(violations[0].invariant) + ": " + violations[0].what;
}

CheckReport check(const Arena& arena, const CheckOptions& options) {
  return insist<CheckReport>([&] { return Look(arena, options).look(); }, options.at_rest);
}

}  // namespace torchshm::pool
