// Kills a process at every instruction of every operation, in the code as it is released, and looks at what a survivor finds.
//
// An operation is first recorded: stepped through to its end, with a picture of the pool after each instruction. A stretch of instructions
// between which no other process could see a difference is a state (step_picture.h). Then the operation is run anew and killed
//   - at the first and the last instruction of each state: all operations;
//   - at each instruction: those of the families allocate, hold, release, issue, redeem, reap, queue (--full; a sample of them otherwise);
//   - as a reaper of a process that was itself killed in each state of each operation, in each state of that reaping.
// Each of these runs is a process of its own that gets SIGKILL. It is brought to the instruction by a hardware breakpoint that counts how
// often its address is passed, and its picture there is compared with the recorded one; where they differ it is stepped into the same state
// instead.
// Last, random combinations: several deaths, a random life, a random operation, a random instruction.
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <unordered_map>

#include "result_file.h"
#include "step_picture.h"
#include "step_tracee.h"
#include "step_verify.h"

namespace torchshm::torture {
namespace {

using Event = Tracee::Event;

constexpr uint64_t kLimit = uint64_t{8} << 20;  // small: it is filled after every kill
constexpr uint32_t kMostSteps = 3'000'000;
// Of the short form; arbitrary: it ends within a minute.
constexpr size_t kSample = 10, kVictims = 12, kPerInstruction = 6;
// Of the full form: up to so many instructions an operation is killed at each of them without exception; longer ones spend theirs in reading
// /proc and in loops over a chunk, and are killed at both ends of each state and at so many others. --every knows no such limit.
constexpr uint32_t kShort = 6000;
constexpr size_t kLongSample = 2000;

struct Step {
  uint64_t rip = 0;  // of the next instruction
  uint32_t nth = 0;  // time, counted from 1, that it is the next one
  uint32_t state = 0;
  bool inside = false;  // a string instruction, between two of its iterations
};

struct Recording {
  std::vector<Step> steps;  // [n]: after n steps
  struct State {
    uint32_t first, last;
    uint64_t difference;
  };
  std::vector<State> states;
  uint32_t forked = UINT32_MAX;  // the instruction that made a child
  // Where to kill so that each state is met. most: of the states that one and the same instruction begins (a loop over the 512 descriptors
  // of a chunk), so many: its first ones, its last one, and some between.
  std::set<uint32_t> points(bool both_ends, size_t most) const {
    std::map<uint64_t, std::vector<const State*>> by_instruction;
    for (const State& state : states)
      by_instruction[state.first == 0 ? 0 : steps[state.first - 1].rip].push_back(&state);
    std::set<uint32_t> out;
    for (const auto& [rip, same] : by_instruction) {
      const size_t n = std::min(most, same.size());
      for (size_t i = 0; i < n; ++i) {
        const State& state = *same[n == 1 ? 0 : i * (same.size() - 1) / (n - 1)];
        out.insert(state.first);
        if (both_ends) out.insert(state.last);
      }
    }
    return out;
  }
  uint32_t instructions() const { return static_cast<uint32_t>(steps.size()) - 1; }
};

struct Totals {
  uint64_t kills = 0, steps = 0, stepped = 0, inexact = 0;
  uint64_t complete = 0;  // operations killed at each of their instructions
  std::vector<std::string> violations;
};

Totals totals;

// Of violations: a core that is broken breaks nearly everywhere, and the checker looks long at what is wrong.
bool enough() { return totals.violations.size() >= 50; }

void report(const Operation& operation, const Recording* recording, uint64_t n, uint64_t rip, const std::string& wrong,
            const std::string& reproduce) {
  std::string text = operation.name + ", killed at instruction " + std::to_string(n);
  if (recording != nullptr) {
    text += " of " + std::to_string(recording->instructions());
    if (n < recording->steps.size()) text += " (state " + std::to_string(recording->steps[n].state) + ")";
  }
  text += ", " + symbol(rip) + ": " + wrong + "   [" + reproduce + "]";
  std::printf("VIOLATION %s\n", text.c_str());
  totals.violations.push_back(text);
}

// One run of an operation in a process of its own, up to its first instruction.
class Run {
 public:
  explicit Run(const Operation& operation, Scene& scene) : operation_(operation), scene_(scene) {
    if (operation.before) operation.before(scene);
    start();
  }
  // In a scene in which `before` has been done.
  struct Prepared {};
  Run(const Operation& operation, Scene& scene, Prepared) : operation_(operation), scene_(scene) { start(); }

