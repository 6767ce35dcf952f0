// Chunks of small blocks whose owner has died: they are adopted, and taken away again when nothing is live in them.
#include <gtest/gtest.h>

#include "base/failpoint.h"
#include "pool/checker.h"
#include "processes.h"

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;

// Someone dies who owned a chunk; someone else adopts it and is stopped at once; the last block in it goes, and the chunk with it.
TEST(Orphans, ChunkThatIsTakenAwayFromItsAdopterGetsNoMemory) {
  auto survivor = tests::fresh_pool();
  auto first = survivor->allocate(5000, false);  // so that the orphan is not the chunk which everyone takes next
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_TRUE(tests::succeeds([&] {
    auto owner = tests::join(*survivor);
    const auto handle = owner->issue(owner->allocate(5000, false)->block);
    return handle && ::write(ends[1], &*handle, sizeof *handle) == static_cast<ssize_t>(sizeof *handle);
  }));
  Handle handle;
  ASSERT_EQ(::read(ends[0], &handle, sizeof handle), static_cast<ssize_t>(sizeof handle));
  auto kept = survivor->redeem(handle, Mode::kReadWrite);
  ASSERT_TRUE(kept.ok());
  EXPECT_EQ(survivor->reap(), 1U);  // the chunk is nobody's now

  const pid_t adopter = tests::start([&] {
    auto member = tests::join(*survivor);
    failpoint::arm({.action = failpoint::Action::kStop, .only = "claim_small.adopted"});
    return member->allocate(5000, false).ok() && std::string(failpoint::last()) == "claim_small.adopted";
  });
  int status = 0;
  ASSERT_EQ(::waitpid(adopter, &status, WUNTRACED), adopter);
  ASSERT_TRUE(WIFSTOPPED(status));
  survivor->release(kept->block, Mode::kReadWrite);
  survivor->release(first->block, Mode::kReadWrite);
  (void)survivor->trim(0);
  EXPECT_EQ(survivor->stats().committed, 0U);
  ::kill(adopter, SIGCONT);
  status = tests::wait_for(adopter);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);

  (void)survivor->trim(0);
  EXPECT_EQ(survivor->stats().committed, 0U);
  const auto report = pool::check(survivor->arena(), {.at_rest = true});
  EXPECT_TRUE(report.ok()) << report.first();
  ::close(ends[0]);
  ::close(ends[1]);
}

}  // namespace
}  // namespace torchshm
