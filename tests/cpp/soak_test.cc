// Many processes at once, killed and stopped at random: nobody sees other data, nobody hangs, everything comes back.
//
// TORCHSHM_SOAK_SECONDS sets how long (default 6), TORCHSHM_SOAK_SEED which sequence.
#include <fcntl.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "pool/members.h"
#include "processes.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;

constexpr int kWorkers = 6;

struct Message {
  Handle handle;
  uint64_t seed;
  uint64_t bytes;
};

struct Held {
  uint32_t block;
  std::byte* data;
  uint64_t bytes;
  uint64_t seed;
};

uint64_t word_at(uint64_t seed, uint64_t i) { return (seed + i) * 0x9e3779b97f4a7c15; }

void fill(const Held& held) {
  for (uint64_t i = 0; i < held.bytes / 8; ++i) {
    const uint64_t word = word_at(held.seed, i);
    std::memcpy(held.data + i * 8, &word, 8);
  }
}

bool intact(const Held& held) {
  const uint64_t words = held.bytes / 8, step = words > 4096 ? 61 : 1;
  for (uint64_t i = 0; i < words; i += step) {
    uint64_t word = 0;
    std::memcpy(&word, held.data + i * 8, 8);
    if (word != word_at(held.seed, i)) {
      std::fprintf(stderr, "pid %d: block %u of %lu bytes differs at word %lu: %lx, expected %lx\n", ::getpid(),
                   held.block, held.bytes, i, word, word_at(held.seed, i));
      return false;
    }
  }
  return true;
}

class Worker {
 public:
  Worker(Member& survivor, const std::array<std::array<int, 2>, kWorkers>& pipes, int index, uint64_t seed)
      : member_(*pool::adopt(tests::join(survivor))), pipes_(pipes), index_(index), random_(seed) {}

  bool run() {
    for (;;) {
      ::alarm(30);
      bool fine = true;
      switch (random_() % 16) {
        case 0:
        case 1:
        case 2:
        case 3:
          allocate();
          break;
        case 4:
        case 5:
        case 6:
        case 7:
          send();
          break;
        case 8:
        case 9:
        case 10:
        case 11:
          fine = receive();
          break;
        case 12:
        case 13:
          fine = release();
          break;
        case 14:
          fine = random_() % 20 != 0 || fork_and_check();
          break;
        default:
          if (random_() % 30 == 0) (void)member_.trim(random_() % 2 == 0 ? 0 : uint64_t{4} << 20);
          if (random_() % 30 == 0) (void)member_.stats();
          break;
      }
      if (!fine) return false;
    }
  }

 private:
  void allocate() {
    if (held_.size() >= 24) return;
    const uint64_t bytes = (uint64_t{64} << (random_() % 15)) + random_() % 4096;
    auto view = member_.allocate(bytes, random_() % 4 == 0);
    if (!view) return;  // full is allowed
    held_.push_back({view->block, view->data, bytes, random_()});
    fill(held_.back());
  }

  void send() {
    if (held_.empty()) return;
    const Held& held = held_[random_() % held_.size()];
    auto handle = member_.issue(held.block);
    if (!handle) return;
    const Message message{*handle, held.seed, held.bytes};
    // A full pipe loses the message, as a killed receiver would.
    (void)!::write(pipes_[random_() % kWorkers][1], &message, sizeof message);
  }

  bool receive() {
    Message message{};
    if (held_.size() >= 24 ||
        ::read(pipes_[static_cast<size_t>(index_)][0], &message, sizeof message) != sizeof message)
      return true;
    auto view = member_.redeem(message.handle, Mode::kReadWrite);
    if (!view) {
      // Only a full pool takes tickets back.
      return view.code() == Code::kStale;
    }
    held_.push_back({view->block, view->data, message.bytes, message.seed});
    return intact(held_.back());
  }

  bool release() {
    if (held_.empty()) return true;
    const size_t i = random_() % held_.size();
    const bool fine = intact(held_[i]);
    member_.release(held_[i].block, Mode::kReadWrite);
    held_[i] = held_.back();
    held_.pop_back();
    return fine;
  }

