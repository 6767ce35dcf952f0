// What survives others who write where they should not, and a system that refuses.
#include <csignal>
#include <cstring>
#include <vector>

#include "base/failpoint.h"
#include "os/mapping.h"
#include "processes.h"

namespace torchshm {
namespace {

using pool::BlockValue;
using pool::ChunkState;
using pool::ChunkValue;
using pool::kChunk;
using pool::kPage;
using pool::Member;
using pool::Membership;
using pool::Mode;
using pool::Pair;
using tests::fresh_pool;
using tests::join;

void overwrite(Member& member, uint32_t block, BlockValue value) {
  pool::AtomicPair& word = member.arena().block(block).value;
  Pair before = word.load();
  ASSERT_TRUE(word.exchange_if(before, value.pair()));
}

ChunkValue chunk_of(Member& member, uint32_t chunk) { return ChunkValue::of(member.arena().chunk(chunk).value.load()); }

TEST(Limits, BeyondAllMemoryMakeAPoolOfTheLargestSizeAndNotOfTheSmallest) {
  for (const uint64_t limit : {uint64_t{1} << 62, (uint64_t{1} << 62) + kChunk, ~uint64_t{0}}) {
    pool::Limits limits;
    limits.limit = limit;
    auto arena = pool::Arena::create(1, limits);
    if (!arena) {
      EXPECT_EQ(arena.code(), Code::kUnsupported) << arena.status().what();  // no address space for it here
      continue;
    }
    EXPECT_EQ(arena->header().data_size, uint64_t{8} << 40);
  }
}

TEST(Corrupt, AFreedBlockWhoseLengthWasChangedIsNotPlacedAcrossTheEndOfItsChunk) {
  auto member = fresh_pool(uint64_t{8} << 20);
  std::vector<Member::View> views;
  uint32_t last = 0;
  for (int i = 0; i < 512; ++i) {
    views.push_back(*member->allocate(4096, true));
    last = std::max(last, views.back().block);
  }
  ASSERT_EQ(last % 512, 511U);
  BlockValue value = BlockValue::of(member->arena().block(last).value.load());
  value.granules = 60;
  overwrite(*member, last, value);
  member->release(last, Mode::kReadWrite);
  auto next = member->allocate(uint64_t{60} << 10, false);
  ASSERT_TRUE(next.ok());
  const auto offset = static_cast<uint64_t>(next->data - member->arena().data());
  EXPECT_EQ(offset / kChunk, (offset + next->length - 1) / kChunk);
  EXPECT_NE(next->block, last);
}

TEST(Corrupt, BlocksThatOverlapInAnAdoptedChunkDoNotUpsetItsCount) {
  auto member = fresh_pool(uint64_t{8} << 20);
  std::vector<uint32_t> blocks;
  {
    auto owner = join(*member);
    for (int i = 0; i < 16; ++i) {
      auto block = owner->allocate(4096, true);
      auto handle = owner->issue(block->block);
      ASSERT_TRUE(member->redeem(*handle, Mode::kReadWrite).ok());
      owner->release(block->block, Mode::kReadWrite);
      blocks.push_back(block->block);
    }
    owner->membership().abandon(owner->arena());
  }
  // Together longer than the chunk.
  for (const uint32_t block : blocks) {
    BlockValue value = BlockValue::of(member->arena().block(block).value.load());
    value.granules = 512;
    overwrite(*member, block, value);
  }
  EXPECT_EQ(member->reap(), 1U);
  auto adopting = member->allocate(4096, true);
  ASSERT_TRUE(adopting.ok());
  EXPECT_EQ(adopting->block / 512, blocks[0] / 512);  // there is room behind them
  for (const uint32_t block : blocks) member->release(block, Mode::kReadWrite);
  (void)member->trim(0);
  // The one that lives keeps its chunk.
  EXPECT_EQ(chunk_of(*member, adopting->block / 512).state, ChunkState::kSmall);
}

TEST(Corrupt, ABlockThatIsMadeShorterWhileItIsHandedOutIsAnError) {
  auto member = fresh_pool();
  const pid_t pid = tests::start([&] {
    auto other = join(*member);
    failpoint::arm({failpoint::Action::kStop, 1, false, 0, "allocate.told"});
    auto block = other->allocate(100000, true);
    failpoint::disarm();
    return block.code() == Code::kCorrupt && other->stats().blocks == 0;
  });
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
  ASSERT_TRUE(WIFSTOPPED(status));
  const pool::Arena& arena = member->arena();
  for (uint32_t block = 0; block < 512; ++block) {
    BlockValue value = BlockValue::of(arena.block(block).value.load());
    if (!value.live) continue;
    value.granules = 4;
    overwrite(*member, block, value);
  }
  ::kill(pid, SIGCONT);
  status = tests::wait_for(pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(Refused, ChunksThatTheSystemDoesNotTakeBackStayIdleAndCounted) {
  auto member = fresh_pool();
  member->release(member->allocate(uint64_t{6} << 20, false)->block, Mode::kReadWrite);
  const uint64_t idle = member->arena().header().idle_estimate.load();
  ASSERT_GE(idle, uint64_t{6} << 20);
  failpoint::arm({failpoint::Action::kFail, 1, true, EINVAL, "os.punch"});
  EXPECT_EQ(member->trim(0), 0U);
  failpoint::disarm();
  EXPECT_EQ(member->arena().header().idle_estimate.load(), idle);
  EXPECT_EQ(member->stats().warm, idle);
  EXPECT_EQ(member->trim(0), idle);
}

// Every slot is a dead lease's, and nobody is left to reap. `blocks` of slot 0 are never given back.
std::unique_ptr<Member> last_of_many(const std::vector<uint64_t>& blocks) {
  auto first = fresh_pool();
  pool::Arena& arena = first->arena();
  for (const uint64_t bytes : blocks) EXPECT_TRUE(first->allocate(bytes, false).ok());
  for (uint32_t slot = 1; slot < pool::kMaxLeases; ++slot) {
    auto life = Membership::join(arena);
    EXPECT_TRUE(life.ok()) << slot;
    life->abandon(arena);
  }
  first->membership().abandon(arena);
  return first;
}

TEST(Join, TakesOverADeadLeaseWhenAllAreDead) {
  const auto gone = last_of_many({5000, uint64_t{3} << 20});
  ASSERT_EQ(Membership::join(gone->arena()).code(), Code::kNoSlot);
  auto newcomer = join(*gone);
  ASSERT_NE(newcomer, nullptr);
  const auto stats = newcomer->stats();
  EXPECT_EQ(stats.blocks, 0U);
  ASSERT_EQ(stats.leases.size(), 1U);
  EXPECT_EQ(stats.leases[0].pid, static_cast<uint32_t>(::getpid()));
  EXPECT_TRUE(newcomer->allocate(5000, false).ok());
  EXPECT_EQ(join(*gone)->stats().leases.size(), 2U);
}

TEST(Join, LeavesADeadLeaseAloneWhoseBlockALivingOneIsAtWorkOn) {
  const auto gone = last_of_many({5000});
  pool::Arena& arena = gone->arena();
  uint32_t block = 0;
  while (!BlockValue::of(arena.block(block).value.load()).live) ++block;
  const uint64_t generation = BlockValue::of(arena.block(block).value.load()).generation;
  // Slot 0 died while it dropped the block, and slot 1 sleeps in the same.
  for (const uint32_t slot : {0U, 1U}) {
    arena.lease(slot).intent_generation.store(generation);
    arena.lease(slot).intent.store(uint64_t{5} << 32 | block);
  }
  auto sleeper = Membership::succeed(arena, 1);
  ASSERT_TRUE(sleeper.ok()) << sleeper.status().what();
  ASSERT_EQ(sleeper->slot(), 1U);
  auto newcomer = join(*gone);
  ASSERT_NE(newcomer, nullptr);
  EXPECT_EQ(newcomer->membership().slot(), 2U);
  EXPECT_EQ(newcomer->stats().leases.size(), 3U);  // the dead one stays until the sleeper is done
  EXPECT_EQ(newcomer->stats().blocks, 1U);
  arena.lease(1).intent.store(0);
  EXPECT_EQ(newcomer->stats().leases.size(), 2U);
  EXPECT_EQ(newcomer->stats().blocks, 0U);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Join, FailsWhereTheNextDeadLeaseCanNotBeTakenOver) {
  const auto gone = last_of_many({5000});
  pool::Arena& arena = gone->arena();
  uint32_t block = 0;
  while (!BlockValue::of(arena.block(block).value.load()).live) ++block;
  for (const uint32_t slot : {0U, 1U}) {
    arena.lease(slot).intent_generation.store(BlockValue::of(arena.block(block).value.load()).generation);
    arena.lease(slot).intent.store(uint64_t{5} << 32 | block);
  }
  auto sleeper = Membership::succeed(arena, 1);
  ASSERT_TRUE(sleeper.ok());
  os::Fd data = os::duplicate(arena.data_fd()).take(), control = os::duplicate(arena.control_fd()).take();
  // To join, to succeed slot 0, which can't be settled, and then slot 2.
  failpoint::arm({failpoint::Action::kFail, 3, false, EMFILE, "os.reopen"});
  EXPECT_EQ(Member::attach(std::move(data), std::move(control)).status().error(), EMFILE);
  failpoint::disarm();
}

#endif

TEST(Join, FailsWhenAllLeasesLive) {
  // One open file description for each of them; where that many are not allowed, fewer slots are made to look free.
  auto first = fresh_pool();
  pool::Arena& arena = first->arena();
  for (uint32_t slot = 1; slot < pool::kMaxLeases; ++slot) {
    auto life = Membership::join(arena);
    ASSERT_TRUE(life.ok());
    life->abandon(arena);
    // As another process that has closed its descriptors, and still sees the memory.
    arena.lease(slot).pid.store(static_cast<uint32_t>(::getpid()));
    arena.lease(slot).started.store(arena.lease(0).started.load());
    arena.lease(slot).pid_namespace.store(arena.lease(0).pid_namespace.load());
  }
  auto more = Member::attach(os::duplicate(arena.data_fd()).take(), os::duplicate(arena.control_fd()).take());
  EXPECT_EQ(more.code(), Code::kNoSlot);
}

TEST(Fork, WithTheDescriptorsClosedIsNotSaidToBeForWantOfALease) {
  auto member = fresh_pool();
  ASSERT_TRUE(tests::succeeds([&] {
    auto mine = join(*member);
    ::close(mine->arena().control_fd());
    mine->prepare_fork();
    mine->child_after_fork();  // as in the child
    auto block = mine->allocate(5000, false);
    return block.code() == Code::kNoSlot && block.status().what().find("descriptors") != std::string::npos &&
           block.status().what().find("no lease was left") == std::string::npos;
  }));
}

}  // namespace
}  // namespace torchshm
