#include "points_session.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <fstream>

namespace torchshm::torture {

using pool::ChunkState;
using pool::ChunkValue;
using pool::Member;
using pool::Mode;

namespace {

constexpr uint32_t kBystander = kMaxDepth;  // its level

bool asleep(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(stat, line);
  const size_t end = line.rfind(')');
  return end != std::string::npos && line.size() > end + 2 && (line[end + 2] == 'T' || line[end + 2] == 't');
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
  limits.warm = kWarm;  // no janitor's thread but where it is asked for
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
  dismiss();
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
    if ((operation.flags & kMayFill) != 0) {
      s.member->arena().header().limit.store(kLimit);
      s.member->arena().header().warm.store(kWarm);
    }
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

}  // namespace torchshm::torture
