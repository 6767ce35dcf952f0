// A member's operations where something stands in the way: limits, damage, and others in between.
#include "pool/member.h"

#include <sched.h>
#include <sys/syscall.h>

#include <cstring>
#include <thread>
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
using pool::kGranule;
using pool::kMaxLeases;
using pool::kPage;
using pool::kPagesPerChunk;
using pool::kTickets;
using pool::Member;
using pool::Mode;
using tests::Between;
using tests::Failing;
using tests::fresh_pool;
using tests::join;
using tests::receive;
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

// ---- hand over

TEST(Redeem, TheSameBlockTwiceIsOneHold) {
  auto member = fresh_pool();
  auto block = member->allocate(5000, false);
  auto handle = member->issue(block->block);
  auto view = member->redeem(*handle, Mode::kRead);
  ASSERT_TRUE(view.ok());
  EXPECT_NE(view->data, block->data);
  Handle stale = *handle;
  stale.generation += 1;
  EXPECT_EQ(member->redeem(stale, Mode::kRead).code(), Code::kStale);
  member->release(block->block, Mode::kRead);
  EXPECT_EQ(member->stats().blocks, 1U);
  member->retain(block->block, Mode::kReadWrite);
  member->release(block->block, Mode::kReadWrite);
  EXPECT_EQ(member->stats().blocks, 1U);
  member->release(block->block, Mode::kReadWrite);
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Redeem, CopyOnWriteNeedsWholePages) {
  auto sender = fresh_pool();
  auto receiver = join(*sender);
  auto odd = sender->allocate(5000, false);
  EXPECT_EQ(sender->view(odd->block, Mode::kCopyOnWrite).code(), Code::kUnsupported);
  auto handle = sender->issue(odd->block);
  EXPECT_EQ(receiver->redeem(*handle, Mode::kCopyOnWrite).code(), Code::kUnsupported);
  EXPECT_EQ(sender->redeem(*handle, Mode::kCopyOnWrite).code(), Code::kUnsupported);  // held here: the hold stays
  EXPECT_EQ(sender->stats().blocks, 1U);
  EXPECT_TRUE(receiver->redeem(*handle, Mode::kReadWrite).ok());  // the ticket was not used up
  auto longer = sender->allocate(7 * kGranule, false);            // starts in the middle of a page
  EXPECT_EQ(sender->view(longer->block, Mode::kCopyOnWrite).code(), Code::kUnsupported);
}

TEST(Redeem, ABlockWhoseDescriptorIsDamagedIsCorrupt) {
  auto sender = fresh_pool();
  auto receiver = join(*sender);
  auto block = sender->allocate(3 * kMib, false);
  auto handle = sender->issue(block->block);
  sender->arena().block(block->block).granules.store(UINT32_MAX);
  EXPECT_EQ(receiver->redeem(*handle, Mode::kReadWrite).code(), Code::kCorrupt);
  EXPECT_EQ(sender->view(block->block, Mode::kRead).code(), Code::kCorrupt);
  EXPECT_FALSE(sender->find(block->data).has_value());
  (void)sender->stats();  // neither of these follows it
  sender->release(block->block, Mode::kReadWrite);
}

TEST(Issue, WithAllTicketsOutIsFull) {
  auto member = fresh_pool();
  auto block = member->allocate(5000, false);
  for (uint32_t i = 0; i < kTickets; ++i) tests::set_ticket(member->arena(), i, {1, 0x001001, 7, 0});
  EXPECT_EQ(member->issue(block->block).code(), Code::kFull);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Redeem, WithoutTheFaceAskedForIsUnsupported) {
  auto sender = fresh_pool();
  for (const uint64_t at : {3, 4}) {  // control, data, read-only, copy-on-write
    std::unique_ptr<Member> receiver;
    {
      os::Fd data = os::duplicate(sender->arena().data_fd()).take(),
             control = os::duplicate(sender->arena().control_fd()).take();
      const Failing failing("os.mmap", ENOMEM, at, false);
      receiver = Member::attach(std::move(data), std::move(control)).take();
    }
    const Mode mode = at == 3 ? Mode::kRead : Mode::kCopyOnWrite;
    auto block = sender->allocate(8192, true);
    auto handle = sender->issue(block->block);
    EXPECT_EQ(receiver->redeem(*handle, mode).code(), Code::kUnsupported);
    auto view = receiver->redeem(*handle, Mode::kReadWrite);
    ASSERT_TRUE(view.ok());
    EXPECT_EQ(receiver->view(view->block, mode).code(), Code::kUnsupported);
  }
}

#endif

