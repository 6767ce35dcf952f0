// Processes at work that are killed, stopped and continued at random, while somebody looks at what they share.
#pragma once

#include <chrono>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/failpoint.h"
#include "processes.h"

namespace torchshm::tests {

// Environment: TORCHSHM_SOAK_SECONDS, how long (default 4); TORCHSHM_SOAK_SEED, which sequence.
struct SoakSettings {
  int seconds = number("TORCHSHM_SOAK_SECONDS", 4);
  uint64_t seed = static_cast<uint64_t>(number("TORCHSHM_SOAK_SEED", 1));

 private:
  static int number(const char* name, int otherwise) {
    const char* setting = std::getenv(name);
    return setting != nullptr ? std::atoi(setting) : otherwise;
  }
};

// Stopped, or now and then dead, at one of the next `most` points of what this process does; the crowd sends SIGCONT.
inline void end_up_midway(std::mt19937_64& random, uint64_t most) {
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  failpoint::Plan plan;
  plan.action = random() % 8 == 0 ? failpoint::Action::kKill : failpoint::Action::kStop;
  plan.at = 1 + random() % most;
  failpoint::arm(plan);
#else
  (void)random, (void)most;
#endif
}

class CrowdAtWork {
 public:
  // body(seed): what each of them does until it is killed.
  CrowdAtWork(uint64_t seed, std::function<bool(uint64_t)> body) : random_(seed), body_(std::move(body)), workers_(5) {
    for (Process& worker : workers_) launch(worker);
  }
  ~CrowdAtWork() { end(); }  // also when an assertion ends the test
  CrowdAtWork(const CrowdAtWork&) = delete;
  CrowdAtWork& operator=(const CrowdAtWork&) = delete;

  // Asks violation() after every death and every step, and while nobody moves. Returns the first that is not empty.
  std::string run(int seconds, const std::function<std::string()>& violation) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    while (std::chrono::steady_clock::now() < end) {
      Process& worker = workers_[random_() % workers_.size()];
      switch (random_() % 4) {
        case 0:  // dead, and not taken back until somebody notices
          ::kill(worker.pid, SIGKILL);
          (void)wait_for(worker.pid);
          ++kills_;
          if (std::string wrong = violation(); !wrong.empty()) return wrong;
          launch(worker);
          break;
        case 1:
          ::kill(worker.pid, worker.stopped ? SIGCONT : SIGSTOP);
          worker.stopped = !worker.stopped;
          break;
        default:
          ::usleep(static_cast<useconds_t>(random_() % 5000));
          if (!worker.stopped) ::kill(worker.pid, SIGCONT);  // it may have stopped by itself
          break;
      }
      if (random_() % 8 == 0) {  // nobody moves, wherever they are
        for (const Process& each : workers_) ::kill(each.pid, SIGSTOP);
        ::usleep(1000);
        if (std::string wrong = violation(); !wrong.empty()) return wrong;
        for (const Process& each : workers_) {
          if (!each.stopped) ::kill(each.pid, SIGCONT);
        }
      }
      if (std::string wrong = violation(); !wrong.empty()) return wrong;
      ++checks_;
    }
    end_and_report();
    return violation();
  }

 private:
  struct Process {
    pid_t pid;
    bool stopped;
  };
  void launch(Process& worker) {
    const uint64_t seed = random_();
    worker = {start([&] { return body_(seed); }), false};
  }
  void end() {
    for (const Process& worker : workers_) {
      ::kill(worker.pid, SIGKILL);
      (void)wait_for(worker.pid);
    }
    workers_.clear();
  }
  void end_and_report() {
    std::printf("%d checks over %zu processes at work, %d kills\n", checks_, workers_.size(), kills_);
    end();
  }

  std::mt19937_64 random_;
  std::function<bool(uint64_t)> body_;
  std::vector<Process> workers_;
  int checks_ = 0, kills_ = 0;
};

}  // namespace torchshm::tests
