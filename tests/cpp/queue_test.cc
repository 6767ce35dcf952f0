// What a queue promises while all live: order, nothing lost, nothing left; and its bytes.
#include "pool/queue.h"

#include <poll.h>

#include <array>
#include <cstring>
#include <random>
#include <thread>

#include "base/failpoint.h"
#include "kernel.h"
#include "os/futex.h"
#include "parts.h"
#include "pool/checker.h"
#include "pool/members.h"
#include "pool/queue_watch.h"
#include "processes.h"
#include "queues.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;
using pool::Queue;
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

TEST(QueueLayout, Stays) {
  EXPECT_EQ(sizeof(pool::QueueHeader), 256U);
  EXPECT_EQ(offsetof(pool::QueueHeader, cells), 12U);
  EXPECT_EQ(offsetof(pool::QueueHeader, maxsize), 16U);
  EXPECT_EQ(offsetof(pool::QueueHeader, flag), 24U);
  EXPECT_EQ(offsetof(pool::QueueHeader, tail), 64U);
  EXPECT_EQ(offsetof(pool::QueueHeader, head), 128U);
  EXPECT_EQ(offsetof(pool::QueueHeader, done), 192U);
  EXPECT_EQ(offsetof(pool::QueueHeader, arrived), 200U);
  EXPECT_EQ(offsetof(pool::QueueHeader, left), 208U);
  EXPECT_EQ(offsetof(pool::QueueHeader, finished), 216U);
  EXPECT_EQ(offsetof(pool::ParcelHeader, ticket), 4U);
  EXPECT_EQ(offsetof(pool::ParcelHeader, nonce), 8U);
  EXPECT_EQ(offsetof(pool::ParcelHeader, generation), 16U);
  EXPECT_EQ(offsetof(pool::ParcelHeader, filler), 24U);
  EXPECT_EQ(offsetof(pool::ParcelHeader, left), 32U);
  EXPECT_EQ(offsetof(pool::MessageHeader, tickets), 8U);
  EXPECT_EQ(offsetof(pool::QueueParty, parked), 8U);
  EXPECT_EQ(pool::kQueueTableAt, 256U);
  EXPECT_EQ(pool::kQueuePartiesAt, 256U + 2048 * 16);
  EXPECT_EQ(pool::kQueueBytes, 256U + 2048 * 16 + 1024 * 16);
}

TEST(Queue, GivesInOrderWhatWasPut) {
  auto member = fresh_pool();
  auto queue = make(*member);
  uint64_t taken = 0;
  for (uint64_t i = 0; i < 20000; ++i) {
    ASSERT_TRUE(put(*queue, 1, i, sizeof(Note) + i * 37 % 40000));
    if (i % 3 == 0) continue;
    const auto note = take(*queue);
    ASSERT_TRUE(note);
    ASSERT_EQ(note->number, taken++);
  }
  EXPECT_EQ(queue->size(), 20000 - taken);
  while (const auto note = take(*queue)) ASSERT_EQ(note->number, taken++);
  EXPECT_EQ(taken, 20000U);
  EXPECT_TRUE(queue->empty());
  queue.reset();
  expect_nothing_left(*member);
}

TEST(Queue, UsesItsSegmentsAgainAndAgain) {
  auto member = fresh_pool();
  auto queue = make(*member, 300);
  const uint64_t rounds = uint64_t{pool::kQueueSegments} * 512 + 5000;  // beyond the end of the table
  uint64_t most = 0;
  for (uint64_t i = 0; i < rounds; ++i) {
    ASSERT_TRUE(put(*queue, 1, i));
    if (i >= 200) {
      ASSERT_EQ(take(*queue)->number, i - 200);
    }
    if (i % 10000 == 5000) most = std::max(most, member->stats().blocks);
  }
  EXPECT_LE(most, 5U);
  queue.reset();
  expect_nothing_left(*member);
}

