// torchshm_points, and torchshm_store_points for names and their service: every operation, killed, failed and stopped at every point that it passes, alone and while others recover from that.
//
//   torchshm_points [--full] [--seed S] [--kills K] [--jobs J] [--operation NAME] [--mode kill|fail|stop] [--json PATH]
//   torchshm_points --mode M --operation NAME --at N [--recovery reap|join|full:M]... [--errno E [--persistent]] [--bystander NAME:N]
//                   [--leave-dead] [--seed S] [--repeat R]                           one trial again, as a violation prints it
//   torchshm_points --list                                                           operations and points
//
// First the enumeration: for each operation N = 1, 2, ... until the operation passes no N-th point; for each N, the process that recovers
// is killed at its M-th point, M = 1, 2, ..., and a third one finishes. Then trials drawn from the seed until --kills processes have been
// killed. A survivor is at work all the while. The short form enumerates all N, and a part of the M that the seed chooses.
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "points_session.h"
#include "result_file.h"

namespace torchshm::torture {
namespace {

struct Options {
  bool full = false, list = false;
  uint64_t seed = 1, kills = 0, at = 0, repeat = 20;
  unsigned jobs = 1;
  int operation = -1;
  int mode = -1;
  std::string json;
  Trial trial;  // with --at
};

constexpr int kOnceErrors[] = {ENOMEM, ENOSPC, EMFILE, EPERM, EINTR};
constexpr int kLastingErrors[] = {ENOMEM, ENOSPC, EMFILE, EPERM};
constexpr uint32_t kTrialsPerSession = 400;
constexpr int kTries = 3;
constexpr uint64_t kMostPoints = 5000;  // of one operation: more is a loop without end

char running[1000];  // the trial that runs, for the alarm

void add_violation(const std::string& text) {
  const uint32_t at = here.totals->violations.fetch_add(1);
  std::fprintf(stderr, "VIOLATION: %s\n", text.c_str());
  if (at < kMaxViolations) std::strncpy(here.totals->violation[at], text.c_str(), sizeof here.totals->violation[0] - 1);
}

void took_too_long(int) {
  const uint32_t at = here.totals->violations.fetch_add(1);
  if (at < kMaxViolations) {
    char* to = here.totals->violation[at];
    std::strncpy(to, "somebody waits for the dead or the stopped, or does not end: ", 100);
    std::strncat(to, running, sizeof here.totals->violation[0] - 100);
    (void)!::write(2, to, std::strlen(to));
    (void)!::write(2, "\n", 1);
  }
  ::_exit(3);
}

// Runs trials in sessions, one after the other; a session ends after so many trials, or with a violation.
class Worker {
 public:
  explicit Worker(uint64_t seed) : seed_(seed) {}
  ~Worker() { end_session(); }

  Outcome run(const Trial& trial) {
    if ((operations()[trial.operation].flags & kFresh) != 0) end_session();
    if (session_ == nullptr) {
      session_ = std::make_unique<Session>(seed_ * 1000003 + ++sessions_);
      trials_ = 0;
      if (!session_->usable()) {
        add_violation("no pool could be made");
        ::_exit(3);
      }
    }
    const std::string text = trial.describe();
    std::strncpy(running, text.c_str(), sizeof running - 1);
    Outcome outcome = session_->run(trial);
    if (!outcome.wrong.empty()) {
      const Board& board = *here.board;
      std::string at;
      for (size_t level = 0; level <= trial.kills.size(); ++level)
        at += std::string(level == 0 ? "" : ", ") + board.last[level];
      add_violation(outcome.wrong + " [at " + at + "; trial " + std::to_string(trials_) + " of session " +
                    std::to_string(seed_) + "/" + std::to_string(sessions_) + "]  again: " + subject().program + " " +
                    text);
      session_.reset();
    } else if (++trials_ >= kTrialsPerSession) {
      end_session();
    }
    return outcome;
  }