TEST(Find, NeverFindsMoreThanIsHeld) {
  auto member = fresh_pool();
  auto first = member->allocate(5 * kGranule, false);   // pages 0 and a part of 1
  auto second = member->allocate(5 * kGranule, false);  // starts in page 1, one granule in
  EXPECT_EQ(member->find(first->data + 5 * kGranule - 1)->block, first->block);
  EXPECT_EQ(member->find(second->data)->block, second->block);
  EXPECT_EQ(member->find(first->data + 4 * kGranule)->block, first->block);  // the page in which the second starts
  member->release(first->block, Mode::kReadWrite);
  EXPECT_FALSE(member->find(first->data).has_value());
  EXPECT_FALSE(member->find(first->data + 4 * kGranule).has_value());
  EXPECT_FALSE(member->find(second->data + 5 * kGranule).has_value());  // behind it
  EXPECT_FALSE(member->find(second->data + kChunk).has_value());
  auto large = member->allocate(3 * kMib, false);
  EXPECT_FALSE(member->find(large->data + 3 * kMib).has_value());  // in its last chunk, behind its end
  auto other = join(*member);
  EXPECT_FALSE(other->find(other->arena().data() + (large->data - member->arena().data())).has_value());
  const uint32_t head = large->block / kPagesPerChunk;
  pool::ChunkValue damaged = pool::ChunkValue::of(member->arena().chunk(head).value.load());
  damaged.head = UINT32_MAX;
  tests::set_chunk(member->arena(), head, damaged);
  EXPECT_EQ(member->find(large->data)->block, large->block);  // what is held decides
  EXPECT_FALSE(member->find(large->data - 1).has_value());
  auto third = join(*member)->allocate(8192, false);  // at the start of a chunk
  auto mine = other->allocate(8192, false);
  pool::BlockValue value = pool::BlockValue::of(member->arena().block(mine->block).value.load());
  value.first = 2;
  tests::set_block(member->arena(), mine->block, value);
  EXPECT_FALSE(other->find(mine->data).has_value());
  value.granules = value.first = 0;
  tests::set_block(member->arena(), second->block, value);
  EXPECT_FALSE(member->find(second->data).has_value());
  (void)third;
}

TEST(Find, TellsWhatCameForThisProcessAlone) {
  auto member = fresh_pool();
  auto mine = member->allocate(8192, true);
  auto came = receive(*member, 8192);
  EXPECT_FALSE(member->find(mine->data)->exclusive);
  EXPECT_TRUE(member->find(came.data)->exclusive);
}

TEST(Modified, IsToldForEachRangeAndRemembered) {
  auto member = fresh_pool();
  auto block = member->allocate(uint64_t{16} * kPage, true);
  std::memset(block->data, 1, block->length);
  auto copy = member->view(block->block, Mode::kCopyOnWrite);
  ASSERT_TRUE(copy.ok());
  const auto found = member->find(copy->data);
  ASSERT_TRUE(found.has_value());
  const auto modified = [&](uint64_t from, uint64_t to) {
    return member->modified(*found, copy->data + from, copy->data + to);
  };
  EXPECT_FALSE(modified(kPage, 4 * kPage));
  EXPECT_FALSE(modified(kPage, 4 * kPage));  // known
  EXPECT_FALSE(modified(2 * kPage, 3 * kPage));
  EXPECT_FALSE(modified(0, 3 * kPage));
  EXPECT_FALSE(modified(0, 5 * kPage));
  copy->data[3 * kPage] = std::byte{2};
  EXPECT_TRUE(modified(0, 5 * kPage));
  EXPECT_TRUE(modified(3 * kPage, 3 * kPage + 1));
  EXPECT_FALSE(modified(4 * kPage, 16 * kPage));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Modified, IsLookedUpEachTimeWhereFaultsAreNotCounted) {
  auto member = fresh_pool();
  auto block = member->allocate(4 * kPage, true);
  auto copy = member->view(block->block, Mode::kCopyOnWrite);
  const auto found = member->find(copy->data);
  const Failing failing("os.getrusage", EPERM);
  EXPECT_FALSE(member->modified(*found, copy->data, copy->data + kPage));
  copy->data[0] = std::byte{2};
  EXPECT_TRUE(member->modified(*found, copy->data, copy->data + kPage));
}

TEST(Release, OfTheLastCopyForgetsWhatWasWrittenWhereThatIsPossible) {
  auto member = fresh_pool();
  auto block = member->allocate(4 * kPage, true);
  auto one = member->view(block->block, Mode::kCopyOnWrite), two = member->view(block->block, Mode::kCopyOnWrite);
  one->data[0] = std::byte{7};
  member->release(block->block, Mode::kCopyOnWrite);
  EXPECT_EQ(two->data[0], std::byte{7});
  member->release(block->block, Mode::kCopyOnWrite);
  EXPECT_EQ(member->view(block->block, Mode::kCopyOnWrite)->data[0], std::byte{0});
  auto large = member->allocate(3 * kMib, true);
  (void)member->view(large->block, Mode::kCopyOnWrite);
  member->arena().block(large->block).granules.store(0);  // damaged meanwhile
  member->release(large->block, Mode::kCopyOnWrite);
}

