// What lies where in the control file, byte for byte. The data file holds payload only.
//
// Shared: everything declared here. Structs are trivially copyable, zero is their initial state (a fresh memory file reads as zero), and
// they hold offsets and indices, never pointers. tests/cpp/layout_test.cc pins the bytes; kLayoutHash changes with them.
//
//   control file:  Header | Lease x kMaxLeases | Chunk x chunks | Ticket x kTickets | Block x pages | ledger bits x kMaxLeases
//   data file:     chunks of 2 MiB = 512 pages of 4 KiB = 2048 granules of 1 KiB
//
// A block is named by the page in which it starts: no block is smaller than a page, so no two start in the same one. That is what makes
// address -> block and block -> descriptor plain arithmetic.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pool/pair.h"

namespace torchshm::pool {

constexpr uint64_t kMagic = 0x4d48535f48435254;  // "TRCH_SHM"
constexpr uint32_t kVersion = 3;

constexpr uint64_t kGranule = 1024;  // with blocks of at least 4 KiB: at most 20 % internal waste
constexpr uint64_t kPage = 4096;
constexpr uint64_t kChunk = uint64_t{2} << 20;  // one huge page, where there are some
constexpr uint32_t kPagesPerChunk = kChunk / kPage;
constexpr uint32_t kGranulesPerChunk = kChunk / kGranule;
constexpr uint64_t kSmallMax = uint64_t{512} << 10;  // larger blocks are runs of whole chunks, committed to the page

constexpr uint32_t kMaxLeases = 1024;
constexpr uint32_t kTickets = 1u << 22;  // one for every unreceived message, and one for every block of every name
constexpr uint32_t kHints = 1024;        // a dict of a thousand arrays may be released at once
constexpr uint32_t kNobody = 0xfff;

static_assert(kMaxLeases < kNobody - 1);

// What a lease is doing to which block, written before the first step and cleared after the last one. If the lease dies in between, the
// reaper settles exactly that block.
enum class Op : uint8_t { kNone, kAllocate, kAttach, kIssue, kRedeem, kDrop, kRetake };

struct alignas(64) Header {
  uint64_t magic;
  uint32_t version;
  uint32_t layout_hash;
  uint64_t pool_id;
  uint64_t secret;  // random; keys the checksums of handles
  uint64_t family;  // digest of what the family shares; a stranger has another one
  uint64_t chunks;
  uint64_t data_size;
  uint64_t control_size;
  std::atomic<uint64_t> limit;  // bytes of committed pages
  std::atomic<uint64_t> warm;   // watermark: bytes of idle chunks kept
  std::atomic<uint64_t> next_incarnation;
  std::atomic<uint32_t> ready;          // 1 once the header is complete
  std::atomic<uint32_t> slots_used;     // leases [0, slots_used) have ever been claimed
  std::atomic<uint32_t> chunks_used;    // chunks [0, chunks_used) have ever been claimed
  std::atomic<uint32_t> tickets_used;   // tickets [0, tickets_used) have ever been issued
  std::atomic<uint64_t> idle_estimate;  // bytes; wakes the janitor only, the truth is the chunk table
  std::atomic<uint64_t> reaped;         // leases taken back
  std::atomic<uint64_t> taken_back;     // tickets taken back
  std::atomic<uint32_t> ticket_age;     // seconds after which a full pool takes a living sender's ticket back
  std::atomic<uint32_t> warned;         // 1 once some member has said that the pool is full
  std::atomic<uint32_t> pages;          // a PageKind, which members keep to
  std::atomic<uint32_t> numa_policy;    // an os::Numa::Policy, which members with reserved pages set for themselves
  std::atomic<uint64_t> numa_nodes;     // its nodes, below 64
  std::atomic<uint64_t> keep_until;     // CLOCK_BOOTTIME, ns: until then the watermark is the limit
};

// state in the low byte, incarnation above.
constexpr uint64_t kLeaseFree = 0;
constexpr uint64_t kLeaseLive = 1;
constexpr uint64_t lease_word(uint64_t incarnation) { return incarnation << 8 | kLeaseLive; }

struct alignas(128) Lease {
  std::atomic<uint64_t> word;
  std::atomic<uint32_t> pid;
  std::atomic<uint32_t>
      reaping;  // slot + 1 of the lease that this one takes back; that slot is not given out meanwhile
  std::atomic<uint64_t> started;
  std::atomic<uint64_t> pid_namespace;
  std::atomic<uint64_t> intent;             // op << 32 | block
  std::atomic<uint64_t> intent_generation;  // written before intent
  std::atomic<uint64_t> ledger_end;         // bits at and above are zero
  std::atomic<uint64_t> name[2];
  // Statistics, written by the owner only.
  std::atomic<uint64_t> allocations;
  std::atomic<uint64_t> fallbacks;
  std::atomic<uint64_t> grown;  // bytes
  alignas(64) std::atomic<uint32_t> hints_end;
  std::atomic<uint32_t> hints_lost;     // a hint was overwritten: look at every chunk
  std::atomic<uint32_t> hints[kHints];  // block + 1 freed by somebody else
};

enum class ChunkState : uint8_t {
  kHole,      // no pages
  kIdle,      // pages [0, committed) are warm and free for anyone; home got them last
  kRun,       // part of one large block that starts in chunk `head` with generation `generation`
  kSmall,     // small blocks, allocated by `owner` alone
  kTrimming,  // owner is giving its pages back; kNobody: the system refused them, and whoever trims tries again
  kBacking,   // owner is committing its pages; then it becomes kSmall
  kTaking,    // owner is looking whether somebody else's chunk of small blocks is empty, and then takes it
};

struct ChunkValue {
  ChunkState state = ChunkState::kHole;
  uint32_t owner = 0;       // 12 bits; kNobody for an orphan
  uint32_t committed = 0;   // pages; 16 bits. An upper bound after a death
  uint32_t head = 0;        // 32 bits
  uint64_t generation = 0;  // kRun: of the block, so that an old releaser can't free a new run
  static ChunkValue of(Pair p) {
    return {static_cast<ChunkState>(p.lo & 0xf), static_cast<uint32_t>(p.lo >> 4 & 0xfff),
            static_cast<uint32_t>(p.lo >> 16 & 0xffff), static_cast<uint32_t>(p.lo >> 32), p.hi};
  }
  Pair pair() const {
    return {static_cast<uint64_t>(state) | uint64_t{owner} << 4 | uint64_t{committed} << 16 | uint64_t{head} << 32,
            generation};
  }
};

struct Chunk {
  AtomicPair value;
};

// generation:52 first:2 granules:10 | sequence:36 count:24 state:4. The sequence number moves with every change, so that a recount that
// was overtaken fails. Where a small block lies is part of the value: whoever sees it live sees its place in the same exchange.
struct BlockValue {
  uint64_t generation = 0;
  uint64_t sequence = 0;
  uint32_t count = 0;  // holds + tickets (+ names); too high for a moment after a death, never too low
  bool live = false;
  uint32_t granules = 0;  // length of a small block; 0 for a large one, whose descriptor says it
  uint32_t first = 0;     // granules from the start of its page to its first byte, 0..3
  static constexpr uint64_t kGenerationMask = (uint64_t{1} << 52) - 1;
  static BlockValue of(Pair p) {
    return {p.lo >> 12,
            p.hi >> 28,
            static_cast<uint32_t>(p.hi >> 4 & 0xffffff),
            (p.hi & 0xf) != 0,
            static_cast<uint32_t>(p.lo & 0x3ff),
            static_cast<uint32_t>(p.lo >> 10 & 3)};
  }
  Pair pair() const {
    return {generation << 12 | uint64_t{first & 3} << 10 | (granules & 0x3ff),
            (sequence & 0xfffffffff) << 28 | uint64_t{count & 0xffffff} << 4 | static_cast<uint64_t>(live)};
  }
};

struct Block {
  AtomicPair value;
  std::atomic<uint32_t> granules;  // length of a large block; written before it is live
  std::atomic<uint32_t> queue;     // low half of the generation in which the block is a queue (queue.h); 0: never
  std::atomic<uint32_t>
      punched;  // of a chunk's first block: moves when the chunk's pages go back to the system. A hint
  std::atomic<uint32_t> reserved;
};

// Which queue a ticket belongs to.
struct QueueRef {
  uint32_t block = 0;
  uint64_t generation = 0;
};

static_assert(kSmallMax / kGranule < 1024, "fits BlockValue::granules");

// nonce:40 sender:24 | block:32 second:32. Out while sender is not zero.
struct TicketValue {
  uint64_t nonce = 0;
  uint32_t sender = 0;  // low 12 bits of the incarnation << 12 | slot + 1
  uint32_t block = 0;
  uint32_t second = 0;  // CLOCK_MONOTONIC
  static constexpr uint64_t kNonceMask = (uint64_t{1} << 40) - 1;
  static uint32_t sender_of(uint32_t slot, uint64_t incarnation) {
    return static_cast<uint32_t>(incarnation & 0xfff) << 12 | (slot + 1);
  }
  // In the place of a sender: a name keeps the block alive, and neither a death nor time takes the ticket back.
  static constexpr uint32_t kName = kNobody;
  // The block belongs to a queue, or to a message in one: out as long as that queue is, and no longer. `second` is the queue's block, and
  // the upper half of `sender` the low bits of its generation.
  static constexpr uint32_t kQueue = kNobody - 1;
  static uint32_t sender_of_queue(uint64_t generation) {
    return static_cast<uint32_t>(generation & 0xfff) << 12 | kQueue;
  }
  bool of_queue() const { return (sender & 0xfff) == kQueue; }
  static TicketValue of(Pair p) {
    return {p.lo >> 24, static_cast<uint32_t>(p.lo & 0xffffff), static_cast<uint32_t>(p.hi),
            static_cast<uint32_t>(p.hi >> 32)};
  }
  Pair pair() const { return {nonce << 24 | sender, uint64_t{second} << 32 | block}; }
};

struct Ticket {
  AtomicPair value;
};

static_assert(sizeof(Block) == 32, "0.8 % of a 4 KiB block");
static_assert(sizeof(Ticket) == 16);
static_assert(sizeof(Chunk) == 16);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

constexpr uint32_t kLayoutHash =
    static_cast<uint32_t>(sizeof(Header) * 2654435761u ^ sizeof(Lease) * 40503u ^ kMaxLeases * 31u ^ kTickets ^
                          kHints * 7u ^ sizeof(Block) * 131u ^ kVersion);

// Offsets of the tables for a pool of so many chunks.
struct Offsets {
  uint64_t leases, chunks, tickets, blocks, ledgers, ledger_stride, total;
  static Offsets of(uint64_t chunk_count);
};

}  // namespace torchshm::pool