  void end_session() {
    if (session_ == nullptr) return;
    ::alarm(60);
    const std::string wrong = session_->close();
    ::alarm(0);
    if (!wrong.empty()) add_violation("at the end of a session, after " + std::string(running) + ": " + wrong);
    session_.reset();
  }

 private:
  std::unique_ptr<Session> session_;
  uint64_t seed_, sessions_ = 0;
  uint32_t trials_ = 0;
};

// Of the same operation a few are as good as many.
uint32_t at_start = 0;
// The survivor's own work makes an operation pass fewer points now and then: only what several tries do not reach is the end.
Outcome run_up_to(Worker& worker, const Trial& trial, int tries, bool Outcome::*reached) {
  Outcome outcome = worker.run(trial);
  while (--tries > 0 && !(outcome.*reached) && outcome.wrong.empty()) outcome = worker.run(trial);
  return outcome;
}

bool enough() { return here.totals->violations.load() >= std::min(kMaxViolations, at_start + 4); }

void raise_to(std::atomic<uint32_t>& mark, uint64_t value) {
  uint32_t seen = mark.load();
  while (seen < value && !mark.compare_exchange_weak(seen, static_cast<uint32_t>(value))) {
  }
}

void enumerate_kills(Worker& worker, uint32_t operation, const Options& options) {
  const uint32_t flags = operations()[operation].flags;
  std::mt19937_64 random(options.seed * 31 + operation);
  const uint64_t step = !options.full && (operations()[operation].flags & kLong) != 0 ? 61 : 1;
  for (uint64_t at = 1; at < kMostPoints && !enough(); at += step) {
    Trial trial;
    trial.operation = operation;
    trial.at = at;
    trial.seed = options.seed;
    const Outcome alone = run_up_to(worker, trial, kTries, &Outcome::reached);
    if (!alone.reached) break;
    here.totals->points[static_cast<int>(Run::kKill)].fetch_add(1);
    raise_to(here.totals->most[operation], at);
    if ((flags & kOnlyAlone) != 0) continue;
    // All recoveries in the full form. In the short one some M each for every third N: what they have in common is enumerated already.
    if (!options.full && (at + operation + options.seed) % 3 != 0) continue;
    const uint64_t stride = options.full ? 1 : 37;
    trial.whole = false;
    trial.leave_dead = true;
    for (uint64_t nested = 1 + random() % stride; nested < kMostPoints && !enough(); nested += stride) {
      trial.kills = {{Recovery::kReap, nested}};
      trial.whole = options.full && nested % 16 == 1;
      const Outcome outcome = run_up_to(worker, trial, options.full ? 3 : 2, &Outcome::recovery_reached);
      if (!outcome.recovery_reached) break;
      here.totals->pairs.fetch_add(1);
      raise_to(here.totals->most_recovery[0], nested);
    }
    if (!options.full) continue;
    for (const Recovery recovery : {Recovery::kJoin, Recovery::kFull}) {
      for (uint64_t nested = 1 + random() % 5; nested < kMostPoints && !enough(); nested += 5) {
        trial.kills = {{recovery, nested}};
        trial.whole = false;
        const Outcome outcome = run_up_to(worker, trial, 3, &Outcome::recovery_reached);
        if (!outcome.recovery_reached) break;
        here.totals->pairs.fetch_add(1);
        raise_to(here.totals->most_recovery[static_cast<int>(recovery)], nested);
      }
    }
  }
}

void enumerate_failures(Worker& worker, uint32_t operation, const Options& options) {
  const uint64_t step = !options.full && (operations()[operation].flags & kLong) != 0 ? 61 : 1;
  for (uint64_t at = 1; at < kMostPoints && !enough(); at += step) {
    Trial trial;
    trial.run = Run::kFail;
    trial.operation = operation;
    trial.at = at;
    trial.seed = options.seed;
    bool reached = false;
    for (const bool persistent : {false, true}) {
      trial.persistent = persistent;
      size_t i = 0;
      for (const int error : persistent ? std::vector<int>(std::begin(kLastingErrors), std::end(kLastingErrors))
                                        : std::vector<int>(std::begin(kOnceErrors), std::end(kOnceErrors))) {
        // The short form takes the errors in turn.
        if (!options.full && i++ != (at + options.seed) % (persistent ? 4 : 5)) continue;
        trial.error = error;
        reached = run_up_to(worker, trial, reached ? 1 : kTries, &Outcome::reached).reached || reached;
      }
    }
    if (!reached) break;
    here.totals->points[static_cast<int>(Run::kFail)].fetch_add(1);
  }
}

void enumerate_stops(Worker& worker, uint32_t operation, const Options& options) {
  const bool is_long = (operations()[operation].flags & kLong) != 0;
  const uint64_t stride = options.full ? 1 : is_long ? 101 : 5;
  for (uint64_t at = options.full ? 1 : 1 + (options.seed + operation) % stride; at < kMostPoints && !enough();
       at += stride) {
    Trial trial;
    trial.run = Run::kStop;
    trial.operation = operation;
    trial.at = at;
    bool reached = false;
    for (uint64_t rounds = 0; rounds < 2; ++rounds) {
      trial.seed = options.seed + rounds;
      if (options.full || (at + operation) % 2 == rounds)
        reached = run_up_to(worker, trial, reached ? 1 : kTries, &Outcome::reached).reached || reached;
    }
    if (!reached) break;
    here.totals->points[static_cast<int>(Run::kStop)].fetch_add(1);
  }
}

Trial draw(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto& all = operations();
  Trial trial;
  trial.seed = seed;
  do {
    trial.operation = static_cast<uint32_t>(random() % all.size());
  } while ((all[trial.operation].flags & kOnlyAlone) != 0 && random() % 16 != 0);
  const uint32_t most = here.totals->most[trial.operation].load();
  trial.at = 1 + random() % (most != 0 ? most : 40);
  static constexpr size_t kDepths[] = {0, 1, 1, 1, 1, 1, 2, 2, 2, 3};
  for (size_t depth = kDepths[random() % std::size(kDepths)]; depth > 0; --depth) {
    const auto recovery = static_cast<Recovery>(std::array<uint32_t, 8>{0, 0, 0, 0, 1, 1, 1, 2}[random() % 8]);
    const uint32_t longest = here.totals->most_recovery[static_cast<int>(recovery)].load();
    const uint64_t bound = random() % 4 == 0 && longest != 0 ? longest : 40;
    trial.kills.push_back({recovery, 1 + random() % bound});
  }
  // One that empties chunks would take those that the operation needs.
  if (random() % 16 == 0 && (all[trial.operation].flags & kEmptyChunk) == 0) {
    for (int tries = 0; tries < 20; ++tries) {
      const auto i = static_cast<uint32_t>(random() % all.size());
      if ((all[i].flags & ~kInbox) != 0) continue;
      trial.bystander = static_cast<int>(i);
      trial.bystander_at = 1 + random() % std::max<uint32_t>(here.totals->most[i].load(), 1);
      break;
    }
  }
  trial.whole = random() % 32 == 0;
  return trial;
}

[[noreturn]] void work(const Options& options, unsigned job) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  std::signal(SIGALRM, took_too_long);
  here.board = make_shared_page<Board>();
  (void)plan_for(failpoint::Action::kNone, 0);
  {
    Worker worker(options.seed * 100 + job);
    if (options.trial.at != 0 && options.at != 0) {
      for (uint64_t i = 0; i < options.repeat && !enough(); ++i) {
        (void)worker.run(options.trial);
        if (i % 10 == 9) worker.end_session();
      }
    } else {
      const auto count = static_cast<uint32_t>(operations().size());
      for (uint32_t piece; (piece = here.totals->next.fetch_add(1)) < count * kRuns;) {
        at_start = here.totals->violations.load();
        const uint32_t operation = piece / kRuns;
        const auto run = static_cast<Run>(piece % kRuns);
        if (options.operation >= 0 && operation != static_cast<uint32_t>(options.operation)) continue;
        if (options.mode >= 0 && static_cast<int>(run) != options.mode) continue;
        if (run == Run::kKill) enumerate_kills(worker, operation, options);
        if (run == Run::kFail) enumerate_failures(worker, operation, options);
        if (run == Run::kStop) enumerate_stops(worker, operation, options);
        worker.end_session();
      }
      at_start = kMaxViolations;
      for (uint64_t i = 0; here.totals->kills.load() < options.kills && !enough(); ++i)
        (void)worker.run(draw((options.seed * 64 + job) * 1'000'000'007 + i));
    }
  }
  std::fflush(nullptr);
  ::_exit(0);
}

// ---- the report

void write_json(const Options& options, double seconds, const std::vector<std::string>& violations) {
  const Totals& t = *here.totals;
  size_t reached = 0;
  for (size_t i = 0; i < point_names().size(); ++i) {
    bool any = false;
    for (const auto& run : t.reached) any = any || run[i].load() != 0;
    reached += any ? 1 : 0;
  }
  ResultFile result{subject().name, options.seed, options.full, seconds, {}, violations};
  const std::vector<std::pair<const char*, uint64_t>> figures = {
      {"operations", operations().size()},
      {"names of points in the sources", point_names().size()},
      {"names reached", reached},
      {"points enumerated, kill", t.points[0].load()},
      {"points enumerated, fail", t.points[1].load()},
      {"points enumerated, stop", t.points[2].load()},
      {"pairs of a point and a point of its recovery", t.pairs.load()},
      {"SIGKILLs", t.kills.load()},
      {"calls made to fail", t.failures.load()},
      {"SIGSTOPs", t.stops.load()},
      {"trials", t.trials.load()},
      {"victims that did not come to their point", t.missed.load()},
      {"times the whole limit was allocated afterwards", t.wholes.load()},
      {"operations of the survivors meanwhile", t.survivor_operations.load()},
  };
  result.count(figures);
  result.write(options.json);
}

int find_operation(const std::string& name) {
  const auto& all = operations();
  for (size_t i = 0; i < all.size(); ++i) {
    if (name == all[i].name) return static_cast<int>(i);
  }
  std::fprintf(stderr, "no operation is called %s; --list names them\n", name.c_str());
  std::exit(2);
}

std::pair<std::string, uint64_t> split(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == std::string::npos) return {text, 1};
  return {text.substr(0, colon), std::strtoull(text.c_str() + colon + 1, nullptr, 10)};
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) {
        std::fprintf(stderr, "%s needs a value\n", flag.c_str());
        std::exit(2);
      }
      return argv[++i];
    };
    const auto number = [&] { return std::strtoull(value().c_str(), nullptr, 10); };
    if (flag == "--full") {
      options.full = true;
    } else if (flag == "--list") {
      options.list = true;
    } else if (flag == "--seed") {
      options.seed = number();
    } else if (flag == "--kills") {
      options.kills = number();
    } else if (flag == "--jobs") {
      options.jobs = static_cast<unsigned>(std::max<uint64_t>(number(), 1));
    } else if (flag == "--operation") {
      options.operation = find_operation(value());
    } else if (flag == "--mode") {
      const std::string name = value();
      for (int run = 0; run < kRuns; ++run) options.mode = name == kRunNames[run] ? run : options.mode;
      if (options.mode < 0) {
        std::fprintf(stderr, "--mode is kill, fail or stop\n");
        std::exit(2);
      }
    } else if (flag == "--json") {
      options.json = value();
    } else if (flag == "--at") {
      options.at = number();
    } else if (flag == "--repeat") {
      options.repeat = number();
    } else if (flag == "--errno") {
      options.trial.error = static_cast<int>(number());
    } else if (flag == "--persistent") {
      options.trial.persistent = true;
    } else if (flag == "--recovery") {
      const auto [kind, at] = split(value());
      for (uint32_t k = 0; k < kRecoveries; ++k) {
        if (kind == kRecoveryNames[k]) options.trial.kills.push_back({static_cast<Recovery>(k), at});
      }
    } else if (flag == "--leave-dead") {
      options.trial.leave_dead = true;
    } else if (flag == "--bystander") {
      const auto [name, at] = split(value());
      options.trial.bystander = find_operation(name);
      options.trial.bystander_at = at;
    } else {
      std::fprintf(stderr, "unknown option %s\n", flag.c_str());
      std::exit(2);
    }
  }
  if (options.full && options.kills == 0 && options.operation < 0) options.kills = 1'000'000;
  if (options.at != 0) {
    if (options.operation < 0) {
      std::fprintf(stderr, "--at needs --operation\n");
      std::exit(2);
    }
    options.trial.operation = static_cast<uint32_t>(options.operation);
    options.trial.run = static_cast<Run>(std::max(options.mode, 0));
    options.trial.at = options.at;
    options.trial.seed = options.seed;
    options.jobs = 1;
  } else {
    options.trial.at = 0;
  }
  return options;
}