TEST(Release, WhatTheSystemKeepsOfACopyIsNotSeenAgainUntilItIsForgotten) {
  auto member = fresh_pool();
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 3; ++i) blocks.push_back(member->allocate(4 * kPage, true)->block);
  const auto see = [&](int i) { return member->view(blocks[static_cast<size_t>(i)], Mode::kCopyOnWrite); };
  for (int i = 0; i < 3; ++i) see(i)->data[0] = std::byte{7};
  const auto handle = member->issue(blocks[1]);
  ASSERT_TRUE(handle.ok());
  {
    const Failing failing("os.drop_private", EINVAL);
    member->release(blocks[1], Mode::kCopyOnWrite);
    EXPECT_EQ(see(1).code(), Code::kUnsupported);
    EXPECT_EQ(member->redeem(*handle, Mode::kCopyOnWrite).code(), Code::kUnsupported);
    EXPECT_TRUE(see(0).ok() && see(2).ok());  // others are none the worse
  }
  auto clean = see(1);
  ASSERT_TRUE(clean.ok());
  EXPECT_EQ(clean->data[0], std::byte{0});
}

TEST(Release, ABlockOverTwoCopiesThatTheSystemKeepsIsNotSeenEither) {
  auto member = fresh_pool(64 * kMib);
  const uint32_t one = member->allocate(4 * kMib, true)->block, two = member->allocate(4 * kMib, true)->block;
  for (const uint32_t block : {one, two}) member->view(block, Mode::kCopyOnWrite)->data[0] = std::byte{7};
  const Failing failing("os.drop_private", EINVAL);
  for (const uint32_t block : {one, two}) {
    member->release(block, Mode::kCopyOnWrite);
    member->release(block, Mode::kReadWrite);
  }
  auto both = member->allocate(8 * kMib, true);
  ASSERT_EQ(both->block, std::min(one, two));
  EXPECT_EQ(member->view(both->block, Mode::kCopyOnWrite).code(), Code::kUnsupported);
  failpoint::disarm();
  auto clean = member->view(both->block, Mode::kCopyOnWrite);
  ASSERT_TRUE(clean.ok());
  EXPECT_EQ(clean->data[4 * kMib], std::byte{0});
}

#endif

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

TEST(Keep, AHandleThatNamesNothingIsNeitherKeptNorGivenUp) {
  auto member = fresh_pool();
  auto block = member->allocate(5000, false);
  auto handle = member->issue(block->block), second = member->issue(block->block);
  ASSERT_TRUE(handle.ok() && second.ok());
  pool::Handle no_ticket = *handle, no_block = *handle;
  no_ticket.ticket = pool::kTickets;
  no_block.block = member->arena().pages();
  member->give_up(no_ticket);
  member->give_up(no_block);
  EXPECT_EQ(member->stats().tickets, 2U);
  member->give_up(*second);
  EXPECT_EQ(member->stats().tickets, 1U);
  EXPECT_FALSE(member->keep(*second));
  EXPECT_FALSE(member->keep(no_block));
  EXPECT_TRUE(member->keep(*handle));
  member->release(block->block, Mode::kReadWrite);
  EXPECT_EQ(member->stats().blocks, 1U);
  member->give_up(*handle);
  EXPECT_EQ(member->stats().blocks, 0U);
}

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

// ---- naming what came in a message

TEST(MemberNaming, WhatCameInAMessageStaysAsItWasNamed) {
  auto member = fresh_pool(), other = join(*member);
  const Member::View view = receive(*member, 8 * kPage);
  const auto named = [&] {
    const auto found = member->find(view.data);
    return found && found->exclusive && member->can_be_named(*found, view.data, view.data + view.length);
  };
  auto handle = member->issue(view.block);
  ASSERT_TRUE(handle.ok());
  EXPECT_FALSE(member->is_private(view.block));
  ASSERT_TRUE(named());
  EXPECT_TRUE(member->is_private(view.block));
  EXPECT_TRUE(named()) << "nothing has been written to it";
  view.data[3] = std::byte{9};
  EXPECT_FALSE(named()) << "the file has not what is seen here";
  auto theirs = other->redeem(*handle, Mode::kReadWrite);
  ASSERT_TRUE(theirs.ok());
  EXPECT_EQ(theirs->data[3], std::byte{1});
  theirs->data[3 + kPage] = std::byte{7};
  other->release(view.block, Mode::kReadWrite);
  member->release(view.block, Mode::kReadWrite);
  EXPECT_FALSE(member->is_private(view.block));
}

TEST(MemberNaming, BlocksThatShareAPageAndRefusedMappingsAreCopied) {
  auto member = fresh_pool();
  const Member::View small = receive(*member, kPage + kGranule, false);
  EXPECT_FALSE(member->can_be_named(*member->find(small.data), small.data, small.data + kPage));
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  const Member::View large = receive(*member, 8 * kPage);
  const Failing failing("os.remap", ENOMEM);
  EXPECT_FALSE(member->can_be_named(*member->find(large.data), large.data, large.data + kPage));
  EXPECT_FALSE(member->is_private(large.block));
#endif
}

}  // namespace
}  // namespace torchshm
