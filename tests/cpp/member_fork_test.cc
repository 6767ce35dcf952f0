// What a fork leaves parent and child, with handlers and without, and where no lease is to be had.
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

using pool::Handle;
using pool::kPage;
using pool::Member;
using pool::Mode;
using tests::Failing;
using tests::fresh_pool;
using tests::give_slots_back;
using tests::join;
using tests::receive;
using tests::succeeds;
using tests::take_all_slots;

constexpr uint64_t kMib = uint64_t{1} << 20;

// A fork that runs no handlers, as other runtimes make them.
pid_t raw_fork(const std::function<bool()>& body) {
  const auto pid = static_cast<pid_t>(::syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
  if (pid == 0) {
    ::alarm(60);
    ::_exit(body() ? 0 : 1);
  }
  return pid;
}

bool ends_well(pid_t pid) {
  const int status = tests::wait_for(pid);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(Fork, WhatCameInAMessageIsEachProcessesOwnAfterwards) {
  Member* member = pool::adopt(fresh_pool());
  const auto one = receive(*member, 2 * kPage), two = receive(*member, 3 * kPage), three = receive(*member, 3 * kMib);
  const auto shared = *member->allocate(2 * kPage, true);
  shared.data[0] = std::byte{1};
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t pid = tests::start([&] {
    for (const auto& view : {one, two, three, shared}) view.data[0] = std::byte{9};
    char go = 0;
    if (::read(ends[0], &go, 1) != 1) return false;
    for (const auto& view : {one, two, three}) {
      if (view.data[1] != std::byte{1} || view.data[0] != std::byte{9}) return false;
    }
    return shared.data[1] == std::byte{5};
  });
  for (const auto& view : {one, two, three, shared}) view.data[1] = std::byte{5};
  ASSERT_EQ(::write(ends[1], "g", 1), 1);
  EXPECT_TRUE(ends_well(pid));
  for (const auto& view : {one, two, three}) EXPECT_EQ(view.data[0], std::byte{1});
  EXPECT_EQ(shared.data[0], std::byte{9});
  EXPECT_TRUE(succeeds([&] { return one.data[1] == std::byte{5}; }));  // once more: they are private already
  // Released, the range is everybody's again.
  for (const auto& view : {one, two, three, shared}) member->release(view.block, Mode::kReadWrite);
  auto again = member->allocate(2 * kPage, true), large = member->allocate(3 * kMib, true);
  auto other = join(*member);
  for (const auto* view : {&*again, &*large}) {
    view->data[0] = std::byte{3};
    auto seen = other->redeem(*member->issue(view->block), Mode::kReadWrite);
    EXPECT_EQ(seen->data[0], std::byte{3});
  }
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(Fork, SmallBlocksThatCameInAMessageStayShared) {
  Member* member = pool::adopt(fresh_pool());
  auto sender = join(*member);
  std::vector<Member::View> views;
  for (int i = 0; i < 2; ++i) {  // side by side
    auto block = sender->allocate(5000, false);
    views.push_back(*member->redeem(*sender->issue(block->block), Mode::kReadWrite, true));
  }
  const auto odd = views[0], second = views[1];
  EXPECT_TRUE(succeeds([&] {
    odd.data[0] = second.data[0] = std::byte{9};
    return true;
  }));
  EXPECT_EQ(odd.data[0], std::byte{9});
  EXPECT_EQ(second.data[0], std::byte{9});
}

TEST(Fork, BeyondSoManyBlocksWritesAreShared) {
  Member* member = pool::adopt(fresh_pool());
  auto sender = join(*member);
  std::vector<Member::View> views;
  for (int i = 0; i < 4100; ++i) {
    auto block = sender->allocate(kPage, true);
    views.push_back(*member->redeem(*sender->issue(block->block), Mode::kReadWrite, true));
  }
  EXPECT_TRUE(succeeds([&] {
    for (const auto& view : views) view.data[0] = std::byte{9};
    return true;
  }));
  int shared = 0;
  for (const auto& view : views) shared += view.data[0] == std::byte{9} ? 1 : 0;
  EXPECT_EQ(shared, 4);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Fork, GoesOnWhereARangeCanNotBeMadePrivate) {
  for (const uint64_t at : {1, 2}) {
    EXPECT_TRUE(succeeds([&] {
      Member* member = pool::adopt(fresh_pool());
      (void)receive(*member, 2 * kPage);
      (void)member->allocate(kPage, true);
      const auto two = receive(*member, 2 * kPage), three = receive(*member, 3 * kMib);
      const Failing failing("os.remap", ENOMEM, at);
      const bool child = succeeds([&] { return three.data[0] == std::byte{1} && member->stats().blocks == 4; });
      return child && two.data[0] == std::byte{1};
    }));
  }
}

TEST(Fork, AChildForWhichNoLeaseCanBeMadeReadsAndNoMore) {
  Member* member = pool::adopt(fresh_pool());
  auto block = member->allocate(5000, false);
  std::memset(block->data, 5, 5000);
  const Failing failing("os.reopen", EMFILE);
  EXPECT_TRUE(succeeds(
      [&] { return block->data[4999] == std::byte{5} && member->allocate(5000, false).code() == Code::kNoSlot; }));
}

TEST(Fork, ARangeThatCanNotBeSharedAgainIsNeverGivenToAnother) {
  Member* member = pool::adopt(fresh_pool());
  const auto view = receive(*member, 2 * kPage);
  ASSERT_TRUE(succeeds([] { return true; }));
  {
    const Failing failing("os.remap", ENOMEM);
    member->release(view.block, Mode::kReadWrite);
  }
  EXPECT_EQ(member->stats().blocks, 1U);
  EXPECT_NE(member->allocate(2 * kPage, true)->block, view.block);
}

TEST(Fork, ARangeWhoseDescriptorIsDamagedStays) {
  Member* member = pool::adopt(fresh_pool());
  const auto view = receive(*member, 3 * kMib);
  const auto other = receive(*member, 3 * kMib);
  member->arena().block(other.block).granules.store(0);
  ASSERT_TRUE(succeeds([] { return true; }));
  member->arena().block(view.block).granules.store(0);
  member->release(view.block, Mode::kReadWrite);
  EXPECT_TRUE(member->arena().block(view.block).value.load().hi & 1);
}

#endif

TEST(Fork, BlocksThatOtherThreadsAreFillingAreNotTheChilds) {
  Member* member = pool::adopt(fresh_pool());
  auto made = member->allocate(5000, false, true);
  EXPECT_TRUE(succeeds([&] { return !member->find(made->data).has_value(); }));
  EXPECT_EQ(member->stats().blocks, 1U);
  member->release_made(made->block);
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Fork, AChildWithoutALeaseReadsWhatItInheritedAndNoMore) {
  Member* member = pool::adopt(fresh_pool());
  auto block = member->allocate(5000, false);
  std::memset(block->data, 5, 5000);
  auto handle = member->issue(block->block);
  take_all_slots(member->arena());
  EXPECT_TRUE(succeeds([&] {
    if (block->data[4999] != std::byte{5} || member->allocate(5000, false).code() != Code::kNoSlot) return false;
    if (member->issue(block->block).code() != Code::kNoSlot) return false;
    if (member->redeem(*handle, Mode::kRead).code() != Code::kNoSlot) return false;
    member->release(block->block, Mode::kReadWrite);
    if (member->reap() != 0 || member->trim(0) != 0) return false;
    return succeeds([&] { return block->data[4999] == std::byte{5} && member->reap() == 0; });  // nor its child
  }));
  give_slots_back(member->arena());
  // What the child may still look at stays held by its parent's lease for good.
  member->release(block->block, Mode::kReadWrite);
  EXPECT_EQ(member->stats().blocks, 1U);
}

TEST(Fork, ASlotOfTheDeadIsEnoughForAChild) {
  Member* member = pool::adopt(fresh_pool());
  auto dead = join(*member);
  take_all_slots(member->arena());
  dead->membership().abandon(member->arena());
  EXPECT_TRUE(succeeds([&] { return member->allocate(5000, false).ok(); }));
  give_slots_back(member->arena());
}

TEST(RawFork, TheChildTakesOverWhatTheParentStillHolds) {
  auto member = fresh_pool();
  auto kept = member->allocate(5000, false), dropped = member->allocate(3 * kMib, false);
  ASSERT_TRUE(join(*member)->allocate(kMib, false).ok());  // right behind it
  std::memset(kept->data, 5, 5000);
  int there[2], back[2];
  ASSERT_EQ(::pipe(there), 0);
  ASSERT_EQ(::pipe(back), 0);
  const pid_t pid = raw_fork([&] {
    char byte = 0;
    if (::read(there[0], &byte, 1) != 1) return false;  // the parent has dropped one of the two
    if (member->issue(dropped->block).code() != Code::kStale) return false;
    if (member->view(dropped->block, Mode::kRead).code() != Code::kStale) return false;
    if (!member->issue(kept->block).ok() || ::write(back[1], "x", 1) != 1) return false;
    if (::read(there[0], &byte, 1) != 1) return false;
    return kept->data[4999] == std::byte{5} && member->stats().leases.size() == 3;
  });
  member->release(dropped->block, Mode::kReadWrite);
  auto later = member->allocate(3 * kMib, false);
  ASSERT_EQ(later->block, dropped->block);  // another block in the same place, which the child never had
  char byte = 0;
  ASSERT_EQ(::write(there[1], "x", 1), 1);
  ASSERT_EQ(::read(back[0], &byte, 1), 1);
  member->release(kept->block, Mode::kReadWrite);
  member->release(later->block, Mode::kReadWrite);
  EXPECT_EQ(member->stats().blocks, 2U);
  ASSERT_EQ(::write(there[1], "x", 1), 1);
  EXPECT_TRUE(ends_well(pid));
  for (const int fd : {there[0], there[1], back[0], back[1]}) ::close(fd);
}

TEST(RawFork, AHandleOfABlockThatWasLostIsReceivedAnew) {
  auto member = fresh_pool();
  auto other = join(*member);
  auto block = member->allocate(5000, false);
  auto handle = member->issue(block->block);
  int there[2];
  ASSERT_EQ(::pipe(there), 0);
  const pid_t pid = raw_fork([&] {
    char byte = 0;
    if (::read(there[0], &byte, 1) != 1) return false;
    (void)member->reap();
    auto view = member->redeem(*handle, Mode::kReadWrite);
    return view.ok() && member->issue(block->block).ok();
  });
  member->release(block->block, Mode::kReadWrite);
  ASSERT_EQ(::write(there[1], "x", 1), 1);
  EXPECT_TRUE(ends_well(pid));
  ::close(there[0]);
  ::close(there[1]);
}

TEST(RawFork, WithoutALeaseTheChildReadsAndNoMore) {
  Member* member = pool::adopt(fresh_pool());
  auto block = member->allocate(5000, false);
  auto handle = member->issue(block->block);
  ASSERT_TRUE(handle.ok());
  std::memset(block->data, 5, 5000);
  take_all_slots(member->arena());
  EXPECT_TRUE(ends_well(raw_fork([&] {
    if (member->allocate(5000, false).code() != Code::kNoSlot || block->data[4999] != std::byte{5}) return false;
    if (member->keep(*handle)) return false;
    member->give_up(*handle);
    if (member->stats().tickets != 1) return false;
    member->release(block->block, Mode::kReadWrite);
    return ends_well(raw_fork([&] { return member->allocate(5000, false).code() == Code::kNoSlot; }));
  })));
  give_slots_back(member->arena());
}

TEST(RawFork, TheChildHoldsNothingThatTheParentMadeLater) {
  auto member = fresh_pool();
  auto first = member->allocate(5000, false);
  int there[2];
  ASSERT_EQ(::pipe(there), 0);
  const pid_t pid = raw_fork([&] {
    char byte = 0;
    if (::read(there[0], &byte, 1) != 1) return false;
    const auto mine = member->stats();
    return mine.leases.size() == 2 && mine.leases[0].held_blocks == 2 && mine.leases[1].held_blocks == 1;
  });
  ASSERT_TRUE(member->allocate(5000, false).ok());
  ASSERT_EQ(::write(there[1], "x", 1), 1);
  EXPECT_TRUE(ends_well(pid));
  EXPECT_TRUE(first.ok());
  for (const int fd : there) ::close(fd);
}

TEST(RawFork, WhereLostArraysLookAHandleOfAnotherBlockIsStale) {
  auto member = fresh_pool();
  auto block = member->allocate(3 * kMib, false);
  int there[2];
  ASSERT_EQ(::pipe(there), 0);
  const pid_t pid = raw_fork([&] {
    pool::Handle later;
    if (::read(there[0], &later, sizeof later) != sizeof later || later.block != block->block) return false;
    return member->redeem(later, Mode::kReadWrite).code() == Code::kStale;
  });
  member->release(block->block, Mode::kReadWrite);
  auto later = member->allocate(3 * kMib, false);
  auto handle = member->issue(later->block);
  ASSERT_TRUE(handle.ok());
  ASSERT_EQ(::write(there[1], &*handle, sizeof(pool::Handle)), static_cast<ssize_t>(sizeof(pool::Handle)));
  EXPECT_TRUE(ends_well(pid));
  for (const int fd : there) ::close(fd);
}

TEST(RawFork, IsNotNoticedByKernelsThatDoNotTell) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] {
    if (!tests::refuse(SYS_madvise, EINVAL, 2, 18)) return false;  // MADV_WIPEONFORK
    Member* member = pool::adopt(fresh_pool());
    auto block = member->allocate(5000, false);
    return block.ok() && succeeds([&] { return member->stats().leases.size() == 2; });  // handlers do
  }));
}

}  // namespace
}  // namespace torchshm
