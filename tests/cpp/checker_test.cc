// The checker: it finds each kind of damage, names it, and finds nothing in a sound pool, whatever its members are doing.
//
// TORCHSHM_SOAK_SECONDS sets how long members work under it (default 4), TORCHSHM_SOAK_SEED which sequence.
#include "pool/checker.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/failpoint.h"
#include "crowd_at_work.h"
#include "os/mapping.h"
#include "pool/members.h"
#include "processes.h"

namespace torchshm::tests {
namespace {

using pool::Arena;
using pool::BlockValue;
using pool::CheckOptions;
using pool::CheckReport;
using pool::ChunkState;
using pool::ChunkValue;
using pool::Handle;
using pool::kChunk;
using pool::kNobody;
using pool::kPage;
using pool::kPagesPerChunk;
using pool::Member;
using pool::Mode;
using pool::Pair;
using pool::TicketValue;

constexpr CheckOptions kAtRest{.at_rest = true};

// ---- damage

// A pool with something of everything: two small blocks side by side, a large one of three chunks, an idle chunk, a ticket, two leases.
struct Scene {
  Scene() {
    member = fresh_pool();
    other = join(*member);
    small = take(5000);
    second = take(5000);
    large = take(5 << 20);
    const uint32_t gone = take(kChunk);
    idle = gone / kPagesPerChunk;
    member->release(gone, Mode::kReadWrite);
    auto handle = member->issue(small);
    EXPECT_TRUE(handle.ok());
    ticket = handle->ticket;
    hole = arena().chunks_used();
  }
  uint32_t take(uint64_t bytes) {
    auto view = member->allocate(bytes, false);
    EXPECT_TRUE(view.ok());
    return view->block;
  }
  Arena& arena() { return member->arena(); }
  pool::Header& header() { return arena().header(); }
  pool::Lease& lease(uint32_t slot = 0) { return arena().lease(slot); }
  static void set(pool::AtomicPair& at, Pair to) {
    Pair found = at.load();
    while (!at.exchange_if(found, to)) {
    }
  }
  void block(uint32_t index, const std::function<void(BlockValue&)>& change) {
    BlockValue value = BlockValue::of(arena().block(index).value.load());
    change(value);
    set(arena().block(index).value, value.pair());
  }
  void chunk(uint32_t index, const std::function<void(ChunkValue&)>& change) {
    ChunkValue value = ChunkValue::of(arena().chunk(index).value.load());
    change(value);
    set(arena().chunk(index).value, value.pair());
  }
  void out(const std::function<void(TicketValue&)>& change) {
    TicketValue value = TicketValue::of(arena().ticket(ticket).value.load());
    change(value);
    set(arena().ticket(ticket).value, value.pair());
  }
  void hold(uint32_t slot, uint32_t index) { arena().ledger(slot, index / 64).fetch_or(uint64_t{1} << (index % 64)); }
  void drop(uint32_t slot, uint32_t index) {
    arena().ledger(slot, index / 64).fetch_and(~(uint64_t{1} << (index % 64)));
  }
  void punch(uint32_t page) { EXPECT_TRUE(os::punch(arena().data() + uint64_t{page} * kPage, kPage).ok()); }
  uint32_t small_chunk() const { return small / kPagesPerChunk; }
  uint32_t large_chunk() const { return large / kPagesPerChunk; }

