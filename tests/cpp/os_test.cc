// What the kernel gives, and what is done about a kernel that does not: older ones, tight limits, odd files.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <vector>

#include "base/failpoint.h"
#include "kernel.h"
#include "memory_files.h"
#include "os/huge_pages.h"
#include "os/lock.h"
#include "os/mapping.h"
#include "os/memory.h"
#include "os/numa.h"
#include "os/process.h"
#include "processes.h"

namespace torchshm {
namespace {

using os::Fd;
using os::Mapping;
using tests::kSize;
using tests::map;
using tests::memfd;
using tests::refuse;
using tests::succeeds;

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE

// Of this process, in whose line `text` stands. Sanitizers make mappings of their own at any time.
int mappings(const std::string& text = "") {
  std::ifstream maps("/proc/self/maps");
  int n = 0;
  for (std::string line; std::getline(maps, line);) n += line.find(text) != std::string::npos ? 1 : 0;
  return n;
}

// ---- memory files

TEST(Memfd, IsSealedPrivateToTheUserAndClosedByExec) {
  const Fd fd = memfd();
  EXPECT_EQ(::ftruncate(fd.get(), 1), -1);
  EXPECT_EQ(::ftruncate(fd.get(), kSize * 2), -1);
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_EQ(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  struct stat st {};
  ASSERT_EQ(::fstat(fd.get(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777U, 0600U);
  auto size = os::check_memfd(fd.get());
  ASSERT_TRUE(size.ok());
  EXPECT_EQ(*size, kSize);
}

TEST(Memfd, IsRefusedWithAReasonWhereFilesMustBeSmaller) {
  EXPECT_TRUE(succeeds([] {
    const tests::Limited files(RLIMIT_FSIZE, kSize - 1);
    auto fd = os::create_memfd("torchshm-test", kSize);
    return fd.code() == Code::kUnsupported && fd.status().what().find("ulimit -f") != std::string::npos;
  }));
  EXPECT_TRUE(succeeds([] {
    const tests::Limited files(RLIMIT_FSIZE, kSize);
    return os::create_memfd("torchshm-test", kSize).ok();
  }));
}

TEST(Memfd, IsMadeByKernelsThatDoNotKnowNoexecOrLimits) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] {
    return refuse(SYS_memfd_create, EINVAL, 1, 8, 8) && refuse(SYS_prlimit64, ENOSYS) &&
           refuse(SYS_getrlimit, ENOSYS) && os::create_memfd("torchshm-test", kSize).ok();
  }));
}

TEST(Memfd, EachStepThatFailsIsNamed) {
  TORCHSHM_NEEDS_SECCOMP();
  const auto names = [](const char* call, int error) {
    auto fd = os::create_memfd("torchshm-test", kSize);
    return fd.code() == Code::kSystem && fd.status().error() == error &&
           fd.status().what().find(std::string(call) + "(torchshm-test)") != std::string::npos;
  };
  EXPECT_TRUE(succeeds([&] { return refuse(SYS_memfd_create, EPERM) && names("memfd_create", EPERM); }));
  EXPECT_TRUE(succeeds([&] { return refuse(SYS_memfd_create, EINVAL) && names("memfd_create", EINVAL); }));
  EXPECT_TRUE(succeeds([&] { return refuse(SYS_fchmod, EPERM) && names("fchmod", EPERM); }));
  EXPECT_TRUE(succeeds([&] { return refuse(SYS_fcntl, EPERM, 1, F_ADD_SEALS) && names("fcntl F_ADD_SEALS", EPERM); }));
  auto fd = os::create_memfd("torchshm-test", uint64_t{1} << 63);
  EXPECT_EQ(fd.code(), Code::kSystem);
  EXPECT_NE(fd.status().what().find("ftruncate"), std::string::npos) << fd.status().what();
}

TEST(Memfd, FromElsewhereMustBeOneAndSealed) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  EXPECT_EQ(os::check_memfd(ends[0]).code(), Code::kInvalid);
  EXPECT_EQ(os::check_memfd(-1).code(), Code::kInvalid);
  ::close(ends[0]);
  ::close(ends[1]);
  const Fd open(::memfd_create("open", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::fcntl(open.get(), F_ADD_SEALS, F_SEAL_GROW), 0);  // may still be cut short
  EXPECT_EQ(os::check_memfd(open.get()).code(), Code::kInvalid);
}

TEST(Memfd, IsOpenedByItsPath) {
  const Fd fd = memfd();
  auto opened = os::open_memfd("/proc/self/fd/" + std::to_string(fd.get()));
  ASSERT_TRUE(opened.ok()) << opened.status().what();
  EXPECT_EQ(*os::file_id(opened->get()), *os::file_id(fd.get()));
  EXPECT_NE(*os::file_id(opened->get()), *os::file_id(memfd().get()));
  EXPECT_NE((os::FileId{1, 5}), (os::FileId{2, 5}));  // the inode of another device
  EXPECT_EQ(os::open_memfd("/proc/self/fd/none").status().error(), ENOENT);
}

TEST(Memfd, RangesWithDataAreAllOfTheFileWhereTheKernelDoesNotTell) {
  const Fd fd = memfd();
  const char byte = 1;
  ASSERT_EQ(::pwrite(fd.get(), &byte, 1, 40960), 1);
  const auto is = [](os::Range range, uint64_t begin, uint64_t end) {
    return range.begin == begin && range.end == end;
  };
  EXPECT_TRUE(is(os::next_data(fd.get(), 0, kSize), 40960, 45056));
  EXPECT_TRUE(is(os::next_data(fd.get(), 45056, kSize), kSize, kSize));
  EXPECT_TRUE(is(os::next_data(fd.get(), kSize, kSize), kSize, kSize));
  EXPECT_TRUE(is(os::next_data(-1, 4096, kSize), 4096, kSize));
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds(
      [&] { return refuse(SYS_lseek, EINVAL, 2, SEEK_HOLE) && is(os::next_data(fd.get(), 0, kSize), 40960, kSize); }));
}

