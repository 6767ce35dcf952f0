// What all processes of a soak see beside the pool: who they are, what they are doing since when, what was counted, what was found wrong.
//
// Shared: the board itself, a memory file of its own that every process maps. Private: nothing. Called by the conductor and its workers.
// When a process dies here: its entry keeps its pid until the conductor has waited for it, so that no signal goes to a stranger.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <ctime>

namespace torchshm::torture {

enum class Action : uint32_t {
  kNone,
  kJoin,
  kAllocate,
  kSend,
  kReceive,
  kAgain,  // redeem a handle that was redeemed before
  kView,
  kWrite,
  kRelease,
  kFork,
  kTrim,
  kStats,
  kReap,
  kCount,
};

constexpr const char* kActions[] = {"none",  "join",    "allocate", "send", "receive", "again", "view",
                                    "write", "release", "fork",     "trim", "stats",   "reap"};
static_assert(std::size(kActions) == static_cast<size_t>(Action::kCount));

constexpr uint32_t kMostWorkers = 32;
constexpr uint32_t kMostEntries = 128;  // with what workers have forked
constexpr uint32_t kMostFound = 32;

inline uint64_t now_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000 + static_cast<uint64_t>(t.tv_nsec);
}

struct Entry {
  std::atomic<pid_t> pid;        // 0: free
  std::atomic<uint32_t> action;  // kNone between operations
  std::atomic<uint64_t> since;   // when the action began
  std::atomic<uint64_t> held;    // distinct blocks; exact while parked
  std::atomic<uint32_t> parked;  // the pause it stands in; 0: at work
};

struct Board {
  std::atomic<uint32_t> pause;      // number of the pause that everybody is to come to rest for; 0: none
  std::atomic<uint64_t> heartbeat;  // of the conductor; workers that see it stop end by themselves
  std::atomic<uint64_t> actions[static_cast<size_t>(Action::kCount)];
  std::atomic<uint64_t> longest_ns[static_cast<size_t>(Action::kCount)];
  std::atomic<uint64_t> verified;  // bytes
  std::atomic<uint64_t> full, stale, first_stale, lost, duplicated, private_writes, left, armed_kills, armed_stops;
  std::atomic<uint32_t> found;
  char what[kMostFound][320];
  int pipes[kMostWorkers][2];
  uint32_t workers;
  Entry entries[kMostEntries];

  // Something is wrong.
  __attribute__((format(printf, 2, 3))) void report(const char* format, ...) {
    const uint32_t n = found.fetch_add(1);
    if (n >= kMostFound) return;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(what[n], sizeof what[n], format, arguments);
    va_end(arguments);
  }
};

}  // namespace torchshm::torture