  std::unique_ptr<Member> member, other;
  uint32_t small = 0, second = 0, large = 0, idle = 0, ticket = 0, hole = 0;
};

using Texts = std::vector<std::string>;

std::string named(const char* what, uint64_t index) { return std::string(what) + " " + std::to_string(index) + " "; }

struct Damage {
  const char* name;
  int invariant;
  bool at_rest;                        // not wrong while members are at work
  std::function<Texts(Scene&)> cause;  // returns what the message says
};

const Damage kDamages[] = {
    // The header.
    {"Magic", 1, false, [](Scene& s) { return s.header().magic ^= 1, Texts{"magic"}; }},
    {"Version", 1, false, [](Scene& s) { return ++s.header().version, Texts{"version"}; }},
    {"LayoutHash", 1, false, [](Scene& s) { return ++s.header().layout_hash, Texts{"layout_hash"}; }},
    {"Chunks", 1, false, [](Scene& s) { return ++s.header().chunks, Texts{"header chunks"}; }},
    {"DataSize", 1, false, [](Scene& s) { return ++s.header().data_size, Texts{"data_size"}; }},
    {"ControlSize", 1, false, [](Scene& s) { return ++s.header().control_size, Texts{"control_size"}; }},
    {"Ready", 1, false, [](Scene& s) { return s.header().ready = 0, Texts{"ready"}; }},
    {"PoolId", 1, false, [](Scene& s) { return s.header().pool_id = 0, Texts{"pool_id"}; }},
    {"Secret", 1, false, [](Scene& s) { return s.header().secret = 0, Texts{"secret"}; }},
    {"SlotsUsedTooHigh", 2, false, [](Scene& s) { return s.header().slots_used = 1025, Texts{"slots_used is 1025"}; }},
    {"ChunksUsedTooHigh", 1, false, [](Scene& s) { return s.header().chunks_used = 1u << 31, Texts{"chunks_used"}; }},
    {"TicketsUsedTooHigh", 3, false, [](Scene& s) { return s.header().tickets_used = ~0u, Texts{"tickets_used"}; }},
    // Leases.
    {"LeaseState", 2, false, [](Scene& s) { return s.lease(1).word = 2 << 8 | 3, Texts{"lease 1 0x203"}; }},
    {"NoIncarnation", 2, false, [](Scene& s) { return s.lease(1).word = 1, Texts{"lease 1 0x1"}; }},
    {"SameIncarnation", 2, false,
     [](Scene& s) {
       return s.lease(1).word = s.lease(0).word.load(), Texts{"lease ", "same incarnation"};
     }},
    {"IncarnationOfTheFuture", 2, false,
     [](Scene& s) {
       return s.lease(1).word = pool::lease_word(99), Texts{"lease 1 ", "next_incarnation 3"};
     }},
    {"SlotsUsedTooLow", 2, false,
     [](Scene& s) {
       return s.header().slots_used = 1, Texts{"lease 1 ", "slots_used 1"};
     }},
    {"LedgerEndTooHigh", 2, false,
     [](Scene& s) {
       return s.lease().ledger_end = uint64_t{1} << 60, Texts{"lease 0 ", "ledger_end"};
     }},
    {"IntentOperation", 6, false,
     [](Scene& s) {
       return s.lease().intent = uint64_t{9} << 32 | 5, Texts{"lease 0 ", "0x900000005"};
     }},
    {"IntentBlock", 6, false,
     [](Scene& s) {
       return s.lease().intent = uint64_t{1} << 32 | ~0u, Texts{"lease 0 ", "0x1ffffffff"};
     }},
    {"IntentWithoutAnOperation", 6, false,
     [](Scene& s) {
       return s.lease().intent = s.small + 1, Texts{"lease 0 ", "names no operation"};
     }},
    {"IntentOfAFreeLease", 6, false,
     [](Scene& s) {
       return s.lease(7).intent = uint64_t{1} << 32 | s.small, Texts{"lease 7 ", "intent"};
     }},
    {"ReapsItself", 6, false,
     [](Scene& s) {
       return s.lease(1).reaping = 2, Texts{"lease 1 ", "reaping 2"};
     }},
    {"ReapsNobody", 6, false,
     [](Scene& s) {
       return s.lease(1).reaping = 77, Texts{"lease 1 ", "reaping 77"};
     }},
    {"FreeLeaseReaps", 6, false,
     [](Scene& s) {
       return s.lease(7).reaping = 1, Texts{"lease 7 ", "reaping of lease 0"};
     }},
    {"ReapingAtRest", 6, true,
     [](Scene& s) {
       return s.lease(1).reaping = 1, Texts{"lease 1 ", "reaping of lease 0"};
     }},
    {"IntentAtRest", 6, true,
     [](Scene& s) {
       return s.lease().intent = uint64_t{5} << 32 | s.small, Texts{"lease 0 ", "intent 0x5"};
     }},
    {"DeadLease", 2, true,
     [](Scene& s) {
       return s.other->membership().abandon(s.arena()), Texts{"lease 1 ", "not taken back"};
     }},
    // Chunks.
    {"ChunksUsedTooLow", 1, false,
     [](Scene& s) {
       return s.header().chunks_used = s.large_chunk(), Texts{named("chunk", s.large_chunk()), "chunks_used"};
     }},
    {"MorePagesThanAChunk", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.committed = 513; });
       return Texts{named("chunk", s.idle), "513 pages"};
     }},
    {"OwnerOutOfRange", 2, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.owner = 2000; });
       return Texts{named("chunk", s.idle), "lease 2000"};
     }},
    {"OwnerIsFree", 2, false,
     [](Scene& s) {
       s.chunk(s.small_chunk(), [](ChunkValue& v) { v.owner = 500; });
       return Texts{named("chunk", s.small_chunk()), "lease 500", "free"};
     }},
    {"RunOfAFreeLease", 2, false,
     [](Scene& s) {
       s.chunk(s.large_chunk(), [](ChunkValue& v) { v.owner = 500; });
       return Texts{named("chunk", s.large_chunk()), "lease 500", "free"};
     }},
    {"BackedByNobody", 2, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.state = ChunkState::kBacking, v.owner = kNobody; });
       return Texts{named("chunk", s.idle), "backing", "nobody"};
     }},
    {"HoleWithPages", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.state = ChunkState::kHole; });
       return Texts{named("chunk", s.idle), "hole"};
     }},
    {"IdleWithAHead", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.head = 3; });
       return Texts{named("chunk", s.idle), "head 3"};
     }},
    {"IdleWithoutPages", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.committed = 0; });
       return Texts{named("chunk", s.idle), "idle"};
     }},
    {"SmallWithoutAllPages", 1, false,
     [](Scene& s) {
       s.chunk(s.small_chunk(), [](ChunkValue& v) { v.committed = 100; });
       return Texts{named("chunk", s.small_chunk()), "100 pages"};
     }},
    {"TrimmingWithAGeneration", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.state = ChunkState::kTrimming, v.owner = 0, v.generation = 4; });
       return Texts{named("chunk", s.idle), "trimming", "generation 4"};
     }},
    {"ChunkState", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.state = static_cast<ChunkState>(9); });
       return Texts{named("chunk", s.idle), "state 9"};
     }},
    {"BackingAtRest", 6, true,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.state = ChunkState::kBacking, v.owner = 0; });
       return Texts{named("chunk", s.idle), "backing"};
     }},
    {"TakingAtRest", 6, true,
     [](Scene& s) {
       s.chunk(s.small_chunk(), [](ChunkValue& v) { v.state = ChunkState::kTaking, v.owner = 1; });
       return Texts{named("chunk", s.small_chunk()), "taking"};
     }},
    {"TrimmingAtRest", 6, true,
     [](Scene& s) {
       s.chunk(s.idle, [](ChunkValue& v) { v.state = ChunkState::kTrimming, v.owner = 0; });
       return Texts{named("chunk", s.idle), "trimming"};
     }},
    {"HeadBehindItsRun", 1, false,
     [](Scene& s) {
       s.chunk(s.large_chunk(), [](ChunkValue& v) { v.head = ~0u; });
       return Texts{named("chunk", s.large_chunk()), "head"};
     }},
    {"ForgottenRun", 1, false,
     [](Scene& s) {
       s.chunk(s.idle, [&](ChunkValue& v) {
         v.state = ChunkState::kRun, v.owner = kNobody, v.head = s.idle, v.generation = 1;
       });
       return Texts{named("chunk", s.idle), "expected a live block", named("block", s.idle * kPagesPerChunk)};
     }},
    {"ForgottenRunOfTheLiving", 1, true,
     [](Scene& s) {
       s.chunk(s.idle,
               [&](ChunkValue& v) { v.state = ChunkState::kRun, v.owner = 0, v.head = s.idle, v.generation = 2; });
       return Texts{named("chunk", s.idle), "expected a live block", named("block", s.idle * kPagesPerChunk)};
     }},
    {"RunLongerThanItsBlock", 1, false,
     [](Scene& s) {
       s.arena().block(s.large).granules = 3 << 10;
       s.chunk(s.large_chunk() + 2, [](ChunkValue& v) { v.owner = kNobody; });
       return Texts{named("chunk", s.large_chunk() + 2), named("block", s.large), "behind the end"};
     }},
    {"RunLongerThanItsBlockAtRest", 1, true,
     [](Scene& s) {
       s.arena().block(s.large).granules = 3 << 10;
       return Texts{named("chunk", s.large_chunk() + 2), named("block", s.large), "behind the end"};
     }},
    {"RunOfAnotherGeneration", 9, false,
     [](Scene& s) {
       s.chunk(s.large_chunk() + 1, [](ChunkValue& v) { v.generation = 77; });
       return Texts{named("chunk", s.large_chunk() + 1), named("block", s.large), "generation 77"};
     }},
    {"RunOfNobodyOfAnotherGeneration", 9, false,
     [](Scene& s) {
       s.chunk(s.large_chunk() + 1, [](ChunkValue& v) { v.generation = 77, v.owner = kNobody; });
       return Texts{named("chunk", s.large_chunk() + 1), "expected a live block of that generation"};
     }},
    {"MoreThanTheLimit", 1, true, [](Scene& s) { return s.header().limit = 1 << 20, Texts{"limit of 1048576"}; }},
    // Blocks: words.
    {"LiveWithoutACount", 3, false,
     [](Scene& s) {
       s.block(s.large, [](BlockValue& v) { v.count = 0; });
       return Texts{named("block", s.large), "count 0, live"};
     }},
    {"FreeWithACount", 3, false,
     [](Scene& s) {
       s.block(s.hole * kPagesPerChunk, [](BlockValue& v) { v.count = 2; });
       return Texts{named("block", s.hole * kPagesPerChunk), "count 2, free"};
     }},
    {"BlockState", 3, false,
     [](Scene& s) {
       Pair word = s.arena().block(s.large).value.load();
       word.hi |= 6;
       return Scene::set(s.arena().block(s.large).value, word), Texts{named("block", s.large), "state 7"};
     }},
    {"NoGeneration", 9, false,
     [](Scene& s) {
       s.block(s.small, [](BlockValue& v) { v.generation = 0; });
       return Texts{named("block", s.small), "generation 0"};
     }},
    {"CountTooHigh", 3, false,
     [](Scene& s) {
       s.block(s.second, [](BlockValue& v) { ++v.count; });
       return Texts{named("block", s.second), "1 ledger bits of leases 0 and 0 tickets", "no intent"};
     }},
    {"CountTooLow", 3, false,
     [](Scene& s) {
       s.block(s.small, [](BlockValue& v) { --v.count; });
       return Texts{named("block", s.small), "1 ledger bits of leases 0 and 1 tickets", "no more than the count"};
     }},
    {"CountTooLowUnderAnIntent", 3, false,
     [](Scene& s) {
       s.lease(1).intent = uint64_t{5} << 32 | s.small;
       s.block(s.small, [](BlockValue& v) { --v.count; });
       return Texts{named("block", s.small), "no more than the count"};
     }},
    {"CountTooLowForManyHolders", 3, false,
     [](Scene& s) {
       for (uint32_t slot = 1; slot < 6; ++slot) s.hold(slot, s.small);
       return Texts{named("block", s.small), "6 ledger bits of leases 0, 1, 2, 3, ... and 1 tickets"};
     }},
    {"LostHold", 3, false,
     [](Scene& s) {
       return s.drop(0, s.large), Texts{named("block", s.large), "0 ledger bits and 0 tickets"};
     }},
    // Blocks: places.
    {"SmallerThanABlock", 1, false,
     [](Scene& s) {
       s.block(s.second, [](BlockValue& v) { v.granules = 2; });
       return Texts{named("block", s.second), "4 to 512"};
     }},
    {"LargerThanASmallBlock", 1, false,
     [](Scene& s) {
       s.block(s.second, [](BlockValue& v) { v.granules = 600; });
       return Texts{named("block", s.second), "4 to 512"};
     }},
    {"LargeWithAnOffset", 1, false,
     [](Scene& s) {
       s.block(s.large, [](BlockValue& v) { v.first = 1; });
       return Texts{named("block", s.large), "starts with its chunk"};
     }},
    {"OverTheEndOfTheChunk", 1, false,
     [](Scene& s) {
       const uint32_t last = s.small_chunk() * kPagesPerChunk + kPagesPerChunk - 1;
       s.block(last,
               [](BlockValue& v) { v = {.generation = 1, .sequence = 1, .count = 1, .live = true, .granules = 5}; });
       s.hold(0, last);
       return Texts{named("block", last), "end of its chunk"};
     }},
    {"Overlap", 1, false,
     [](Scene& s) {
       s.block(s.small, [](BlockValue& v) { v.granules = 6; });
       return Texts{named("block", s.small), named("block", s.second), "lies in"};
     }},
    {"LiveInAnIdleChunk", 1, false,
     [](Scene& s) {
       s.chunk(s.small_chunk(), [](ChunkValue& v) { v.state = ChunkState::kIdle; });
       return Texts{named("block", s.small), named("chunk", s.small_chunk()), "idle"};
     }},
    {"SmallInsideALargeOne", 1, false,
     [](Scene& s) {
       const uint32_t inside = s.large + kPagesPerChunk + 7;
       s.block(inside,
               [](BlockValue& v) { v = {.generation = 1, .sequence = 1, .count = 1, .live = true, .granules = 5}; });
       s.hold(0, inside);
       return Texts{named("block", inside), named("block", s.large), "lies in"};
     }},
    {"LargeInsideAChunk", 1, false,
     [](Scene& s) {
       const uint32_t inside = s.idle * kPagesPerChunk + 3;
       s.block(inside, [](BlockValue& v) { v = {.generation = 1, .sequence = 1, .count = 1, .live = true}; });
       s.arena().block(inside).granules = 1024;
       s.hold(0, inside);
       return Texts{named("block", inside), "starts with its chunk"};
     }},
    {"LargeTooShort", 1, false,
     [](Scene& s) {
       return s.arena().block(s.large).granules = 512, Texts{named("block", s.large), "512 granules", "more than"};
     }},
    {"LargeOverTheEndOfTheFile", 1, false,
     [](Scene& s) {
       return s.arena().block(s.large).granules = ~0u, Texts{named("block", s.large), "end of the data file"};
     }},
    {"RunShorterThanItsBlock", 1, false,
     [](Scene& s) {
       return s.arena().block(s.large).granules = 9 << 10,
              Texts{named("block", s.large), named("chunk", s.large_chunk() + 2)};
     }},
    {"ChunkLostFromARun", 1, false,
     [](Scene& s) {
       s.chunk(s.large_chunk() + 1, [](ChunkValue& v) { v.state = ChunkState::kIdle, v.head = 0, v.generation = 0; });
       return Texts{named("block", s.large), named("chunk", s.large_chunk() + 1), "idle"};
     }},
    {"RunWithTooFewPages", 1, false,
     [](Scene& s) {
       s.chunk(s.large_chunk() + 1, [](ChunkValue& v) { v.committed = 511; });
       return Texts{named("block", s.large), named("chunk", s.large_chunk() + 1), "511 pages"};
     }},
    // The ledger and tickets.
    {"HoldOfAFreeBlock", 3, false,
     [](Scene& s) {
       return s.hold(0, s.small + 100), Texts{"lease 0 ", named("block", s.small + 100), "hold of a free one"};
     }},
    {"HoldOfAFreeLease", 2, false,
     [](Scene& s) {
       return s.hold(9, s.small), Texts{"lease 9 ", "block " + std::to_string(s.small), "free lease"};
     }},
    {"HoldAboveLedgerEnd", 2, false,
     [](Scene& s) {
       return s.lease().ledger_end = s.large / 64, Texts{"lease 0 ", "block " + std::to_string(s.large), "ledger_end"};
     }},
    {"TicketForAFreeBlock", 3, false,
     [](Scene& s) {
       s.out([&](TicketValue& v) { v.block = s.small + 100; });
       return Texts{named("ticket", s.ticket), named("block", s.small + 100), "free block"};
     }},
    {"TicketForNoBlock", 3, false,
     [](Scene& s) {
       s.out([&](TicketValue& v) { v.block = ~0u; });
       return Texts{named("ticket", s.ticket), "no such block"};
     }},
    {"TicketOfNoSlot", 2, false,
     [](Scene& s) {
       s.out([&](TicketValue& v) { v.sender |= 0xfff; });
       return Texts{named("ticket", s.ticket), "sender"};
     }},
    {"TicketOfSlotNone", 2, false,
     [](Scene& s) {
       s.out([&](TicketValue& v) { v.sender = 1 << 12; });
       return Texts{named("ticket", s.ticket), "sender"};
     }},
    {"TicketOfNoIncarnation", 2, false,
     [](Scene& s) {
       s.out([&](TicketValue& v) { v.sender = 1; });
       return Texts{named("ticket", s.ticket), "sender"};
     }},
    {"TicketOfAFutureSender", 2, false,
     [](Scene& s) {
       s.out([&](TicketValue& v) { v.sender = TicketValue::sender_of(0, 50); });
       return Texts{named("ticket", s.ticket), "sender"};
     }},
    {"TicketsUsedTooLow", 3, false,
     [](Scene& s) {
       return s.header().tickets_used = 0, Texts{named("ticket", s.ticket), "tickets_used 0"};
     }},
    // Memory.
    {"NoMemoryUnderASmallBlock", 1, false,
     [](Scene& s) {
       return s.punch(s.small + 1),
              Texts{named("chunk", s.small_chunk()), "block " + std::to_string(s.small + 1) + ")"};
     }},
    {"NoMemoryUnderALargeBlock", 1, false,
     [](Scene& s) {
       return s.punch(s.large + 1000), Texts{named("chunk", s.large_chunk() + 1), "page 488"};
     }},
    {"NoMemoryInAnIdleChunk", 1, false,
     [](Scene& s) {
       return s.punch(s.idle * kPagesPerChunk + 511), Texts{named("chunk", s.idle), "page 511"};
     }},
    {"MemoryInAHole", 1, true,
     [](Scene& s) {
       s.arena().data()[s.hole * kChunk + 5000] = std::byte{1};
       return Texts{named("chunk", s.hole), "has memory"};
     }},
    {"MemoryFarBehind", 1, true,
     [](Scene& s) {
       s.arena().data()[(s.hole + 20) * kChunk + 5000] = std::byte{1};
       return Texts{named("chunk", s.hole + 20), "has memory"};
     }},
};