TEST(Queue, IsFullAtItsSizeExactly) {
  auto member = fresh_pool();
  for (const uint64_t maxsize : {1, 2, 255, 256, 257, 3000}) {
    auto queue = make(*member, maxsize);
    for (int round = 0; round < 3; ++round) {
      for (uint64_t i = 0; i < maxsize; ++i) {
        EXPECT_FALSE(queue->full());
        ASSERT_TRUE(put(*queue, 1, i)) << maxsize;
      }
      EXPECT_TRUE(queue->full());
      EXPECT_FALSE(put(*queue, 1, 0));
      for (uint64_t i = 0; i < maxsize; ++i) ASSERT_EQ(take(*queue)->number, i);
      EXPECT_FALSE(take(*queue));
    }
  }
  expect_nothing_left(*member);
}

TEST(Queue, WhatIsUnreceivedWhenItEndsComesBack) {
  auto member = fresh_pool();
  auto queue = make(*member);
  auto block = member->allocate(5000, false);
  ASSERT_TRUE(member->issue(block->block, &queue->ref()).ok());  // as of an array in a message
  member->release(block->block, Mode::kReadWrite);
  for (uint64_t i = 0; i < 5000; ++i) ASSERT_TRUE(put(*queue, 1, i, i % 100 == 0 ? 100000 : 900));
  EXPECT_GT(member->stats().blocks, 100U);
  queue.reset();
  expect_nothing_left(*member);
}

TEST(Queue, TicketsInItAreNotTakenBackWhileItLives) {
  auto member = fresh_pool(uint64_t{8} << 20);
  auto queue = make(*member);
  for (uint64_t i = 0; i < 4; ++i) ASSERT_TRUE(put(*queue, 1, i, uint64_t{1} << 20));
  member->set_ticket_age(0);
  while (member->allocate(uint64_t{1} << 20, false)) {
  }
  for (uint64_t i = 0; i < 4; ++i) ASSERT_EQ(take(*queue)->number, i);
}

TEST(Queue, FailsWithAFullPoolAndGoesOnAfterwards) {
  auto member = fresh_pool(uint64_t{8} << 20);
  auto queue = make(*member);
  uint64_t sent = 0;
  while (put(*queue, 1, sent, 20000)) ++sent;
  EXPECT_GT(sent, 100U);
  for (uint64_t i = 0; i < sent; ++i) ASSERT_EQ(take(*queue)->number, i);
  EXPECT_TRUE(put(*queue, 1, 0, 20000));
}

TEST(Queue, AHandleOfSomethingElseIsRefused) {
  auto member = fresh_pool();
  auto block = member->allocate(100000, false);
  std::memset(block->data, 0, 100000);
  auto handle = member->issue(block->block);
  auto opened = Queue::open(*member, *handle);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.code(), Code::kInvalid);
}

TEST(Queue, ManySendersAndTakersLoseNothing) {
  constexpr uint64_t kSenders = 4, kTakers = 3, kEach = 5000;
  auto member = fresh_pool();
  auto queue = make(*member, 100), results = make(*member);
  std::vector<pid_t> children;
  std::vector<Handle> handles;
  const auto start = [&](const std::function<bool(Queue&, Queue&)>& body) {
    const Handle first = *queue->handle(), second = *results->handle();
    children.push_back(tests::start([&, first, second] {
      auto self = join(*member);
      auto mine = open(*self, first), out = open(*self, second);
      return body(*mine, *out);
    }));
  };
  for (uint64_t s = 0; s < kSenders; ++s)
    start([s](Queue& mine, Queue&) {
      for (uint64_t i = 0; i < kEach; ++i) {
        while (!put(mine, s, i, sizeof(Note) + i % 2000)) mine.wait(Queue::For::kRoom, kSecond);
      }
      return true;
    });
  for (uint64_t t = 0; t < kTakers; ++t)
    start([](Queue& mine, Queue& out) {
      uint64_t next[kSenders] = {};
      for (;;) {
        const auto note = take_within(mine, 30 * kSecond);
        if (!note) return false;
        if (note->sender == kSenders) return true;
        if (note->number < next[note->sender]) return false;  // in order for each sender
        next[note->sender] = note->number + 1;
        if (!put(out, note->sender, note->number)) return false;
      }
    });
  std::vector<std::vector<bool>> seen(kSenders, std::vector<bool>(kEach));
  for (uint64_t i = 0; i < kSenders * kEach; ++i) {
    const auto note = take_within(*results, 30 * kSecond);
    ASSERT_TRUE(note);
    ASSERT_FALSE(seen[note->sender][note->number]);
    seen[note->sender][note->number] = true;
  }
  for (uint64_t t = 0; t < kTakers; ++t) ASSERT_TRUE(put(*queue, kSenders, 0));
  for (const pid_t pid : children) EXPECT_EQ(tests::wait_for(pid), 0);
  EXPECT_TRUE(queue->empty());
  queue.reset();
  results.reset();
  expect_nothing_left(*member);
}

