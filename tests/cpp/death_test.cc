// What a pool promises when processes die, at any point.
#include <sys/resource.h>

#include <cstring>

#include "base/failpoint.h"
#include "pool/members.h"
#include "processes.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;
using tests::fresh_pool;
using tests::join;

// A member with one block that has closed all its descriptors and sleeps.
pid_t start_without_descriptors(Member& member) {
  int ends[2];
  EXPECT_EQ(::pipe(ends), 0);
  const pid_t pid = tests::start([&] {
    auto worker = join(member);
    (void)worker->allocate(5000, false);
    for (int fd = 3; fd < 256; ++fd) {
      if (fd != ends[1]) ::close(fd);
    }
    (void)!::write(ends[1], "x", 1);
    ::pause();
    return true;
  });
  char byte = 0;
  EXPECT_EQ(::read(ends[0], &byte, 1), 1);
  ::close(ends[0]);
  ::close(ends[1]);
  return pid;
}

TEST(Death, WhatOnlyTheDeadUsedComesBack) {
  auto member = fresh_pool();
  const pid_t pid = tests::start([&] {
    auto worker = join(*member);
    for (const uint64_t bytes : {uint64_t{5000}, uint64_t{90000}, uint64_t{3} << 20})
      (void)worker->allocate(bytes, false);
    std::raise(SIGKILL);
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(tests::wait_for(pid)));
  const auto stats = member->stats();
  EXPECT_EQ(stats.blocks, 0U);
  EXPECT_EQ(stats.leases.size(), 1U);
}

TEST(Death, ASleepingProcessIsNotDead) {
  auto member = fresh_pool();
  const pid_t pid = tests::start([&] {
    auto worker = join(*member);
    (void)worker->allocate(5000, false);
    std::raise(SIGSTOP);
    std::raise(SIGKILL);
    return true;
  });
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
  EXPECT_EQ(member->stats().blocks, 1U);
  ::kill(pid, SIGCONT);
  (void)tests::wait_for(pid);
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Death, AProcessThatClosedAllDescriptorsIsNotDead) {
  auto member = fresh_pool();
  const pid_t pid = start_without_descriptors(*member);
  EXPECT_EQ(member->stats().blocks, 1U);
  ::kill(pid, SIGKILL);
  (void)tests::wait_for(pid);
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Death, IsNotConcludedByAReaperWithoutDescriptorsToLookWith) {
  auto member = fresh_pool();
  const pid_t pid = start_without_descriptors(*member);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{0, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const uint64_t blocks = member->stats().blocks;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(blocks, 1U);
  ::kill(pid, SIGKILL);
  (void)tests::wait_for(pid);
  EXPECT_EQ(member->stats().blocks, 0U);
}

TEST(Fork, TheChildKeepsWhatItInheritedWhenTheParentDropsIt) {
  Member* member = pool::adopt(fresh_pool());
  for (const uint64_t bytes : {uint64_t{5000}, uint64_t{3} << 20}) {
    auto block = member->allocate(bytes, false);
    std::memset(block->data, 5, bytes);
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t pid = tests::start([&] {
      char byte = 0;
      if (::read(ends[0], &byte, 1) != 1) return false;
      const bool same = block->data[0] == std::byte{5} && block->data[bytes - 1] == std::byte{5};
      member->release(block->block, Mode::kReadWrite);
      return same && member->stats().blocks == 1;  // the parent's next one
    });
    member->release(block->block, Mode::kReadWrite);
    auto next = member->allocate(bytes, false);
    std::memset(next->data, 6, bytes);
    (void)!::write(ends[1], "x", 1);
    const int status = tests::wait_for(pid);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    member->release(next->block, Mode::kReadWrite);
    EXPECT_EQ(member->stats().blocks, 0U);
    ::close(ends[0]);
    ::close(ends[1]);
  }
}

TEST(Fork, TheChildOutlivesTheParent) {
  auto watcher = fresh_pool();
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t pid = tests::start([&] {
    Member* member = pool::adopt(join(*watcher));
    auto block = member->allocate(5000, false);
    std::memset(block->data, 5, 5000);
    if (::fork() == 0) {
      ::usleep(200000);  // the parent is gone by now
      const char answer = block->data[4999] == std::byte{5} && member->stats().blocks == 1 ? 'y' : 'n';
      (void)!::write(ends[1], &answer, 1);
      ::_exit(0);
    }
    std::raise(SIGKILL);
    return true;
  });
  (void)tests::wait_for(pid);
  EXPECT_EQ(watcher->stats().blocks, 1U);
  char answer = 0;
  ASSERT_EQ(::read(ends[0], &answer, 1), 1);
  EXPECT_EQ(answer, 'y');
  for (int i = 0; i < 100 && watcher->stats().blocks != 0; ++i) ::usleep(10000);
  EXPECT_EQ(watcher->stats().blocks, 0U);
  ::close(ends[0]);
  ::close(ends[1]);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

// Every operation, killed at its first, second, ... point until there are no more; a survivor's data stay whole and all comes back.
bool busy_life(Member& survivor, const Handle& inbox) {
  Member* self = pool::adopt(join(survivor));
  auto small = self->allocate(6000, false);
  auto large = self->allocate(uint64_t{3} << 20, false);
  auto view = self->redeem(inbox, Mode::kReadWrite);
  if (!small || !large || !view) return true;  // only where a call was made to fail
  auto out = self->issue(small->block);
  auto out_large = self->issue(large->block);
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(0);
  (void)tests::wait_for(pid);
  if (out) (void)self->redeem(*out, Mode::kReadWrite);
  self->release(large->block, Mode::kReadWrite);
  self->release(view->block, Mode::kReadWrite);
  (void)self->reap();
  (void)self->trim(0);
  return true;
}

TEST(Death, AtEveryPointLeavesNothingBehind) {
  auto survivor = fresh_pool(uint64_t{64} << 20);
  auto kept = survivor->allocate(70000, false);
  std::memset(kept->data, 7, 70000);
  uint64_t kills = 0;
  for (uint64_t at = 1;; ++at) {
    auto inbox = survivor->issue(kept->block);
    ASSERT_TRUE(inbox.ok());
    failpoint::Plan plan;
    plan.action = failpoint::Action::kKill;
    plan.at = at;
    const pid_t pid = tests::start([&] {
      failpoint::arm(plan);
      return busy_life(*survivor, *inbox);
    });
    const int status = tests::wait_for(pid);
    // A reaper is killed too, at its own points, in another process; then a third finishes.
    for (uint64_t nested = 1; nested < 4; ++nested) {
      failpoint::Plan again = plan;
      again.at = nested * 5;
      (void)tests::wait_for(tests::start([&] {
        auto reaper = join(*survivor);
        failpoint::arm(again);
        (void)reaper->reap();
        (void)reaper->trim(0);
        return true;
      }));
    }
    // Its forked child may outlive it by a moment, and nobody here is told of that one's end.
    auto stats = survivor->stats();
    for (int i = 0; i < 1000 && stats.leases.size() > 1; ++i, stats = survivor->stats()) ::usleep(10000);
    ASSERT_EQ(stats.leases.size(), 1U) << "killed at point " << at;
    ASSERT_LE(stats.blocks, 3U) << at;  // its unreceived messages may hold two
    for (int i = 0; i < 70000; i += 999) ASSERT_EQ(static_cast<int>(kept->data[i]), 7) << at;
    if (WIFSIGNALED(status)) {
      ++kills;
    } else {
      ASSERT_EQ(status, 0) << at;
    }
    // With its tickets taken back as well, only what the survivor holds is left.
    auto filler = survivor->allocate(uint64_t{61} << 20, false);
    ASSERT_TRUE(filler.ok()) << at << ": " << filler.status().what();
    ASSERT_EQ(survivor->stats().blocks, 2U) << at;
    survivor->release(filler->block, Mode::kReadWrite);
    // The inbox ticket of this round is still out when the child died before redeeming it.
    auto mine = survivor->redeem(*inbox, Mode::kReadWrite);
    ASSERT_TRUE(mine.ok());
    survivor->release(mine->block, Mode::kReadWrite);
    ASSERT_EQ(survivor->stats().tickets, 0U) << at;
    if (!WIFSIGNALED(status)) break;
  }
  EXPECT_GT(kills, 60U);
}

TEST(Failure, OfAnySystemCallIsAnErrorAndNotACrash) {
  for (const bool persistent : {false, true}) {
    auto survivor = fresh_pool(uint64_t{64} << 20);
    auto kept = survivor->allocate(70000, false);
    for (uint64_t at = 1; at < 400; ++at) {
      auto inbox = survivor->issue(kept->block);
      failpoint::Plan plan;
      plan.action = failpoint::Action::kFail;
      plan.at = at;
      plan.persistent = persistent;
      plan.error = ENOSPC;
      bool more = true;
      const int status = tests::wait_for(tests::start([&] {
        auto self = join(*survivor);
        failpoint::arm(plan);
        (void)self->redeem(*inbox, Mode::kReadWrite);
        auto small = self->allocate(6000, false);
        auto large = self->allocate(uint64_t{3} << 20, false);
        if (small) (void)self->issue(small->block);
        if (large) self->release(large->block, Mode::kReadWrite);
        (void)self->trim(0);
        more = failpoint::reached() >= at;
        return true;
      }));
      ASSERT_EQ(status, 0) << at;
      ASSERT_EQ(survivor->stats().leases.size(), 1U);
      auto mine = survivor->redeem(*inbox, Mode::kReadWrite);
      ASSERT_TRUE(mine.ok());
      survivor->release(mine->block, Mode::kReadWrite);
    }
  }
}

TEST(Failure, ToDropACopyDoesNotShowItAgain) {
  auto member = fresh_pool();
  auto block = member->allocate(20000, true);
  std::memset(block->data, 1, 20000);
  for (const bool persistent : {false, true}) {
    auto copy = member->view(block->block, Mode::kCopyOnWrite);
    ASSERT_TRUE(copy.ok());
    std::memset(copy->data, 2, 20000);
    failpoint::Plan plan;
    plan.action = failpoint::Action::kFail;
    plan.only = "os.drop_private";
    plan.error = ENOMEM;
    plan.persistent = persistent;
    failpoint::arm(plan);
    member->release(block->block, Mode::kCopyOnWrite);
    // Refused once, it is dropped now; refused for good, there is no copy-on-write view of this place.
    auto again = member->view(block->block, Mode::kCopyOnWrite);
    EXPECT_EQ(again.ok(), !persistent);
    if (again) {
      EXPECT_EQ(again->data[0], std::byte{1});
      member->release(block->block, Mode::kCopyOnWrite);
    }
    failpoint::disarm();
    again = member->view(block->block, Mode::kCopyOnWrite);
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(again->data[0], std::byte{1});
    member->release(block->block, Mode::kCopyOnWrite);
  }
}

TEST(Failure, ToGiveAChunkOfTheDeadBackIsMadeUpForByTheNextTrim) {
  auto member = fresh_pool();
  failpoint::Plan plan;
  plan.action = failpoint::Action::kKill;
  plan.only = "claim_small.taken";
  const pid_t pid = tests::start([&] {
    auto worker = join(*member);
    failpoint::arm(plan);
    (void)worker->allocate(5000, false);
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(tests::wait_for(pid)));
  plan.action = failpoint::Action::kFail;
  plan.only = "os.punch";
  plan.error = EINTR;
  failpoint::arm(plan);
  EXPECT_EQ(member->reap(), 1U);
  failpoint::disarm();
  EXPECT_EQ(member->stats().committed, pool::kChunk);  // as far as anybody knows
  (void)member->trim(0);
  EXPECT_EQ(member->stats().committed, 0U);
}

#endif

}  // namespace
}  // namespace torchshm