class DamagedPool : public testing::TestWithParam<Damage> {};

void PrintTo(const Damage& damage, std::ostream* out) { *out << damage.name; }

TEST_P(DamagedPool, IsFoundAndNamed) {
  Scene scene;
  ASSERT_EQ(pool::check(scene.arena(), kAtRest).first(), "");
  const Texts texts = GetParam().cause(scene);
  const CheckReport report = pool::check(scene.arena(), {.at_rest = GetParam().at_rest});
  ASSERT_FALSE(report.ok());
  EXPECT_NE(report.first().find("invariant "), std::string::npos);
  bool found = false;
  for (const pool::Violation& v : report.violations) {
    bool all = v.invariant == GetParam().invariant;
    for (const std::string& text : texts) all = all && v.what.find(text) != std::string::npos;
    found = found || all;
  }
  std::string seen;
  for (const pool::Violation& v : report.violations) seen += std::to_string(v.invariant) + ": " + v.what + "\n";
  EXPECT_TRUE(found) << "expected invariant " << GetParam().invariant << " with '" << testing::PrintToString(texts)
                     << "', found\n"
                     << seen;
  // What is wrong at rest only is no violation while members may be at work.
  if (GetParam().at_rest) {
    EXPECT_EQ(pool::check(scene.arena()).first(), "");
  }
}

