// Errors say what failed, and the failpoints do what they were told.
#include "base/status.h"

#include <cerrno>
#include <exception>
#include <thread>

#include "base/failpoint.h"
#include "os/fd.h"
#include "processes.h"

namespace torchshm {
namespace {

TEST(Status, NamesTheCallTheObjectAndTheReason) {
  const Status status = Status::system("fcntl F_OFD_SETLK", "17", EBADF);
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.code(), Code::kSystem);
  EXPECT_EQ(status.error(), EBADF);
  EXPECT_EQ(status.what(), "fcntl F_OFD_SETLK(17): Bad file descriptor");
}

TEST(Status, LackOfMemoryIsAFullPoolAndNoFailureOfTheSystem) {
  EXPECT_EQ(Status::system("mmap", "x", ENOMEM).code(), Code::kFull);
  EXPECT_EQ(Status::system("madvise", "x", ENOSPC).code(), Code::kFull);
}

TEST(Status, IsEmptyWhenAllWentWell) {
  const Status status;
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(status.code(), Code::kOk);
  EXPECT_EQ(status.error(), 0);
  EXPECT_EQ(status.what(), "");
}

TEST(Result, IsAValueOrTheReasonWhyThereIsNone) {
  const Result<int> value(7);
  EXPECT_TRUE(value.ok());
  EXPECT_EQ(*value, 7);
  EXPECT_EQ(value.code(), Code::kOk);
  const Result<int> none(Status(Code::kStale, "gone"));
  EXPECT_FALSE(none.ok());
  EXPECT_EQ(none.code(), Code::kStale);
  EXPECT_EQ(none.status().what(), "gone");
  const Result<std::string> other(Status(Code::kFull, "no room"));
  EXPECT_EQ(other.code(), Code::kFull);
  EXPECT_EQ(Result<std::string>(std::string("x")).code(), Code::kOk);
}

TEST(Fd, ClosesWhatItHeldAndNothingElse) {
  std::signal(SIGPIPE, SIG_IGN);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  os::Fd read(ends[0]), write(ends[1]);
  os::Fd& same = read;
  read = std::move(same);
  EXPECT_EQ(read.get(), ends[0]);
  read = std::move(write);
  EXPECT_EQ(read.get(), ends[1]);
  EXPECT_FALSE(write.valid());
  EXPECT_EQ(::write(ends[1], "x", 1), -1);  // its reader was closed by the assignment
  EXPECT_EQ(errno, EPIPE);
  const int raw = read.release();
  EXPECT_FALSE(read.valid());
  EXPECT_EQ(::close(raw), 0);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

class Failpoint : public testing::Test {
 protected:
  void TearDown() override { failpoint::disarm(); }
};

TEST_F(Failpoint, FailsOnceWhereItWasToldTo) {
  failpoint::arm({failpoint::Action::kFail, 2, false, ENOSPC, nullptr});
  EXPECT_EQ(failpoint::pass("a", true), 0);
  EXPECT_EQ(failpoint::pass("b", true), ENOSPC);
  EXPECT_EQ(failpoint::pass("c", true), 0);
  EXPECT_EQ(failpoint::reached(), 3U);
  EXPECT_STREQ(failpoint::last(), "c");
}

TEST_F(Failpoint, FailsForGoodWhereItWasToldTo) {
  failpoint::arm({failpoint::Action::kFail, 2, true, EIO, nullptr});
  EXPECT_EQ(failpoint::pass("a", true), 0);
  EXPECT_EQ(failpoint::pass("a", true), EIO);
  EXPECT_EQ(failpoint::pass("a", true), EIO);
}

TEST_F(Failpoint, PassesOverOtherNames) {
  failpoint::arm({failpoint::Action::kFail, 1, true, EIO, "chosen"});
  EXPECT_EQ(failpoint::pass("other", true), 0);
  EXPECT_EQ(failpoint::reached(), 0U);
  EXPECT_EQ(failpoint::pass("chosen", true), EIO);
  EXPECT_EQ(failpoint::reached(), 1U);
}

TEST_F(Failpoint, CountsOnlyWhenNothingIsToHappen) {
  failpoint::arm({});
  EXPECT_EQ(failpoint::pass("a", true), 0);
  EXPECT_EQ(failpoint::reached(), 1U);
}

TEST_F(Failpoint, TellsTheWatcherWhoMayCallItOff) {
  static int told = 0;
  failpoint::Plan plan;
  plan.action = failpoint::Action::kFail;
  plan.error = EIO;
  plan.watch = [](const char*, bool acts) {
    ++told;
    if (acts) failpoint::disarm();
  };
  failpoint::arm(plan);
  EXPECT_EQ(failpoint::pass("can not fail", false), 0);
  EXPECT_EQ(told, 1);
  EXPECT_EQ(failpoint::pass("can fail", true), 0);
  EXPECT_EQ(told, 2);
}

TEST_F(Failpoint, LeavesAThreadByAnExceptionAtTheChosenPoint) {
  EXPECT_TRUE(tests::succeeds([] {
    std::set_terminate([] { ::_exit(0); });
    std::thread other([] {  // where nobody catches it
      failpoint::die_after(1);
      (void)failpoint::pass("first", false);
    });
    other.join();
    return false;
  }));
  failpoint::die_after(2);
  EXPECT_EQ(failpoint::pass("first", false), 0);
  failpoint::die_after(0);
  EXPECT_EQ(failpoint::pass("second", false), 0);
}

TEST_F(Failpoint, StopsAndKillsTheProcessThatPasses) {
  const pid_t pid = tests::start([] {
    failpoint::arm({failpoint::Action::kStop, 1, false, 0, nullptr});
    if (failpoint::pass("a", true) != 0) return false;
    failpoint::arm({failpoint::Action::kKill, 1, false, 0, nullptr});
    (void)failpoint::pass("b", true);
    return true;
  });
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
  EXPECT_TRUE(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
  ::kill(pid, SIGCONT);
  status = tests::wait_for(pid);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

#endif

}  // namespace
}  // namespace torchshm
