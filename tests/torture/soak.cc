// A soak: many processes use one pool at random, and are killed, stopped, forked and started at random, for as long as is asked for.
//
// Every byte that a process reads is verified against a seeded pattern. Now and then everything comes to rest and the whole pool is
// looked at: all processes between two operations; all stopped wherever they are; all dead, when everything must have come back.
// The seed decides who does what and who is killed; the kernel's scheduler decides when.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/failpoint.h"
#include "os/memfd.h"
#if __has_include("pool/checker.h")
#include "pool/checker.h"
#endif
#include "pool/members.h"
#include "result_file.h"
#include "soak_worker.h"

namespace torchshm::torture {
namespace {

constexpr uint64_t kPatience = 30'000'000'000;  // no operation of a survivor takes longer, in ns

volatile sig_atomic_t interrupted = 0;

struct Options {
  uint64_t seconds = 10, seed = 1;
  uint32_t processes = 0;  // 0: the seed says
  uint64_t limit = 0;      // 0: the seed says
  bool full = false, quiet = false;
  std::string json;
};

// ---- processes

char state_of(pid_t pid) {
  char path[64], text[512] = {};
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  const ssize_t n = ::read(fd, text, sizeof text - 1);
  ::close(fd);
  if (n <= 0) return 0;
  const char* name_end = std::strrchr(text, ')');
  return name_end == nullptr || name_end[1] == 0 ? 0 : name_end[2];
}

void add_children(pid_t pid, std::set<pid_t>& found) {
  char path[96];
  std::snprintf(path, sizeof path, "/proc/%d/task/%d/children", pid, pid);
  FILE* file = std::fopen(path, "re");
  if (file == nullptr) return;
  std::vector<pid_t> children;
  for (int child = 0; std::fscanf(file, "%d", &child) == 1;) children.push_back(child);
  std::fclose(file);
  for (const pid_t child : children) {
    const char state = state_of(child);
    if (state == 0 || state == 'Z' || state == 'X') continue;
    if (found.insert(child).second) add_children(child, found);
  }
}

// All living processes below this one.
std::set<pid_t> descendants() {
  std::set<pid_t> found;
  add_children(::getpid(), found);
  return found;
}

uint64_t own_descriptors() {
  uint64_t n = 0;
  DIR* folder = ::opendir("/proc/self/fd");
  while (folder != nullptr && ::readdir(folder) != nullptr) ++n;
  if (folder != nullptr) ::closedir(folder);
  return n;
}

// ---- a worker's beginning

// Runs in a fresh process, with a member of its own.
[[noreturn]] void work(pool::Member& member, Board& board, uint32_t index, uint64_t seed) {
  Entry* entry = Worker::enter(board);
  if (entry == nullptr) ::_exit(0);
  Worker worker(member, board, entry, index, seed);
  worker.run(seed % 3 == 0 ? 2000 : UINT64_MAX);
  ::_exit(0);
}

[[noreturn]] void join_and_work(os::Fd data, os::Fd control, Board& board, uint32_t index, uint64_t seed) {
  if (seed % 16 == 0) Worker::arm(board, seed);
  auto member = pool::Member::attach(std::move(data), std::move(control));
  if (!member) {
    board.report("pid %d: attach: %s", ::getpid(), member.status().what().c_str());
    ::_exit(1);
  }
  work(*pool::adopt(member.take()), board, index, seed);
}

Board* map_board(int fd) {
  void* at = ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  return static_cast<Board*>(at);
}

// `torchshm_soak --worker data control board index seed`: a process that has inherited nothing but these descriptors and the pipes.
int execed_worker(char** argv) {
  Board& board = *map_board(std::atoi(argv[4]));
  ::close(std::atoi(argv[4]));
  Worker::watch_for_crashes(board);
  join_and_work(os::Fd(std::atoi(argv[2])), os::Fd(std::atoi(argv[3])), board,
                static_cast<uint32_t>(std::atoi(argv[5])), std::strtoull(argv[6], nullptr, 10));
}

// ---- the conductor

class Conductor {
 public:
  explicit Conductor(const Options& options) : options_(options), random_(options.seed) {
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);
    processes_ = options.processes != 0 ? options.processes : 8 + static_cast<uint32_t>(random_() % 25);
    processes_ = std::min(processes_, kMostWorkers);
    constexpr uint64_t kLimits[] = {64, 192, 1024};  // MiB: always full, sometimes, never
    pool::Limits limits;
    limits.limit = options.limit != 0 ? options.limit : kLimits[random_() % 3] << 20;
    limits.warm = limits.limit / (1 + random_() % 8);
    limit_ = limits.limit;
    auto member = pool::Member::create(1, limits);
    if (!member) {
      std::fprintf(stderr, "no pool: %s\n", member.status().what().c_str());
      std::exit(2);
    }
    member_ = member.take();
    board_fd_ = static_cast<int>(::memfd_create("torchshm-soak", 0));
    if (::ftruncate(board_fd_, sizeof(Board)) != 0) std::exit(2);
    board_ = map_board(board_fd_);
    board_->workers = processes_;
    for (uint32_t i = 0; i < processes_; ++i) {
      if (::pipe2(board_->pipes[i], O_NONBLOCK) != 0) std::exit(2);
      ::fcntl(board_->pipes[i][1], F_SETPIPE_SZ, 4096);  // few messages wait: what they keep is kept from use
    }
    beat();
    worker_ = std::make_unique<Worker>(*member_, *board_, Worker::enter(*board_), 0, random_());
    // Held to the end, whatever happens around it.
    for (int n = 0; n < 3; ++n) worker_->keep(uint64_t{1000} << (4 * n));
    (void)member_->trim(0);
    committed_ = member_->stats().committed;
    blocks_ = member_->stats().blocks;
    descriptors_ = own_descriptors();
  }