TEST(Queue, AForkedChildSendsInParcelsOfItsOwn) {
  Member* member = pool::adopt(fresh_pool());
  auto queue = make(*member);
  for (uint64_t i = 0; i < 10; ++i) ASSERT_TRUE(put(*queue, 1, i, 500));
  const pid_t pid = tests::start([&] {
    for (uint64_t i = 0; i < 1000; ++i)
      if (!put(*queue, 2, i, 500)) return false;
    return true;
  });
  for (uint64_t i = 10; i < 1000; ++i) ASSERT_TRUE(put(*queue, 1, i, 500));
  EXPECT_EQ(tests::wait_for(pid), 0);
  uint64_t next[3] = {};
  while (const auto note = take(*queue)) ASSERT_EQ(note->number, next[note->sender]++);
  EXPECT_EQ(next[1], 1000U);
  EXPECT_EQ(next[2], 1000U);
  queue.reset();
  expect_nothing_left(*member);
}

TEST(Queue, ASleepingTakerIsWoken) {
  const tests::Watchdog watchdog(60);  // without the wakes it would take twice as long
  auto member = fresh_pool();
  auto queue = make(*member), answers = make(*member, 1);
  const Handle first = *queue->handle(), second = *answers->handle();
  const pid_t pid = tests::start([&] {
    auto self = join(*member);
    auto mine = open(*self, first), out = open(*self, second);
    for (uint64_t i = 0; i < 1000; ++i) {
      const auto note = take_within(*mine, 30 * kSecond);
      if (!note || note->number != i) return false;
      while (!put(*out, 1, i)) out->wait(Queue::For::kRoom, kSecond);
    }
    return true;
  });
  for (uint64_t i = 0; i < 1000; ++i) {
    if (i % 2 == 0) ::usleep(1000);  // it sleeps by now
    ASSERT_TRUE(put(*queue, 1, i));
    if (i % 2 == 1) ::usleep(1000);
    ASSERT_EQ(take_within(*answers, 30 * kSecond)->number, i);
  }
  EXPECT_EQ(tests::wait_for(pid), 0);
}

TEST(Queue, CountsWhatIsDone) {
  auto member = fresh_pool();
  auto queue = make(*member);
  EXPECT_TRUE(queue->all_done());
  EXPECT_FALSE(queue->task_done());
  ASSERT_TRUE(put(*queue, 1, 0));
  ASSERT_TRUE(put(*queue, 1, 1));
  EXPECT_FALSE(queue->all_done());
  EXPECT_TRUE(queue->task_done());
  EXPECT_FALSE(queue->all_done());
  EXPECT_TRUE(queue->task_done());
  EXPECT_TRUE(queue->all_done());
  EXPECT_FALSE(queue->task_done());
}

TEST(Queue, ItsDescriptorIsReadableWhileSomethingIsThere) {
  const tests::Watchdog watchdog(60);
  auto member = fresh_pool();
  auto queue = make(*member);
  auto watch = pool::QueueWatch::start(*queue);
  ASSERT_TRUE(watch.ok());
  const auto readable = [&](int milliseconds) {
    pollfd one{(*watch)->fd(), POLLIN, 0};
    return ::poll(&one, 1, milliseconds) == 1;
  };
  for (uint64_t i = 0; i < 100; ++i) {
    (*watch)->settle();
    ASSERT_FALSE(readable(0));
    const Handle handle = *queue->handle();
    const auto sender = [&] {
      auto self = join(*member);
      auto mine = open(*self, handle);
      return put(*mine, 1, i);
    };
    if (i % 20 == 0) {
      ASSERT_TRUE(tests::succeeds(sender));
    } else {
      member->give_up(handle);
      ASSERT_TRUE(put(*queue, 1, i));
    }
    ASSERT_TRUE(readable(30000));
    ASSERT_EQ(take(*queue)->number, i);
  }
}

