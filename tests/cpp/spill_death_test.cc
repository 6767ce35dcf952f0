// Values in files when something fails, or somebody dies, in the middle: there is the old file or the new one, whole.
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>

#include "base/failpoint.h"
#include "os/directory.h"
#include "spill_values.h"
#include "store/spill_file.h"

namespace torchshm {
namespace {

using store::SpillDirectory;
using store::sweep_dead;
using tests::Blocks;
using tests::head_of;
using tests::kSpillId;
using tests::kSpillPool;
using tests::Lengths;
using tests::spill_past_cache;
using tests::spill_to;
using tests::succeeds;
using tests::TemporaryDirectory;

constexpr uint64_t kMiB = uint64_t{1} << 20;

// An old value of the id and a newer one, of other shapes.
struct Pair {
  const Lengths old_lengths = {5000, 300}, lengths;
  Blocks old{old_lengths}, newer{lengths};

  explicit Pair(Lengths newer_lengths = {70, 70000, 9}) : lengths(std::move(newer_lengths)) {
    old.fill(1);
    newer.fill(2);
  }
  bool old_is_in(SpillDirectory& directory) { return tests::read(directory, old, old_lengths) == Code::kOk; }
  bool newer_is_in(SpillDirectory& directory) { return tests::read(directory, newer, lengths) == Code::kOk; }
};

size_t parts(SpillDirectory& directory) {
  const auto files = directory.list();
  return static_cast<size_t>(std::count_if(files.begin(), files.end(), [](const auto& file) { return file.part; }));
}

// Fills up in the middle: errors that say so, nothing left of them, the older one whole; with room again it goes on.
bool fills_up(const std::string& place, bool past) {
  const auto directory = spill_past_cache(place, past);
  Pair pair;
  bool good = directory->write(head_of(pair.old_lengths), pair.old.from).ok();
  const Lengths large = {40 * kMiB};
  const Blocks blocks(large);
  const auto full = [&](const Status& status) {
    return status.error() == ENOSPC && status.what().find(directory->path()) != std::string::npos;
  };
  good = good && full(directory->write(head_of(large), blocks.from)) && directory->list().size() == 1;
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  // Where the system can't promise the room, the disk is full in the middle of the value.
  for (const char* also : {"", "os.direct"}) {
    failpoint::arm({failpoint::Action::kFail, 1, true, EOPNOTSUPP, "os.file_allocate"});
    if (*also != 0) good = good && tests::refuse(SYS_fcntl, EINVAL, 1, F_SETFL);
    const auto status = directory->write(head_of(large), blocks.from);
    failpoint::disarm();
    good = good && full(status) && directory->list().size() == 1;
  }
#endif
  good = good && pair.old_is_in(*directory);
  return good && directory->write(head_of(pair.lengths), pair.newer.from).ok() && pair.newer_is_in(*directory);
}

TEST(SpillFull, TmpfsThatFillsUpLeavesWhatWasThere) {
  TORCHSHM_NEEDS_MOUNTS();
  TORCHSHM_NEEDS_SECCOMP();
  const TemporaryDirectory place;
  EXPECT_TRUE(succeeds([&] {
    return tests::private_mounts() && ::mount("none", place.path().c_str(), "tmpfs", 0, "size=24m,mode=700") == 0 &&
           fills_up(place.path(), false) && fills_up(place.path(), true);
  }));
}

TEST(SpillFull, Ext4ThatFillsUpLeavesWhatWasThere) {
  TORCHSHM_NEEDS_MOUNTS();
  TORCHSHM_NEEDS_SECCOMP();
  const TemporaryDirectory place, image;
  const std::string file = image.path() + "/image", at = place.path();
  const std::string make = "truncate -s 32M " + file + " && mkfs.ext4 -qF " + file + " 2>/dev/null";
  if (std::system(make.c_str()) != 0) GTEST_SKIP() << "no mkfs.ext4 here";
  const std::string mount = "mount -o loop " + file + " " + at + " 2>/dev/null";
  const auto mounted = [&] { return tests::private_mounts() && std::system(mount.c_str()) == 0; };
  if (!tests::permitted(mounted)) GTEST_SKIP() << "no loop mounts for this user";
  EXPECT_TRUE(succeeds([&] { return mounted() && fills_up(at, false) && fills_up(at, true); }));
}

TEST(SpillFull, ALimitOnFileSizesIsAnErrorAndNoSignal) {
  const TemporaryDirectory place;
  for (const bool past : tests::kBothWays) {
    EXPECT_TRUE(succeeds([&] {
      const auto directory = spill_past_cache(place.path(), past);
      Pair pair;
      const tests::Limited files(RLIMIT_FSIZE, 50000);
      return directory->write(head_of(pair.old_lengths), pair.old.from).ok() &&
             directory->write(head_of(pair.lengths), pair.newer.from).error() == EFBIG && pair.old_is_in(*directory) &&
             directory->list().size() == 1;
    })) << past;
  }
}

TEST(SpillFile, WhatTheKernelRefusesIsAnErrorThatNamesTheFile) {
  TORCHSHM_NEEDS_SECCOMP();
  const TemporaryDirectory place;
  struct Call {
    long number;
    int error;
  };
  for (const Call call : {Call{SYS_pwrite64, EIO}, Call{SYS_fallocate, EDQUOT}, Call{SYS_renameat, EIO},
                          Call{SYS_pwrite64, ENOSPC}, Call{SYS_flock, ENOLCK}}) {
    EXPECT_TRUE(succeeds([&] {
      const auto directory = spill_to(place.path());
      Pair pair;
      if (!directory->write(head_of(pair.old_lengths), pair.old.from).ok()) return false;
      if (!tests::refuse(call.number, call.error)) return false;
      if (call.number == SYS_pwrite64 && !tests::refuse(SYS_pwritev, call.error)) return false;
      const auto status = directory->write(head_of(pair.lengths), pair.newer.from);
      return status.error() == call.error && status.what().find(directory->path() + "/00") != std::string::npos &&
             pair.old_is_in(*directory) && directory->list().size() == 1;
    })) << call.number
        << " " << call.error;
  }
  // And when reading.
  EXPECT_TRUE(succeeds([&] {
    const auto directory = spill_to(place.path());
    Pair pair;
    const Blocks large({300000});
    if (!directory->write(head_of(pair.lengths, 1), pair.newer.from).ok() ||
        !directory->write(head_of({300000}), large.from).ok())
      return false;
    auto reader = directory->open(kSpillId);
    if (!tests::refuse(SYS_pread64, EIO)) return false;
    return directory->open(kSpillId).status().error() == EIO && directory->open(1).status().error() == EIO &&
           reader->read(large.into).error() == EIO;
  }));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

failpoint::Plan failing(uint64_t at, bool persistent, int error, const char* only = nullptr) {
  failpoint::Plan plan;
  plan.action = failpoint::Action::kFail;
  plan.at = at;
  plan.persistent = persistent;
  plan.error = error;
  plan.only = only;
  return plan;
}

void every_call_of_a_write_fails(bool past) {
  const TemporaryDirectory place;
  const auto directory = spill_past_cache(place.path(), past);
  Pair pair;
  uint64_t failures = 0;
  for (const int error : {EIO, ENOSPC, EINVAL}) {
    for (const bool persistent : {false, true}) {
      for (uint64_t at = 1;; ++at) {
        ASSERT_TRUE(directory->write(head_of(pair.old_lengths), pair.old.from).ok());
        failpoint::arm(failing(at, persistent, error));
        const auto status = directory->write(head_of(pair.lengths), pair.newer.from);
        const bool more = failpoint::reached() >= at;
        const std::string last = failpoint::last();
        failpoint::disarm();
        ASSERT_TRUE(status.ok() ? pair.newer_is_in(*directory) : pair.old_is_in(*directory))
            << last << " " << status.what();
        // Only where a part could not be removed is one left, and that nobody writes any more.
        if (!persistent) {
          ASSERT_EQ(parts(*directory), 0U) << last;
        }
        (void)directory->sweep_parts();
        ASSERT_EQ(directory->list().size(), 1U) << last;
        failures += status.ok() ? 0 : 1;
        if (!more) break;
      }
    }
  }
  EXPECT_GT(failures, 30U) << past;
}

TEST(SpillFailure, OfAnyCallOfAWriteLeavesTheOldOrTheNew) {
  for (const bool past : tests::kBothWays) every_call_of_a_write_fails(past);
}

void every_call_of_a_read_fails(Pair& pair, bool past = false) {
  const TemporaryDirectory place;
  const auto directory = spill_past_cache(place.path(), past);
  ASSERT_TRUE(directory->write(head_of(pair.lengths), pair.newer.from).ok());
  for (const bool persistent : {false, true}) {
    for (uint64_t at = 1;; ++at) {
      failpoint::arm(failing(at, persistent, EIO));
      const Code code = tests::read(*directory, pair.newer, pair.lengths);
      const bool more = failpoint::reached() >= at;
      failpoint::disarm();
      ASSERT_TRUE(code == Code::kOk || code == Code::kSystem) << at << " " << static_cast<int>(code);
      if (!more) break;
    }
  }
}

TEST(SpillFailure, OfAnyCallOfAReadIsAnErrorOrTheRightBytes) {
  Pair small, larger({9, 300000}), of_two_threads({9 * kMiB});
  every_call_of_a_read_fails(small);
  every_call_of_a_read_fails(larger);
  every_call_of_a_read_fails(of_two_threads);
  every_call_of_a_read_fails(of_two_threads, true);
}

TEST(SpillFailure, OfAnyCallOnTheWayInOrOutIsAnError) {
  const TemporaryDirectory place;
  const std::string dir = place.path() + "/new";
  for (const bool persistent : {false, true}) {
    for (uint64_t at = 1;; ++at) {
      failpoint::arm(failing(at, persistent, EIO));
      {
        auto made = SpillDirectory::make(dir, "test", kSpillPool, false, -1);
        if (made) {
          auto copy = os::duplicate((*made)->fd());
          if (copy) (void)SpillDirectory::join(copy.take(), kSpillPool);
          (void)(*made)->list();
          (void)(*made)->sweep_parts();
          (void)(*made)->free_bytes();
          (void)(*made)->sync();
          (void)(*made)->remove(kSpillId);
        }
      }
      (void)sweep_dead(dir);
      const bool more = failpoint::reached() >= at;
      failpoint::disarm();
      {
        Pair pair;
        const auto directory = spill_to(dir);
        ASSERT_NE(directory, nullptr);
        ASSERT_TRUE(directory->write(head_of(pair.lengths), pair.newer.from).ok());
        ASSERT_TRUE(pair.newer_is_in(*directory));
      }
      (void)sweep_dead(dir);
      ASSERT_TRUE(std::filesystem::is_empty(dir)) << at;
      if (!more) break;
    }
  }
}

TEST(SpillFailure, ShortAndInterruptedTransfersAreGoneOnWith) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  Pair pair;
  const Lengths large = {9 * kMiB + 5, 100000};
  Blocks blocks(large);
  blocks.fill(7);
  for (const int bytes : {4096, 100003, 1 << 20}) {
    failpoint::arm(failing(1, true, bytes, "os.short"));
    ASSERT_TRUE(directory->write(head_of(large), blocks.from).ok()) << bytes;
    ASSERT_EQ(tests::read(*directory, blocks, large), Code::kOk) << bytes;
    failpoint::disarm();
    ASSERT_EQ(tests::read(*directory, blocks, large), Code::kOk) << bytes;
  }
  // A value of one piece is written by one call, or by those that it takes where that one stops.
  for (const char* call : {"os.pwritev", "os.short_pwritev"}) {
    failpoint::arm(failing(1, false, EINTR, call));
    ASSERT_TRUE(directory->write(head_of(pair.lengths), pair.newer.from).ok()) << call;
    ASSERT_EQ(failpoint::reached(), 1U) << call;
    failpoint::disarm();
    ASSERT_TRUE(pair.newer_is_in(*directory)) << call;
  }
  for (const char* call : {"os.pwrite", "os.pread", "os.file_allocate", "os.flock"}) {
    failpoint::arm(failing(1, false, EINTR, call));
    ASSERT_TRUE(directory->write(head_of(large), blocks.from).ok()) << call;
    ASSERT_EQ(tests::read(*directory, blocks, large), Code::kOk) << call;
    ASSERT_GE(failpoint::reached(), 1U) << call;
    failpoint::disarm();
  }
}

TEST(SpillFailure, WhatThePageCacheCouldNotWriteIsNotRenamed) {
  const TemporaryDirectory place;
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] {  // a file system without direct transfers
    const auto directory = spill_to(place.path());
    Pair pair;
    if (!tests::refuse(SYS_fcntl, EINVAL, 1, F_SETFL) ||
        !directory->write(head_of(pair.old_lengths), pair.old.from).ok() || !tests::refuse(SYS_fdatasync, EIO))
      return false;
    const auto status = directory->write(head_of(pair.lengths), pair.newer.from);
    return status.error() == EIO && pair.old_is_in(*directory) && directory->list().size() == 1;
  }));
}