INSTANTIATE_TEST_SUITE_P(Checker, DamagedPool, testing::ValuesIn(kDamages),
                         [](const auto& info) { return std::string(info.param.name); });

// ---- garbage

uint64_t scrambled(uint64_t i) {
  i = (i + 1) * 0x9e3779b97f4a7c15;
  i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9;
  return i ^ i >> 29;
}

uint64_t (*const kGarbage[])(uint64_t) = {[](uint64_t) { return uint64_t{0}; }, [](uint64_t) { return ~uint64_t{0}; },
                                          scrambled,
                                          // Sparse, so that more than the header is looked at.
                                          [](uint64_t i) { return scrambled(i) % 65536 == 0 ? scrambled(~i) : 0; }};

class Garbage : public testing::TestWithParam<size_t> {};

TEST_P(Garbage, EndsInAReport) {
  const tests::Watchdog watchdog(60);
  auto member = fresh_pool(uint64_t{32} << 20);
  auto other = join(*member);  // a copy of what is in the header stays with the arena, so the rest is looked at as well
  const auto size = pool::Offsets::of(member->arena().chunks()).total;
  auto* words = reinterpret_cast<uint64_t*>(&member->arena().header());
  for (uint64_t i = 0; i < size / 8; ++i) words[i] = kGarbage[GetParam()](i);
  for (const bool at_rest : {false, true}) {
    const CheckReport report = pool::check(other->arena(), {.at_rest = at_rest});
    EXPECT_FALSE(report.ok());
    EXPECT_LT(report.violations.size(), 1000u);
  }
  auto opened = Arena::inspect(os::duplicate(member->arena().data_fd()).take(),
                               os::duplicate(member->arena().control_fd()).take());
  EXPECT_FALSE(opened.ok());
}

