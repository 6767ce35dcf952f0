// What a queue promises: order, nothing lost, nothing left, whoever is killed and wherever.
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

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;
using pool::Queue;
using tests::fresh_pool;
using tests::join;

constexpr uint64_t kSecond = 1'000'000'000;

struct Note {
  uint64_t sender = 0, number = 0, bytes = 0;
};

std::unique_ptr<Queue> make(Member& member, uint64_t maxsize = 0) {
  auto queue = Queue::create(member, maxsize);
  EXPECT_TRUE(queue.ok()) << queue.status().what();
  return queue.take();
}

std::unique_ptr<Queue> open(Member& member, const Handle& handle) {
  auto queue = Queue::open(member, handle);
  EXPECT_TRUE(queue.ok()) << queue.status().what();
  return queue.take();
}

bool put(Queue& queue, uint64_t sender, uint64_t number, uint64_t bytes = sizeof(Note)) {
  auto message = queue.reserve(bytes);
  if (!message) return false;
  const Note note{sender, number, bytes};
  std::memcpy(message->data, &note, sizeof note);
  std::memset(message->data + sizeof note, static_cast<int>(number & 0xff), bytes - sizeof note);
  auto done = queue.publish(*message);
  if (done && *done) return true;
  queue.cancel(*message);
  return false;
}

std::optional<Note> take(Queue& queue) {
  auto message = queue.take();
  EXPECT_TRUE(message.ok()) << message.status().what();
  if (!message || !*message) return std::nullopt;
  Note note;
  std::memcpy(&note, (*message)->data, sizeof note);
  EXPECT_EQ((*message)->length, note.bytes);
  for (uint64_t i = sizeof note; i < note.bytes; i += 97)
    EXPECT_EQ(static_cast<uint64_t>((*message)->data[i]), note.number & 0xff);
  queue.finish(**message);
  return note;
}

// Waits for one.
std::optional<Note> take_within(Queue& queue, uint64_t nanoseconds) {
  const uint64_t end = os::boot_time() + nanoseconds;
  for (;;) {
    if (auto note = take(queue)) return note;
    if (os::boot_time() > end) return std::nullopt;
    queue.wait(Queue::For::kMessage, kSecond / 10);
  }
}

void expect_nothing_left(Member& member) {
  const auto stats = member.stats();
  EXPECT_EQ(stats.blocks, 0U);
  EXPECT_EQ(stats.tickets, 0U);
}

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

// A message that refers to a block of its sender's own, which holds nothing but `number`.
struct Parcelled {
  Queue::Message message;
  Handle handle;
};
std::optional<Parcelled> write(Queue& queue, uint64_t number) {
  const Queue::Busy busy(queue);
  auto block = queue.member().allocate(1 << 20, false, true);
  if (!block) return std::nullopt;
  std::memcpy(block->data, &number, sizeof number);
  auto handle = queue.member().issue(block->block, &queue.ref());
  queue.member().release_made(block->block);
  if (!handle) return std::nullopt;
  const std::array tickets = {*handle};
  auto message = queue.reserve(Handle::kBytes, tickets);
  if (!message) return std::nullopt;
  handle->write(reinterpret_cast<char*>(message->data));
  return Parcelled{*message, *handle};
}

// What it refers to, read and dropped.
std::optional<uint64_t> read(Queue& queue, const Queue::Message& message) {
  auto view = queue.member().redeem(Handle::read(reinterpret_cast<const char*>(message.data)), Mode::kReadWrite);
  if (!view) return std::nullopt;
  uint64_t number = 0;
  std::memcpy(&number, view->data, sizeof number);
  queue.member().release(view->block, Mode::kReadWrite);
  return number;
}

// Puts and takes until no more than that many blocks are live.
bool comes_down_to(Queue& queue, uint64_t blocks) {
  for (const uint64_t end = os::boot_time() + 20 * kSecond; os::boot_time() < end; ::usleep(1000)) {
    if (!put(queue, 9, 9) || !take(queue)) return false;
    queue.close_parcel();
    if (queue.member().stats().blocks <= blocks) return true;
  }
  return false;
}

