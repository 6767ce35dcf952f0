// What a member does with what it holds and what it receives: handing over, views of each mode, what is found and named.
#include <algorithm>
#include <cstring>
#include <vector>

#include "member_parts.h"
#include "os/mapping.h"
#include "parts.h"
#include "pool/member.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::kChunk;
using pool::kGranule;
using pool::kPage;
using pool::kPagesPerChunk;
using pool::kTickets;
using pool::Member;
using pool::Mode;
using tests::Failing;
using tests::fresh_pool;
using tests::join;
using tests::receive;

constexpr uint64_t kMib = uint64_t{1} << 20;

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

TEST(Release, WhatWasOnlyReadThroughACopyStaysMappedAndShowsWhatComesNext) {
  auto member = fresh_pool(64 * kMib);
  constexpr uint64_t kBytes = 4 * kMib;
  const auto read = [](const std::byte* data) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < kBytes; i += kPage) sum += static_cast<uint64_t>(data[i]);
    return sum / (kBytes / kPage);
  };
  uint64_t place = 0;
  for (uint64_t life = 1; life < 5; ++life) {
    auto block = member->allocate(kBytes, true);
    std::memset(block->data, static_cast<int>(life), kBytes);
    auto copy = member->view(block->block, Mode::kCopyOnWrite);
    ASSERT_TRUE(copy.ok());
    if (place != 0) {
      ASSERT_EQ(reinterpret_cast<uint64_t>(copy->data), place);
    }
    place = reinterpret_cast<uint64_t>(copy->data);
    const uint64_t faults = os::page_faults();
    EXPECT_EQ(read(copy->data), life);
    // After the one that wrote everything is seen anew.
    if (life == 2 || life == 3) {
      EXPECT_LT(os::page_faults() - faults, kBytes / kPage / 32);
    }
    if (life == 3) copy->data[kBytes / 2] = std::byte{99};
    if (life == 4) {
      EXPECT_EQ(copy->data[kBytes / 2], std::byte{4});
    }
    member->release(block->block, Mode::kCopyOnWrite);
    member->release(block->block, Mode::kReadWrite);
  }
}

TEST(Release, WhatWasReadThroughACopyIsGoneWithItsPages) {
  auto member = fresh_pool(64 * kMib);
  auto block = member->allocate(4 * kMib, true);
  std::memset(block->data, 1, 4 * kMib);
  auto copy = member->view(block->block, Mode::kCopyOnWrite);
  EXPECT_EQ(copy->data[kPage], std::byte{1});
  const uint32_t first = block->block;
  member->release(first, Mode::kCopyOnWrite);
  member->release(first, Mode::kReadWrite);
  (void)member->trim(0);  // the pages go back to the system
  block = member->allocate(4 * kMib, true);
  ASSERT_EQ(block->block, first);
  std::memset(block->data, 2, 4 * kMib);
  copy = member->view(first, Mode::kCopyOnWrite);
  EXPECT_EQ(copy->data[kPage], std::byte{2});
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

TEST(MemberNaming, WhatIsSharedByIntentIsNamedAsItIsAndACopyOnlyUnwritten) {
  auto member = fresh_pool();
  auto view = member->allocate(4 * kPage, true);
  EXPECT_TRUE(member->can_be_named(*member->find(view->data), view->data, view->data + 10));
  auto copy = member->view(view->block, Mode::kCopyOnWrite);
  ASSERT_TRUE(copy.ok());
  EXPECT_TRUE(member->can_be_named(*member->find(copy->data), copy->data, copy->data + 10));
  copy->data[0] = std::byte{1};
  EXPECT_FALSE(member->can_be_named(*member->find(copy->data), copy->data, copy->data + 10));
  EXPECT_EQ(member->objects(view->block), 2U);
  EXPECT_EQ(member->objects(member->arena().pages()), 0U);
  EXPECT_FALSE(member->is_private(member->arena().pages()));
  member->release(view->block, Mode::kReadWrite);
  member->release(view->block, Mode::kCopyOnWrite);
  EXPECT_FALSE(member->is_private(view->block));
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