  Tracee& process() { return *process_; }
  Picture& picture() { return *picture_; }

  // Lets the fork's other side end too. What it has to say about it.
  std::string end_of_family() {
    if (operation_.child) {
      std::string wrong = verify_beside(scene_, 1);
      process_->kill_rest();
      return wrong;
    }
    const pid_t child = process_->let_child_go();
    if (child == 0) return {};
    int status = 0;
    (void)::waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0
               ? ""
               : "the child of the dead found something wrong, status " + std::to_string(status);
  }

 private:
  void start() {
    process_.emplace(
        [this] {
          ::alarm(600);
          if (operation_.joins) scene_.join();
          if (operation_.prepare) operation_.prepare(scene_);
        },
        [this] { operation_.act(scene_); });
    if (operation_.between) operation_.between(scene_);
    if (operation_.child) {
      if (!process_->run_to_fork()) std::fprintf(stderr, "step: %s does not fork\n", operation_.name.c_str());
      process_->follow_child();
    }
    picture_.emplace(scene_.survivor->arena());
  }

  const Operation& operation_;
  Scene& scene_;
  std::optional<Tracee> process_;
  std::optional<Picture> picture_;
};

Recording record(const Operation& operation) {
  Recording out;
  Scene scene(kLimit);
  Run run(operation, scene);
  Tracee& process = run.process();
  std::unordered_map<uint64_t, uint32_t> seen;
  uint64_t before = 0;
  out.states.push_back({0, 0, run.picture().difference()});
  bool entered_kernel = false;
  for (uint32_t n = 0;; ++n) {
    if (n > 0 && run.picture().look(entered_kernel)) out.states.push_back({n, n, run.picture().difference()});
    out.states.back().last = n;
    Step step;
    step.rip = process.rip();
    step.inside = step.rip == before;
    step.nth = step.inside ? seen[step.rip] : ++seen[step.rip];
    step.state = static_cast<uint32_t>(out.states.size()) - 1;
    out.steps.push_back(step);
    before = step.rip;
    entered_kernel = Tracee::at_syscall(step.rip);
    const Event event = process.step();
    ++totals.steps;
    if (event == Event::kForked) {
      entered_kernel = true;
      out.forked = n;
    }
    if (event == Event::kDone) break;
    if (event == Event::kGone || n == kMostSteps) {
      report(operation, nullptr, n, step.rip, "it did not end by itself: " + process.crash(),
             "--operation '" + operation.name + "'");
      break;
    }
  }
  process.kill();
  std::string wrong = run.end_of_family();
  wrong += verify(scene, 0);
  if (!wrong.empty())
    report(operation, &out, out.instructions(), before, wrong, "--operation '" + operation.name + "'");
  return out;
}

// Brings a run to its n-th instruction. False when what can be seen there is not what was recorded.
bool bring_to(Run& run, const Recording& recording, uint32_t n) {
  if (n == 0) return true;
  const Step& step = recording.steps[n];
  if (step.inside) return false;
  const Event event = run.process().run_to(step.rip, step.nth);
  if (event != Event::kArrived) return false;
  (void)run.picture().look(true);
  return run.picture().difference() == recording.states[step.state].difference;
}

bool step_to(Run& run, uint32_t n) {
  for (uint32_t i = 0; i < n; ++i) {
    const Event event = run.process().step();
    ++totals.steps;
    if (event == Event::kDone || event == Event::kGone) return false;
  }
  return true;
}

// Where a run differs from the recording (a process id with one more digit takes longer to read): to the same instruction, counted from the
// beginning of its state. False when the state is shorter now.
bool step_within_state(Run& run, const Recording& recording, uint32_t n) {
  const uint32_t state = recording.steps[n].state;
  uint32_t left = n - recording.states[state].first;
  for (uint32_t at = 0; at != state || left != 0;) {
    if (at == state) --left;
    const bool kernel = Tracee::at_syscall(run.process().rip());
    if (!step_to(run, 1)) return false;
    if (!run.picture().look(kernel)) continue;
    if (at == state) return false;
    ++at;
  }
  return run.picture().difference() == recording.states[state].difference;
}

void kill_at(const Operation& operation, const Recording& recording, uint32_t n, unsigned variant,
             const std::string& how) {
  if (enough()) return;
  std::optional<Scene> scene(std::in_place, kLimit);
  std::optional<Run> run(std::in_place, operation, *scene);
  if (!bring_to(*run, recording, n)) {
    run.reset();
    scene.emplace(kLimit);
    run.emplace(operation, *scene);
    ++totals.stepped;
    if (!step_within_state(*run, recording, n)) ++totals.inexact;
  }
  const uint64_t rip = run->process().pid() != 0 ? run->process().rip() : 0;
  run->process().kill();
  ++totals.kills;
  std::string wrong = run->end_of_family();
  const std::string rest = verify(*scene, variant);
  if (!wrong.empty() && !rest.empty()) wrong += "; ";
  wrong += rest;
  if (!wrong.empty()) report(operation, &recording, n, rip, wrong, how);
}

// The reaping of a process that was killed at an instruction of an operation of its own. It is brought there first, as it was recorded;
// then the reaper joins, beside a process that is stopped half-way; then it dies.
Operation reaping_of(const Operation& victim, const Recording& recording, uint32_t n) {
  Operation reap;
  reap.name = "reap of '" + victim.name + "' at " + std::to_string(n);
  reap.family = "reap";
  const auto run = std::make_shared<std::optional<Run>>();
  reap.before = [&victim, &recording, n, run](Scene& scene) {
    run->emplace(victim, scene);
    if (!bring_to(**run, recording, n)) ++totals.inexact;
  };
  reap.between = [run](Scene&) {
    run->reset();
    ++totals.kills;
  };
  reap.act = [](Scene& scene) { (void)scene.self->reap(); };
  return reap;
}

bool can_be_victim(const Operation& operation) { return !operation.child && std::string(operation.family) != "stats"; }

// ---- random combinations

void random_trial(uint64_t seed) {
  if (enough()) return;
  std::mt19937_64 random(seed);
  const auto& all = operations();
  Scene scene(random() % 2 == 0 ? kLimit : 2 * kLimit);
  for (uint64_t i = random() % 3; i > 0; --i) (void)scene.hold(1 + random() % 300000, random() % 2 == 0);
  for (uint64_t i = random() % 3; i > 0; --i) (void)scene.send(1 + random() % 700000);
  const auto choose = [&]() -> const Operation& {
    for (;;) {
      const Operation& o = all[random() % all.size()];
      if (std::string(o.family) != "fork") return o;
    }
  };
  // All lives have joined before the first death, so that each of them may be the one that reaps it.
  const uint64_t deaths = 1 + random() % 4;
  std::vector<Operation> lives;
  for (uint64_t i = 0; i < deaths; ++i) {
    const Operation& chosen = choose();
    Operation life = chosen;
    const bool reaper = random() % 3 == 0;
    const uint64_t prelude = random();
    if (reaper) life.act = [](Scene& s) { (void)s.self->reap(); };
    life.joins = life.joins || reaper;
    if (reaper) life.before = life.prepare = nullptr;
    life.between = nullptr;
    life.prepare = [prepare = life.prepare, prelude, joined = life.joins](Scene& s) {
      std::mt19937_64 own(prelude);
      if (joined) random_steps(s, own, static_cast<int>(own() % 6));
      if (prepare) prepare(s);
    };
    life.name += reaper ? " (a reaper)" : "";
    lives.push_back(life);
  }
  std::string story;
  std::vector<std::unique_ptr<Run>> runs;
  for (const Operation& life : lives) {
    scene.handle = scene.stale;
    if (life.before) life.before(scene);
    runs.push_back(std::make_unique<Run>(life, scene, Run::Prepared{}));
  }
  uint64_t n = 0, rip = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    n = static_cast<uint64_t>(std::exp(std::uniform_real_distribution<double>(0, std::log(20000.0))(random)));
    (void)step_to(*runs[i], static_cast<uint32_t>(n));
    rip = runs[i]->process().pid() != 0 ? runs[i]->process().rip() : 0;
    story += (story.empty() ? "" : ", then ") + lives[i].name + " at " + std::to_string(n);
    runs[i]->process().kill();
    ++totals.kills;
    if (!runs[i]->process().crash().empty()) story += " CRASHED: " + runs[i]->process().crash();
  }
  const bool crashed = story.find("CRASHED") != std::string::npos;
  std::string wrong = crashed ? "a crash" : verify(scene, static_cast<unsigned>(seed));
  if (wrong.empty()) return;
  Operation named;
  named.name = story;
  report(named, nullptr, n, rip, wrong, "--seed " + std::to_string(seed) + " --trials 1 --random");
}

// ---- the command line

struct Arguments {
  bool full = false, every = false, random_only = false, list = false;
  std::string operation, victim, json;
  uint64_t seed = 1;
  int64_t trials = -1, instruction = -1, at = -1, variant = -1;
};

Arguments parse(int count, char** values) {
  Arguments out;
  for (int i = 1; i < count; ++i) {
    const std::string name = values[i];
    const auto next = [&]() -> std::string {
      if (i + 1 == count) {
        std::fprintf(stderr, "step: %s needs a value\n", name.c_str());
        std::exit(2);
      }
      return values[++i];
    };
    if (name == "--full") {
      out.full = true;
    } else if (name == "--every") {
      out.full = out.every = true;
    } else if (name == "--random") {
      out.random_only = true;
    } else if (name == "--list") {
      out.list = true;
    } else if (name == "--operation") {
      out.operation = next();
    } else if (name == "--json") {
      out.json = next();
    } else if (name == "--seed") {
      out.seed = std::stoull(next());
    } else if (name == "--trials") {
      out.trials = std::stoll(next());
    } else if (name == "--instruction") {
      out.instruction = std::stoll(next());
    } else if (name == "--variant") {
      out.variant = std::stoll(next());
    } else if (name == "--victim") {
      out.victim = next();
    } else if (name == "--at") {
      out.at = std::stoll(next());
    } else {
      std::fprintf(stderr,
                   "usage: torchshm_step [--full] [--every] [--operation PART_OF_NAME] [--victim NAME [--at N]] "
                   "[--instruction N [--variant N]] "
                   "[--random] "
                   "[--trials N] [--seed N] [--json FILE] [--list]\n");
      std::exit(2);
    }
  }
  return out;
}

using Figures = std::vector<std::pair<std::string, std::string>>;

bool every_instruction(const Operation& operation) {
  static const std::set<std::string> families = {"allocate", "hold", "release", "issue", "redeem", "reap", "queue"};
  return families.count(operation.family) != 0;
}

std::string command(const Operation& operation, uint32_t n, unsigned variant) {
  return "--operation '" + operation.name + "' --instruction " + std::to_string(n) + " --variant " +
         std::to_string(variant);
}

uint64_t descriptors() {
  uint64_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) n += entry.exists() ? 1 : 0;
  return n;
}

