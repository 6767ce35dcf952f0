#include "base/failpoint.h"

#include <atomic>
#include <csignal>
#include <cstring>

namespace torchshm::failpoint {
namespace {

Plan plan;
std::atomic<uint64_t> count{0};
std::atomic<const char*> latest{""};

}  // namespace

void arm(const Plan& next) {
  plan = next;
  count.store(0);
}

void disarm() { plan = Plan{}; }

uint64_t reached() { return count.load(); }

const char* last() { return latest.load(); }

int pass(const char* name) {
  if (plan.only != nullptr && std::strcmp(plan.only, name) != 0) return 0;
  const uint64_t nth = count.fetch_add(1) + 1;
  latest.store(name);
  if (nth != plan.at && !(plan.persistent && nth > plan.at)) return 0;
  switch (plan.action) {
    case Action::kKill:
      std::raise(SIGKILL);
      break;
    case Action::kStop:
      std::raise(SIGSTOP);
      break;
    case Action::kFail:
      return plan.error;
    case Action::kNone:
      break;
  }
  return 0;
}

}  // namespace torchshm::failpoint
