// What a pool promises to processes that behave.
#include <csignal>
#include <cstring>
#include <random>
#include <vector>

#include "processes.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;
using tests::fresh_pool;
using tests::join;

TEST(Pool, GivesBlocksOfEverySizeWithAtMostAQuarterOfWaste) {
  auto member = fresh_pool();
  for (uint64_t bytes = 4096; bytes < (uint64_t{20} << 20); bytes += bytes / 7 + 1) {
    auto block = member->allocate(bytes, false);
    ASSERT_TRUE(block.ok()) << bytes << block.status().what();
    EXPECT_GE(block->length, bytes);
    EXPECT_LE(static_cast<double>(block->length), 1.25 * static_cast<double>(bytes)) << bytes;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(block->data) % 64, 0U);
    std::memset(block->data, 1, bytes);
    member->release(block->block, Mode::kReadWrite);
  }
  EXPECT_EQ(member->stats().blocks, 0U);
  EXPECT_EQ(member->stats().live, 0U);
}

TEST(Pool, NeverHandsTheSameByteToTwoBlocks) {
  auto member = fresh_pool(uint64_t{64} << 20);
  std::mt19937_64 random(7);
  struct Held {
    uint32_t block;
    std::byte* data;
    uint64_t length;
    unsigned char mark;
  };
  std::vector<Held> held;
  for (int step = 0; step < 20000; ++step) {
    if (held.size() < 60 && random() % 3 != 0) {
      const uint64_t bytes = uint64_t{1} << (random() % 21);
      auto block = member->allocate(bytes + random() % bytes, random() % 4 == 0);
      if (!block) continue;  // full: allowed here
      const auto mark = static_cast<unsigned char>(random());
      std::memset(block->data, mark, block->length);
      held.push_back({block->block, block->data, block->length, mark});
    } else if (!held.empty()) {
      const size_t i = random() % held.size();
      const Held h = held[i];
      for (uint64_t at = 0; at < h.length; at += 509) ASSERT_EQ(static_cast<unsigned char>(h.data[at]), h.mark);
      ASSERT_EQ(static_cast<unsigned char>(h.data[h.length - 1]), h.mark);
      member->release(h.block, Mode::kReadWrite);
      held[i] = held.back();
      held.pop_back();
    }
  }
  EXPECT_EQ(member->stats().blocks, held.size());
}

TEST(Pool, FindsABlockByAnyAddressInIt) {
  auto member = fresh_pool();
  for (const uint64_t bytes : {uint64_t{5000}, uint64_t{5000}, uint64_t{70000}, uint64_t{3} << 20, uint64_t{5000}}) {
    auto block = member->allocate(bytes, false);
    ASSERT_TRUE(block.ok());
    for (const uint64_t at : {uint64_t{0}, bytes / 2, bytes - 1}) {
      const auto found = member->find(block->data + at);
      ASSERT_TRUE(found.has_value()) << bytes << " " << at;
      EXPECT_EQ(found->block, block->block);
      EXPECT_EQ(found->offset, at);
    }
  }
  int outside = 0;
  EXPECT_FALSE(member->find(&outside).has_value());
}

TEST(Pool, HandsABlockToAnotherMemberWithoutACopy) {
  auto sender = fresh_pool();
  auto receiver = join(*sender);
  auto block = sender->allocate(100000, false);
  ASSERT_TRUE(block.ok());
  std::memset(block->data, 42, 100000);
  auto handle = sender->issue(block->block);
  ASSERT_TRUE(handle.ok());
  sender->release(block->block, Mode::kReadWrite);
  auto view = receiver->redeem(*handle, Mode::kReadWrite);
  ASSERT_TRUE(view.ok()) << view.status().what();
  EXPECT_EQ(static_cast<int>(view->data[99999]), 42);
  EXPECT_EQ(receiver->stats().tickets, 0U);
  receiver->release(view->block, Mode::kReadWrite);
  EXPECT_EQ(receiver->stats().blocks, 0U);
}

