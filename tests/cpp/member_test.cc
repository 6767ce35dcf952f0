// A member's operations where something stands in the way: limits, damage, and others in between.
#include "pool/member.h"

#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernel.h"
#include "member_parts.h"
#include "parts.h"
#include "pool/members.h"

namespace torchshm {
namespace {

using pool::Arena;
using pool::ChunkState;
using pool::Handle;
using pool::kChunk;
using pool::kMaxLeases;
using pool::kPagesPerChunk;
using pool::Member;
using pool::Mode;
using tests::Between;
using tests::Failing;
using tests::fresh_pool;
using tests::join;
using tests::succeeds;
using tests::take_all_slots;

constexpr uint64_t kMib = uint64_t{1} << 20;

// ---- making one

TEST(Member, IsRefusedWithTheReason) {
  EXPECT_EQ(Member::attach(os::Fd(), os::Fd()).code(), Code::kInvalid);
  auto member = fresh_pool();
  take_all_slots(member->arena());
  auto other = Member::attach(os::duplicate(member->arena().data_fd()).take(),
                              os::duplicate(member->arena().control_fd()).take());
  EXPECT_EQ(other.code(), Code::kNoSlot);
  EXPECT_NE(other.status().what().find("leases"), std::string::npos);
  const tests::Limited files(RLIMIT_NOFILE, 0);
  EXPECT_FALSE(Member::create(1, {}).ok());
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Member, IsRefusedWhenAnyMappingOrLockOfItsOwnFails) {
  auto member = fresh_pool();
  for (const char* call : {"os.mmap", "os.reopen", "os.lock"}) {
    for (uint64_t at = 1; at <= 10; ++at) {
      os::Fd data = os::duplicate(member->arena().data_fd()).take(),
             control = os::duplicate(member->arena().control_fd()).take();
      const Failing failing(call, ENOLCK, at);
      auto other = Member::attach(std::move(data), std::move(control));
      EXPECT_TRUE(!other.ok() || failpoint::reached() < at) << call << at;
    }
  }
}

#endif

TEST(Members, AreFoundByPoolAndAddressUpToSixteen) {
  std::vector<Member*> adopted;
  for (int i = 0; i < 16; ++i) {
    adopted.push_back(pool::adopt(fresh_pool(16 * kMib)));
    ASSERT_NE(adopted.back(), nullptr);
  }
  EXPECT_EQ(pool::adopt(fresh_pool(16 * kMib)), nullptr);
  for (Member* member : adopted) {
    auto block = member->allocate(5000, false);
    ASSERT_TRUE(block.ok());
    EXPECT_EQ(pool::find_pool(member->pool_id()), member);
    EXPECT_EQ(pool::find_address(block->data + 10), member);
  }
  EXPECT_EQ(pool::find_pool(0), nullptr);
  EXPECT_EQ(pool::find_address(&adopted), nullptr);
  EXPECT_TRUE(succeeds([&] { return adopted[3]->stats().blocks == 1 && adopted[15]->allocate(5000, false).ok(); }));
}

TEST(Member, BesideAnotherIsALeaseOfTheSamePool) {
  auto member = fresh_pool();
  auto second = Member::beside(*member);
  ASSERT_TRUE(second.ok()) << second.status().what();
  EXPECT_NE((*second)->identity(), member->identity());
  auto block = member->allocate(5000, false);
  EXPECT_EQ((*second)->redeem(*member->issue(block->block), Mode::kReadWrite)->data, block->data);
  const auto signatures = pool::signatures(member->arena());
  ASSERT_EQ(signatures.size(), 2U);
  EXPECT_EQ(signatures[1].pid, static_cast<uint32_t>(::getpid()));
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  const Failing failing("os.duplicate", EMFILE);
  EXPECT_EQ(Member::beside(*member).status().error(), EMFILE);
#endif
}

TEST(Member, IsGoneWhenItsProcessIsOrItsLeaseHasAnother) {
  auto member = fresh_pool();
  auto other = join(*member);
  const uint64_t identity = other->identity();
  EXPECT_FALSE(member->gone(identity));
  EXPECT_TRUE(member->gone(identity + (1 << 12)));  // an incarnation that never was
  EXPECT_TRUE(member->gone(kMaxLeases));            // no such lease
  other->membership().abandon(member->arena());
  EXPECT_TRUE(member->gone(identity));
  EXPECT_EQ(pool::signatures(member->arena()).size(), 2U);
  (void)member->reap();
  EXPECT_EQ(pool::signatures(member->arena()).size(), 1U);
  EXPECT_TRUE(member->gone(identity));
}

// ---- allocate

TEST(Allocate, WhatCanNeverFitIsFull) {
  auto member = fresh_pool(64 * kMib);
  EXPECT_EQ(member->allocate(uint64_t{1} << 40, false).code(), Code::kFull);
  EXPECT_EQ(member->allocate(UINT64_MAX, false).code(), Code::kFull);
  EXPECT_EQ(member->allocate(100 * kMib, false).code(), Code::kFull);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they have not so much address space
  if (!tests::under_valgrind()) {
    auto large = Member::create(1, {uint64_t{2} << 40, 0});
    ASSERT_TRUE(large.ok()) << large.status().what();
    EXPECT_EQ((*large)->allocate(uint64_t{5} << 40, false).code(), Code::kFull);
  }
#endif
  auto nothing = member->allocate(0, false);
  ASSERT_TRUE(nothing.ok());
  EXPECT_EQ(nothing->length, 4096U);
}

TEST(Allocate, SmallBlocksOfAFullPoolAreRefusedAndComeBack) {
  auto member = fresh_pool(8 * kMib);
  std::vector<uint32_t> blocks;
  for (;;) {
    auto block = member->allocate(100000, false);
    if (!block) {
      EXPECT_EQ(block.code(), Code::kFull);
      break;
    }
    blocks.push_back(block->block);
  }
  EXPECT_GT(blocks.size(), 70U);
  for (const uint32_t block : blocks) member->release(block, Mode::kReadWrite);
  EXPECT_TRUE(member->allocate(7 * kMib, false).ok());
}

TEST(Allocate, ManyEmptyChunksOfSmallBlocksAreGivenUp) {
  auto member = fresh_pool(128 * kMib);
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 80; ++i) blocks.push_back(member->allocate(500000, false)->block);
  for (const uint32_t block : blocks) member->release(block, Mode::kReadWrite);
  EXPECT_GT(member->stats().warm, 20 * kMib);
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Allocate, ABlockInTheMakingIsReleasedOnce) {
  auto member = fresh_pool();
  auto made = member->allocate(5000, false, true), other = member->allocate(5000, false);
  member->release_made(made->block);
  EXPECT_EQ(member->stats().blocks, 1U);
  member->release_made(other->block);  // it was not in the making: released all the same
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Allocate, WhatOthersFreedIsFoundByHintAndWhenHintsWereLost) {
  auto owner = fresh_pool(32 * kMib);
  auto other = join(*owner);
  const auto fill_and_hand_over = [&] {
    std::vector<Handle> handles;
    for (;;) {
      auto block = owner->allocate(4096, false);
      if (!block) break;
      handles.push_back(*owner->issue(block->block));
      owner->release(block->block, Mode::kReadWrite);
    }
    return handles;
  };
  owner->set_ticket_age(1000000);
  auto handles = fill_and_hand_over();
  ASSERT_GT(handles.size(), 5000U);  // more than the ring of hints has
  for (const Handle& handle : handles) {
    auto view = other->redeem(handle, Mode::kReadWrite);
    ASSERT_TRUE(view.ok());
    other->release(view->block, Mode::kReadWrite);
  }
  EXPECT_EQ(owner->stats().blocks, 0U);
  EXPECT_EQ(fill_and_hand_over().size(), handles.size());
}

TEST(Allocate, WhatOthersFreedIsUsedBeforeThePoolGrowsAlsoWhenHintsWereLost) {
  auto owner = fresh_pool(256 * kMib);
  auto other = join(*owner);
  std::vector<Handle> handles;
  const auto take = [&] {
    for (int i = 0; i < 5000; ++i) {  // more than the ring of hints has
      auto block = owner->allocate(4096, false);
      ASSERT_TRUE(block.ok());
      handles.push_back(*owner->issue(block->block));
      owner->release(block->block, Mode::kReadWrite);
    }
  };
  take();
  const uint64_t grown = owner->stats().committed;
  // In an order that leaves free pages in every chunk, but no chunk empty.
  for (size_t i = 0; i < handles.size(); ++i) {
    if (i % 512 == 0) continue;
    auto view = other->redeem(handles[i], Mode::kReadWrite);
    ASSERT_TRUE(view.ok());
    other->release(view->block, Mode::kReadWrite);
  }
  handles.clear();
  take();
  EXPECT_LE(owner->stats().committed, grown + kChunk);
}

TEST(Allocate, AHintThatIsCountedAndNotWrittenYetCostsALook) {
  auto member = fresh_pool(8 * kMib);
  std::vector<uint32_t> blocks;
  for (;;) {
    auto block = member->allocate(500000, false);
    if (!block) break;
    blocks.push_back(block->block);
  }
  auto other = join(*member);
  auto view = other->redeem(*member->issue(blocks[0]), Mode::kReadWrite);
  ASSERT_TRUE(view.ok());
  member->release(blocks[0], Mode::kReadWrite);
  other->release(view->block, Mode::kReadWrite);  // it hints
  pool::Lease& lease = member->arena().lease(member->membership().slot());
  for (auto& hint : lease.hints) hint.store(0);  // as if it slept before it wrote
  EXPECT_TRUE(member->allocate(500000, false).ok());
  lease.hints[lease.hints_end.load() % pool::kHints].store(UINT32_MAX);  // damaged: leads nowhere
  lease.hints_end.fetch_add(1);
  member->release(blocks[1], Mode::kReadWrite);
  EXPECT_TRUE(member->allocate(500000, false).ok());
}

TEST(Allocate, AChunkThatWasLostUnnoticedAndComesBackIsCutAnew) {
  auto member = fresh_pool(64 * kMib);
  std::vector<Member::View> views;
  for (int i = 0; i < 4; ++i) views.push_back(*member->allocate(512 << 10, false));
  Arena& arena = member->arena();
  const uint32_t chunk = views[0].block / kPagesPerChunk;
  for (const auto& view : views) {  // freed by others, whose hints were lost
    ASSERT_EQ(view.block / kPagesPerChunk, chunk);
    pool::BlockValue value = pool::BlockValue::of(arena.block(view.block).value.load());
    value.live = false;
    value.count = 0;
    tests::set_block(arena, view.block, value);
    arena.ledger(member->membership().slot(), view.block / 64).store(0);
  }
  tests::set_chunk(arena, chunk, {ChunkState::kIdle, 9, kPagesPerChunk, 0, 0});  // and taken, as empty, by another
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 4; ++i) blocks.push_back(member->allocate(512 << 10, false)->block);
  std::sort(blocks.begin(), blocks.end());
  EXPECT_EQ(std::adjacent_find(blocks.begin(), blocks.end()), blocks.end());
  EXPECT_EQ(blocks[0] / kPagesPerChunk, chunk);
  EXPECT_EQ(blocks[3] / kPagesPerChunk, chunk);
}

