// What goes on beside a trial: the survivor's work, and what others do while one is stopped.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <climits>
#include <random>

#include "points_session.h"
#include "pool/checker.h"

namespace torchshm::torture {

using pool::Lease;
using pool::Mode;

namespace {

void wait_on(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec most{0, 50'000'000};
  (void)::syscall(SYS_futex, &word, FUTEX_WAIT, value, &most, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word) { (void)::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void rest(std::atomic<uint32_t>& word) {
  const timespec most{0, 50'000};
  (void)::syscall(SYS_futex, &word, FUTEX_WAIT, 0, &most, nullptr, 0);
}

uint64_t intent_block(const Lease& lease) {
  const uint64_t intent = lease.intent.load();
  return intent >> 32 == 0 ? ~uint64_t{0} : (intent & 0xffffffff);
}

}  // namespace

void Session::survive(uint64_t seed) {
  Board& board = *here.board;
  std::mt19937_64 random(seed);
  Scene s(scene_->data_fd, scene_->control_fd);
  s.seed = seed;
  s.join();
  if (!s.fine()) ::_exit(1);
  const auto allocate = [&](uint64_t bytes) {
    auto view = s.member->allocate(bytes, random() % 4 == 0);
    if (!view) {
      if (view.code() != Code::kFull) s.wrong("survivor: allocate: %s", view.status().what().c_str());
      return;
    }
    s.keep(*view, bytes, random() >> 1);
    fill(s.held.back());
  };
  allocate(30000);
  if (s.held.empty()) ::_exit(1);
  // held[0] stays to the end; the rest comes and goes.
  while (s.fine() && board.leave.load() == 0) {
    ::alarm(kSeconds);
    if (board.park.load() != 0) {
      ::alarm(0);
      board.survivor_blocks.store(static_cast<uint32_t>(s.held.size()));
      board.parked.store(1);
      wake(board.parked);
      while (board.park.load() != 0 && board.leave.load() == 0) wait_on(board.park, 1);
      board.parked.store(0);
      continue;
    }
    if (subject().work && random() % 2 == 0) subject().work(s, random);
    if (!intact(s.held[0])) s.wrong("survivor: block %u, held throughout, has changed", s.held[0].block);
    switch (random() % 8) {
      case 0:
      case 1:
        // Growth would reap; its small blocks have room in the chunk that it has.
        if (s.held.size() < 6)
          allocate(random() % 8 == 0 && board.leave_dead.load() == 0 ? kLargeBytes
                                                                     : 64 + (uint64_t{1} << random() % 16));
        break;
      case 2:
      case 3:
        if (s.held.size() > 1) s.release(1 + random() % (s.held.size() - 1));
        break;
      case 4:
        // Sent and let go of: only the message keeps it. A quarter of the street is enough.
        if (s.held.size() > 1) {
          const size_t i = 1 + random() % (s.held.size() - 1);
          if (board.street[0].state.load() == kNothing || random() % 4 == 0) (void)s.post(s.held[i]);
          s.release(i);
        }
        break;
      case 5:
      case 6: {
        Message& message = board.street[random() % kStreet];
        uint32_t expected = kUp;
        if (!message.state.compare_exchange_strong(expected, kClaimed)) break;
        auto view = s.member->redeem(message.handle, random() % 2 == 0 ? Mode::kRead : Mode::kReadWrite);
        if (view) {
          const Held got{view->block, Mode::kRead, view->data, message.bytes, message.seed};
          if (!intact(got)) s.wrong("survivor: block %u was received with other data", view->block);
          s.member->release(view->block, Mode::kReadWrite);
        } else if (board.tolerant.load() == 0 || view.code() != Code::kStale) {
          s.wrong("survivor: a message was lost: %s", view.status().what().c_str());
        }
        message.state.store(kNothing);
        break;
      }
      default: {
        const auto rare = random() % 64;
        if (board.leave_dead.load() == 0) {
          if (rare < 4) (void)s.member->reap();
          if (rare == 4) (void)s.member->stats();
          if (rare == 5) (void)s.member->trim(uint64_t{1} << 20);
        }
        auto handle = s.member->issue(s.held[0].block);
        if (!handle) break;
        auto view = s.member->redeem(*handle, Mode::kReadWrite);
        if (!view) {
          s.wrong("survivor: redeem: %s", view.status().what().c_str());
        } else {
          s.member->release(view->block, Mode::kReadWrite);
        }
        break;
      }
    }
    // Short rests leave the processor to those that are killed; waking up it gets between any two of their steps.
    if (board.survivor_operations.fetch_add(1, std::memory_order_relaxed) % 4 == 3) rest(board.park);
  }
  if (s.fine()) s.release_all();
  s.own.reset();
  ::_exit(s.fine() ? 0 : 1);
}

void Session::park() {
  if (survivor_ < 0) return;
  Board& board = *here.board;
  board.park.store(1);
  while (board.parked.load() == 0) {
    wait_on(board.parked, 0);
    int status = 0;
    if (board.parked.load() == 0 && ::waitpid(survivor_, &status, WNOHANG) == survivor_) {
      wrong("the survivor ended with status %d: %s", status, board.wrong);
      survivor_ = -1;
      return;
    }
  }
}

void Session::unpark() {
  here.board->park.store(0);
  wake(here.board->park);
}

// It leaves, and must have found nothing wrong.
void Session::dismiss() {
  Board& board = *here.board;
  board.leave.store(1);
  wake(board.park);
  const int status = wait_for(survivor_);
  survivor_ = -1;
  if (status != 0) wrong("the survivor ended with status %d: %s", status, board.wrong);
}

// Others go on, and take nothing from the sleeper.
void Session::while_stopped(const Operation& operation, int rounds) {
  Board& board = *here.board;
  Scene& d = *scene_;
  pool::Arena& arena = member_->arena();
  const uint32_t slot = board.actor_slot.load() - 1;
  std::vector<uint64_t> bits;
  const auto read_bits = [&] {
    std::vector<uint64_t> now;
    if (slot < pool::kMaxLeases) {
      for (uint64_t i = 0; i < arena.pages() / 64; ++i) now.push_back(arena.ledger(slot, i).load());
    }
    return now;
  };
  bits = read_bits();
  const uint64_t before = board.survivor_operations.load();
  const uint32_t was_tolerant = board.tolerant.exchange(1);
  const uint64_t warm = arena.header().warm.exchange(uint64_t{1} << 40);
  const size_t held = d.held.size();
  // In one round what is taken from the sleeper by mistake is left free; in two it is used again.
  for (int round = 0; round < rounds; ++round) {
    (void)driver->reap();
    d.hold(kSmallBytes + static_cast<uint64_t>(round) * 60000);
    d.hold(kLargeBytes);
    // In a full pool too: with the limit reached everything is looked for that nobody uses.
    auto most = driver->allocate(uint64_t{8} << 20, false);
    if (most) driver->release(most->block, Mode::kReadWrite);
    if (!most && most.code() != Code::kFull) wrong("others can't allocate: %s", most.status().what().c_str());
    while (d.held.size() > held) {
      auto handle = driver->issue(d.held.back().block);
      if (!handle) {
        wrong("others can't send: %s", handle.status().what().c_str());
        break;
      }
      auto view = driver->redeem(*handle, Mode::kReadWrite);
      if (view) driver->release(view->block, Mode::kReadWrite);
      d.release(d.held.size() - 1);
    }
    (void)driver->trim(0);
    (void)driver->stats();
    if (subject().while_stopped) {
      if (const std::string what = subject().while_stopped(d, rounds); !what.empty())
        wrong("stopped at %s: %s", board.last[0], what.c_str());
    }
    const pool::CheckReport report = pool::check(arena);
    if (!report.ok()) wrong("stopped at %s, the checker: %s", board.last[0], report.first().c_str());
  }
  arena.header().warm.store(warm);
  if ((operation.flags & kParked) == 0) {
    // The alarm bounds it.
    while (board.survivor_operations.load() < before + 20 && survivor_ > 0) {
      ::usleep(200);
      int status = 0;
      if (::waitpid(survivor_, &status, WNOHANG) == survivor_) {
        wrong("the survivor ended with status %d: %s", status, board.wrong);
        survivor_ = -1;
      }
    }
  }
  board.tolerant.store(was_tolerant);
  if (slot < pool::kMaxLeases) {
    const uint64_t word = arena.lease(slot).word.load();
    // One that is leaving has no sign of life any more.
    if (word != board.actor_word.load() && operation.name != std::string("janitor"))
      wrong("stopped at %s, its lease was taken", board.last[0]);
    if (read_bits() != bits) wrong("stopped at %s, what it holds was taken", board.last[0]);
  }
  const uint32_t victim = board.victim_slot.load() - 1;
  if ((operation.flags & kReaps) == 0 || victim >= pool::kMaxLeases || slot >= pool::kMaxLeases) return;
  // A reaper half-way: the rest is done by others, and the slot stays out of use.
  const Lease& dead = arena.lease(victim);
  const Lease& sleeper = arena.lease(slot);
  if (dead.word.load() == board.victim_word.load()) {
    if (intent_block(dead) == ~uint64_t{0} || intent_block(dead) != intent_block(sleeper))
      wrong("a reaper stopped at %s keeps others from finishing", board.last[0]);
    return;
  }
  if (sleeper.reaping.load() != victim + 1) return;
  for (uint64_t i = 0; i < arena.pages() / 64; ++i) {
    if (arena.ledger(victim, i).load() != 0) wrong("a reaper stopped at %s: a bit of the dead is left", board.last[0]);
  }
  const pid_t pid = begin([&] {
    Scene s(scene_->data_fd, scene_->control_fd);
    s.join();
    if (!s.fine()) return 1;
    return s.member->membership().slot() == victim ? 2 : 0;
  });
  const int status = wait_for(pid);
  if (status != 0)
    wrong("a reaper stopped at %s: joining ended with status %d (2: got the slot)", board.last[0], status);
}

}  // namespace torchshm::torture
