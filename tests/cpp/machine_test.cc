// What is known of the machine: how much memory there is, and who a process is.
#include <sys/mman.h>

#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include "base/failpoint.h"
#include "kernel.h"
#include "memory_files.h"
#include "os/memory.h"
#include "os/process.h"

namespace torchshm {
namespace {

using os::Fd;
using os::Mapping;
using tests::kSize;
using tests::map;
using tests::memfd;
using tests::refuse;
using tests::succeeds;

// ---- how much memory there is

constexpr uint64_t kKib = 1024, kMib = kKib << 10;

struct System {
  std::string meminfo = "MemTotal: 4096 kB\nMemFree: 1 kB\nMemAvailable: 2048 kB\n";
  std::string membership;
  std::vector<std::pair<std::string, std::string>> files;  // under /sys/fs/cgroup, folders first made
};

bool in_system(const System& system, const std::function<bool()>& body) {
  return succeeds([&] {
    if (!tests::private_mounts() || !tests::empty_cgroups()) return false;
    for (const auto& [name, content] : system.files) {
      const std::string path = "/sys/fs/cgroup/" + name;
      for (size_t slash = path.find('/', 15); slash != std::string::npos; slash = path.find('/', slash + 1))
        ::mkdir(path.substr(0, slash).c_str(), 0700);
      if (!tests::write_file(path, content)) return false;
    }
    return tests::show("/proc/meminfo", system.meminfo) && tests::show(tests::of_self("cgroup"), system.membership) &&
           body();
  });
}

TEST(Memory, IsTheMachinesWithoutACgroup) {
  TORCHSHM_NEEDS_MOUNTS();
  EXPECT_TRUE(in_system({}, [] { return os::memory_allowed() == 4 * kMib && os::memory_headroom() == 2 * kMib; }));
  System unknown;
  unknown.meminfo = "Nothing: 1 kB\n";
  EXPECT_TRUE(
      in_system(unknown, [] { return os::memory_allowed() == UINT64_MAX && os::memory_headroom() == UINT64_MAX; }));
  unknown.meminfo = "MemTotal: what\n";
  EXPECT_TRUE(in_system(unknown, [] { return os::memory_allowed() == UINT64_MAX; }));
}

TEST(Memory, IsThatOfTheTightestCgroupAbove) {
  TORCHSHM_NEEDS_MOUNTS();
  System two;
  two.membership = "0::/a/b\n";
  two.files = {{"a/b/memory.max", "max\n"},       {"a/memory.max", "3145728\n"},
               {"a/memory.current", "2097152\n"}, {"a/memory.stat", "anon 5\ninactive_file 1048576\n"},
               {"memory.max", "1073741824\n"},    {"memory.current", "1\n"}};
  EXPECT_TRUE(in_system(two, [] { return os::memory_allowed() == 3 * kMib && os::memory_headroom() == 2 * kMib; }));
  two.files = {{"a/memory.max", "1048576\n"}, {"a/memory.current", "2097152\n"}, {"a/memory.stat", "anon 5\n"}};
  EXPECT_TRUE(in_system(two, [] { return os::memory_headroom() == 0; }));
  // More given up than used: they are not read at the same moment.
  two.files = {
      {"a/memory.max", "1048576\n"}, {"a/memory.current", "4096\n"}, {"a/memory.stat", "inactive_file 8192\n"}};
  EXPECT_TRUE(in_system(two, [] { return os::memory_headroom() == kMib; }));
  two.membership = "0::/\n";
  two.files = {{"memory.max", "2097152\n"}};
  EXPECT_TRUE(in_system(two, [] { return os::memory_allowed() == 2 * kMib; }));
}

TEST(Memory, IsThatOfTheMemoryControllerOfTheFirstVersion) {
  TORCHSHM_NEEDS_MOUNTS();
  System one;
  one.membership = "5:cpu,memory:/a\n4:pids:/a\n3:memoryless:/a\n";
  one.files = {{"memory/a/memory.limit_in_bytes", "1048576\n"},
               {"memory/a/memory.usage_in_bytes", "900000\n"},
               {"memory/a/memory.stat", "total_inactive_file 375712\n"}};
  EXPECT_TRUE(in_system(one, [] { return os::memory_allowed() == kMib && os::memory_headroom() == kMib / 2; }));
}

TEST(Memory, LinesThatAreNoCgroupAreSkipped) {
  TORCHSHM_NEEDS_MOUNTS();
  System odd;
  odd.membership = "\nx\n1:memory\n0::a\n";
  odd.files = {{"a/memory.max", "1\n"}};
  EXPECT_TRUE(in_system(odd, [] { return os::memory_allowed() == 4 * kMib; }));
}

// ---- who a process is

TEST(Process, IsKnownByMoreThanItsPid) {
  const Fd fd = memfd();
  const Mapping shared = map(Mapping::Kind::kShared, fd);
  const uint64_t inode = os::file_id(fd.get())->inode;
  const os::ProcessId self = os::self();
  EXPECT_EQ(self.pid, static_cast<uint32_t>(::getpid()));
  EXPECT_NE(self.started, 0U);
  EXPECT_TRUE(os::maps_file(self, inode));
  EXPECT_FALSE(os::maps_file(self, inode + 1));
  os::ProcessId other = self;
  other.started += 1;
  EXPECT_FALSE(os::maps_file(other, inode));
  other.started = 0;  // unknown: the pid has to do
  EXPECT_TRUE(os::maps_file(other, inode));
  other.namespace_ += 1;
  EXPECT_FALSE(os::maps_file(other, inode));
}

TEST(Process, ThatIsGoneMapsNothing) {
  const Fd fd = memfd();
  const Mapping shared = map(Mapping::Kind::kShared, fd);
  os::ProcessId other = os::self();
  const pid_t child = tests::start([] {
    ::pause();
    return true;
  });
  other.pid = static_cast<uint32_t>(child);
  other.started = 0;
  EXPECT_TRUE(os::maps_file(other, os::file_id(fd.get())->inode));
  ::kill(child, SIGKILL);
  (void)tests::wait_for(child);
  EXPECT_FALSE(os::maps_file(other, os::file_id(fd.get())->inode));
}

TEST(Process, WhoseFirstThreadHasEndedStillMapsWhatItMaps) {
  const Fd fd = memfd();
  const Mapping shared = map(Mapping::Kind::kShared, fd);
  os::ProcessId other = os::self();
  const pid_t child = tests::start([] {
    std::thread([] { ::pause(); }).detach();
    ::syscall(SYS_exit, 0);  // of this thread alone
    return false;
  });
  other.pid = static_cast<uint32_t>(child);
  other.started = 0;
  const auto state = [&] {
    std::ifstream stat("/proc/" + std::to_string(child) + "/stat");
    const std::string text((std::istreambuf_iterator<char>(stat)), {});
    return text[text.rfind(')') + 2];
  };
  for (int i = 0; i < 1000 && state() != 'Z'; ++i) ::usleep(1000);
  ASSERT_EQ(state(), 'Z');
  EXPECT_TRUE(os::maps_file(other, os::file_id(fd.get())->inode));
  EXPECT_FALSE(os::maps_file(other, os::file_id(fd.get())->inode + 1));
  ::kill(child, SIGKILL);
  (void)tests::wait_for(child);
  EXPECT_FALSE(os::maps_file(other, os::file_id(fd.get())->inode));
}

TEST(Process, OnlyMemoryFilesOfThePoolCount) {
  char name[] = "/tmp/torchshm-test-XXXXXX";
  const Fd file(::mkstemp(name));
  ASSERT_TRUE(file.valid());
  ASSERT_EQ(::ftruncate(file.get(), kSize), 0);
  const Mapping shared = map(Mapping::Kind::kShared, file);
  // Inode numbers of other file systems say nothing.
  EXPECT_FALSE(os::maps_file(os::self(), os::file_id(file.get())->inode));
  ::unlink(name);
}

TEST(Process, MayHaveAnyName) {
  EXPECT_TRUE(succeeds([] {
    const os::ProcessId before = os::self();
    if (::prctl(PR_SET_NAME, ") S (1 2 3") != 0) return false;
    return os::self().started == before.started && os::self_name() == ") S (1 2 3";
  }));
}

TEST(Process, WithoutProcIsUnknown) {
  TORCHSHM_NEEDS_MOUNTS();
  for (const std::string& stat : {std::string(), std::string("12 no name"), std::string("12 (x) S 1 2 3")}) {
    EXPECT_TRUE(succeeds([&] {
      return tests::private_mounts() && tests::show(tests::of_self("stat"), stat) && os::self().started == 0;
    })) << stat;
  }
  EXPECT_TRUE(succeeds([] {
    return tests::private_mounts() &&
           tests::show(tests::of_self("maps"), "nonsense memfd:torchshm\n7f-80 r--p 0 0:1 77 /memfd:torchshm\n") &&
           os::maps_file(os::self(), 77) && !os::maps_file(os::self(), 78);
  }));
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([] { return refuse(SYS_newfstatat, EPERM) && os::self().namespace_ == 0; }));
}

TEST(Process, IsTakenForLivingWhenTheKernelCanNotTell) {
  const os::ProcessId self = os::self();
  os::ProcessId unknown = self;
  unknown.started = 0;
  {
    const tests::Limited files(RLIMIT_NOFILE, 0);
    EXPECT_TRUE(os::maps_file(self, 1));
    EXPECT_TRUE(os::maps_file(unknown, 1));
    EXPECT_EQ(os::self().started, 0U);
  }
  TORCHSHM_NEEDS_SECCOMP();
  EXPECT_TRUE(succeeds([&] { return refuse(SYS_newfstatat, EPERM) && os::maps_file(self, 1); }));
  const auto while_reads_fail = [](int error, const std::function<bool()>& body) {
    return succeeds([&] {
      const int next = ::dup(0);  // the number that the next file gets; only its reads fail
      ::close(next);
      const bool good = refuse(SYS_read, error, 0, static_cast<uint32_t>(next)) && body();
      return ::dup(0) == next && good;
    });
  };
  EXPECT_TRUE(while_reads_fail(EIO, [&] { return os::maps_file(self, 1) && os::maps_file(unknown, 1); }));
  // It ended between the two looks: that is told.
  EXPECT_TRUE(while_reads_fail(ESRCH, [&] { return !os::maps_file(self, 1) && !os::maps_file(unknown, 1); }));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Process, WithoutItsNamespaceIsTakenForLiving) {
  const os::ProcessId self = os::self();
  for (const char* name : {"os.namespace", "os.proc"}) {
    failpoint::arm({failpoint::Action::kFail, 1, true, EMFILE, name});
    EXPECT_TRUE(os::maps_file(self, 1)) << name;
    failpoint::disarm();
  }
}

#endif

}  // namespace
}  // namespace torchshm