// The instructions at which an operation is killed.
std::set<uint32_t> choose(const Operation& operation, const Recording& recording, const Arguments& arguments,
                          std::mt19937_64& random) {
  std::set<uint32_t> at = recording.points(arguments.full, arguments.full ? SIZE_MAX : kPerInstruction);
  if (!every_instruction(operation)) return at;
  if (arguments.every || (arguments.full && recording.instructions() <= kShort)) {
    ++totals.complete;
    for (uint32_t n = 0; n <= recording.instructions(); ++n) at.insert(n);
  } else {
    for (size_t i = arguments.full ? kLongSample : kSample; i > 0; --i)
      at.insert(static_cast<uint32_t>(random() % recording.steps.size()));
  }
  // A string instruction half-way: its iterations can't be told apart by address. Where others can see one, it begins a state.
  std::erase_if(at, [&](uint32_t n) {
    return recording.steps[n].inside && recording.states[recording.steps[n].state].first != n;
  });
  return at;
}

// The one kill that the command line names; whatever the survivor does first, unless that is named too.
void reproduce(const Operation& operation, const Recording& recording, const Arguments& arguments,
               const std::string& how) {
  const auto n = std::min(static_cast<uint32_t>(arguments.instruction), recording.instructions());
  for (unsigned variant = 0; variant < kVariants; ++variant) {
    if (arguments.variant < 0 || variant == arguments.variant) kill_at(operation, recording, n, variant, how);
  }
}

