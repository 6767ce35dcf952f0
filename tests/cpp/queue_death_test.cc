// Members of a queue that die, anywhere and at random: nobody waits for them, and nothing but what they had in hand is lost.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "base/failpoint.h"
#include "os/futex.h"
#include "pool/members.h"
#include "pool/stats.h"
#include "queues.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;
using pool::Queue;
using tests::comes_down_to;
using tests::expect_nothing_left;
using tests::fresh_pool;
using tests::join;
using tests::kSecond;
using tests::make;
using tests::Note;
using tests::open;
using tests::put;
using tests::take;
using tests::take_within;

TEST(QueueDeath, OfTheLastOneThatHasItGivesAllBack) {
  auto member = fresh_pool();
  const pid_t pid = tests::start([&] {
    auto self = join(*member);
    auto queue = make(*self);
    for (uint64_t i = 0; i < 100; ++i) (void)put(*queue, 1, i, i % 10 == 0 ? 100000 : 900);
    std::raise(SIGKILL);
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(tests::wait_for(pid)));
  expect_nothing_left(*member);
}

// Not when somebody reaps or needs room, some time.
TEST(QueueDeath, OfAllOthersThatHaveItEndsItWithThisOne) {
  auto member = fresh_pool();
  auto queue = make(*member);
  const Handle handle = *queue->handle();
  const pid_t pid = tests::start([&] {
    auto self = join(*member);
    auto mine = open(*self, handle);
    for (uint64_t i = 0; i < 10; ++i) (void)put(*mine, 1, i, 100000);
    std::raise(SIGKILL);
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(tests::wait_for(pid)));
  queue.reset();
  EXPECT_EQ(pool::collect(member->arena()).blocks, 0);
}

TEST(QueueDeath, OfTheLastOneThatHasItGivesRoomBeforeThePoolGrows) {
  constexpr uint64_t kBytes = uint64_t{8} << 20;
  auto member = fresh_pool(8 * kBytes);
  const pid_t pid = tests::start([&] {
    auto self = join(*member);
    auto queue = make(*self);
    auto block = self->allocate(kBytes, false);
    (void)self->issue(block->block, &queue->ref());
    self->release(block->block, Mode::kReadWrite);
    std::raise(SIGKILL);
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(tests::wait_for(pid)));
  ASSERT_TRUE(member->allocate(kBytes, false).ok());
  EXPECT_LT(member->stats().committed, 2 * kBytes);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

// All that a process does with a queue.
bool live(Member& survivor, const Handle& handle) {
  auto self = join(survivor);
  auto opened = Queue::open(*self, handle);
  if (!opened) return false;
  Queue& queue = **opened;
  for (uint64_t i = 0; i < 12; ++i) (void)put(queue, 2, i, i % 4 == 3 ? 30000 : 700);
  for (int i = 0; i < 6; ++i) {
    (void)take(queue);
    (void)queue.task_done();
  }
  queue.set_flag(true);
  queue.wait(Queue::For::kMessage, 0);
  while (put(queue, 2, 100, 64)) {
  }
  return true;
}

TEST(QueueDeath, AtEveryPointStopsNobodyAndLeavesNothing) {
  auto survivor = fresh_pool(uint64_t{64} << 20);
  uint64_t kills = 0;
  for (uint64_t at = 1;; ++at) {
    auto queue = make(*survivor, 40);
    // Near the end of the first segment, so that the next is made, and then of the second, which is made of the first.
    for (uint64_t i = 0; i < (at % 2 == 0 ? 250U : 506U); ++i) {
      ASSERT_TRUE(put(*queue, 1, i));
      ASSERT_TRUE(take(*queue));
      ASSERT_TRUE(queue->task_done());
    }
    const Handle handle = *queue->handle();
    failpoint::Plan plan;
    plan.action = failpoint::Action::kKill;
    plan.at = at;
    const int status = tests::wait_for(tests::start([&] {
      failpoint::arm(plan);
      return live(*survivor, handle);
    }));
    survivor->give_up(handle);  // it may not have come to open it
    ASSERT_EQ(survivor->stats().leases.size(), 1U) << at;
    // What it sent arrives in order, without gaps before what it took, and the survivor's after it.
    while (queue->full()) ASSERT_TRUE(take(*queue));
    ASSERT_TRUE(put(*queue, 3, 0)) << at;
    uint64_t last = 0;
    for (;;) {
      const auto note = take_within(*queue, 10 * kSecond);
      ASSERT_TRUE(note) << at;
      if (note->sender == 3) break;
      ASSERT_EQ(note->sender, 2U);
      ASSERT_GE(note->number, last) << at;
      last = note->number;
    }
    ASSERT_TRUE(queue->empty()) << at;
    ASSERT_EQ(queue->size(), 0U) << at;
    while (queue->task_done()) {
    }
    ASSERT_TRUE(queue->all_done());
    // What the dead left comes back but for a segment that it had in its hand, which goes with the queue.
    ASSERT_TRUE(comes_down_to(*queue, 4)) << at;
    queue.reset();
    expect_nothing_left(*survivor);
    if (HasFailure() || !WIFSIGNALED(status)) {
      ASSERT_EQ(status, 0);
      break;
    }
    ++kills;
  }
  EXPECT_GT(kills, 200U);
}

TEST(QueueDeath, WhileItsEndIsCarriedOutLeavesTheRestToOthers) {
  auto survivor = fresh_pool(uint64_t{64} << 20);
  for (uint64_t at = 1;; ++at) {
    failpoint::Plan plan;
    plan.action = failpoint::Action::kKill;
    plan.at = at;
    const int status = tests::wait_for(tests::start([&] {
      auto self = join(*survivor);
      auto queue = make(*self);
      for (uint64_t i = 0; i < 4; ++i) (void)put(*queue, 1, i, 30000);
      failpoint::arm(plan);
      queue.reset();
      return true;
    }));
    (void)tests::wait_for(tests::start([&] {
      auto reaper = join(*survivor);
      auto nested = plan;
      nested.at = at % 7 + 1;
      nested.only = at % 2 == 0 ? "end_queues.cleared" : nullptr;
      failpoint::arm(nested);
      (void)reaper->reap();
      return true;
    }));
    expect_nothing_left(*survivor);
    ASSERT_FALSE(HasFailure()) << at;
    if (!WIFSIGNALED(status)) break;
  }
}

TEST(QueueDeath, OfASenderBeforeItsWakeCostsNoMoreThanASlice) {
  const tests::Watchdog watchdog(60);
  auto member = fresh_pool();
  for (const char* point : {"queue.published", "queue.tail_moved", "queue.rung"}) {
    auto queue = make(*member);
    const Handle handle = *queue->handle();
    const pid_t pid = tests::start([&] {
      auto self = join(*member);
      auto mine = open(*self, handle);
      failpoint::Plan plan;
      plan.action = failpoint::Action::kKill;
      plan.only = point;
      failpoint::arm(plan);
      ::usleep(20000);  // the taker sleeps by then
      return put(*mine, 1, 7);
    });
    const auto note = take_within(*queue, 30 * kSecond);
    ASSERT_TRUE(note);
    EXPECT_EQ(note->number, 7U);
    EXPECT_TRUE(WIFSIGNALED(tests::wait_for(pid))) << point;
  }
}

TEST(QueueDeath, AStoppedSenderOrTakerStopsNobody) {
  auto member = fresh_pool();
  for (const char* point : {"queue.put", "queue.published", "queue.take", "queue.taken", "queue.block"}) {
    auto queue = make(*member);
    ASSERT_TRUE(put(*queue, 1, 0));
    const Handle handle = *queue->handle();
    const pid_t pid = tests::start([&] {
      auto self = join(*member);
      auto mine = open(*self, handle);
      failpoint::Plan plan;
      plan.action = failpoint::Action::kStop;
      plan.only = point;
      failpoint::arm(plan);
      return put(*mine, 2, 0) && take(*mine).has_value();
    });
    int status = 0;
    ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
    ASSERT_TRUE(WIFSTOPPED(status)) << point;
    for (uint64_t i = 1; i < 3000; ++i) {
      ASSERT_TRUE(put(*queue, 1, i));
      ASSERT_TRUE(take(*queue)) << point;
    }
    ::kill(pid, SIGCONT);
    EXPECT_EQ(tests::wait_for(pid), 0) << point;
    queue.reset();
    expect_nothing_left(*member);
  }
}

#endif

TEST(QueueDeath, AtRandomMomentsLosesOnlyWhatTheDeadHadInHand) {
  const tests::Watchdog watchdog(110);
  auto member = fresh_pool();
  auto queue = make(*member, 50), results = make(*member);
  unsigned seed = 12345;
  for (int round = 0; round < 25; ++round) {
    std::vector<pid_t> children;
    for (uint64_t s = 0; s < 3; ++s) {
      const Handle first = *queue->handle(), second = *results->handle();
      children.push_back(tests::start([&, first, second, s] {
        auto self = join(*member);
        auto mine = open(*self, first), out = open(*self, second);
        for (uint64_t i = 0;; ++i) {
          if (s == 0) {
            while (!put(*mine, s, i, sizeof(Note) + i * 31 % 30000)) mine->wait(Queue::For::kRoom, kSecond);
          } else if (const auto note = take_within(*mine, 20 * kSecond)) {
            (void)put(*out, s, note->number);
          }
        }
        return true;
      }));
    }
    ::usleep(20000 + rand_r(&seed) % 20000);
    uint64_t last[3] = {};
    for (uint64_t i = 0; i < 50; ++i) {
      const auto note = take_within(*results, 20 * kSecond);
      ASSERT_TRUE(note);
      ASSERT_TRUE(last[note->sender] == 0 || note->number > last[note->sender]);
      last[note->sender] = note->number;
    }
    for (const pid_t pid : children) ::kill(pid, SIGKILL);
    for (const pid_t pid : children) (void)tests::wait_for(pid);
    // The survivor finds both as they should be.
    while (queue->full()) ASSERT_TRUE(take(*queue));
    ASSERT_TRUE(put(*queue, 9, 1));
    for (;;) {
      const auto note = take(*queue);
      ASSERT_TRUE(note);
      if (note->sender == 9) break;
    }
    while (take(*results)) {
    }
    ASSERT_EQ(queue->size(), 0U);
  }
  queue.reset();
  results.reset();
  EXPECT_EQ(member->stats().leases.size(), 1U);
}

}  // namespace
}  // namespace torchshm