// ---- deaths

void killed_at_every_point(Pair& pair, bool past) {
  const TemporaryDirectory place;
  const auto directory = spill_past_cache(place.path(), past);
  uint64_t kills = 0;
  for (uint64_t at = 1;; ++at) {
    ASSERT_TRUE(directory->write(head_of(pair.old_lengths), pair.old.from).ok());
    ASSERT_TRUE(directory->write(head_of(pair.old_lengths, 3), pair.old.from).ok());
    const int status = tests::wait_for(tests::start([&] {
      failpoint::Plan plan;
      plan.action = failpoint::Action::kKill;
      plan.at = at;
      auto joined = SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool);
      failpoint::arm(plan);
      const bool good = (*joined)->write(head_of(pair.lengths), pair.newer.from).ok() && (*joined)->remove(3) &&
                        (*joined)->sweep_parts() == 0;
      return good;
    }));
    ASSERT_TRUE(pair.old_is_in(*directory) || pair.newer_is_in(*directory)) << at;
    const Code other = tests::read(*directory, pair.old, pair.old_lengths, 3);
    ASSERT_TRUE(other == Code::kOk || other == Code::kMissing) << at;
    ASSERT_LE(parts(*directory), 1U) << at;
    const size_t left = parts(*directory);
    ASSERT_EQ(directory->sweep_parts(), left) << at;
    ASSERT_EQ(parts(*directory), 0U) << at;
    if (!WIFSIGNALED(status)) {
      ASSERT_EQ(status, 0) << at;
      break;
    }
    ++kills;
  }
  EXPECT_GT(kills, 20U) << past;
}