int campaign(const Arguments& arguments) {
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  std::mt19937_64 random(arguments.seed);
  Figures figures;
  std::map<std::string, std::pair<uint64_t, uint64_t>>
      covered;  // family: instructions, kills at an instruction of their own
  std::map<std::string, Recording> recordings;
  uint64_t states = 0, nested = 0, nested_states = 0;
  const uint64_t baseline = descriptors();

  for (const Operation& operation : operations()) {
    if (arguments.random_only ||
        (!arguments.operation.empty() && operation.name.find(arguments.operation) == std::string::npos))
      continue;
    const double since = seconds();
    const Recording& recording = recordings[operation.name] = record(operation);
    if (!arguments.victim.empty()) continue;
    if (arguments.instruction >= 0) {
      reproduce(operation, recording, arguments, command(operation, 0, 0));
      continue;
    }
    const auto at = choose(operation, recording, arguments, random);
    for (const uint32_t n : at) {
      const auto variant = static_cast<unsigned>(random() % kVariants);
      kill_at(operation, recording, n, variant, command(operation, n, variant));
    }
    // Whatever the survivor does first.
    const std::set<uint32_t> firsts = arguments.full ? recording.points(false, kPerInstruction) : std::set<uint32_t>();
    for (const uint32_t n : firsts) {
      for (unsigned variant = 0; variant < kVariants; ++variant)
        kill_at(operation, recording, n, variant, command(operation, n, variant));
    }
    states += recording.states.size();
    covered[operation.family].first += recording.instructions();
    covered[operation.family].second += at.size();
    std::printf("%-55s %7u instructions %4zu states %7zu kills %6.1f s\n", operation.name.c_str(),
                recording.instructions(), recording.states.size(), at.size(), seconds() - since);
    std::fflush(stdout);
  }

  // Every reaping of every death.
  const bool wanted = arguments.operation.empty() && !arguments.random_only && arguments.instruction < 0;
  std::vector<std::pair<const Operation*, uint32_t>> victims, middles;
  for (const Operation& operation : operations()) {
    if (!can_be_victim(operation) || recordings.count(operation.name) == 0) continue;
    if (!wanted && operation.name != arguments.victim) continue;
    const Recording& recording = recordings[operation.name];
    for (const uint32_t n : recording.points(false, kPerInstruction)) {
      if (n > recording.forked) continue;  // the child would live on
      if (arguments.at < 0 || n == arguments.at) victims.emplace_back(&operation, n);
    }
    if (recording.instructions() <= kShort && recording.states.size() > 2 && recording.forked == UINT32_MAX)
      middles.emplace_back(&operation, recording.states[recording.states.size() / 2].first);
  }
  if (!arguments.full && arguments.victim.empty()) {
    std::shuffle(victims.begin(), victims.end(), random);
    victims.resize(std::min(victims.size(), kVictims));
  }
  double since = seconds();
  const auto reaped = [&](const Operation* victim, uint32_t n, bool each) {
    const Operation reap = reaping_of(*victim, recordings[victim->name], n);
    const std::string death =
        "--operation '" + victim->name + "' --victim '" + victim->name + "' --at " + std::to_string(n);
    const Recording recording = record(reap);
    if (arguments.instruction >= 0) return reproduce(reap, recording, arguments, death);
    const auto at = each ? choose(reap, recording, arguments, random) : recording.points(false, kPerInstruction);
    for (const uint32_t m : at) {
      const auto variant = static_cast<unsigned>(random() % kVariants);
      kill_at(reap, recording, m, variant,
              death + " --instruction " + std::to_string(m) + " --variant " + std::to_string(variant));
    }
    if (!each) {
      ++nested;
      nested_states += recording.states.size();
      return;
    }
    covered[reap.family].first += recording.instructions();
    covered[reap.family].second += at.size();
    std::printf("%-55s %7u instructions %4zu states %7zu kills\n", reap.name.c_str(), recording.instructions(),
                recording.states.size(), at.size());
  };
  for (const auto& [victim, n] : victims) reaped(victim, n, false);
  if (nested != 0) {
    std::printf("%lu deaths, their reaping killed in each of its %lu states: %.1f s\n", nested, nested_states,
                seconds() - since);
  }
  // And at every instruction, of those that died in the middle of what they were doing.
  if (arguments.full && wanted) {
    for (const auto& [victim, n] : middles) reaped(victim, n, true);
  }

  since = seconds();
  const int64_t trials = arguments.trials >= 0               ? arguments.trials
                         : !wanted && !arguments.random_only ? 0
                         : arguments.full                    ? 20000
                                                             : 150;
  for (int64_t i = 0; i < trials; ++i) random_trial(arguments.seed + static_cast<uint64_t>(i));
  if (trials != 0) std::printf("%ld random combinations: %.1f s\n", trials, seconds() - since);

  if (descriptors() != baseline)
    totals.violations.push_back("descriptors: " + std::to_string(baseline) + " before, " +
                                std::to_string(descriptors()) + " after");

  for (const auto& [family, figure] : covered) {
    figures.emplace_back("instructions: " + family, std::to_string(figure.first));
    figures.emplace_back("killed at, one by one: " + family, std::to_string(figure.second));
  }
  figures.emplace_back("operations", std::to_string(recordings.size()));
  figures.emplace_back("operations and reapings killed at every instruction", std::to_string(totals.complete));
  figures.emplace_back("states", std::to_string(states));
  figures.emplace_back("deaths reaped by a reaper that is killed in each state", std::to_string(nested));
  figures.emplace_back("states of those reapings", std::to_string(nested_states));
  figures.emplace_back("random combinations", std::to_string(trials));
  figures.emplace_back("kills", std::to_string(totals.kills));
  figures.emplace_back("instructions stepped", std::to_string(totals.steps));
  figures.emplace_back("kills reached by stepping", std::to_string(totals.stepped));
  figures.emplace_back("kills in another state than recorded", std::to_string(totals.inexact));
  for (const auto& [name, value] : figures) std::printf("  %-58s %s\n", name.c_str(), value.c_str());
  std::printf("%zu violations, %.1f s, seed %lu\n", totals.violations.size(), seconds(), arguments.seed);
  ResultFile{"step", arguments.seed, arguments.full, seconds(), figures, totals.violations}.write(arguments.json);
  return totals.violations.empty() ? 0 : 1;
}

}  // namespace
}  // namespace torchshm::torture

int main(int count, char** values) {
  using namespace torchshm::torture;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  (void)::prctl(PR_SET_CHILD_SUBREAPER, 1);  // of a forked process that dies the child is ours
  // On one processor the next step costs no wake-up on another: a quarter of the time.
  if (const int here = ::sched_getcpu(); here >= 0) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(here, &one);
    (void)::sched_setaffinity(0, sizeof one, &one);
  }
  const Arguments arguments = parse(count, values);
  if (arguments.list) {
    for (const Operation& operation : operations()) std::printf("%-9s %s\n", operation.family, operation.name.c_str());
    return 0;
  }
  return campaign(arguments);
}