  bool run() {
    const uint64_t began = now_ns(), end = began + options_.seconds * 1'000'000'000;
    uint64_t next_rest = began + 1'000'000'000, next_line = began + 60'000'000'000;
    while (now_ns() < end && interrupted == 0 && fine()) {
      ::usleep(static_cast<useconds_t>(random_() % 8000));
      beat();
      bury();
      resume(false);
      if (random_() % 8 == 0) {
        find_stopped();
        watch();
      }
      populate();
      act();
      if (now_ns() > next_rest) {
        next_rest = now_ns() + (300 + random_() % 1500) * 1'000'000;
        rest();
      }
      if (now_ns() > next_line) {
        next_line += 60'000'000'000;
        if (!options_.quiet) print();
      }
    }
    if (fine()) come_back();
    kill_all();
    seconds_ = static_cast<double>(now_ns() - began) / 1e9;
    print();
    for (uint32_t n = 0; n < std::min(board_->found.load(), kMostFound); ++n)
      std::printf("WRONG: %s\n", board_->what[n]);
    write_json();
    return fine();
  }

 private:
  bool fine() const { return board_->found.load() == 0; }
  void beat() { board_->heartbeat.store(now_ns()); }

  // One operation of the conductor's own, which nobody may keep waiting.
  template <class F>
  auto timed(const char* what, F f) {
    const uint64_t began = now_ns();
    if constexpr (std::is_void_v<decltype(f())>) {
      f();
      late(what, began);
    } else {
      auto result = f();
      late(what, began);
      return result;
    }
  }
  void late(const char* what, uint64_t began) {
    const uint64_t took = now_ns() - began;
    longest_ = std::max(longest_, took);
    if (took > kPatience) board_->report("the conductor's %s took %lu ms", what, took / 1000000);
  }

  // Children that have ended, also those that workers had forked.
  void bury() {
    int status = 0;
    for (pid_t pid = 0; (pid = ::waitpid(-1, &status, WNOHANG)) > 0;) {
      stopped_.erase(pid);
      resumed_.erase(pid);
      const auto worker = std::find(workers_.begin(), workers_.end(), pid);
      if (worker != workers_.end()) *worker = 0;
      if (WIFEXITED(status) && WEXITSTATUS(status) != 0)
        board_->report("pid %d ended with status %d", pid, WEXITSTATUS(status));
      if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) ++kills_;
      if (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL)
        board_->report("pid %d ended by signal %d", pid, WTERMSIG(status));
      for (Entry& entry : board_->entries) {
        if (entry.pid.load() != pid) continue;
        entry.action.store(0);
        entry.parked.store(0);
        entry.held.store(0);
        entry.pid.store(0);
      }
    }
  }