  bool fork_and_check() {
    const pid_t pid = ::fork();
    if (pid == 0) {
      bool fine = true;
      for (const Held& held : held_) fine = intact(held) && fine;
      for (const Held& held : held_) member_.release(held.block, Mode::kReadWrite);
      ::_exit(fine ? 0 : 1);
    }
    // The parent goes on and drops what the child still looks at.
    if (!release() || !release()) return false;
    int status = 0;
    while (::waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    return !WIFEXITED(status) || WEXITSTATUS(status) == 0;
  }

  Member& member_;
  const std::array<std::array<int, 2>, kWorkers>& pipes_;
  int index_;
  std::mt19937_64 random_;
  std::vector<Held> held_;
};

TEST(Soak, RandomDeathsLeaveNothingBehindAndDamageNothing) {
  const char* seconds = std::getenv("TORCHSHM_SOAK_SECONDS");
  const char* chosen = std::getenv("TORCHSHM_SOAK_SEED");
  const uint64_t seed = chosen != nullptr ? std::strtoull(chosen, nullptr, 10) : 1;
  std::mt19937_64 random(seed);
  auto survivor = tests::fresh_pool(uint64_t{48} << 20);
  std::array<std::array<int, 2>, kWorkers> pipes{};
  for (auto& ends : pipes) ASSERT_EQ(::pipe2(ends.data(), O_NONBLOCK), 0);
  auto kept = survivor->allocate(200000, false);
  const Held mine{kept->block, kept->data, 200000, 99};
  fill(mine);

  std::array<pid_t, kWorkers> workers{};
  uint64_t kills = 0, born = 0;
  const auto spawn = [&](int i) {
    ++born;
    return tests::start([&, i] { return Worker(*survivor, pipes, i, seed * 1000003 + born).run(); });
  };
  for (int i = 0; i < kWorkers; ++i) workers[static_cast<size_t>(i)] = spawn(i);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds != nullptr ? std::atoi(seconds) : 6);
  bool failed = false;
  while (std::chrono::steady_clock::now() < end && !failed) {
    ::usleep(static_cast<useconds_t>(random() % 12000));
    const auto i = static_cast<size_t>(random() % kWorkers);
    if (random() % 5 == 0) {
      ::kill(workers[i], SIGSTOP);
      ::usleep(static_cast<useconds_t>(random() % 5000));
      ::kill(workers[i], SIGCONT);
      continue;
    }
    ::kill(workers[i], SIGKILL);
    const int status = tests::wait_for(workers[i]);
    failed = WIFEXITED(status);  // a worker only ends by itself when it has seen something wrong
    failed = failed || (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL);
    if (failed) ADD_FAILURE() << "worker ended with status " << status << ", seed " << seed;
    ++kills;
    if (random() % 3 == 0) (void)survivor->stats();
    EXPECT_TRUE(intact(mine));
    workers[i] = spawn(static_cast<int>(i));
  }
  for (const pid_t pid : workers) {
    ::kill(pid, SIGKILL);
    (void)tests::wait_for(pid);
  }
  // Children that workers had forked may need a moment to end.
  for (int i = 0; i < 200 && survivor->stats().leases.size() > 1; ++i) ::usleep(10000);
  EXPECT_EQ(survivor->stats().leases.size(), 1U);
  survivor->set_ticket_age(0);
  auto all = survivor->allocate(uint64_t{45} << 20, false);  // takes every ticket back that is in the way
  EXPECT_TRUE(all.ok()) << all.status().what();
  if (all) survivor->release(all->block, Mode::kReadWrite);
  const auto stats = survivor->stats();
  EXPECT_LE(stats.blocks, 1 + stats.tickets);  // nothing is live but what is ours and what unreceived messages keep
  EXPECT_TRUE(intact(mine));
  std::printf("%lu kills, %lu reaped, %lu tickets taken back\n", kills, stats.reaped, stats.taken_back);
  for (auto& ends : pipes) {
    ::close(ends[0]);
    ::close(ends[1]);
  }
}

}  // namespace
}  // namespace torchshm