INSTANTIATE_TEST_SUITE_P(Checker, Garbage, testing::Range(size_t{0}, std::size(kGarbage)));

class GarbageTable : public testing::TestWithParam<int> {};

TEST_P(GarbageTable, EndsInAReport) {
  const tests::Watchdog watchdog(60);
  Scene scene;
  const pool::Offsets o = pool::Offsets::of(scene.arena().chunks());
  const uint64_t edges[] = {o.leases, o.chunks, o.tickets, o.blocks, o.ledgers, o.total};
  auto* bytes = reinterpret_cast<std::byte*>(&scene.header());
  for (uint64_t at = edges[GetParam()]; at < edges[GetParam() + 1]; at += 8) {
    const uint64_t word = scrambled(at);
    std::memcpy(bytes + at, &word, 8);
  }
  EXPECT_FALSE(pool::check(scene.arena()).ok());
  EXPECT_FALSE(pool::check(scene.arena(), kAtRest).ok());
}

INSTANTIATE_TEST_SUITE_P(Checker, GarbageTable, testing::Range(0, 5));

// ---- sound pools

TEST(Checker, FindsNothingInASoundPoolAtRest) {
  auto member = fresh_pool();
  EXPECT_EQ(pool::check(member->arena(), kAtRest).first(), "");
  auto small = member->allocate(5000, false);
  auto large = member->allocate(5 << 20, true);
  ASSERT_TRUE(small.ok() && large.ok());
  auto handle = member->issue(small->block);
  ASSERT_TRUE(handle.ok());
  const CheckReport busy = pool::check(member->arena(), kAtRest);
  EXPECT_EQ(busy.first(), "");
  EXPECT_EQ(busy.blocks, 2u);
  EXPECT_EQ(busy.leases, 1u);
  EXPECT_EQ(busy.tickets, 1u);
  member->release(small->block, Mode::kReadWrite);
  member->release(large->block, Mode::kReadWrite);
  (void)member->trim(0);
  EXPECT_EQ(pool::check(member->arena(), kAtRest).first(), "");
}