  // No operation of a process that runs takes longer than T.
  void watch() {
    const uint64_t now = now_ns();
    for (const Entry& entry : board_->entries) {
      const pid_t pid = entry.pid.load();
      const uint32_t action = entry.action.load();
      const uint64_t since = entry.since.load();
      if (pid <= 1 || pid == ::getpid() || action == 0 || stopped_.contains(pid)) continue;
      const auto resumed = resumed_.find(pid);
      const uint64_t from = std::max(since, resumed == resumed_.end() ? 0 : resumed->second);
      const char state = state_of(pid);
      if (now > from + kPatience && state != 'Z' && state != 'T' && entry.since.load() == since &&
          entry.pid.load() == pid)
        board_->report("pid %d (%c) is in %s for %lu ms", pid, state, kActions[action], (now - from) / 1000000);
    }
  }

  void populate() {
    for (uint32_t i = 0; i < processes_; ++i) {
      if (workers_[i] == 0 && random_() % 3 == 0) workers_[i] = born(i);
    }
  }

  pid_t born(uint32_t index) {
    ++births_;
    const uint64_t seed = random_();
    const uint64_t way = random_() % 8;
    if (way == 0) {  // a forked child with a lease that holds all that the conductor holds
      worker_->before_fork();
      member_->prepare_fork();
      const pid_t pid = ::fork();
      if (pid != 0) {
        member_->parent_after_fork();
        return started(pid);
      }
      begin_child();
      member_->child_after_fork();
      pool::Member& member = *pool::adopt(std::move(member_));
      Entry* entry = Worker::enter(*board_);
      if (entry == nullptr) ::_exit(0);
      worker_->become(member, entry, index, seed);
      worker_->run(seed % 3 == 0 ? 2000 : UINT64_MAX);
      ::_exit(0);
    }
    const pid_t pid = ::fork();
    if (pid != 0) return started(pid);
    begin_child();
    os::Fd data(::dup(member_->arena().data_fd())), control(::dup(member_->arena().control_fd()));
    if (way >= 4) join_and_work(std::move(data), std::move(control), *board_, index, seed);
    const std::string numbers[] = {std::to_string(data.get()), std::to_string(control.get()), std::to_string(board_fd_),
                                   std::to_string(index), std::to_string(seed)};
    ::execl("/proc/self/exe", "torchshm_soak", "--worker", numbers[0].c_str(), numbers[1].c_str(), numbers[2].c_str(),
            numbers[3].c_str(), numbers[4].c_str(), nullptr);
    ::_exit(3);
  }
  void begin_child() {
    ::signal(SIGTERM, SIG_DFL);
    ::signal(SIGINT, SIG_DFL);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    Worker::watch_for_crashes(*board_);
  }
  pid_t started(pid_t pid) {
    if (pid < 0) {
      std::perror("fork");
      std::exit(2);
    }
    return pid;
  }

  pid_t somebody() {
    std::vector<pid_t> pids;
    for (const Entry& entry : board_->entries) {
      const pid_t pid = entry.pid.load();
      if (pid > 1 && pid != ::getpid()) pids.push_back(pid);
    }
    // Also those that have no entry yet: they are joining.
    for (const pid_t pid : workers_) {
      if (pid > 1 && std::find(pids.begin(), pids.end(), pid) == pids.end()) pids.push_back(pid);
    }
    return pids.empty() ? 0 : pids[random_() % pids.size()];
  }

  // Every pid in the table is a process of ours or one that has not been waited for; so no signal goes astray.
  void send(pid_t pid, int signal) {
    if (pid <= 1) return;
    if (::kill(pid, signal) != 0) return;
    if (signal == SIGSTOP) ++stops_;
  }