TEST(Pool, ReusesAFreedBlockOfAnotherMemberForDifferentSizes) {
  auto sender = fresh_pool();
  auto receiver = join(*sender);
  uint64_t high = 0;
  for (int i = 0; i < 200; ++i) {
    auto block = sender->allocate((uint64_t{8} << 20) + static_cast<uint64_t>(i % 17) * 4096, false);
    ASSERT_TRUE(block.ok());
    auto handle = sender->issue(block->block);
    sender->release(block->block, Mode::kReadWrite);
    auto view = receiver->redeem(*handle, Mode::kReadWrite);
    ASSERT_TRUE(view.ok());
    receiver->release(view->block, Mode::kReadWrite);
    high = std::max(high, sender->stats().committed);
  }
  EXPECT_LE(high, uint64_t{10} << 20);
}

TEST(Pool, RefusesWhatIsNotAHandle) {
  auto member = fresh_pool();
  auto block = member->allocate(5000, false);
  auto handle = member->issue(block->block);
  ASSERT_TRUE(handle.ok());
  Handle forged = *handle;
  forged.generation += 1;
  auto other = join(*member);
  EXPECT_EQ(other->redeem(forged, Mode::kReadWrite).code(), Code::kStale);
  forged = *handle;
  forged.block = 0xffffffff;
  EXPECT_EQ(other->redeem(forged, Mode::kReadWrite).code(), Code::kInvalid);
  forged = *handle;
  forged.ticket = 0xffffffff;
  EXPECT_EQ(other->redeem(forged, Mode::kReadWrite).code(), Code::kInvalid);
  forged = *handle;
  forged.pool_id ^= 1;
  EXPECT_EQ(other->redeem(forged, Mode::kReadWrite).code(), Code::kForeign);
}

TEST(Pool, UnpicklingTwiceWorksWhileTheBlockLivesAndIsStaleAfterwards) {
  auto sender = fresh_pool();
  auto receiver = join(*sender);
  auto block = sender->allocate(5000, false);
  auto first = sender->issue(block->block);
  auto second = sender->issue(block->block);
  sender->release(block->block, Mode::kReadWrite);
  auto one = receiver->redeem(*first, Mode::kReadWrite);
  auto again = receiver->redeem(*first, Mode::kReadWrite);
  ASSERT_TRUE(one.ok());
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(receiver->stats().tickets, 1U);  // the second one was not used up by the repetition
  receiver->release(one->block, Mode::kReadWrite);
  receiver->release(again->block, Mode::kReadWrite);
  auto two = receiver->redeem(*second, Mode::kReadWrite);
  ASSERT_TRUE(two.ok());
  receiver->release(two->block, Mode::kReadWrite);
  EXPECT_EQ(receiver->redeem(*first, Mode::kReadWrite).code(), Code::kStale);
}

TEST(Pool, SaysWhoHoldsWhatWhenItIsFull) {
  auto member = fresh_pool(uint64_t{8} << 20);
  auto block = member->allocate(uint64_t{6} << 20, false);
  ASSERT_TRUE(block.ok());
  auto more = member->allocate(uint64_t{6} << 20, false);
  ASSERT_EQ(more.code(), Code::kFull);
  EXPECT_NE(more.status().what().find("pid " + std::to_string(::getpid())), std::string::npos) << more.status().what();
  EXPECT_NE(more.status().what().find("limit"), std::string::npos);
  member->release(block->block, Mode::kReadWrite);
  EXPECT_TRUE(member->allocate(uint64_t{6} << 20, false).ok());
}

TEST(Pool, TakesTicketsOfTheDeadBackOnlyWhenFull) {
  auto member = fresh_pool(uint64_t{8} << 20);
  ASSERT_TRUE(tests::succeeds([&] {
    auto sender = join(*member);
    auto block = sender->allocate(uint64_t{5} << 20, false);
    return block.ok() && sender->issue(block->block).ok();
  }));
  EXPECT_EQ(member->stats().tickets, 1U);  // the sender is gone, its message may still come
  EXPECT_EQ(member->stats().blocks, 1U);
  EXPECT_TRUE(member->allocate(uint64_t{5} << 20, false).ok());
  EXPECT_EQ(member->stats().tickets, 0U);
}

