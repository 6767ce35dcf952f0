// What the dead had in hand comes back while the queue lives, and nothing of the living; and a damaged queue is an error.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>
#include <thread>

#include "base/failpoint.h"
#include "os/futex.h"
#include "pool/members.h"
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
using tests::open;
using tests::put;
using tests::read;
using tests::take;
using tests::write;

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

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

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

}  // namespace
}  // namespace torchshm
