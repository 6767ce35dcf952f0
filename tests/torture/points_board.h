// What the processes of the points campaign tell one another: one anonymous shared mapping, made before the first fork.
//
// Totals belong to the whole campaign, a Board to one worker and the processes that it starts. Nothing here is part of a pool. Any of the
// writers may be killed at any moment: every field is one store, or is read only when its writer is gone or parked.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "base/failpoint.h"
#include "pool/handle.h"

namespace torchshm::torture {

enum class Run : uint8_t { kKill, kFail, kStop };
constexpr int kRuns = 3;
constexpr const char* kRunNames[kRuns] = {"kill", "fail", "stop"};

constexpr uint32_t kMaxNames = 256;
constexpr uint32_t kMaxOperations = 128;
constexpr uint32_t kMaxViolations = 32;
constexpr uint32_t kMaxDepth = 4;
constexpr uint32_t kStreet = 16;
constexpr uint32_t kMany = 1030;  // more than the ring of hints holds

struct Totals {
  std::atomic<uint64_t> kills, failures, stops;  // that happened
  std::atomic<uint64_t> trials, pairs, wholes;   // pairs: kills of a recovering process at a point of its own
  std::atomic<uint64_t> missed;                  // victims that did not come to the point where they were to die
  std::atomic<uint64_t> survivor_operations;
  std::atomic<uint64_t> points[kRuns];             // (operation, N) that were reached, alone
  std::atomic<uint32_t> most[kMaxOperations];      // points of an operation, as enumerated
  std::atomic<uint32_t> most_recovery[kMaxDepth];  // points of a recovery of each kind
  std::atomic<uint32_t> next;                      // piece of work to be taken next
  std::atomic<uint8_t> reached[kRuns][kMaxNames];
  std::atomic<uint32_t> violations;
  char violation[kMaxViolations][1400];
};

// A block under way in the street: whoever finds it takes it, checks its bytes and drops it.
enum : uint32_t { kNothing = 0, kUp = 1, kClaimed = 2, kWriting = 4 };
struct Message {
  std::atomic<uint32_t> state;
  pool::Handle handle;
  uint64_t seed, bytes;
};

struct Board {
  // The survivor: told to park (futex), says that it has.
  std::atomic<uint32_t> park, parked, leave;
  std::atomic<uint64_t> survivor_operations;
  std::atomic<uint32_t> survivor_blocks;
  char survivor_wrong[512];
  Message street[kStreet];
  // From the driver to the actor.
  Message inbox[2];  // a small and a large block that the driver keeps
  Message gift;      // nothing else holds it
  Message gone;      // released long ago
  pool::Handle many[kMany];
  uint32_t many_bytes;
  std::atomic<uint32_t> tolerant;    // the pool is made full on purpose: unreceived messages may have been taken back
  std::atomic<uint32_t> leave_dead;  // the survivor does not reap of its own accord
  // From the actor (level 0) and the recovering processes (1, 2, ...).
  std::atomic<uint32_t> acted[kMaxDepth + 1];
  std::atomic<uint64_t> reached[kMaxDepth + 1];
  std::atomic<int> status[kMaxDepth + 1];
  char last[kMaxDepth + 1][48];
  char wrong[512];
  std::atomic<int> stopped;                       // pid
  std::atomic<uint32_t> actor_slot, victim_slot;  // + 1
  std::atomic<uint64_t> actor_word, victim_word;
  pool::Handle note;   // from one helper of the actor to it
  pool::Handle stale;  // of a block of the actor's that must be gone in the end
  std::atomic<uint32_t> stale_set;
};

template <class T>
T* make_shared_page() {
  void* at = ::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) std::abort();
  return new (at) T{};
}

// All names of points in the sources; their order is their index.
const std::vector<std::string>& point_names();
const std::vector<std::string>& names_that_can_fail();

// State of this process: which totals and board it writes to, and in which role it passes points.
struct Here {
  Totals* totals = nullptr;
  Board* board = nullptr;
  Run run = Run::kKill;
  uint32_t level = 0;
  void (*hook)(const char* name) = nullptr;  // an operation's own, called at each point
};
extern Here here;

// A plan that reports to `here`.
failpoint::Plan plan_for(failpoint::Action action, uint64_t at);

// The first one stands.
__attribute__((format(printf, 2, 3))) inline void say(char (&to)[512], const char* format, ...) {
  if (to[0] != 0) return;
  va_list arguments;
  va_start(arguments, format);
  (void)std::vsnprintf(to, sizeof to, format, arguments);
  va_end(arguments);
}

}  // namespace torchshm::torture