TEST(SpillDeath, AtEveryPointLeavesWholeFilesAndParts) {
  Pair pair;
  for (const bool past : tests::kBothWays) killed_at_every_point(pair, past);
}

TEST(SpillDeath, AtEveryPointOfTwoThreadsLeavesWholeFilesAndParts) {
  Pair pair({100, 9 * kMiB + 5});
  for (const bool past : tests::kBothWays) killed_at_every_point(pair, past);
}

TEST(SpillDeath, OfWhoMakesOrSweepsADirectoryIsMadeUpForByTheNext) {
  const TemporaryDirectory place;
  uint64_t kills = 0;
  for (uint64_t at = 1;; ++at) {
    Pair pair;
    (void)tests::wait_for(tests::start([&] {  // a dead one, to be swept
      const auto directory = spill_to(place.path(), 1);
      tests::write_file(directory->path() + "/0000000000000001.spill", "x");
      std::raise(SIGKILL);
      return true;
    }));
    const int status = tests::wait_for(tests::start([&] {
      failpoint::Plan plan;
      plan.action = failpoint::Action::kKill;
      plan.at = at;
      failpoint::arm(plan);
      {
        const auto directory = spill_to(place.path());
        (void)directory->write(head_of(pair.lengths), pair.newer.from);
      }
      (void)sweep_dead(place.path());
      return true;
    }));
    {
      const auto directory = spill_to(place.path());
      ASSERT_TRUE(directory->write(head_of(pair.lengths), pair.newer.from).ok()) << at;
      ASSERT_TRUE(pair.newer_is_in(*directory)) << at;
    }
    (void)sweep_dead(place.path());
    ASSERT_TRUE(std::filesystem::is_empty(place.path())) << at;
    if (!WIFSIGNALED(status)) break;
    ++kills;
  }
  EXPECT_GT(kills, 40U);
}

