// What lies where in a catalogue file, byte for byte: names, and what each of them keeps alive in the pool.
//
// Shared: everything declared here. Structs are trivially copyable, zero is their initial state, and they hold indices, never pointers.
// tests/cpp/store_layout_test.cc pins the bytes; kLayoutHash changes with them.
//
//   catalogue file:  Header | Bell x kBells | Counters x kMaxLeases | Slot x every level | CellWord x kCells | Body x kCells | Use x kCells
//
// A slot of the index says which cell a name has now, and is the only truth about it: a name appears, changes its value and goes in one
// exchange of one slot. A cell says what a value consists of. The index has levels of growing size; which of them are in use only grows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pool/layout.h"

namespace torchshm::store {

constexpr uint64_t kMagic = 0x474c544353485254;  // "TRHSCTLG"
constexpr uint32_t kVersion = 2;

constexpr uint32_t kLevels = 4;
constexpr uint32_t kWindow = 16;  // slots of a level in which a name may be; four cache lines
constexpr uint32_t level_size(uint32_t level) { return uint32_t{1} << (13 + 3 * level); }
constexpr uint32_t level_start(uint32_t level) {
  return level == 0 ? 0 : level_start(level - 1) + level_size(level - 1);
}
constexpr uint32_t kSlots = level_start(kLevels);
constexpr uint32_t kCells = uint32_t{1} << 22;
constexpr uint32_t kBells = 1024;
constexpr uint32_t kInline = 160;                  // bytes of key and description in the cell itself
constexpr uint32_t kMaxName = 64u << 10;           // bytes
constexpr uint32_t kMaxKey = kMaxName + 1;         // of a name, or of a mark for one: a zero byte and the name
constexpr uint32_t kMaxParts = 1u << 20;           // blocks of one value
constexpr uint64_t kMaxText = uint64_t{64} << 20;  // bytes of key and description

// A futex that moves when a name that rings it is saved. Names share bells by their hash.
struct Bell {
  std::atomic<uint32_t> rung;
  std::atomic<uint32_t> waiting;  // 1: somebody may be asleep
};

enum class SlotState : uint8_t {
  kEmpty,    // never used: a search ends here
  kClaimed,  // somebody is about to put a name here, unless a rival for the same name prevents it
  kNamed,
  kGone,  // free again
};

// cell:32 tag:30 state:2 | sequence:32 life:32. The sequence number moves with every change.
struct SlotValue {
  SlotState state = SlotState::kEmpty;
  uint32_t tag = 0;  // 30 bits of the name's hash
  uint32_t cell = 0;
  uint32_t life = 0;  // the cell's, when it was put here
  uint32_t sequence = 0;
  static SlotValue of(pool::Pair p) {
    return {static_cast<SlotState>(p.lo & 3), static_cast<uint32_t>(p.lo >> 2 & 0x3fffffff),
            static_cast<uint32_t>(p.lo >> 32), static_cast<uint32_t>(p.hi), static_cast<uint32_t>(p.hi >> 32)};
  }
  pool::Pair pair() const {
    return {static_cast<uint64_t>(state) | uint64_t{tag & 0x3fffffff} << 2 | uint64_t{cell} << 32,
            uint64_t{sequence} << 32 | life};
  }
  friend bool operator==(const SlotValue&, const SlotValue&) = default;
};

struct Slot {
  pool::AtomicPair value;
};

enum class CellState : uint8_t {
  kFree,
  kMaking,    // owner is putting a value together, or has just named it
  kStanding,  // named
  kBound,     // named, as long as owner lives
  kLeaving,   // owner is about to take it out of the index; still named, or not any more
  kReleasing  // not named any more; owner is giving back what it kept alive
};

// owner:60 state:4 | step:32 life:32. owner is incarnation:48 slot:12. A life begins when a free cell is taken; a cell is named by one
// slot in a life, once. The step moves with every change.
struct CellValue {
  CellState state = CellState::kFree;
  uint64_t owner = 0;
  uint32_t life = 0;
  uint32_t step = 0;
  static CellValue of(pool::Pair p) {
    return {static_cast<CellState>(p.lo & 0xf), p.lo >> 4, static_cast<uint32_t>(p.hi),
            static_cast<uint32_t>(p.hi >> 32)};
  }
  pool::Pair pair() const { return {owner << 4 | static_cast<uint64_t>(state), uint64_t{step} << 32 | life}; }
  friend bool operator==(const CellValue&, const CellValue&) = default;
};

struct CellWord {
  pool::AtomicPair value;
};

// One block that a value keeps alive, through a ticket that no time takes back.
struct Part {
  uint32_t block = 0;
  uint32_t ticket = 0;
  uint64_t generation = 0;
  uint64_t nonce = 0;
};

// Written by the cell's owner before a slot names it, read by anyone: a reader looks at the slot again afterwards.
struct Body {
  uint64_t hash = 0;
  uint64_t expires = 0;  // CLOCK_BOOTTIME, ns; 0: never
  uint64_t created = 0;  // CLOCK_REALTIME, ns
  uint64_t owner = 0;    // of a bound name: as in CellValue; else 0
  uint32_t pid = 0;      // of the saver
  uint32_t key_bytes = 0;
  uint32_t text_bytes = 0;  // description
  uint32_t parts = 0;       // without the overflow block
  Part overflow;            // nonce 0: none. Holds parts 1.. and, where they do not fit here, key and description
  Part first;
  uint8_t text[kInline] = {};  // key, then description, when both fit
};

// What may become of a value when room is needed. In this order they go: names that have expired, kDrop, kSpill, kKeep.
enum class Policy : uint8_t {
  kKeep,   // never lost: to disk, after all that may go before it
  kDrop,   // removed
  kSpill,  // to disk, before what is kept
  kPin,    // stays in memory
};

// life:32 policy:8 flags:8 | file. What is known of a value beside what it consists of; of that life of its cell and no other.
struct StandingValue {
  uint32_t life = 0;
  Policy policy = Policy::kKeep;
  uint8_t flags = 0;
  uint64_t file =
      0;  // the spill file that has the value: cell << 32 | life of whose it was when it was written; 0: none
  static StandingValue of(pool::Pair p) {
    const auto policy = static_cast<uint8_t>(p.lo >> 8);
    return {static_cast<uint32_t>(p.lo >> 32),
            policy <= static_cast<uint8_t>(Policy::kPin) ? static_cast<Policy>(policy) : Policy::kPin,
            static_cast<uint8_t>(p.lo), p.hi};
  }
  pool::Pair pair() const { return {uint64_t{life} << 32 | static_cast<uint64_t>(policy) << 8 | flags, file}; }
};

// Beside a cell, what changes while its value stands. Made anew by who claims the cell, before a slot names it.
struct alignas(64) Use {
  pool::AtomicPair standing;
  std::atomic<uint64_t> used;   // Header::clock when it was last loaded
  std::atomic<uint64_t> claim;  // who writes the value out or brings it back, as in CellValue; 0: nobody. Of no life
  std::atomic<uint64_t> bytes;  // of the value's blocks, wherever they are
  std::atomic<uint64_t> shared_writes;  // Header::shared_writes before its file was written
  std::atomic<uint64_t> reserved[2];
};
constexpr uint8_t kSpilled = 1;   // flag: the value is in the file, and the cell has no blocks
constexpr uint8_t kWritten = 2;   // flag: somebody may have written to it in this life, so no file has it
constexpr uint8_t kReadBack = 4;  // flag: its file has been read before

// Statistics of whoever has had the lease of that slot; written by them alone, and never reset.
struct alignas(128) Counters {
  std::atomic<uint64_t> loads;           // of values, by find
  std::atomic<uint64_t> restores;        // values brought back
  std::atomic<uint64_t> restored_bytes;  //
  std::atomic<uint64_t> spills;          // values whose memory was given up for a file
  std::atomic<uint64_t> spilled_bytes;   //
  std::atomic<uint64_t> written;         // files written
  std::atomic<uint64_t> written_bytes;   //
  std::atomic<uint64_t> evictions;       // names removed to make room
  std::atomic<uint64_t> spill_errors;    // files that could not be written, or not be read
  std::atomic<uint64_t> room_waits;      // times that there was no room at first
  std::atomic<uint64_t> reserved[6];
};

struct alignas(64) Header {
  uint64_t magic;
  uint32_t version;
  uint32_t layout_hash;
  uint64_t pool_id;
  uint64_t size;
  uint64_t created;  // CLOCK_REALTIME, ns
  char name[64];     // of the store; zero-terminated
  std::atomic<uint32_t> ready;
  std::atomic<uint32_t> levels;                   // levels [0, levels) are in use; at least one
  std::atomic<uint32_t> cells_used;               // cells [0, cells_used) have ever been used
  std::atomic<uint32_t> serving;                  // pid of the service, for messages
  std::atomic<uint64_t> default_ttl;              // ns; 0: none
  std::atomic<uint64_t> saved, removed, expired;  // statistics
  uint64_t place;                                 // the directory in which the store's name counts; 0: none
  std::atomic<uint64_t> patience;                 // ns that saving and loading wait for room
  std::atomic<uint32_t> policy;                   // of names that are saved without one
  std::atomic<uint32_t> spilling;      // 1: the store has a directory for what does not fit, and its name is here
  std::atomic<uint32_t> room_wanted;   // a futex: moves when somebody had to make room; wakes the service
  std::atomic<uint32_t> spill_failed;  // errno of the last file that could not be written; 0 when one was written since
  char directory[1024];                // of the files of what does not fit; zero-terminated, empty: none
  alignas(64)
      std::atomic<uint64_t> clock;  // moves when a value comes into memory; what it was is when a value was last used
  std::atomic<uint64_t> moves;      // of files from one cell to another
  std::atomic<uint64_t> policies;   // moves when a name gets another policy than the store's
  std::atomic<uint64_t> service;    // who gives the room of discarded files back, as in CellValue; 0: nobody
  std::atomic<uint32_t> discarded;  // moves when there is such a file
  std::atomic<uint64_t>
      shared_writes;  // moves when somebody is about to write to blocks that may be another name's as well
};

static_assert(sizeof(Header) <= pool::kPage);
static_assert(sizeof(Body) == 256 && alignof(Body) == 8);
static_assert(sizeof(Slot) == 16 && sizeof(CellWord) == 16 && sizeof(Part) == 24);
static_assert(sizeof(Use) == 64 && sizeof(Counters) == 128);

constexpr uint32_t kLayoutHash =
    static_cast<uint32_t>(sizeof(Header) * 2654435761u ^ sizeof(Body) * 40503u ^ kCells ^ kSlots * 31u ^ kBells * 7u ^
                          kWindow * 131u ^ sizeof(Use) * 8191u ^ sizeof(Counters) * 127u ^ kVersion);

namespace offsets {
constexpr uint64_t align(uint64_t value) { return (value + pool::kPage - 1) & ~(pool::kPage - 1); }
constexpr uint64_t kBellsAt = align(sizeof(Header));
constexpr uint64_t kCountersAt = align(kBellsAt + sizeof(Bell) * kBells);
constexpr uint64_t kSlotsAt = align(kCountersAt + sizeof(Counters) * pool::kMaxLeases);
constexpr uint64_t kWordsAt = align(kSlotsAt + sizeof(Slot) * uint64_t{kSlots});
constexpr uint64_t kBodiesAt = align(kWordsAt + sizeof(CellWord) * uint64_t{kCells});
constexpr uint64_t kUsesAt = align(kBodiesAt + sizeof(Body) * uint64_t{kCells});
constexpr uint64_t kTotal = kUsesAt + sizeof(Use) * uint64_t{kCells};
}  // namespace offsets

}  // namespace torchshm::store
