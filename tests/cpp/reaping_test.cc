// Taking back what the dead used when the system refuses to take memory.
#include "base/failpoint.h"
#include "pool/checker.h"
#include "processes.h"

namespace torchshm {
namespace {

using pool::Mode;
using tests::fresh_pool;
using tests::join;

constexpr pool::CheckOptions kAtRest{.at_rest = true};

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

failpoint::Plan plan_of(failpoint::Action action, const char* only, int error = 0) {
  failpoint::Plan plan;
  plan.action = action;
  plan.only = only;
  plan.error = error;
  return plan;
}

TEST(Reaping, FinishesLaterWhatTheSystemHasRefused) {
  // Where a process dies that has pages which nobody knows of; small and large.
  for (const char* point : {"claim_small.taken", "claim_run.chunk", "claim_run.backed", "trim.claimed"}) {
    auto survivor = fresh_pool(uint64_t{64} << 20);
    survivor->arena().header().warm.store(uint64_t{1} << 40);  // else the janitor may be giving a chunk back at the end
    const int status = tests::wait_for(tests::start([&] {
      auto self = join(*survivor);
      auto warm = self->allocate(uint64_t{3} << 20, false);
      self->release(warm->block, Mode::kReadWrite);
      failpoint::arm(plan_of(failpoint::Action::kKill, point));
      (void)self->trim(uint64_t{2} << 20);
      (void)self->allocate(6000, false);
      (void)self->allocate(uint64_t{9} << 20, false);
      return true;
    }));
    ASSERT_TRUE(WIFSIGNALED(status)) << point;
    failpoint::Plan refuse = plan_of(failpoint::Action::kFail, "os.punch", ENOMEM);
    refuse.persistent = true;
    failpoint::arm(refuse);
    (void)survivor->reap();
    EXPECT_GT(failpoint::reached(), 0U) << point;
    failpoint::disarm();
    EXPECT_EQ(pool::check(survivor->arena()).first(), "") << point;
    (void)survivor->reap();
    EXPECT_EQ(pool::check(survivor->arena(), kAtRest).first(), "") << point;
    EXPECT_EQ(survivor->stats().leases.size(), 1U) << point;
    // It is there for whoever needs it, and for the system.
    auto everything = survivor->allocate(uint64_t{64} << 20, false);
    ASSERT_TRUE(everything.ok()) << point << ": " << everything.status().what();
    survivor->release(everything->block, Mode::kReadWrite);
    (void)survivor->trim(0);
    EXPECT_EQ(survivor->stats().committed, 0U) << point;
    EXPECT_EQ(pool::check(survivor->arena(), kAtRest).first(), "") << point;
  }
}

#endif

}  // namespace
}  // namespace torchshm