TEST(Allocate, AFullPoolWaitsALittleForWhatIsJustGivenBack) {
  auto member = fresh_pool(8 * kMib);
  auto other = join(*member);
  auto block = other->allocate(6 * kMib, false);
  tests::set_chunk(member->arena(), 20, {ChunkState::kTrimming, other->membership().slot(), 0, 0, 0});
  member->arena().header().chunks_used.store(21);
  EXPECT_EQ(member->allocate(6 * kMib, false).code(), Code::kFull);
  other->release(block->block, Mode::kReadWrite);
  EXPECT_TRUE(member->allocate(6 * kMib, false).ok());
}

TEST(Allocate, ACorruptDescriptorIsAnErrorAndNoPointer) {
  auto member = fresh_pool(64 * kMib);
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  const Between between("allocate.told", [&] {
    for (uint32_t i = 0; i < member->arena().pages(); ++i) member->arena().block(i).granules.store(0);
  });
  EXPECT_EQ(member->allocate(3 * kMib, false).code(), Code::kCorrupt);
  const Between again("allocate.told", [&] {
    for (uint32_t i = 0; i < member->arena().pages(); ++i) member->arena().block(i).granules.store(0);
  });
  EXPECT_EQ(member->allocate(3 * kMib, false, true).code(), Code::kCorrupt);
#endif
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Allocate, AnErrorOfTheSystemIsSaidAsIs) {
  auto member = fresh_pool(64 * kMib);
  const Failing failing("os.commit", EIO);
  EXPECT_EQ(member->allocate(3 * kMib, false).code(), Code::kSystem);
  EXPECT_EQ(member->allocate(5000, false).code(), Code::kSystem);
}