TEST(Memfd, OperationsOnAClosedDescriptorAreErrors) {
  EXPECT_EQ(os::file_size(-1).code(), Code::kSystem);
  EXPECT_EQ(os::reopen(1 << 20).code(), Code::kSystem);
  EXPECT_EQ(os::duplicate(-1).code(), Code::kSystem);
  EXPECT_EQ(os::file_id(-1).code(), Code::kSystem);
  TORCHSHM_NEEDS_SECCOMP();
  const Fd fd = memfd();
  EXPECT_TRUE(succeeds([&] {  // fstat() is either of the two calls, as the C library and the sanitizers choose
    return refuse(SYS_newfstatat, EIO) && refuse(SYS_fstat, EIO) && os::check_memfd(fd.get()).code() == Code::kSystem;
  }));
}

// ---- locks

TEST(Lock, BelongsToADescriptionAndGoesWithIt) {
  const Fd file = memfd();
  Fd one = os::reopen(file.get()).take();
  const Fd two = os::reopen(file.get()).take();
  EXPECT_TRUE(*os::try_lock(one.get(), 3));
  EXPECT_TRUE(*os::try_lock(one.get(), 3));  // again, by the same
  EXPECT_FALSE(*os::try_lock(two.get(), 3));
  EXPECT_TRUE(*os::try_lock(two.get(), 4));
  EXPECT_TRUE(os::locked_by_other(two.get(), 3));
  EXPECT_FALSE(os::locked_by_other(one.get(), 3));
  EXPECT_TRUE(os::locked_by_other(one.get(), 4));
  EXPECT_TRUE(os::unlock(two.get(), 4).ok());
  EXPECT_FALSE(os::locked_by_other(one.get(), 4));
  one.reset();
  EXPECT_FALSE(os::locked_by_other(two.get(), 3));
}

TEST(Lock, IsHeldUntilTheLastForkedChildIsGone) {
  const Fd file = memfd();
  Fd one = os::reopen(file.get()).take();
  ASSERT_TRUE(*os::try_lock(one.get(), 3));
  const pid_t child = tests::start([] {
    ::pause();
    return true;
  });
  one.reset();
  EXPECT_TRUE(os::locked_by_other(file.get(), 3));
  ::kill(child, SIGKILL);
  (void)tests::wait_for(child);
  EXPECT_FALSE(os::locked_by_other(file.get(), 3));
}

