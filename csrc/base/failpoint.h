// Named points in every transition of shared memory and before every system call that can fail.
//
// A build with TORCHSHM_FAILPOINTS can be told, per process: "die here", "stop here" or "fail here with this errno" at the n-th
// point that is reached. Release builds contain none of it. When a process dies here: that is what the points are for.
#pragma once

#include <cstdint>

namespace torchshm::failpoint {

enum class Action : uint8_t { kNone, kKill, kStop, kFail };

struct Plan {
  Action action = Action::kNone;
  uint64_t at = 1;          // act at the at-th matching point, counted from 1
  bool persistent = false;  // and at every later one
  int error = 0;            // kFail: the errno that the system call seems to return; only what can fail is counted then
  const char* only = nullptr;  // match this name only; a static string
  // Told of every matching point (with kFail also of those that can't fail), in the process that passes it, and whether the action follows. Must not pass points itself.
  void (*watch)(const char* name, bool acts) = nullptr;
};

// Counts from zero again. Not for use while other threads pass points.
void arm(const Plan& plan);
void disarm();
bool armed();
uint64_t reached();  // matching points passed since arm()
const char* last();  // name of the point that acted or was passed last
// 0, or the errno to fail with.
int pass(const char* name, bool can_fail);

// For members that are threads: this thread leaves what it is doing by an exception at its n-th point from here, as if it had been
// killed there, with all that it has written and nothing that it has not. 0: not at all.
struct Died {
  const char* at;
};
void die_after(uint64_t points);

}  // namespace torchshm::failpoint

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
#define TORCHSHM_POINT(name) ((void)::torchshm::failpoint::pass(name, false))
#define TORCHSHM_INJECT(name) (::torchshm::failpoint::pass(name, true))
#else
#define TORCHSHM_POINT(name) ((void)0)
#define TORCHSHM_INJECT(name) 0
#endif