  void act() {
    const uint64_t n = random_() % 100;
    if (n < 45) {
      const pid_t pid = somebody();
      send(pid, SIGKILL);
    } else if (n < 70) {
      if (stopped_.size() * 3 > processes_) return;
      const pid_t pid = somebody();
      if (pid == 0) return;
      send(pid, SIGSTOP);
      // Mostly for a moment, sometimes for longer than anything should wait.
      const uint64_t ms = random_() % 12 == 0 ? 500 + random_() % 4000 : random_() % 40;
      stopped_[pid] = now_ns() + ms * 1'000'000;
    } else {
      for (int i = 0; i < 3; ++i) timed("operation", [&] { worker_->step(false); });
    }
  }

  // Those that a failpoint has stopped.
  void find_stopped() {
    for (const Entry& entry : board_->entries) {
      const pid_t pid = entry.pid.load();
      if (pid <= 1 || pid == ::getpid() || stopped_.contains(pid) || state_of(pid) != 'T') continue;
      stopped_[pid] = now_ns() + random_() % 400 * 1'000'000;
    }
  }

  void resume(bool all) {
    for (auto it = stopped_.begin(); it != stopped_.end();) {
      if (!all && it->second > now_ns()) {
        ++it;
        continue;
      }
      if (random_() % 4 == 0) send(it->first, SIGKILL);  // killed where it was stopped
      resumed_[it->first] = now_ns();
      send(it->first, SIGCONT);
      it = stopped_.erase(it);
    }
  }

  // ---- rest

  void rest() {
    const uint64_t n = random_() % 10;
    if (n < 5) {
      pause();
    } else if (n < 8) {
      stop_all();
    } else {
      come_back();
    }
  }

  // Calls again until f() or until T.
  bool until(const std::function<bool()>& f) {
    for (const uint64_t began = now_ns(); now_ns() < began + kPatience;) {
      beat();
      bury();
      if (f()) return true;
      ::usleep(2000);
    }
    return false;
  }

  // REQUIRES: at_rest: nobody is inside an operation. The threads that give cold memory back may be for a moment.
  void check(bool at_rest, const char* when) {
    ++checks_;
#if __has_include("pool/checker.h")
    pool::CheckReport report;
    for (int again = 0; again < (at_rest ? 40 : 1); ++again) {
      report = pool::check(member_->arena(), {.at_rest = at_rest});
      if (report.ok()) return;
      ::usleep(50000);
    }
    board_->report("%s: %zu violations, first: %s", when, report.violations.size(), report.first().c_str());
#else
    (void)at_rest, (void)when;
#endif
  }

  // All processes between two operations, with what they hold.
  void pause() {
    ++pauses_;
    resume(true);
    board_->pause.store(static_cast<uint32_t>(pauses_));
    std::map<pid_t, uint64_t> held;
    const bool quiet = until([&] {
      const auto alive = descendants();
      held.clear();
      for (const Entry& entry : board_->entries) {
        if (entry.parked.load() == pauses_) held[entry.pid.load()] = entry.held.load();
      }
      bool all = true;
      for (const pid_t pid : alive) {
        if (held.contains(pid)) continue;
        all = false;
        if (state_of(pid) == 'T') ::kill(pid, SIGCONT);
      }
      if (!all) return false;
      return descendants() == alive;  // a parked process forks nobody
    });
    if (!quiet) {
      std::string who;
      for (const pid_t pid : descendants()) {
        if (held.contains(pid)) continue;
        const char* what = "no entry";
        for (const Entry& entry : board_->entries)
          what = entry.pid.load() == pid ? kActions[entry.action.load()] : what;
        who += " " + std::to_string(pid) + " " + state_of(pid) + " " + what;
      }
      board_->report("not at rest:%s", who.c_str());
    } else {
      (void)timed("reap", [&] { return member_->reap(); });
      check(true, "at rest");
      const pool::Stats stats = timed("stats", [&] { return member_->stats(); });
      const auto alive = descendants();
      if (stats.leases.size() != alive.size() + 1)
        board_->report("at rest: %zu leases, %zu living processes", stats.leases.size(), alive.size() + 1);
      for (const pool::LeaseStats& lease : stats.leases) {
        const auto pid = static_cast<pid_t>(lease.pid);
        const uint64_t expected = pid == ::getpid() ? worker_->held() : held[pid];
        if (lease.held_blocks != expected)
          board_->report("at rest: lease %u of pid %u holds %lu blocks, its process %lu", lease.slot, lease.pid,
                         lease.held_blocks, expected);
      }
    }
    for (auto& [pid, since] : resumed_) since = now_ns();
    board_->pause.store(0);
  }