TEST(Checker, FindsNothingWhereAHoldIsKeptForAName) {
  Scene scene;
  auto handle = scene.member->issue(scene.large);
  ASSERT_TRUE(handle.ok());
  ASSERT_TRUE(scene.member->keep(*handle));
  EXPECT_EQ(pool::check(scene.arena(), kAtRest).first(), "");
  scene.member->release(scene.large, Mode::kReadWrite);  // held by the name alone
  EXPECT_EQ(pool::check(scene.arena(), kAtRest).first(), "");
}

TEST(Checker, FindsNothingAfterMoreJoinersThanASenderCanTell) {
  Scene scene;
  scene.header().next_incarnation = 5000;
  EXPECT_EQ(pool::check(scene.arena(), kAtRest).first(), "");
}

TEST(Checker, FindsNothingWhereAnIntentStillReleasesARunOfTheDead) {
  Scene scene;
  scene.chunk(scene.idle, [&](ChunkValue& v) {
    v.state = ChunkState::kRun, v.owner = kNobody, v.head = scene.idle, v.generation = 1;
  });
  EXPECT_FALSE(pool::check(scene.arena()).ok());
  scene.lease(1).intent = uint64_t{5} << 32 | scene.idle * kPagesPerChunk;
  EXPECT_EQ(pool::check(scene.arena()).first(), "");
}