// Whatever stands in its blocks: an error, or other messages; no crash, no hang, and the pool is sound.
TEST(QueueCorrupt, IsAnErrorAndNoMore) {
  const tests::Watchdog watchdog(110);
  for (uint64_t seed = 1; seed <= 3000; ++seed) {
    std::mt19937_64 random(seed);
    auto member = fresh_pool(uint64_t{64} << 20);
    auto queue = make(*member, random() % 2 == 0 ? 40 : 0);
    for (uint64_t i = 0; i < random() % 300; ++i) {
      ASSERT_TRUE(put(*queue, 1, i, 64 + random() % 3000 * (i % 20 == 0 ? 10 : 0)));
      if (i % 4 != 0) (void)queue->take();
      if (i % 4 != 0 && queue->full()) (void)queue->take();
      if (queue->full()) (void)queue->take();
    }
    (void)queue->publish(write(*queue, 7)->message);
    const Handle handle = *queue->handle();
    // The blocks of the queue: its own, segments, parcels.
    std::vector<uint32_t> blocks = {queue->ref().block};
    for (uint32_t i = 0; i < member->arena().tickets_used(); ++i) {
      const auto ticket = pool::TicketValue::of(member->arena().ticket(i).value.load());
      if (ticket.of_queue()) blocks.push_back(ticket.block);
    }
    for (uint64_t damages = 1 + random() % 6; damages > 0; --damages) {
      const auto extent = *member->arena().extent(blocks[random() % 2 == 0 ? 0 : random() % blocks.size()]);
      const uint64_t words = random() % 2 == 0 ? std::min<uint64_t>(extent.length / 8, 64) : extent.length / 8;
      auto* word = reinterpret_cast<uint64_t*>(member->arena().data() + extent.offset) + random() % words;
      switch (random() % 5) {
        case 0:
          *word = 0;
          break;
        case 1:
          *word = ~uint64_t{0};
          break;
        case 2:
          *word += random() % 5 - 2;
          break;
        case 3:
          *word = random();
          break;
        default:
          *word ^= uint64_t{1} << random() % 64;
      }
    }
    auto second = Queue::open(*member, handle);
    std::vector<Queue*> both = {queue.get()};
    if (second) both.push_back(second->get());
    for (int i = 0; i < 30; ++i) {
      Queue& one = *both[random() % both.size()];
      switch (random() % 7) {
        case 0: {
          auto message = one.reserve(random() % 20000);
          if (!message) break;
          auto done = one.publish(*message);
          if (done && !*done) one.wait_for_room(*message, 1000);
          if (!done || !*done) one.cancel(*message);
          break;
        }
        case 1:
          (void)one.task_done();
          (void)one.all_done();
          break;
        case 2:
          (void)one.size();
          (void)one.full();
          (void)one.empty();
          one.wait(Queue::For::kMessage, 1000);
          break;
        case 3:
          member->arena().header().reaped.fetch_add(1, std::memory_order_relaxed);
          one.salvage();
          break;
        case 4:
          one.close_parcel();
          break;
        default: {
          auto message = one.take();
          if (!message || !*message) break;
          uint64_t sum = 0;
          for (uint64_t at = 0; at < (*message)->length; at += 512) sum += static_cast<uint64_t>((*message)->data[at]);
          if (sum % 3 == 0) one.keep_for_later(**message);
          if (sum % 3 == 1) one.drop_rest(**message);
          one.finish(**message);
        }
      }
    }
  }
}

TEST(QueueSalvage, GivesBackWhatSomebodyHadInHandWhoHasGone) {
  auto member = fresh_pool();
  auto queue = make(*member);
  ASSERT_TRUE(queue->publish(write(*queue, 1)->message));
  ASSERT_TRUE(queue->publish(write(*queue, 2)->message));
  const pid_t pid = tests::start([&, handle = *queue->handle()] {
    auto self = join(*member);
    auto mine = open(*self, handle);
    if (!put(*mine, 3, 3, 700) || !put(*mine, 3, 4, 30000) || !mine->publish(write(*mine, 5)->message)) return false;
    if (!mine->take()->has_value() || !write(*mine, 6) || !mine->reserve(100000)) return false;
    std::raise(SIGKILL);
    return true;
  });
  ASSERT_TRUE(WIFSIGNALED(tests::wait_for(pid)));
  (void)member->reap();
  EXPECT_GT(member->stats().live, 4U << 20);  // 1, 2, 5, 6, and parcels
  auto second = queue->take();
  ASSERT_TRUE(*second);
  EXPECT_EQ(read(*queue, **second), 2U);
  queue->finish(**second);
  EXPECT_EQ(take(*queue)->number, 3U);
  EXPECT_EQ(take(*queue)->number, 4U);
  auto last = queue->take();
  ASSERT_TRUE(*last);
  EXPECT_EQ(read(*queue, **last), 5U);
  queue->finish(**last);
  EXPECT_TRUE(queue->empty());
  EXPECT_TRUE(comes_down_to(*queue, 2));  // the queue, and a segment
  queue.reset();
  expect_nothing_left(*member);
}