TEST(Allocate, ARunThatIsTakenAwayBeforeItIsLiveIsClaimedAgain) {
  auto member = fresh_pool(64 * kMib);
  const auto move_on = [&] {  // the head's generation has moved: the run was claimed for another
    for (uint32_t i = 0; i < member->arena().chunks_used(); ++i) {
      pool::ChunkValue chunk = pool::ChunkValue::of(member->arena().chunk(i).value.load());
      if (chunk.state != ChunkState::kRun) continue;
      ++chunk.generation;
      tests::set_chunk(member->arena(), i, chunk);
    }
  };
  {
    const Between between("claim_run.backed", move_on);
    EXPECT_TRUE(member->allocate(3 * kMib, false).ok());
    EXPECT_EQ(Between::passed(), 1);
  }
  const Between each("claim_run.backed", move_on, Between::kEachTime);
  EXPECT_EQ(member->allocate(3 * kMib, false).code(), Code::kFull);
}

TEST(Allocate, AChunkThatIsTakenBetweenTwoStepsIsGivenUpAndMayComeBack) {
  auto member = fresh_pool(64 * kMib);
  auto other = join(*member);
  auto first = member->allocate(5000, false);
  member->release(first->block, Mode::kReadWrite);
  {
    const Between between("allocate.checked", [&] { (void)other->trim(UINT64_MAX); });
    auto second = member->allocate(5000, false);
    ASSERT_TRUE(second.ok());
    EXPECT_EQ(member->stats().blocks, 1U);
    member->release(second->block, Mode::kReadWrite);
  }
  // Taken while it is not looked at, orphaned, and adopted by the one who still has it in its heap.
  const uint32_t chunk = first->block / kPagesPerChunk;
  pool::ChunkValue orphan = pool::ChunkValue::of(member->arena().chunk(chunk).value.load());
  orphan.state = ChunkState::kSmall;
  orphan.owner = pool::kNobody;
  tests::set_chunk(member->arena(), chunk, orphan);
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 12; ++i) {
    auto block = member->allocate(500000, false);
    ASSERT_TRUE(block.ok());
    blocks.push_back(block->block);
  }
  std::sort(blocks.begin(), blocks.end());
  EXPECT_EQ(std::adjacent_find(blocks.begin(), blocks.end()), blocks.end());
}