int main_of(const Options& options) {
  if (options.list) {
    for (const Operation& operation : operations()) std::printf("%s\n", operation.name);
    for (const std::string& name : point_names()) std::printf("  %s\n", name.c_str());
    return 0;
  }
  (void)point_names();  // as they are at the start
  here.totals = make_shared_page<Totals>();
  const auto start = std::chrono::steady_clock::now();
  std::vector<pid_t> workers;
  for (unsigned job = 0; job < options.jobs; ++job) {
    const pid_t pid = ::fork();
    if (pid == 0) work(options, job);
    workers.push_back(pid);
  }
  for (const pid_t pid : workers) {
    int status = 0;
    for (unsigned seconds = 1; ::waitpid(pid, &status, WNOHANG) != pid; ++seconds) {
      ::usleep(options.full ? 1'000'000 : 20'000);
      if (options.full && seconds % 60 == 0) {
        std::fprintf(stderr, "%lu SIGKILLs, %lu pairs, %lu trials, %u violations\n", here.totals->kills.load(),
                     here.totals->pairs.load(), here.totals->trials.load(), here.totals->violations.load());
      }
    }
    if (status != 0 && here.totals->violations.load() == 0)
      add_violation("a worker ended with status " + std::to_string(status) + " in " + options.trial.describe());
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const Totals& t = *here.totals;
  const bool all = options.operation < 0 && options.mode < 0 && options.at == 0;
  for (size_t i = 0; i < point_names().size() && all; ++i) {
    bool any = false;
    for (const auto& run : t.reached) any = any || run[i].load() != 0;
    if (!any) add_violation("no operation reaches the point " + point_names()[i]);
    const auto& can_fail = names_that_can_fail();
    if (std::find(can_fail.begin(), can_fail.end(), point_names()[i]) != can_fail.end() &&
        t.reached[static_cast<int>(Run::kFail)][i].load() == 0)
      add_violation("no operation was made to fail at " + point_names()[i]);
  }
  std::vector<std::string> violations;
  for (uint32_t i = 0; i < std::min(t.violations.load(), kMaxViolations); ++i) violations.emplace_back(t.violation[i]);
  std::printf("%zu operations, %zu names of points; enumerated: kill %lu, fail %lu, stop %lu points, %lu pairs\n",
              operations().size(), point_names().size(), t.points[0].load(), t.points[1].load(), t.points[2].load(),
              t.pairs.load());
  std::printf(
      "%lu SIGKILLs, %lu failed calls, %lu SIGSTOPs in %lu trials, %lu operations of survivors; %.1f s; %u "
      "violations\n",
      t.kills.load(), t.failures.load(), t.stops.load(), t.trials.load(), t.survivor_operations.load(), seconds,
      t.violations.load());
  write_json(options, seconds, violations);
  return t.violations.load() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace torchshm::torture

int main(int argc, char** argv) { return torchshm::torture::main_of(torchshm::torture::parse(argc, argv)); }
