#include "base/failpoint.h"

#include <atomic>
#include <csignal>
#include <cstring>

namespace torchshm::failpoint {
namespace {

Plan plan;
std::atomic<uint64_t> count{0};
std::atomic<const char*> latest{""};
thread_local uint64_t points_left = 0;

}  // namespace

void arm(const Plan& next) {
  plan = next;
  count.store(0);
}

void disarm() { plan = Plan{}; }

bool armed() { return plan.action != Action::kNone; }

uint64_t reached() { return count.load(); }

const char* last() { return latest.load(); }

void die_after(uint64_t points) { points_left = points; }

int pass(const char* name, bool can_fail) {
  if (points_left != 0 && --points_left == 0) throw Died{name};
  if (plan.action == Action::kFail && !can_fail) {
    if (plan.watch != nullptr) plan.watch(name, false);
    return 0;
  }
  if (plan.only != nullptr && std::strcmp(plan.only, name) != 0) return 0;
  // Relaxed: or all threads would meet at every point, and ThreadSanitizer would see no race between two of them.
  const uint64_t nth = count.fetch_add(1, std::memory_order_relaxed) + 1;
  latest.store(name, std::memory_order_relaxed);
  const bool acts = plan.action != Action::kNone && (nth == plan.at || (plan.persistent && nth > plan.at));
  if (plan.watch != nullptr) plan.watch(name, acts);
  if (!acts || plan.action == Action::kNone) return 0;  // the watcher may have disarmed it
  if (plan.action == Action::kFail) return plan.error;
  std::raise(plan.action == Action::kKill ? SIGKILL : SIGSTOP);
  return 0;
}

}  // namespace torchshm::failpoint