TEST(Release, OfABlockInATakenChunkLeavesTheChunkToItsTaker) {
  auto member = fresh_pool(64 * kMib);
  auto block = member->allocate(5000, false);
  const uint32_t chunk = block->block / kPagesPerChunk;
  pool::ChunkValue taken = pool::ChunkValue::of(member->arena().chunk(chunk).value.load());
  taken.state = ChunkState::kTaking;
  taken.owner = 9;
  tests::set_chunk(member->arena(), chunk, taken);
  member->release(block->block, Mode::kReadWrite);
  EXPECT_EQ(member->arena().chunk(chunk).value.load(), taken.pair());
  taken.state = ChunkState::kSmall;  // an owner that can't be
  taken.owner = kMaxLeases + 1;
  auto again = member->allocate(5000, false);
  ASSERT_TRUE(again.ok());
  tests::set_chunk(member->arena(), again->block / kPagesPerChunk, taken);
  member->release(again->block, Mode::kReadWrite);
}

#endif

// ---- figures

TEST(Stats, OfManyAndOfDamagedLeasesAreTold) {
  auto member = fresh_pool(64 * kMib);
  std::vector<std::unique_ptr<Member>> members;
  for (int i = 0; i < 6; ++i) {
    members.push_back(join(*member));
    ASSERT_TRUE(members.back()->allocate(static_cast<uint64_t>(i + 1) * kMib, false).ok());
    members.back()->count_fallback();
  }
  auto full = member->allocate(60 * kMib, false);
  ASSERT_EQ(full.code(), Code::kFull);
  const std::string& what = full.status().what();
  size_t holders = 0;
  for (size_t at = what.find("holds"); at != std::string::npos; at = what.find("holds", at + 1)) ++holders;
  EXPECT_EQ(holders, 4U) << what;
  EXPECT_NE(what.find("21.0 MiB live"), std::string::npos) << what;
  const auto stats = member->stats();
  EXPECT_EQ(stats.leases.size(), 7U);
  EXPECT_EQ(stats.leases[3].fallbacks, 1U);
  EXPECT_EQ(stats.leases[3].held_bytes, 3 * kMib);
  pool::Stats huge;
  huge.live = UINT64_MAX;
  EXPECT_NE(pool::summary(huge).find("TiB live"), std::string::npos);
}