TEST(Lock, OfABadDescriptorIsAnErrorAndTakenForHeld) {
  EXPECT_EQ(os::try_lock(-1, 0).code(), Code::kSystem);
  EXPECT_FALSE(os::unlock(-1, 0).ok());
  EXPECT_TRUE(os::locked_by_other(-1, 0));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Lock, EitherErrnoOfAHeldLockMeansHeld) {
  const Fd file = memfd();
  for (const int error : {EAGAIN, EACCES}) {
    failpoint::arm({failpoint::Action::kFail, 1, true, error, "os.lock"});
    auto locked = os::try_lock(file.get(), 0);
    ASSERT_TRUE(locked.ok());
    EXPECT_FALSE(*locked);
  }
  failpoint::arm({failpoint::Action::kFail, 1, true, ENOLCK, "os.lock"});
  EXPECT_EQ(os::try_lock(file.get(), 0).code(), Code::kSystem);
  failpoint::arm({failpoint::Action::kFail, 1, true, EINVAL, "os.getlock"});
  EXPECT_TRUE(os::locked_by_other(file.get(), 0));
  failpoint::disarm();
}

TEST(Os, EveryCallThatIsMadeToFailIsAnError) {
  const auto failing = [](const char* name, const std::function<Code()>& call) {
    failpoint::arm({failpoint::Action::kFail, 1, true, EPERM, name});
    const Code code = call();
    EXPECT_EQ(failpoint::reached(), 1U) << name;
    failpoint::disarm();
    return code;
  };
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd);
  for (const char* name : {"os.memfd_create", "os.fchmod", "os.ftruncate", "os.seal"}) {
    EXPECT_EQ(failing(name, [] { return os::create_memfd("x", kSize).code(); }), Code::kSystem) << name;
  }
  (void)failing("os.populate", [&] {  // best effort: nobody is told
    os::populate(shared.data(), 4096, false);
    return Code::kOk;
  });
  for (const char* name : {"os.get_seals", "os.fstat"}) {
    EXPECT_EQ(failing(name, [&] { return os::check_memfd(fd.get()).code(); }), Code::kSystem) << name;
  }
  EXPECT_EQ(failing("os.open_memfd", [] { return os::open_memfd("/proc/self/fd/0").code(); }), Code::kSystem);
  EXPECT_EQ(failing("os.seek_data", [&] { return os::next_data(fd.get(), 0, 9).end == 9 ? Code::kOk : Code::kSystem; }),
            Code::kOk);
  EXPECT_EQ(failing("os.duplicate", [&] { return os::duplicate(fd.get()).code(); }), Code::kSystem);
  EXPECT_EQ(failing("os.unlock", [&] { return os::unlock(fd.get(), 0).code(); }), Code::kSystem);
  EXPECT_EQ(failing("os.map_file", [&] { return Mapping::map(Mapping::Kind::kShared, fd.get(), kSize).code(); }),
            Code::kUnsupported);
  EXPECT_EQ(failing("os.fork_detector", [] { return os::fork_detector() ? Code::kOk : Code::kSystem; }), Code::kSystem);
  EXPECT_EQ(
      failing("os.pagemap", [&] { return os::privately_modified(shared.data(), 4096) ? Code::kSystem : Code::kOk; }),
      Code::kSystem);
  EXPECT_EQ(failing("os.reopen", [&] { return os::reopen(fd.get()).code(); }), Code::kSystem);
  EXPECT_EQ(failing("os.mmap", [&] { return Mapping::map(Mapping::Kind::kShared, fd.get(), kSize).code(); }),
            Code::kUnsupported);
  EXPECT_EQ(failing("os.remap", [&] { return shared.remap(Mapping::Kind::kPrivate, fd.get(), 0, 4096).code(); }),
            Code::kSystem);
  EXPECT_EQ(failing("os.commit", [&] { return os::commit(shared.data(), 4096).code(); }), Code::kSystem);
  EXPECT_EQ(failing("os.fstatfs", [&] { return os::in_huge_pages(fd.get()) ? Code::kOk : Code::kSystem; }),
            Code::kSystem);
  EXPECT_EQ(failing("os.nodes", [] { return os::parse_numa("interleave").code(); }), Code::kUnsupported);
  EXPECT_EQ(failing("os.mbind",
                    [&] {
                      return os::set_policy(shared.data(), kSize, {os::Numa::Policy::kBind, {0}}).code();
                    }),
            Code::kUnsupported);
  EXPECT_EQ(failing("os.punch", [&] { return os::punch(shared.data(), 4096).code(); }), Code::kSystem);
  EXPECT_EQ(failing("os.drop_private", [&] { return os::drop_private(shared.data(), 4096).code(); }), Code::kSystem);
}

#endif

// ---- mappings