TEST(SpillDeath, PartsOfTheLivingAreNotSwept) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  Pair pair;
  const pid_t writer = tests::start([&] {
    failpoint::Plan plan;
    plan.action = failpoint::Action::kStop;
    plan.only = "spill.allocated";
    failpoint::arm(plan);
    return directory->write(head_of(pair.lengths), pair.newer.from).ok();
  });
  int status = 0;
  ASSERT_EQ(::waitpid(writer, &status, WUNTRACED), writer);
  ASSERT_TRUE(WIFSTOPPED(status));
  EXPECT_EQ(parts(*directory), 1U);
  EXPECT_EQ(directory->sweep_parts(), 0U);
  // Another one of the same id does not wait for it, and the two do not touch each other's.
  EXPECT_TRUE(directory->write(head_of(pair.old_lengths), pair.old.from).ok());
  EXPECT_TRUE(pair.old_is_in(*directory));
  ::kill(writer, SIGCONT);
  EXPECT_EQ(tests::wait_for(writer), 0);
  EXPECT_TRUE(pair.newer_is_in(*directory));
  EXPECT_EQ(directory->list().size(), 1U);
}

TEST(SpillDeath, ADirectoryThatIsSweptWhileItIsMadeIsMadeAgain) {
  const TemporaryDirectory place;
  for (const char* point : {"spill.directory_made", "spill.alive_made"}) {
    const pid_t maker = tests::start([&] {
      failpoint::Plan plan;
      plan.action = failpoint::Action::kStop;
      plan.only = point;
      failpoint::arm(plan);
      const auto directory = spill_to(place.path());
      failpoint::disarm();
      Pair pair;
      return directory->write(head_of(pair.lengths), pair.newer.from).ok() && sweep_dead(place.path()) == 0 &&
             pair.newer_is_in(*directory);
    });
    int status = 0;
    ASSERT_EQ(::waitpid(maker, &status, WUNTRACED), maker);
    EXPECT_EQ(sweep_dead(place.path()), 1U) << point;
    ::kill(maker, SIGCONT);
    EXPECT_EQ(tests::wait_for(maker), 0) << point;
    EXPECT_TRUE(std::filesystem::is_empty(place.path())) << point;  // as the last one it has removed it
  }
}

#endif

}  // namespace
}  // namespace torchshm