TEST(Janitor, GivesBackWhatIsWarmBeyondTheWatermark) {
  auto made = Member::create(1, {128 * kMib, 8 * kMib});
  ASSERT_TRUE(made.ok());
  Member& member = **made;
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 10; ++i) blocks.push_back(member.allocate(6 * kMib, false)->block);
  for (const uint32_t block : blocks) member.release(block, Mode::kReadWrite);
  for (int i = 0; i < 1000 && member.stats().warm > 8 * kMib; ++i) ::usleep(10000);
  EXPECT_LE(member.stats().warm, 8 * kMib);
}

TEST(Janitor, KeepsWhatIsWarmForAsLongAsItIsTold) {
  auto made = Member::create(1, {128 * kMib, 8 * kMib});
  ASSERT_TRUE(made.ok());
  Member& member = **made;
  const auto fill_and_free = [&] {
    std::vector<uint32_t> blocks;
    for (int i = 0; i < 10; ++i) blocks.push_back(member.allocate(6 * kMib, false)->block);
    for (const uint32_t block : blocks) member.release(block, Mode::kReadWrite);
  };
  member.keep_warm(uint64_t{30} * 1'000'000'000);
  fill_and_free();
  member.look_at_warm();
  ::usleep(200000);
  EXPECT_EQ(member.stats().warm, 60 * kMib);
  // Longer than anybody may say: what a boot before has left.
  member.arena().header().keep_until.store(UINT64_MAX / 2);
  member.look_at_warm();
  for (int i = 0; i < 1000 && member.stats().warm > 8 * kMib; ++i) ::usleep(10000);
  EXPECT_LE(member.stats().warm, 8 * kMib);
  member.keep_warm(0);
  fill_and_free();
  for (int i = 0; i < 1000 && member.stats().warm > 8 * kMib; ++i) ::usleep(10000);
  EXPECT_LE(member.stats().warm, 8 * kMib);
}

TEST(Janitor, IsWaitedForWhenItsPagesAreAllThereIs) {
  static std::atomic<int> passed;
  passed = 0;
  failpoint::Plan slowly;  // armed before the thread is there, and until it has gone
  slowly.only = "trim.claimed";
  slowly.watch = [](const char*, bool) {
    if (passed.fetch_add(1) == 0) ::usleep(200000);
  };
  failpoint::arm(slowly);
  {
    auto made = Member::create(1, {64 * kMib, kMib});
    ASSERT_TRUE(made.ok());
    Member& member = **made;
    auto before = member.allocate(64 * kMib, false);
    ASSERT_TRUE(before.ok());
    member.release(before->block, Mode::kReadWrite);
    while (passed == 0) ::usleep(1000);
    auto block = member.allocate(64 * kMib, false);
    EXPECT_TRUE(block.ok()) << block.status().what();
  }
  failpoint::disarm();
}

TEST(Janitor, WithoutThreadsTheChunksStayWarm) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] {
    auto made = Member::create(1, {64 * kMib, kMib});
    if (!made) return false;
    auto block = (*made)->allocate(6 * kMib, false);
    if (!tests::refuse(SYS_clone3, ENOSYS) || !tests::refuse(SYS_clone, EAGAIN)) return false;
    (*made)->release(block->block, Mode::kReadWrite);
    return (*made)->stats().warm == 6 * kMib && (*made)->allocate(6 * kMib, false).ok();
  }));
}

}  // namespace
}  // namespace torchshm