TEST(Pool, AMessageOutlivesItsSender) {
  auto member = fresh_pool();
  Handle handle;
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_TRUE(tests::succeeds([&] {
    auto sender = join(*member);
    auto block = sender->allocate(300000, false);
    std::memset(block->data, 9, 300000);
    auto issued = sender->issue(block->block);
    return ::write(ends[1], &*issued, sizeof(Handle)) == sizeof(Handle);
  }));
  ASSERT_EQ(::read(ends[0], &handle, sizeof handle), static_cast<ssize_t>(sizeof handle));
  (void)member->reap();
  auto view = member->redeem(handle, Mode::kReadWrite);
  ASSERT_TRUE(view.ok()) << view.status().what();
  EXPECT_EQ(static_cast<int>(view->data[299999]), 9);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(Pool, CopyOnWriteStaysPrivateAndDoesNotShadowTheNextBlock) {
  auto member = fresh_pool();
  auto block = member->allocate(10000, true);
  std::memset(block->data, 1, 10000);
  auto copy = member->view(block->block, Mode::kCopyOnWrite);
  ASSERT_TRUE(copy.ok());
  EXPECT_FALSE(os::privately_modified(copy->data, copy->length));
  copy->data[0] = std::byte{2};
  EXPECT_EQ(static_cast<int>(block->data[0]), 1);
  EXPECT_TRUE(os::privately_modified(copy->data, copy->length));
  member->release(block->block, Mode::kCopyOnWrite);
  EXPECT_FALSE(os::privately_modified(copy->data, copy->length));
  auto again = member->view(block->block, Mode::kCopyOnWrite);
  EXPECT_EQ(static_cast<int>(again->data[0]), 1);
}

TEST(Pool, RoomThatASleepingMemberHasFreedIsThereForOthers) {
  auto member = fresh_pool(uint64_t{16} << 20);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  std::vector<Handle> handles(100);
  const auto bytes = static_cast<ssize_t>(handles.size() * sizeof(Handle));
  const pid_t pid = tests::start([&] {
    auto worker = join(*member);
    for (Handle& handle : handles) {
      auto block = worker->allocate(100000, false);
      handle = *worker->issue(block->block);
      worker->release(block->block, Mode::kReadWrite);
    }
    if (::write(ends[1], handles.data(), static_cast<size_t>(bytes)) != bytes) return false;
    std::raise(SIGSTOP);
    // Awake again: its own chunks are gone, and it gets others.
    auto block = worker->allocate(100000, false);
    if (!block) return false;
    std::memset(block->data, 3, 100000);
    return worker->stats().blocks == 2;
  });
  ASSERT_EQ(::read(ends[0], handles.data(), static_cast<size_t>(bytes)), bytes);
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
  for (const Handle& handle : handles) {
    auto view = member->redeem(handle, Mode::kReadWrite);
    ASSERT_TRUE(view.ok());
    member->release(view->block, Mode::kReadWrite);
  }
  auto large = member->allocate(uint64_t{14} << 20, false);
  EXPECT_TRUE(large.ok()) << large.status().what();
  ::kill(pid, SIGCONT);
  status = tests::wait_for(pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(Pool, TrimGivesEverythingBack) {
  auto member = fresh_pool();
  std::vector<uint32_t> blocks;
  for (const uint64_t bytes : {uint64_t{4096}, uint64_t{100000}, uint64_t{6} << 20})
    blocks.push_back(member->allocate(bytes, false)->block);
  for (const uint32_t block : blocks) member->release(block, Mode::kReadWrite);
  EXPECT_GT(member->stats().committed, 0U);
  EXPECT_GT(member->trim(0), 0U);
  EXPECT_EQ(member->stats().committed, 0U);
}

TEST(Pool, HoldsAMillionBlocksAtTwoPercent) {
  auto member = fresh_pool(uint64_t{6} << 30);
  constexpr uint32_t kBlocks = 1000000;
  for (uint32_t i = 0; i < kBlocks; ++i) ASSERT_TRUE(member->allocate(4096, false).ok()) << i;
  const auto stats = member->stats();
  EXPECT_EQ(stats.blocks, kBlocks);
  EXPECT_LE(static_cast<double>(stats.control), 0.02 * static_cast<double>(stats.live));
}

TEST(Pool, TakesManyLeases) {
  auto member = fresh_pool();
  std::vector<std::unique_ptr<Member>> members;
  for (int i = 0; i < 300; ++i) members.push_back(join(*member));
  EXPECT_EQ(member->stats().leases.size(), 301U);
}

}  // namespace
}  // namespace torchshm
