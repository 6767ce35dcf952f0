#include "points_session.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <csignal>
#include <fstream>
#include <random>

#include "pool/checker.h"
#include "pool/tickets.h"

namespace torchshm::torture {

using pool::BlockValue;
using pool::ChunkState;
using pool::ChunkValue;
using pool::Lease;
using pool::Member;
using pool::Mode;

namespace {

constexpr uint32_t kBystander = kMaxDepth;  // its level
constexpr unsigned kSeconds = 20;           // nobody's operation takes so long, whoever sleeps

void wait_on(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec most{0, 50'000'000};
  (void)::syscall(SYS_futex, &word, FUTEX_WAIT, value, &most, nullptr, 0);
}

void wake(std::atomic<uint32_t>& word) { (void)::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void rest(std::atomic<uint32_t>& word) {
  const timespec most{0, 50'000};
  (void)::syscall(SYS_futex, &word, FUTEX_WAIT, 0, &most, nullptr, 0);
}

bool asleep(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(stat, line);
  const size_t end = line.rfind(')');
  return end != std::string::npos && line.size() > end + 2 && (line[end + 2] == 'T' || line[end + 2] == 't');
}

uint64_t intent_block(const Lease& lease) {
  const uint64_t intent = lease.intent.load();
  return intent >> 32 == 0 ? ~uint64_t{0} : (intent & 0xffffffff);
}

}  // namespace

int open_files() {
  int open = 0;
  for (int fd = 0; fd < 96; ++fd) open += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
  return open;
}

int mappings() {
  std::ifstream maps("/proc/self/maps");
  std::string line;
  int count = 0;
  while (std::getline(maps, line)) ++count;
  return count;
}

std::string Trial::describe() const {
  std::string text = std::string("--mode ") + kRunNames[static_cast<int>(run)] + " --operation " +
                     operations()[operation].name + " --at " + std::to_string(at);
  if (run == Run::kFail) text += " --errno " + std::to_string(error) + (persistent ? " --persistent" : "");
  for (const Kill& kill : kills) {
    text +=
        std::string(" --recovery ") + kRecoveryNames[static_cast<int>(kill.recovery)] + ":" + std::to_string(kill.at);
  }
  if (bystander >= 0) {
    text += std::string(" --bystander ") + operations()[static_cast<size_t>(bystander)].name + ":" +
            std::to_string(bystander_at);
  }
  if (leave_dead) text += " --leave-dead";
  return text + " --seed " + std::to_string(seed);
}

void Session::wrong(const char* format, ...) {
  if (!wrong_.empty()) return;
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  (void)std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  wrong_ = text;
}

// ---- the survivor

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

// ---- session

Session::Session(uint64_t seed) {
  Board& board = *here.board;
  files_ = open_files();
  mappings_ = mappings();
  for (Message& message : board.street) message.state.store(kNothing);
  for (Message* message : {&board.inbox[0], &board.inbox[1], &board.gift, &board.gone}) message->state.store(kNothing);
  board.park = board.parked = board.leave = 0;
  board.wrong[0] = 0;
  board.tolerant = 0;
  here.level = 0;
  pool::Limits limits;
  limits.limit = kLimit;
  limits.warm = uint64_t{1} << 40;  // no janitor's thread but where it is asked for
  auto made = Member::create(seed, limits);
  if (!made) return;
  member_ = made.take();
  driver = member_.get();
  inherited_lives = {member_->membership().life_fd()};
  scene_ = std::make_unique<Scene>(member_->arena().data_fd(), member_->arena().control_fd());
  scene_->member = driver;
  scene_->seed = seed;
  kept_[0] = scene_->hold(kSmallBytes);
  kept_[1] = scene_->hold(kLargeBytes, true);
  if (subject().open) subject().open(*scene_);
  survivor_ = begin([&] {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    survive(seed * 7919 + 1);
    return 0;
  });
}

Session::~Session() {
  if (survivor_ > 0) {
    ::kill(survivor_, SIGKILL);
    (void)wait_for(survivor_);
  }
  inherited_lives.clear();
  driver = nullptr;
}

std::string Session::close() {
  Board& board = *here.board;
  wrong_.clear();
  here.totals->survivor_operations.fetch_add(board.survivor_operations.exchange(0));
  board.leave.store(1);
  wake(board.park);
  const int status = wait_for(survivor_);
  survivor_ = -1;
  if (status != 0) wrong("the survivor ended with status %d: %s", status, board.wrong);
  for (Message& message : board.street) take(message, true, "the street");
  scene_->release_all();
  if (subject().close) subject().close(*scene_);
  scene_->names.reset();
  if (board.wrong[0] != 0) wrong("%s", board.wrong);
  (void)member_->trim(0);
  const pool::Stats stats = member_->stats();
  if (stats.leases.size() != 1) wrong("%zu leases are left", stats.leases.size());
  if (stats.blocks != 0 || stats.tickets != 0)
    wrong("%lu blocks and %lu tickets are left", stats.blocks, stats.tickets);
  if (stats.committed != 0) wrong("%lu bytes are left committed", stats.committed);
  struct stat file {};
  (void)::fstat(member_->arena().data_fd(), &file);
  if (file.st_blocks != 0) wrong("%lu bytes of the data file are left", static_cast<uint64_t>(file.st_blocks) * 512);
  scene_.reset();
  member_.reset();
  inherited_lives.clear();
  if (open_files() != files_) wrong("%d descriptors are open, %d before", open_files(), files_);
  if (mappings() > mappings_ + 2) wrong("%d mappings, %d before", mappings(), mappings_);  // malloc's own
  return wrong_;
}

// ---- a trial

void Session::set_up(const Trial& trial, const Operation& operation) {
  Board& board = *here.board;
  board.wrong[0] = 0;
  for (uint32_t i = 0; i <= kMaxDepth; ++i) {
    board.acted[i].store(0);
    board.reached[i].store(0);
    board.status[i].store(0);
    std::memset(board.last[i], 0, sizeof board.last[i]);
  }
  board.stopped = 0;
  board.actor_slot = board.victim_slot = 0;
  board.stale_set = 0;
  bool fills = (operation.flags & kMayFill) != 0;
  for (const Trial::Kill& kill : trial.kills) fills = fills || kill.recovery == Recovery::kFull;
  board.tolerant = fills ? 1 : 0;
  board.leave_dead = (operation.flags & kReaps) != 0 || trial.leave_dead ? 1 : 0;
  Scene& d = *scene_;
  const auto send = [&](Message& message, const Held& held) {
    auto handle = driver->issue(held.block);
    if (!handle) return wrong("the driver could not send: %s", handle.status().what().c_str());
    message.handle = *handle;
    message.seed = held.seed;
    message.bytes = held.bytes;
    message.state.store(kUp);
  };
  if ((operation.flags & kInbox) != 0 || trial.bystander >= 0) {
    for (int i = 0; i < 2; ++i) {
      send(board.inbox[i], kept_[i]);
      if ((operation.flags & kUsedUp) != 0) {
        take(board.inbox[i], true, "the inbox");
        board.inbox[i].state.store(kUp);
      }
    }
  }
  if ((operation.flags & (kGift | kLargeGift | kGone)) != 0) {
    const Held& held = d.hold((operation.flags & kLargeGift) != 0 ? kTwoChunks : kSmallBytes);
    if (held.data == nullptr) return;
    Message& to = (operation.flags & kGone) != 0 ? board.gone : board.gift;
    send(to, held);
    d.release(d.held.size() - 1);
    if ((operation.flags & kGone) != 0) take(to, true, "the block to be gone");
  }
  if ((operation.flags & kEmptyChunk) != 0) {
    const size_t before = d.held.size();
    for (int i = 0; i < 6; ++i) d.hold(uint64_t{400} << 10);  // more than one chunk holds
    while (d.held.size() > before) d.release(d.held.size() - 1);
  }
  if ((operation.flags & kManyGifts) != 0) {
    const size_t before = d.held.size();
    for (uint32_t i = 0; i < kMany; ++i) {
      const Held& held = d.hold(4096);
      auto handle = driver->issue(held.block);
      if (!handle) return wrong("the driver could not send: %s", handle.status().what().c_str());
      board.many[i] = *handle;
    }
    while (d.held.size() > before) d.release(d.held.size() - 1);
  }
  if (subject().set_up) subject().set_up(d, operation);
  if (board.wrong[0] != 0) wrong("set up: %s", board.wrong);
}

// The life of an actor: gets ready, does the operation with the plan in force, and when it is still there sees whether all is well.
int Session::act(const Trial& trial, const Operation& operation, uint32_t level, Run run, uint64_t at) {
  Board& board = *here.board;
  here.level = level;
  here.run = run;
  const int files = open_files();
  const int maps = run == Run::kFail ? mappings() : 0;
  Scene s(scene_->data_fd, scene_->control_fd);
  s.seed = trial.seed * 31 + level;
  if ((operation.flags & kNoMember) == 0) {
    s.join();
    if (!s.fine()) return 1;
    const uint32_t slot = s.member->membership().slot();
    board.actor_word.store(s.member->arena().lease(slot).word.load());
    board.actor_slot.store(slot + 1);
  }
  operation.prepare(s);
  if (!s.fine()) return 1;
  if (operation.flags == 0 && !s.held.empty() && s.held[0].block != 0) {
    // A handle without a ticket; when the actor is gone it must be an error.
    auto handle = s.member->issue(s.held[0].block);
    auto view = handle ? s.member->redeem(*handle, Mode::kReadWrite) : Result<Member::View>(Status(Code::kFull, ""));
    if (view) {
      s.member->release(view->block, Mode::kReadWrite);
      board.stale = *handle;
      board.stale_set.store(1);
    }
  }
  failpoint::Plan plan = plan_for(run == Run::kKill   ? failpoint::Action::kKill
                                  : run == Run::kFail ? failpoint::Action::kFail
                                                      : failpoint::Action::kStop,
                                  at);
  plan.persistent = trial.persistent && run == Run::kFail;
  plan.error = trial.error;
  failpoint::arm(plan);
  const Status done = operation.act(s);
  board.reached[level].store(failpoint::reached());
  failpoint::disarm();
  here.hook = nullptr;
  driver->arena().lease(driver->membership().slot()).reaping.store(0);  // of the operation that sets it
  const bool faulted = run == Run::kFail && board.acted[level].load() != 0;
  if (!done) {
    const Code code = done.code();
    const bool full = code == Code::kFull && board.tolerant.load() != 0;
    const bool plain =
        code == Code::kFull || code == Code::kSystem || code == Code::kUnsupported || code == Code::kNoSlot;
    if (!full && !(faulted && plain)) s.wrong("failed with code %d: %s", static_cast<int>(code), done.what().c_str());
    if (done.what().empty()) s.wrong("failed without saying why");
  }
  if (s.member == nullptr) s.join();  // a second try, and nothing is lost
  if (!s.fine()) return 1;
  if (run == Run::kFail) {
    // Everything works that worked before.
    if ((operation.flags & kMayFill) != 0) s.member->arena().header().limit.store(kLimit);
    const size_t before = s.held.size();
    s.hold(kSmallBytes);
    s.hold(kLargeBytes);
    if (s.fine() && s.held.size() > before) {
      if (Status sent = s.post(s.held.back()); !sent) s.wrong("issue: %s", sent.what().c_str());
    }
    (void)s.member->reap();
    (void)s.member->trim(0);
    // Not only once this process is gone.
    const uint32_t slot = s.member->membership().slot();
    for (uint32_t i = 0; i < s.member->arena().chunks_used(); ++i) {
      const ChunkValue chunk = ChunkValue::of(s.member->arena().chunk(i).value.load());
      const bool between = chunk.state == ChunkState::kTrimming || chunk.state == ChunkState::kBacking ||
                           chunk.state == ChunkState::kTaking;
      if (between && chunk.owner == slot) s.wrong("chunk %u is left in state %d", i, static_cast<int>(chunk.state));
    }
    // A copy-on-write view shows what the block holds, and nothing that was written to an earlier view.
    if ((operation.flags & kInbox) != 0 && (operation.flags & kForks) == 0) {
      auto view = s.member->redeem(board.inbox[1].handle, Mode::kCopyOnWrite);
      if (view) {
        const Held copy{view->block, Mode::kCopyOnWrite, view->data, board.inbox[1].bytes, board.inbox[1].seed};
        if (!intact(copy)) s.wrong("a new copy-on-write view shows what was written to an old one");
        s.member->release(copy.block, copy.mode);
      } else if (!faulted || view.code() != Code::kUnsupported) {
        s.wrong("redeem: %s", view.status().what().c_str());
      }
    }
  }
  s.release_all();
  s.names.reset();
  if (s.own != nullptr && (operation.flags & kAdopts) == 0) {
    s.own.reset();
    if (open_files() != files) s.wrong("%d descriptors are open, %d before", open_files(), files);
    if (run == Run::kFail && mappings() > maps + 4) s.wrong("%d mappings, %d before", mappings(), maps);
  }
  return s.fine() ? 0 : 1;
}

// Level 0 is the actor; level i recovers from what level i - 1 left, and is killed itself.
int Session::chain(const Trial& trial, const Operation& operation, size_t level) {
  if (level == 0) return act(trial, operation, 0, trial.run, trial.at);
  return recover(trial, level);
}

int Session::recover(const Trial& trial, size_t level) {
  Board& board = *here.board;
  const Operation& operation = operations()[trial.operation];
  const Trial::Kill& kill = trial.kills[level - 1];
  here.level = static_cast<uint32_t>(level);
  here.run = Run::kKill;
  Scene s(scene_->data_fd, scene_->control_fd);
  if (kill.recovery != Recovery::kJoin) s.join();
  if (s.member != nullptr && subject().get_ready) subject().get_ready(s);
  if (!s.fine()) return 1;
  const pid_t pid = begin([&] { return chain(trial, operation, level - 1); });
  board.status[level - 1].store(wait_for(pid));
  failpoint::arm(plan_for(failpoint::Action::kKill, kill.at));
  switch (kill.recovery) {
    case Recovery::kReap:
      (void)s.member->reap();
      if (subject().recover) subject().recover(s);
      (void)s.member->trim(0);
      break;
    case Recovery::kJoin:
      s.join();
      break;
    case Recovery::kFull:
      s.press(0);
      (void)s.member->allocate(kRunBytes, false);
      break;
  }
  board.reached[level].store(failpoint::reached());
  failpoint::disarm();
  s.names.reset();
  if (s.fine() && level % 2 == 0) s.own.reset();
  return s.fine() ? 0 : 1;
}

// Every process of the trial has ended.
void Session::collect(pid_t group) {
  for (;;) {
    int status = 0;
    const pid_t pid = ::waitpid(-group, &status, __WALL);
    if (pid < 0 && errno == EINTR) continue;
    if (pid < 0) return;
    // Orphans of the killed: children of a fork, helpers.
    if (WIFEXITED(status) && WEXITSTATUS(status) != 0) wrong("an orphan found something wrong: %s", here.board->wrong);
    if (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL) wrong("an orphan ended with status %d", status);
  }
}

Outcome Session::run(const Trial& trial) {
  Outcome outcome;
  const Operation& operation = operations()[trial.operation];
  wrong_.clear();
  ::alarm(3 * kSeconds);
  here.totals->trials.fetch_add(1, std::memory_order_relaxed);
  park();
  set_up(trial, operation);
  const bool parked = (operation.flags & kParked) != 0;
  if (wrong_.empty()) {
    if (!parked) unpark();
    const pid_t bystander = trial.bystander >= 0 ? start_bystander(trial) : -1;
    if (trial.run == Run::kStop) {
      stop(trial, operation, outcome);
    } else {
      kill_or_fail(trial, operation, outcome);
    }
    if (bystander > 0) {
      ::kill(bystander, SIGCONT);
      const int status = wait_for(bystander);
      if (status != 0) wrong("the bystander, stopped meanwhile, ended with status %d: %s", status, here.board->wrong);
    }
    park();
    if (wrong_.empty()) verify(trial, operation);
  }
  ::alarm(0);
  outcome.wrong = wrong_;
  return outcome;
}

void Session::kill_or_fail(const Trial& trial, const Operation& operation, Outcome& outcome) {
  Board& board = *here.board;
  const size_t depth = trial.kills.size();
  const pid_t pid = begin([&] {
    (void)::setpgid(0, 0);
    return chain(trial, operation, depth);
  });
  (void)::setpgid(pid, pid);
  board.status[depth].store(wait_for(pid));
  collect(pid);
  for (size_t level = 0; level <= depth; ++level) {
    const int status = board.status[level].load();
    const bool acted = board.acted[level].load() != 0;
    const bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    const bool kills = level > 0 || trial.run == Run::kKill;
    // The child of a fork may be the one that was killed.
    const bool in_child = level == 0 && acted && status == 0 && (operation.flags & kForks) != 0;
    if (kills && acted ? !killed && !in_child : status != 0)
      wrong("level %zu ended with status %d after %s: %s", level, status, board.last[level], board.wrong);
  }
  outcome.reached = board.acted[0].load() != 0;
  outcome.recovery_reached = depth > 0 && board.acted[depth].load() != 0;
  outcome.points = board.reached[0].load();
}

bool Session::wait_until_stopped(pid_t pid, int& status) {
  Board& board = *here.board;
  for (;;) {
    if (::waitpid(pid, &status, WNOHANG) == pid) return false;
    if (const int stopped = board.stopped.load(); stopped != 0 && asleep(stopped)) return true;
    ::usleep(100);
  }
}

pid_t Session::start_bystander(const Trial& trial) {
  const Operation& operation = operations()[static_cast<size_t>(trial.bystander)];
  const pid_t pid = begin([&] {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    return act(trial, operation, kBystander, Run::kStop, trial.bystander_at);
  });
  int status = 0;
  const bool stopped = wait_until_stopped(pid, status);
  here.board->stopped.store(0);
  here.board->actor_slot.store(0);
  here.board->stale_set.store(0);
  if (stopped) return pid;
  if (status != 0) wrong("the bystander ended with status %d: %s", status, here.board->wrong);
  return -1;
}

void Session::stop(const Trial& trial, const Operation& operation, Outcome& outcome) {
  Board& board = *here.board;
  const pid_t pid = begin([&] {
    (void)::setpgid(0, 0);
    return act(trial, operation, 0, Run::kStop, trial.at);
  });
  (void)::setpgid(pid, pid);
  int status = 0;
  if (wait_until_stopped(pid, status)) {
    while_stopped(operation, 1 + static_cast<int>(trial.seed % 2));
    // Parent and child of a fork may both come to a point where they stop.
    while (::waitpid(pid, &status, WNOHANG) != pid) {
      ::kill(-pid, SIGCONT);
      ::usleep(100);
    }
    if (status != 0)
      wrong("stopped at %s and continued, it ended with status %d: %s", board.last[0], status, board.wrong);
  } else if (status != 0) {
    wrong("ended with status %d: %s", status, board.wrong);
  }
  collect(pid);
  outcome.reached = board.acted[0].load() != 0;
  outcome.points = board.reached[0].load();
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

// ---- what must hold

void Session::take(Message& message, bool must, const char* what) {
  const uint32_t state = message.state.exchange(kNothing);
  if (state == kNothing || state == kWriting) return;
  must = must && state == kUp;
  auto view = driver->redeem(message.handle, Mode::kReadWrite);
  if (!view) {
    if (must || view.code() != Code::kStale) wrong("%s: a message was lost: %s", what, view.status().what().c_str());
    return;
  }
  const Held got{view->block, Mode::kReadWrite, view->data, message.bytes, message.seed};
  if (!intact(got)) wrong("%s: block %u was received with other data", what, got.block);
  driver->release(got.block, got.mode);
}

void Session::verify(const Trial& trial, const Operation& operation) {
  Board& board = *here.board;
  pool::Arena& arena = member_->arena();
  const bool tolerant = board.tolerant.load() != 0;
  arena.header().limit.store(kLimit);
  arena.header().warm.store(uint64_t{1} << 40);
  arena.header().ticket_age.store(300);
  arena.lease(member_->membership().slot()).reaping.store(0);
  Scene& d = *scene_;
  (void)member_->reap();
  // What the system refused to take back once is tried again then.
  if ((operation.flags & kRaisesLimit) != 0 || trial.run == Run::kFail) (void)driver->trim(0);
  if (subject().verify) {
    if (const std::string what = subject().verify(d, operation); !what.empty()) wrong("%s", what.c_str());
  }
  for (uint32_t i = 0; i < 2; ++i) take(board.inbox[i], true, "the inbox");  // the driver holds these
  const pool::Handle gift = board.gift.handle;
  const bool had_gift = board.gift.state.load() != kNothing;
  take(board.gift, !tolerant, "the gift");
  pool::Handle street[kStreet];
  bool was_up[kStreet];
  for (uint32_t i = 0; i < kStreet; ++i) {
    was_up[i] = board.street[i].state.load() == kUp;
    street[i] = board.street[i].handle;
    take(board.street[i], !tolerant, "the street");
  }
  // What was only in lost messages of the dead.
  pool::Ledger ledger(arena, member_->membership().slot(), *member_);
  pool::Tickets tickets(arena, ledger, member_->membership().slot());
  (void)tickets.take_back(0, true, ~uint64_t{0});
  const auto must_be_stale = [&](const pool::Handle& handle, const char* what) {
    auto view = driver->redeem(handle, Mode::kReadWrite);
    if (view || view.code() != Code::kStale) wrong("a handle of %s, gone, is not an error", what);
    if (view) driver->release(view->block, Mode::kReadWrite);
  };
  if (board.stale_set.load() != 0) must_be_stale(board.stale, "the actor");
  if (had_gift) must_be_stale(gift, "the gift");
  if ((operation.flags & kGone) != 0) must_be_stale(board.gone.handle, "a released block");
  for (uint32_t i = 0; i < kStreet; ++i) {
    if (was_up[i]) must_be_stale(street[i], "the street");
  }
  if (!intact(kept_[0]) || !intact(kept_[1])) wrong("a block that the driver holds has changed");
  if (!wrong_.empty()) return;
  verify_table();
  if (wrong_.empty()) {
    pool::CheckOptions options;
    options.at_rest = true;
    const pool::CheckReport report = pool::check(arena, options);
    if (!report.ok()) wrong("the checker: %s", report.first().c_str());
  }
  if (trial.whole && wrong_.empty()) verify_whole();
}

// Leases, blocks, tickets and chunks as they must be with two members at rest.
void Session::verify_table() {
  Board& board = *here.board;
  pool::Arena& arena = member_->arena();
  uint32_t living = 0;
  for (uint32_t slot = 0; slot < arena.slots_used(); ++slot) {
    const Lease& lease = arena.lease(slot);
    if ((lease.word.load() & 0xff) == pool::kLeaseFree) continue;
    ++living;
    if (lease.intent.load() != 0) wrong("lease %u has an intent at rest", slot);
    if (lease.reaping.load() != 0) wrong("lease %u is reaping at rest", slot);
  }
  if (living != 2) wrong("%u leases live, not two", living);
  uint32_t blocks = 0;
  uint64_t committed = 0;
  for (uint32_t i = 0; i < arena.chunks_used(); ++i) {
    const ChunkValue chunk = ChunkValue::of(arena.chunk(i).value.load());
    committed += chunk.committed * pool::kPage;
    bool live = false;
    for (uint32_t page = 0; page < pool::kPagesPerChunk; ++page) {
      const BlockValue block = BlockValue::of(arena.block(i * pool::kPagesPerChunk + page).value.load());
      if (!block.live) continue;
      live = true;
      ++blocks;
      if (block.count == 0) wrong("block %u is live and used by nobody", i * pool::kPagesPerChunk + page);
    }
    switch (chunk.state) {
      case ChunkState::kHole:
      case ChunkState::kIdle:
        if (live) wrong("chunk %u is free with a live block in it", i);
        break;
      case ChunkState::kRun: {
        const BlockValue head = BlockValue::of(arena.block(chunk.head * pool::kPagesPerChunk).value.load());
        if (!head.live || head.generation != chunk.generation) wrong("chunk %u belongs to a run that is not", i);
        break;
      }
      case ChunkState::kSmall:
        if (chunk.owner == pool::kNobody ? !live : (arena.lease(chunk.owner).word.load() & 0xff) == pool::kLeaseFree)
          wrong("chunk %u of small blocks is lost (owner %u)", i, chunk.owner);
        break;
      default:
        wrong("chunk %u is left in state %d", i, static_cast<int>(chunk.state));
    }
  }
  const uint32_t expected = static_cast<uint32_t>(scene_->held.size()) + board.survivor_blocks.load();
  if (blocks != expected) wrong("%u blocks are live, %u expected", blocks, expected);
  for (uint32_t i = 0; i < arena.tickets_used(); ++i) {
    const auto ticket = pool::TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender != 0) wrong("ticket %u for block %u is left", i, ticket.block);
  }
  if (committed > kLimit) wrong("%lu bytes committed, over the limit", committed);
  struct stat file {};
  (void)::fstat(arena.data_fd(), &file);
  if (static_cast<uint64_t>(file.st_blocks) * 512 > committed)
    wrong("the data file has %lu bytes, %lu are accounted for", static_cast<uint64_t>(file.st_blocks) * 512, committed);
}

void Session::verify_whole() {
  here.totals->wholes.fetch_add(1, std::memory_order_relaxed);
  (void)driver->trim(0);
  const uint64_t used = scene_->committed();
  auto rest = driver->allocate(kLimit - used, false);
  if (!rest)
    return wrong("the rest of the limit, %lu bytes, can't be allocated: %s", kLimit - used,
                 rest.status().what().c_str());
  driver->release(rest->block, Mode::kReadWrite);
  (void)driver->trim(0);
  if (scene_->committed() > used) wrong("%lu bytes stay committed, %lu before", scene_->committed(), used);
}

}  // namespace torchshm::torture
