// One pool with its driver and a survivor at work, and trials in it: set up, kill, recover, check that nothing is left and nothing changed.
//
// The driver is the process that calls run(); it and the survivor are members throughout. All others live for one trial.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "points_scene.h"

namespace torchshm::torture {

// What a process does that takes a dead one back: reap and trim; join; allocate in a full pool.
enum class Recovery : uint32_t { kReap, kJoin, kFull };
constexpr uint32_t kRecoveries = 3;
constexpr const char* kRecoveryNames[kRecoveries] = {"reap", "join", "full"};

constexpr unsigned kSeconds = 20;  // nobody's operation takes so long, whoever sleeps

struct Trial {
  Run run = Run::kKill;
  uint32_t operation = 0;
  uint64_t at = 1;
  int error = 0;            // kFail
  bool persistent = false;  // kFail
  struct Kill {
    Recovery recovery = Recovery::kReap;
    uint64_t at = 1;
  };
  std::vector<Kill> kills;  // of the one that recovers, of the one that recovers from that, ...
  // A bystander that is stopped at a point of an operation of its own for the time of the trial; -1 for none.
  int bystander = -1;
  uint64_t bystander_at = 1;
  bool leave_dead = false;  // the survivor does not reap meanwhile, so that the one that recovers finds all of it
  bool whole = true;        // in the end allocate all that the limit allows
  uint64_t seed = 1;
  std::string describe() const;  // as options of the program
};

struct Outcome {
  bool reached = false;           // the actor's point
  bool recovery_reached = false;  // the last kill's point
  uint64_t points = 0;            // that the actor passed, when it was not killed
  std::string wrong;              // empty when all is well
};

class Session {
 public:
  explicit Session(uint64_t seed);
  ~Session();
  Outcome run(const Trial& trial);
  // Everybody leaves; nothing must be left. Returns what is wrong.
  std::string close();
  bool usable() const { return member_ != nullptr; }

 private:
  void set_up(const Trial& trial, const Operation& operation);
  int act(const Trial& trial, const Operation& operation, uint32_t level, Run run, uint64_t at);
  int chain(const Trial& trial, const Operation& operation, size_t level);
  int recover(const Trial& trial, size_t level);
  void kill_or_fail(const Trial& trial, const Operation& operation, Outcome& outcome);
  void stop(const Trial& trial, const Operation& operation, Outcome& outcome);
  pid_t start_bystander(const Trial& trial);
  bool wait_until_stopped(pid_t pid, int& status);
  void collect(pid_t group);
  // Beside a trial (points_survivor.cc).
  void survive(uint64_t seed);
  void park();
  void unpark();
  void dismiss();
  void while_stopped(const Operation& operation, int rounds);
  // After it (points_verify.cc).
  void verify(const Trial& trial, const Operation& operation);
  void verify_table();
  void verify_whole();
  void take(Message& message, bool must, const char* what);

  __attribute__((format(printf, 2, 3))) void wrong(const char* format, ...);

  std::unique_ptr<pool::Member> member_;
  Held kept_[2];
  std::unique_ptr<Scene> scene_;  // over member_, for the driver's own blocks
  pid_t survivor_ = -1;
  int files_ = 0, mappings_ = 0;
  std::string wrong_;
};

int open_files();
int mappings();

}  // namespace torchshm::torture