TEST(Mapping, OfEachKindShowsWhatItShould) {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd), read = map(Mapping::Kind::kReadOnly, fd),
          own = map(Mapping::Kind::kPrivate, fd), zero = map(Mapping::Kind::kAnonymous, fd);
  shared.data()[5] = std::byte{1};
  EXPECT_EQ(read.data()[5], std::byte{1});
  EXPECT_EQ(own.data()[5], std::byte{1});
  EXPECT_EQ(zero.data()[5], std::byte{0});
  own.data()[5] = std::byte{2};
  EXPECT_EQ(shared.data()[5], std::byte{1});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(shared.data()) % (uint64_t{2} << 20), 0U);
  EXPECT_TRUE(shared.contains(shared.data() + kSize - 1));
  EXPECT_FALSE(shared.contains(shared.data() + kSize));
  EXPECT_FALSE(shared.contains(shared.data() - 1));
}

TEST(Mapping, MovesAndUndoesItself) {
  {
    const Fd fd = memfd();
    Mapping one = map(Mapping::Kind::kShared, fd), two = map(Mapping::Kind::kShared, fd);
    std::byte* const at = one.data();
    Mapping& same = one;
    one = std::move(same);
    EXPECT_EQ(one.data(), at);
    two = std::move(one);  // its own range goes
    EXPECT_EQ(two.data(), at);
    EXPECT_FALSE(one.valid());
    EXPECT_FALSE(one.contains(at));
    at[0] = std::byte{1};
    EXPECT_EQ(mappings("memfd:torchshm-test"), 1);
  }
  EXPECT_EQ(mappings("memfd:torchshm-test"), 0);
}

TEST(Mapping, WithoutAddressSpaceIsRefused) {
  EXPECT_TRUE(succeeds([] {
    const Fd fd = memfd();
    const tests::Limited space(RLIMIT_AS, 1);
    return space && Mapping::map(Mapping::Kind::kShared, fd.get(), kSize).code() == Code::kUnsupported;
  }));
}

TEST(Mapping, OfWhatIsNoFileIsRefusedAndLeavesNothing) {
  (void)Mapping::map(Mapping::Kind::kShared, -1, kSize);
  const int before = mappings();
  for (int i = 0; i < 64; ++i) EXPECT_EQ(Mapping::map(Mapping::Kind::kShared, -1, kSize).code(), Code::kUnsupported);
  EXPECT_LE(mappings(), before + 16);
}

TEST(Mapping, ARangeCanBeThisProcessesOwnAndSharedAgain) {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd);
  const Mapping other = map(Mapping::Kind::kShared, fd);
  ASSERT_TRUE(shared.remap(Mapping::Kind::kPrivate, fd.get(), 8192, 4096).ok());
  shared.data()[8192] = std::byte{7};
  shared.data()[4096] = std::byte{6};
  EXPECT_EQ(other.data()[8192], std::byte{0});
  EXPECT_EQ(other.data()[4096], std::byte{6});
  ASSERT_TRUE(shared.remap(Mapping::Kind::kShared, fd.get(), 8192, 4096).ok());
  EXPECT_EQ(shared.data()[8192], std::byte{0});
  EXPECT_FALSE(shared.remap(Mapping::Kind::kShared, -1, 8192, 4096).ok());
}

// ---- pages

bool resident(const std::byte* at, uint64_t length) {
  std::vector<unsigned char> pages(length / 4096);
  if (::mincore(const_cast<std::byte*>(at), length, pages.data()) != 0) return false;
  return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

TEST(Pages, AreThereOnceCommittedAndKeepWhatTheyHold) {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd);
  shared.data()[4096] = std::byte{9};
  ASSERT_TRUE(os::commit(shared.data(), uint64_t{1} << 20).ok());
  EXPECT_TRUE(resident(shared.data(), uint64_t{1} << 20));
  EXPECT_EQ(shared.data()[4096], std::byte{9});
}

constexpr uint64_t kHuge = uint64_t{2} << 20;
constexpr uint32_t kCollapse = 25;  // MADV_COLLAPSE

// Bytes of the mapping at an address that lie in huge pages.
uint64_t in_huge_pages(const std::byte* at) {
  std::ifstream smaps("/proc/self/smaps");
  uint64_t bytes = 0;
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long begin = 0, end = 0, kib = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      inside = begin <= reinterpret_cast<uintptr_t>(at) && reinterpret_cast<uintptr_t>(at) < end;
    } else if (inside && std::sscanf(line.c_str(), "ShmemPmdMapped: %lu", &kib) == 1) {
      bytes += kib << 10;
    }
  }
  return bytes;
}