  // All stopped, wherever they are: nobody waits for them. Then some are killed there, and the others go on.
  void stop_all() {
    ++standstills_;
    std::set<pid_t> all;
    const bool quiet = until([&] {
      all = descendants();
      bool still = true;
      for (const pid_t pid : all) {
        if (state_of(pid) == 'T') continue;
        send(pid, SIGSTOP);
        still = false;
      }
      return still;
    });
    if (!quiet) board_->report("not stopped");
    check(false, "all stopped");
    for (int n = 0; n < 30; ++n) timed("operation among stopped processes", [&] { worker_->step(false); });
    (void)timed("trim among stopped processes", [&] { return member_->trim(0); });
    check(false, "all stopped, after more operations");
    for (const pid_t pid : all) {
      if (random_() % 2 == 0) send(pid, SIGKILL);
    }
    (void)timed("reap among stopped processes", [&] { return member_->reap(); });
    check(false, "half of them killed");
    for (const pid_t pid : all) {
      resumed_[pid] = now_ns();
      send(pid, SIGCONT);
    }
    stopped_.clear();
    bury();
  }

  void kill_all() {
    const bool gone = until([&] {
      const auto all = descendants();
      for (const pid_t pid : all) {
        if (random_() % 2 == 0) send(pid, SIGKILL);
      }
      // A process whose first thread is a zombie is not dead yet: its janitor may still be in the kernel.
      siginfo_t info;
      return all.empty() && ::waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD;
    });
    if (!gone) board_->report("processes do not die");
    stopped_.clear();
    resumed_.clear();
  }

  // All dead: everything is as it was at the start.
  void come_back() {
    ++returns_;
    resume(true);
    kill_all();
    (void)timed("reap", [&] { return member_->reap(); });
    check(true, "all dead");
    for (uint32_t i = 0; i < processes_; ++i) {
      // What is still in the pipes can be received, though its senders are dead; or is lost.
      const bool lost = random_() % 3 == 0;
      char message[64];
      while (lost && ::read(board_->pipes[i][0], message, sizeof message) > 0) {
      }
      while (!lost && worker_->drain(i)) {
      }
    }
    worker_->release_all();
    // Nothing fits any more, so whatever no process uses is asked back: all tickets, whoever's and however old.
    pool::Header& header = member_->arena().header();
    const uint32_t age = header.ticket_age.load();
    member_->set_ticket_age(0);
    header.limit.store(committed_);
    auto none = timed("allocation beyond the limit", [&] { return member_->allocate(committed_, false); });
    if (none) {
      board_->report("as much as the limit was given out beside what there is");
      member_->release(none->block, pool::Mode::kReadWrite);
    }
    header.limit.store(limit_);
    member_->set_ticket_age(age);
    // The janitor may be at work on a chunk.
    pool::Stats stats;
    for (int again = 0; again < 40; ++again) {
      (void)timed("trim", [&] { return member_->trim(0); });
      stats = timed("stats", [&] { return member_->stats(); });
      if (stats.committed == committed_) break;
      ::usleep(50000);
    }
    check(true, "all back");
    if (stats.leases.size() != 1) board_->report("all dead: %zu leases", stats.leases.size());
    if (stats.tickets != 0) board_->report("all dead: %lu tickets", stats.tickets);
    if (stats.blocks != blocks_) board_->report("all dead: %lu blocks, %lu at the start", stats.blocks, blocks_);
    if (stats.committed != committed_)
      board_->report("all dead: %lu bytes committed, %lu at the start", stats.committed, committed_);
    if (own_descriptors() != descriptors_)
      board_->report("all dead: %lu descriptors, %lu at the start", own_descriptors(), descriptors_);
    worker_->verify_kept();
  }

  // ---- what is said about it