TEST(Queue, SaysWhatItCanNotHave) {
  auto member = fresh_pool(uint64_t{16} << 20);
  auto queue = make(*member);
  EXPECT_EQ(queue->reserve(uint64_t{1} << 43).code(), Code::kFull);
  EXPECT_TRUE(tests::succeeds([&] {
    if (!tests::refuse(SYS_clone3, EAGAIN) || !tests::refuse(SYS_clone, EAGAIN)) return false;
    return pool::QueueWatch::start(*queue).code() == Code::kUnsupported;
  }));
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  const tests::Failing failing("os.eventfd", EMFILE);
  EXPECT_EQ(pool::QueueWatch::start(*queue).status().error(), EMFILE);
#endif
}

TEST(Queue, AnEventWakesAllWhoWaitForIt) {
  const tests::Watchdog watchdog(60);
  auto member = fresh_pool();
  auto queue = make(*member, 1);
  ASSERT_TRUE(put(*queue, 1, 1));
  std::atomic<int> awake{0};
  const auto waiting = [&](Queue::For what, auto&& ready) {
    return std::thread([&, what, ready] {
      while (!ready()) queue->wait(what, kSecond);
      ++awake;
    });
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.push_back(waiting(Queue::For::kFlag, [&] { return queue->flag(); }));
  for (int i = 0; i < 3; ++i) threads.push_back(waiting(Queue::For::kAllDone, [&] { return queue->all_done(); }));
  threads.push_back(waiting(Queue::For::kRoom, [&] { return !queue->full(); }));
  ::usleep(30000);
  EXPECT_EQ(awake, 0);
  queue->set_flag(true);
  ASSERT_TRUE(queue->task_done());
  ASSERT_TRUE(take(*queue));
  for (auto& thread : threads) thread.join();
  queue->set_flag(false);
  EXPECT_FALSE(queue->flag());
}

TEST(Queue, IsRefusedWhereItCanNotBe) {
  auto member = fresh_pool(uint64_t{8} << 20);
  auto queue = make(*member);
  Handle handle = *queue->handle();
  auto& cells =
      reinterpret_cast<pool::QueueHeader*>(member->arena().data() + member->arena().extent(queue->ref().block)->offset)
          ->cells;
  for (const uint32_t damaged : {0U, pool::kMostCells + 1}) {
    const uint32_t before = std::exchange(cells, damaged);
    EXPECT_EQ(Queue::open(*member, handle).code(), Code::kInvalid);
    cells = before;
    handle = *queue->handle();
  }
  ASSERT_TRUE(put(*queue, 1, 1));
  EXPECT_TRUE(pool::check(member->arena()).violations.empty());
  member->give_up(handle);
  queue.reset();
  EXPECT_EQ(Queue::open(*member, handle).code(), Code::kStale);
  std::vector<Member::View> all;
  for (auto more = member->allocate(4096, false); more; more = member->allocate(4096, false)) all.push_back(*more);
  EXPECT_EQ(Queue::create(*member, 0).code(), Code::kFull);
}

// A child that is forked while a message is in hand has not got it.
TEST(Queue, AMessageInHandIsNotAForkedChilds) {
  auto member = fresh_pool();
  auto queue = make(*member);
  ASSERT_TRUE(put(*queue, 1, 1));
  auto taken = queue->take();
  auto written = queue->reserve(100);
  std::memset(written->data, 0, 100);
  EXPECT_TRUE(tests::succeeds([&] {
    queue->finish(**taken);
    queue->wait_for_room(*written, 1000);
    return queue->publish(*written).code() == Code::kStale && put(*queue, 2, 2);
  }));
  EXPECT_EQ((*taken)->length, sizeof(Note));
  queue->finish(**taken);
  ASSERT_TRUE(*queue->publish(*written));
  EXPECT_EQ(take(*queue)->number, 2U);
  auto mine = queue->take();
  EXPECT_EQ((*mine)->length, 100U);
  queue->finish(**mine);
  queue.reset();
  expect_nothing_left(*member);
}

}  // namespace
}  // namespace torchshm