bool has_huge_pages() {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd);
  shared.data()[0] = std::byte{1};
  return ::madvise(shared.data(), kHuge, static_cast<int>(kCollapse)) == 0;
}

TEST(Pages, AreHugeWhereWholeOnesAreCommitted) {
  if (!has_huge_pages()) GTEST_SKIP() << "the system has no huge pages for memory files";
  EXPECT_TRUE(succeeds([] {
    const Fd fd = memfd(5 * kHuge);
    Mapping shared = map(Mapping::Kind::kShared, fd, 5 * kHuge), own = map(Mapping::Kind::kPrivate, fd, 5 * kHuge);
    shared.data()[kHuge + 5] = std::byte{7};
    const bool committed = os::commit(shared.data() + kHuge - 4096, 3 * kHuge).ok();
    const bool keeps = own.data()[kHuge + 5] == std::byte{7};
    // Two whole ones, a small page before and 511 after, and nothing else.
    return committed && keeps && in_huge_pages(shared.data()) == 2 * kHuge && in_huge_pages(own.data()) == kHuge &&
           resident(shared.data() + kHuge - 4096, 3 * kHuge) && !resident(shared.data() + 4 * kHuge - 4096, 4096);
  }));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
// Where memory is in pieces each huge page takes long: no more of them are asked for than it takes to notice.
TEST(Pages, AreSmallFromWhereHugeOnesCanNotBeMade) {
  if (!has_huge_pages()) GTEST_SKIP() << "the system has no huge pages for memory files";
  EXPECT_TRUE(succeeds([] {
    const uint64_t step = 16 * kHuge, size = 2 * step;
    const Fd fd = memfd(size);
    Mapping shared = map(Mapping::Kind::kShared, fd, size);
    failpoint::arm({failpoint::Action::kFail, 2, false, ENOMEM, "os.collapse"});
    const bool committed = os::commit(shared.data(), size).ok();
    failpoint::disarm();
    return committed && in_huge_pages(shared.data()) <= step && resident(shared.data(), size);
  }));
}
#endif

TEST(Pages, AreSmallWhereTheSystemHasNoHugeOnes) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] {
    const Fd fd = memfd();
    Mapping shared = map(Mapping::Kind::kShared, fd);
    return refuse(SYS_madvise, EINVAL, 2, kCollapse) && os::commit(shared.data(), 2 * kHuge).ok() &&
           resident(shared.data(), 2 * kHuge) && in_huge_pages(shared.data()) == 0;
  }));
}

TEST(Pages, AreTouchedOneByOneWhereTheKernelCanNotDoItInOneCall) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] {
    const Fd fd = memfd();
    Mapping shared = map(Mapping::Kind::kShared, fd);
    shared.data()[4096] = std::byte{9};
    return refuse(SYS_madvise, EINVAL, 2, kPopulateWrite) && os::commit(shared.data(), uint64_t{1} << 20).ok() &&
           resident(shared.data(), uint64_t{1} << 20) && shared.data()[4096] == std::byte{9};
  }));
}

TEST(Pages, ThatTheSystemHasNotAreAFullPool) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] {
    const Fd fd = memfd();
    Mapping shared = map(Mapping::Kind::kShared, fd);
    return refuse(SYS_madvise, ENOMEM, 2, kPopulateWrite) && os::commit(shared.data(), 4096).code() == Code::kFull;
  }));
}

TEST(Pages, GoBackToTheSystemAlsoWhenTheyAreLocked) {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd), own = map(Mapping::Kind::kPrivate, fd);
  for (const bool locked : {false, true}) {
    std::memset(shared.data(), 1, 8192);
    std::memset(own.data(), 2, 8192);
    if (locked && (::mlock(shared.data(), 8192) != 0 || ::mlock(own.data(), 8192) != 0)) GTEST_SKIP() << "no mlock";
    ASSERT_TRUE(os::drop_private(own.data(), 8192).ok());
    EXPECT_EQ(own.data()[0], std::byte{1});
    ASSERT_TRUE(os::punch(shared.data(), 8192).ok());
    EXPECT_EQ(shared.data()[0], std::byte{0});
  }
}