  std::vector<std::pair<std::string, uint64_t>> figures() const {
    std::vector<std::pair<std::string, uint64_t>> all;
    uint64_t operations = 0;
    for (const auto& n : board_->actions) operations += n.load();
    all.emplace_back("processes", processes_);
    all.emplace_back("limit MiB", limit_ >> 20);
    all.emplace_back("operations", operations);
    for (size_t n = 2; n < std::size(kActions); ++n) all.emplace_back(kActions[n], board_->actions[n].load());
    all.emplace_back("bytes verified", board_->verified.load());
    all.emplace_back("private writes", board_->private_writes.load());
    all.emplace_back("messages lost", board_->lost.load());
    all.emplace_back("messages duplicated", board_->duplicated.load());
    all.emplace_back("stale handles", board_->stale.load());
    all.emplace_back("pool full", board_->full.load());
    all.emplace_back("processes started", births_);
    all.emplace_back("ordinary ends", board_->left.load());
    all.emplace_back("kills", kills_);
    all.emplace_back("kills armed at a failpoint", board_->armed_kills.load());
    all.emplace_back("stops armed at a failpoint", board_->armed_stops.load());
    all.emplace_back("stops", stops_);
    all.emplace_back("leases reaped", member_->arena().header().reaped.load());
    all.emplace_back("tickets taken back", member_->arena().header().taken_back.load());
    all.emplace_back("checks", checks_);
    all.emplace_back("rests: all paused", pauses_);
    all.emplace_back("rests: all stopped", standstills_);
    all.emplace_back("rests: all dead, all back", returns_);
    uint64_t longest = longest_;
    all.emplace_back("longest operation of the conductor ms", longest / 1000000);
    return all;
  }

  void print() const {
    std::string line = "seed " + std::to_string(options_.seed);
    for (const auto& [name, value] : figures()) line += ", " + name + " " + std::to_string(value);
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  }

  void write_json() const {
    ResultFile result{"soak", options_.seed, options_.full, seconds_, {}, {}};
    result.count(figures());
    for (uint32_t n = 0; n < std::min(board_->found.load(), kMostFound); ++n)
      result.violations.emplace_back(board_->what[n]);
    result.write(options_.json);
  }

  Options options_;
  std::mt19937_64 random_;
  std::unique_ptr<pool::Member> member_;
  std::unique_ptr<Worker> worker_;
  Board* board_ = nullptr;
  int board_fd_ = -1;
  uint32_t processes_ = 0;
  uint64_t limit_ = 0, committed_ = 0, blocks_ = 0, descriptors_ = 0;
  std::array<pid_t, kMostWorkers> workers_{};
  std::map<pid_t, uint64_t> stopped_, resumed_;  // until when; since when
  uint64_t births_ = 0, kills_ = 0, stops_ = 0, checks_ = 0, pauses_ = 0, standstills_ = 0, returns_ = 0, longest_ = 0;
  double seconds_ = 0;
};

int run(int argc, char** argv) {
  if (argc == 7 && std::strcmp(argv[1], "--worker") == 0) return execed_worker(argv);
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto number = [&] { return i + 1 < argc ? std::strtoull(argv[++i], nullptr, 10) : 0; };
    if (name == "--seconds") {
      options.seconds = number();
    } else if (name == "--seed") {
      options.seed = number();
    } else if (name == "--processes") {
      options.processes = static_cast<uint32_t>(number());
    } else if (name == "--limit-mib") {
      options.limit = number() << 20;
    } else if (name == "--full") {
      options.full = true;
    } else if (name == "--json" && i + 1 < argc) {
      options.json = argv[++i];
    } else {
      std::fprintf(stderr,
                   "usage: torchshm_soak [--seconds N] [--seed N] [--processes N, at most %u] [--limit-mib N] [--full] "
                   "[--json FILE]\n",
                   kMostWorkers);
      return 2;
    }
  }
  for (const int signal : {SIGTERM, SIGINT}) ::signal(signal, [](int) { interrupted = 1; });
  return Conductor(options).run() ? 0 : 1;
}

}  // namespace
}  // namespace torchshm::torture

int main(int argc, char** argv) { return torchshm::torture::run(argc, argv); }
