// The checker: it finds each kind of damage, names it, and finds nothing in a sound pool, whatever its members are doing.
#include "pool/checker.h"

#include <gtest/gtest.h>

#include "processes.h"

namespace torchshm::tests {
namespace {

using pool::CheckOptions;
using pool::CheckReport;

constexpr CheckOptions kAtRest{.at_rest = true};

TEST(Checker, FindsNothingInASoundPoolAtRest) {
  auto member = fresh_pool();
  EXPECT_EQ(pool::check(member->arena(), kAtRest).first(), "");
  auto small = member->allocate(5000, false);
  auto large = member->allocate(5 << 20, true);
  ASSERT_TRUE(small.ok() && large.ok());
  auto handle = member->issue(small->block);
  ASSERT_TRUE(handle.ok());
  const CheckReport busy = pool::check(member->arena(), kAtRest);
  EXPECT_EQ(busy.first(), "");
  EXPECT_EQ(busy.blocks, 2u);
  EXPECT_EQ(busy.leases, 1u);
  EXPECT_EQ(busy.tickets, 1u);
  member->release(small->block, pool::Mode::kReadWrite);
  member->release(large->block, pool::Mode::kReadWrite);
  (void)member->trim(0);
  EXPECT_EQ(pool::check(member->arena(), kAtRest).first(), "");
}

}  // namespace
}  // namespace torchshm::tests