TEST(QueueSalvage, LeavesWhatTheLivingHaveInHand) {
  auto member = fresh_pool();
  auto queue = make(*member, 3);
  const auto join_beside = [&] { return Member::beside(*member).take(); };
  auto taking = join_beside(), writing = join_beside(), waiting = join_beside();
  auto taker = open(*taking, *queue->handle()), writer = open(*writing, *queue->handle()),
       waiter = open(*waiting, *queue->handle());
  for (const uint64_t number : {1, 2, 3}) ASSERT_TRUE(*queue->publish(write(*queue, number)->message));
  const auto parked = write(*waiter, 4);
  ASSERT_FALSE(*waiter->publish(parked->message));  // full
  std::atomic<bool> room{false};
  std::thread parking([&] {
    while (!room) waiter->wait_for_room(parked->message, kSecond / 10);
  });
  auto taken = taker->take();
  ASSERT_TRUE(*taken);
  ASSERT_TRUE(*queue->publish(write(*queue, 5)->message));  // full again
  const auto written = write(*writer, 6);
  const auto lost = write(*queue, 7);  // by somebody who
  queue->finish(lost->message);        // has died since
  const auto look = [&] {
    member->arena().header().reaped.fetch_add(1, std::memory_order_relaxed);  // as if somebody else had died
    ::usleep(30000);
    queue->salvage();
    return member->stats().blocks;
  };
  const uint64_t before = member->stats().blocks;
  EXPECT_EQ(look(), before);  // two are busy
  EXPECT_EQ(read(*taker, **taken), 1U);
  taker->finish(**taken);
  EXPECT_EQ(look(), before - 1);  // what was taken is read; one is busy still
  writer->cancel(written->message);
  writing->give_up(written->handle);
  // Now nobody is. What waits for room is not in hand, and what is unread stays.
  EXPECT_EQ(look(), before - 3);
  for (const uint64_t number : {2, 3, 5}) {
    auto message = queue->take();
    ASSERT_TRUE(*message);
    EXPECT_EQ(read(*queue, **message), number);
    queue->finish(**message);
  }
  room = true;
  parking.join();
  ASSERT_TRUE(*waiter->publish(parked->message));
  (void)look();
  auto message = queue->take();
  EXPECT_EQ(read(*queue, **message), 4U);
  queue->finish(**message);
  for (auto* one : {&taker, &writer, &waiter, &queue}) one->reset();
  expect_nothing_left(*member);
}

TEST(QueueSalvage, LeavesWhatIsReadFromACopyOfTheMessage) {
  auto member = fresh_pool();
  auto queue = make(*member);
  ASSERT_TRUE(*queue->publish(write(*queue, 8)->message));
  auto taken = queue->take();
  char copy[Handle::kBytes];
  std::memcpy(copy, (*taken)->data, sizeof copy);
  queue->keep_for_later(**taken);
  queue->finish(**taken);
  member->arena().header().reaped.fetch_add(1, std::memory_order_relaxed);
  queue->salvage();
  queue->salvage();
  auto view = member->redeem(Handle::read(copy), Mode::kReadWrite);
  ASSERT_TRUE(view.ok());
  member->release(view->block, Mode::kReadWrite);
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

// Somebody who gives back and is stopped at that point of it; until go_on().
class StoppedSalvage {
 public:
  StoppedSalvage(Member& member, Queue& queue, const char* point) {
    member.arena().header().reaped.fetch_add(1, std::memory_order_relaxed);  // as if somebody had died
    pid_ = tests::start([&, handle = *queue.handle()] {
      auto self = join(member);
      auto mine = open(*self, handle);
      failpoint::Plan plan;
      plan.action = failpoint::Action::kStop;
      plan.only = point;
      failpoint::arm(plan);
      mine->salvage();
      return true;
    });
    int status = 0;
    stopped_ = ::waitpid(pid_, &status, WUNTRACED) == pid_ && WIFSTOPPED(status);
  }
  bool stopped() const { return stopped_; }
  int go_on() const {
    ::kill(pid_, SIGCONT);
    return tests::wait_for(pid_);
  }

 private:
  pid_t pid_;
  bool stopped_;
};

TEST(QueueSalvage, LeavesAParcelThatIsFilledAndClosedMeanwhile) {
  auto member = fresh_pool();
  for (const char* point : {"queue.salvage_begun", "queue.salvage_idle", "queue.salvage_parked", "queue.salvage"}) {
    auto queue = make(*member);
    ASSERT_TRUE(put(*queue, 1, 0));
    ASSERT_TRUE(take(*queue));
    const StoppedSalvage other(*member, *queue, point);
    ASSERT_TRUE(other.stopped()) << point;
    ASSERT_TRUE(put(*queue, 1, 1, 700));
    queue->close_parcel();
    EXPECT_EQ(other.go_on(), 0);
    auto block = member->allocate(60000, false);  // where the parcel would have been
    std::memset(block->data, 0xff, 60000);
    const auto note = take(*queue);
    ASSERT_TRUE(note) << point;
    EXPECT_EQ(note->number, 1U);
    member->release(block->block, Mode::kReadWrite);
    queue.reset();
    expect_nothing_left(*member);
  }
}

TEST(QueueSalvage, LeavesWhatIsTakenMeanwhileToBeReadLater) {
  auto member = fresh_pool();
  for (const char* point : {"queue.salvage_begun", "queue.salvage_idle", "queue.salvage_parked", "queue.salvage"}) {
    auto queue = make(*member);
    ASSERT_TRUE(*queue->publish(write(*queue, 8)->message));
    const StoppedSalvage other(*member, *queue, point);
    ASSERT_TRUE(other.stopped()) << point;
    auto taken = queue->take();
    char copy[Handle::kBytes];
    std::memcpy(copy, (*taken)->data, sizeof copy);
    queue->keep_for_later(**taken);
    queue->finish(**taken);
    EXPECT_EQ(other.go_on(), 0);
    auto view = member->redeem(Handle::read(copy), Mode::kReadWrite);
    ASSERT_TRUE(view.ok()) << point << ": " << view.status().what();
    member->release(view->block, Mode::kReadWrite);
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