TEST(Pages, OfAPinnedHugePageMayStayAndThatIsSeen) {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd);
  auto* at = shared.data();
  EXPECT_TRUE(os::absent(at, kSize));
  at[kHuge / 2] = std::byte{1};
  EXPECT_FALSE(os::absent(at, kSize));
  EXPECT_TRUE(os::absent(at, kHuge / 2));
  EXPECT_TRUE(os::absent(at + kHuge / 2 + 4096, kHuge / 2 - 4096));
  ASSERT_TRUE(os::punch(at, kHuge).ok());
  EXPECT_TRUE(os::absent(at, kSize));
  at[0] = std::byte{1};
  const bool huge = ::madvise(at, kHuge, kCollapse) == 0;
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  iovec page{at, 4096};
  ASSERT_EQ(::vmsplice(ends[1], &page, 1, 0), 4096);  // holds it
  ASSERT_TRUE(os::punch(at + kHuge / 2, kHuge / 2).ok());
  EXPECT_EQ(os::absent(at + kHuge / 2, kHuge / 2), !huge);  // small pages go one by one
  ::close(ends[0]);
  ::close(ends[1]);
  ASSERT_TRUE(os::punch(at + kHuge / 2, kHuge / 2).ok());
  EXPECT_TRUE(os::absent(at + kHuge / 2, kHuge / 2));
}

TEST(Pages, ThatAreNotMappedCanNotGoBack) {
  std::byte* gone = nullptr;
  {
    const Fd fd = memfd();
    gone = map(Mapping::Kind::kShared, fd).data();
  }
  EXPECT_FALSE(os::punch(gone, 4096).ok());
  EXPECT_FALSE(os::drop_private(gone, 4096).ok());
  EXPECT_FALSE(os::drop_private(gone + 1, 4096).ok());  // neither a page boundary nor lockable
}

// ---- what was written privately

bool finds_private_writes() {
  const Fd fd = memfd();
  Mapping shared = map(Mapping::Kind::kShared, fd), own = map(Mapping::Kind::kPrivate, fd);
  std::memset(shared.data(), 1, kSize);
  if (os::privately_modified(own.data(), kSize)) return false;  // not present
  std::byte sum{0};
  for (uint64_t at = 0; at < kSize; at += 4096) sum |= own.data()[at];  // present, and the file's
  if (os::privately_modified(own.data(), kSize)) return false;
  own.data()[kSize - 1] = std::byte{2};
  return sum == std::byte{1} && os::privately_modified(own.data(), kSize) &&
         os::privately_modified(own.data() + kSize - 1, 1) && os::privately_modified(own.data() + kSize - 4096, 1) &&
         !os::privately_modified(own.data(), kSize - 4096);
}

TEST(PrivateWrites, AreFoundToThePage) { EXPECT_TRUE(finds_private_writes()); }

TEST(PrivateWrites, AreFoundByKernelsThatCanNotScan) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] { return refuse(SYS_ioctl, ENOTTY) && finds_private_writes(); }));
}

TEST(PrivateWrites, AreAssumedWhereTheKernelDoesNotTell) {
  const Fd fd = memfd();
  Mapping own = map(Mapping::Kind::kPrivate, fd);
  ASSERT_FALSE(os::privately_modified(own.data(), kSize));
  {
    const tests::Limited files(RLIMIT_NOFILE, 0);
    EXPECT_TRUE(files && os::privately_modified(own.data(), kSize));
  }
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] {
    return refuse(SYS_ioctl, ENOTTY) && refuse(SYS_pread64, EPERM) && os::privately_modified(own.data(), kSize);
  }));
}

TEST(PageFaults, AreCountedOrUnknown) {
  const uint64_t before = os::page_faults();
  std::vector<char> fresh(uint64_t{1} << 20, 1);
  EXPECT_GT(os::page_faults(), before);
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] { return refuse(SYS_getrusage, EPERM) && os::page_faults() == 0; }));
}

TEST(ForkDetector, ReadsZeroInAChild) {
  uint64_t* word = os::fork_detector();
  ASSERT_NE(word, nullptr);
  EXPECT_EQ(*word, 1U);
  EXPECT_TRUE(succeeds([&] { return *word == 0; }));
  EXPECT_EQ(*word, 1U);
}

TEST(ForkDetector, IsAbsentWhereTheKernelHasNone) {
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(
      succeeds([] { return refuse(SYS_madvise, EINVAL, 2, MADV_WIPEONFORK) && os::fork_detector() == nullptr; }));
  EXPECT_TRUE(succeeds([] { return refuse(SYS_mmap, ENOMEM, 1, 4096) && os::fork_detector() == nullptr; }));
  os::drop_fork_detector(nullptr);
}

}  // namespace
}  // namespace torchshm