// The two files of a pool as plain files, as somebody copies them away to look at them later.
os::Fd copy_of(int file, const std::byte* bytes, uint64_t size) {
  os::Fd copy(::open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  EXPECT_EQ(::ftruncate(copy.get(), static_cast<off_t>(size)), 0);
  for (os::Range r = os::next_data(file, 0, size); bytes != nullptr && r.begin < r.end;
       r = os::next_data(file, r.end, size)) {
    EXPECT_EQ(::pwrite(copy.get(), bytes + r.begin, r.end - r.begin, static_cast<off_t>(r.begin)),
              static_cast<ssize_t>(r.end - r.begin));
  }
  return copy;
}

TEST(Checker, OfACopyAsksNeitherForItsPagesNorForItsProcesses) {
  Scene scene;
  const Arena& arena = scene.arena();
  const auto* control = reinterpret_cast<const std::byte*>(&scene.header());
  const uint64_t control_size = pool::Offsets::of(arena.chunks()).total, data_size = uint64_t{arena.chunks()} * kChunk;
  auto copies =
      Arena::inspect(copy_of(arena.data_fd(), nullptr, data_size), copy_of(arena.control_fd(), control, control_size));
  ASSERT_TRUE(copies.ok()) << copies.status().what();
  EXPECT_TRUE(copies->is_copy());
  EXPECT_EQ(pool::check(*copies, kAtRest).first(), "");
  auto half = Arena::inspect(copy_of(arena.data_fd(), nullptr, data_size), os::duplicate(arena.control_fd()).take());
  ASSERT_TRUE(half.ok()) << half.status().what();
  EXPECT_TRUE(half->is_copy());
}

TEST(Checker, IsToldWhyThereIsNothingToLookAt) {
  Scene scene;
  const Arena& arena = scene.arena();
  const auto duplicate = [](int fd) { return os::duplicate(fd).take(); };
  EXPECT_EQ(Arena::inspect(duplicate(arena.data_fd()), os::Fd()).code(), Code::kSystem);
  EXPECT_EQ(Arena::inspect(os::Fd(), duplicate(arena.control_fd())).code(), Code::kSystem);
  EXPECT_EQ(Arena::inspect(duplicate(arena.data_fd()), copy_of(-1, nullptr, 100)).code(), Code::kInvalid);
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  os::Fd data = duplicate(arena.data_fd()), control = duplicate(arena.control_fd());
  failpoint::arm({failpoint::Action::kFail, 1, true, ENOMEM, "os.map_file"});
  EXPECT_FALSE(Arena::inspect(std::move(data), std::move(control)).ok());
  failpoint::disarm();
#endif
}

TEST(Checker, NeedsNoMembershipAndWritesNothing) {
  Scene scene;
  const auto blocks = [](int fd) {
    struct stat st {};
    return ::fstat(fd, &st) == 0 ? st.st_blocks : -1;
  };
  auto opened =
      Arena::inspect(os::duplicate(scene.arena().data_fd()).take(), os::duplicate(scene.arena().control_fd()).take());
  ASSERT_TRUE(opened.ok()) << opened.status().what();
  const auto data = blocks(opened->data_fd()), control = blocks(opened->control_fd());
  const CheckReport report = pool::check(*opened, kAtRest);
  EXPECT_EQ(report.first(), "");
  EXPECT_EQ(report.leases, 2u);  // its own is none
  EXPECT_FALSE(opened->is_copy());
  EXPECT_EQ(blocks(opened->data_fd()), data);
  EXPECT_EQ(blocks(opened->control_fd()), control);
}

TEST(Checker, ALoweredLimitIsNoDamageWhenTold) {
  Scene scene;
  scene.header().limit = 1 << 20;
  EXPECT_EQ(pool::check(scene.arena(), {.at_rest = true, .limit = false}).first(), "");
}

// Everything that a member does, until it is killed.
class Hammer {
 public:
  Hammer(Member& survivor, const int* pipe, uint64_t seed)
      : member_(*pool::adopt(join(survivor))), pipe_(pipe), random_(seed) {}

  bool run() {
    for (;;) {
      ::alarm(30);
      if (random_() % 30 == 0) end_up_midway(random_, 60);
      step();
    }
  }

 private:
  void step() {
    const uint64_t what = random_() % 200;
    if (what < 70 && held_.size() < 40) {
      auto view = member_.allocate((uint64_t{64} << (random_() % 17)) + random_() % 4096, random_() % 4 == 0);
      if (view) held_.push_back(view->block);
    } else if (what < 130) {
      if (held_.empty()) return;
      const size_t i = random_() % held_.size();
      member_.release(held_[i], Mode::kReadWrite);
      held_[i] = held_.back();
      held_.pop_back();
    } else if (what < 160) {
      if (held_.empty()) return;
      if (auto handle = member_.issue(held_[random_() % held_.size()]); handle.ok())
        (void)!::write(pipe_[1], &*handle, sizeof(Handle));
    } else if (what < 190) {
      Handle handle;
      if (held_.size() >= 40 || ::read(pipe_[0], &handle, sizeof handle) != sizeof handle) return;
      if (auto view = member_.redeem(handle, Mode::kReadWrite); view.ok()) held_.push_back(view->block);
    } else if (what < 192) {
      (void)member_.trim(random_() % 2 == 0 ? 0 : uint64_t{4} << 20);
    } else if (what < 194) {
      (void)member_.reap();
    } else if (what == 199) {
      failpoint::disarm();  // nobody would wake the child
      const pid_t pid = ::fork();
      if (pid == 0) {
        for (int i = 0; i < 30; ++i) {
          if (random_() % 200 != 199) step();
          if (random_() % 40 == 0) ::raise(SIGKILL);
        }
        ::_exit(0);
      }
      (void)wait_for(pid);
    }
  }

  Member& member_;
  const int* pipe_;
  std::mt19937_64 random_;
  std::vector<uint32_t> held_;
};

TEST(Checker, RaisesNoFalseAlarmOverMembersAtWork) {
  const SoakSettings settings;
  const tests::Watchdog watchdog(static_cast<unsigned>(settings.seconds) + 90);
  auto member = fresh_pool(uint64_t{48} << 20);
  int pipe[2];
  ASSERT_EQ(::pipe2(pipe, O_NONBLOCK), 0);
  CrowdAtWork crowd(settings.seed, [&](uint64_t seed) { return Hammer(*member, pipe, seed).run(); });
  ASSERT_EQ(crowd.run(settings.seconds, [&] { return pool::check(member->arena()).first(); }), "");
  // Forked children of the killed are nobody's to wait for.
  for (int i = 0; i < 600 && member->stats().leases.size() > 1; ++i) ::usleep(10000);
  const CheckReport report = pool::check(member->arena(), kAtRest);
  EXPECT_EQ(report.first(), "");
  EXPECT_EQ(report.leases, 1u);
}

}  // namespace
}  // namespace torchshm::tests
