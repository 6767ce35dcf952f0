// What pages a pool is made of: what was asked for, seen in the kernel's own figures, or an error that says why not.
#include "pool/pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kernel.h"
#include "os/huge_pages.h"
#include "os/mapping.h"
#include "os/memfd.h"
#include "pool/checker.h"
#include "pool/member.h"
#include "processes.h"

namespace torchshm {
namespace {

using os::Mapping;
using os::Numa;
using pool::kChunk;
using pool::Limits;
using pool::Member;
using pool::PageKind;
using tests::private_mounts;
using tests::refuse;
using tests::show;
using tests::succeeds;

constexpr uint64_t kMib = uint64_t{1} << 20;
constexpr char kOnline[] = "/sys/devices/system/node/online";
constexpr char kReserved[] = "/proc/sys/vm/nr_hugepages";
constexpr char kHuge[] = "/sys/kernel/mm/hugepages/hugepages-2048kB/";

Limits limits(uint64_t limit, PageKind kind, bool prefault = false) {
  Limits out;
  out.limit = limit;
  out.pages.kind = kind;
  out.pages.prefault = prefault;
  return out;
}

uint64_t read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  file >> value;
  return value;
}

// As the kernel writes addresses.
std::string hex_of(const std::byte* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%lx", reinterpret_cast<unsigned long>(address));
  return text;
}

// So many huge pages are free as long as this lives, unless why() is something.
class Reserved {
 public:
  explicit Reserved(uint64_t count) : before_(read_number(kReserved)) {
    if (::access(kHuge, F_OK) != 0) {
      why_ = "this kernel has no huge pages of 2 MiB";
    } else if (!set(before_ + count)) {
      why_ = std::string(kReserved) + ": " + std::strerror(errno);
    } else if (os::huge_pages().free < count) {
      why_ = "the kernel has no memory in such pieces";
    }
  }
  ~Reserved() { (void)set(before_); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  const std::string& why() const { return why_; }
  static bool set(uint64_t count) {
    const int fd = ::open(kReserved, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return false;
    const std::string text = std::to_string(count);
    const bool done = ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    return ::close(fd) == 0 && done;
  }

 private:
  uint64_t before_;
  std::string why_;
};

// ---- what is asked for

TEST(Pages, AreWhatTheTextSays) {
  const auto kind = [](const char* text) {
    auto pages = pool::parse_pages(text, true, "");
    return pages.ok() && pages->prefault && pages->numa.policy == Numa::Policy::kLocal ? pages->kind : PageKind{9};
  };
  EXPECT_EQ(kind(""), PageKind::kAuto);
  EXPECT_EQ(kind("auto"), PageKind::kAuto);
  EXPECT_EQ(kind("never"), PageKind::kSmall);
  EXPECT_EQ(kind("2MiB"), PageKind::kReserved);
  for (const char* text : {"1GiB", "4KiB", "yes"}) {
    EXPECT_EQ(pool::parse_pages(text, false, "").code(), Code::kInvalid) << text;
  }
  EXPECT_EQ(pool::parse_pages("", false, "bind").code(), Code::kInvalid);
}

bool nodes_are(const char* online) { return private_mounts() && show(kOnline, online); }

TEST(Numa, NamesNodesThatAreOnline) {
  if (::access(kOnline, R_OK) != 0) GTEST_SKIP() << "the kernel tells of no nodes: no " << kOnline;
  EXPECT_TRUE(succeeds([] {
    if (!nodes_are("0-1,3\n")) return false;
    const auto is = [](const char* text, Numa::Policy policy, const std::vector<uint32_t>& nodes) {
      auto numa = os::parse_numa(text);
      return numa.ok() && numa->policy == policy && numa->nodes == nodes;
    };
    return is("", Numa::Policy::kLocal, {}) && is("local", Numa::Policy::kLocal, {}) &&
           is("interleave", Numa::Policy::kInterleave, {0, 1, 3}) &&
           is("interleave:1,0,1", Numa::Policy::kInterleave, {0, 1}) && is("bind:0-1", Numa::Policy::kBind, {0, 1}) &&
           is("preferred:3", Numa::Policy::kPreferred, {3});
  }));
  EXPECT_TRUE(succeeds([] {
    if (!nodes_are("0-1,3\n")) return false;
    const auto says = [](const char* text, const char* why) {
      auto numa = os::parse_numa(text);
      return numa.code() == Code::kInvalid && numa.status().what().find(why) != std::string::npos;
    };
    return says("bind:0-3", "no node 2; those online are 0-1,3") && says("bind", "names no nodes") &&
           says("bind:", "not a list") && says("bind:1-", "not a list") && says("bind:1-0", "not a list") &&
           says("bind:1;2", "not a list") && says("bind:1024", "not a list") && says("bind:x", "not a list") &&
           says("preferred:0,1", "one node is preferred, not 2") && says("near:0", "no such policy");
  }));
  EXPECT_TRUE(
      succeeds([] { return nodes_are("what?\n") && os::parse_numa("interleave").code() == Code::kUnsupported; }));
  EXPECT_TRUE(succeeds([] { return nodes_are("") && os::parse_numa("bind:0").code() == Code::kUnsupported; }));
}

TEST(Numa, PolicyThatIsRefusedIsAnErrorThatSaysWhy) {
  for (const auto& [error, code, why] :
       {std::tuple(ENOSYS, Code::kUnsupported, "no NUMA policies"),
        std::tuple(EPERM, Code::kUnsupported, "CAP_SYS_NICE"), std::tuple(EINVAL, Code::kUnsupported, "cpuset"),
        std::tuple(ENOMEM, Code::kFull, "mbind")}) {
    EXPECT_TRUE(succeeds([error = error, code = code, why = why] {
      Limits wanted = limits(16 * kMib, PageKind::kAuto);
      wanted.pages.numa = {Numa::Policy::kBind, {0}};
      if (!refuse(SYS_mbind, error)) return false;
      auto made = Member::create(1, wanted);
      return made.code() == code && made.status().what().find(why) != std::string::npos;
    })) << why;
  }
}

TEST(Numa, PolicyIsTheDataFilesAlsoUnderOtherMappings) {
  if (::access("/proc/self/numa_maps", R_OK) != 0) GTEST_SKIP() << "the kernel tells of no policies";
  for (const auto& [policy, word] :
       {std::pair(Numa::Policy::kBind, "bind:0"), std::pair(Numa::Policy::kInterleave, "interleave:0"),
        std::pair(Numa::Policy::kPreferred, "prefer:0")}) {
    Limits wanted = limits(16 * kMib, PageKind::kAuto);
    wanted.pages.numa = {policy, {0}};
    auto made = Member::create(1, wanted);
    if (made.code() == Code::kUnsupported) GTEST_SKIP() << made.status().what();
    ASSERT_TRUE(made.ok());
    auto other = Mapping::map(Mapping::Kind::kReadOnly, (*made)->arena().data_fd(), kChunk);
    ASSERT_TRUE(other.ok());
    const std::string at = hex_of(other->data()) + " ";
    std::ifstream maps("/proc/self/numa_maps");
    bool found = false;
    for (std::string line; std::getline(maps, line);) {
      if (line.rfind(at, 0) == 0) found = line.find(std::string(" ") + word) != std::string::npos;
    }
    EXPECT_TRUE(found) << word;
  }
}

// ---- when

TEST(Prefault, CommitsTheLimitAsIdleChunksThatStay) {
  auto made = Member::create(1, limits(33 * kMib, PageKind::kSmall, true));
  ASSERT_TRUE(made.ok());
  pool::Stats stats = (*made)->stats();
  EXPECT_EQ(stats.committed, 32 * kMib);
  EXPECT_EQ(stats.warm, 32 * kMib);
  EXPECT_EQ(stats.warm_limit, 33 * kMib);
  const auto* data = (*made)->arena().data();
  std::vector<unsigned char> there(32 * kMib / 4096);
  ASSERT_EQ(::mincore(const_cast<std::byte*>(data), 32 * kMib, there.data()), 0);
  for (const unsigned char page : there) ASSERT_EQ(page & 1, 1);
  // All of it is for use, large and small.
  auto large = (*made)->allocate(30 * kMib, false);
  ASSERT_TRUE(large.ok());
  EXPECT_TRUE((*made)->allocate(1000, false).ok());
  EXPECT_EQ((*made)->stats().committed, 32 * kMib);
  EXPECT_EQ(pool::check((*made)->arena(), {.at_rest = true}).first(), "");
}

TEST(Prefault, WithoutTheMemoryIsFull) {
  EXPECT_TRUE(succeeds([] {
    if (!private_mounts() || !show("/proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 60000 kB\n")) return false;
    auto made = Member::create(1, limits(64 * kMib, PageKind::kAuto, true));
    return made.code() == Code::kFull && made.status().what().find("prefault: 67108864 bytes") == 0;
  }));
}

// ---- huge pages

TEST(SmallPages, AreKeptToByAllMembers) {
  auto made = Member::create(1, limits(64 * kMib, PageKind::kSmall));
  ASSERT_TRUE(made.ok());
  EXPECT_EQ((*made)->arena().page_kind(), PageKind::kSmall);
  auto data = os::duplicate((*made)->arena().data_fd()), control = os::duplicate((*made)->arena().control_fd());
  ASSERT_TRUE(data.ok() && control.ok());
  auto other = pool::Arena::attach(data.take(), control.take());
  ASSERT_TRUE(other.ok());
  EXPECT_EQ(other->page_kind(), PageKind::kSmall);
  auto alias = other->alias();
  ASSERT_TRUE(alias.ok());
  EXPECT_EQ(alias->page_kind(), PageKind::kSmall);
  auto block = (*made)->allocate(16 * kMib, false);
  ASSERT_TRUE(block.ok());
  const std::string at = hex_of((*made)->arena().data());
  std::ifstream smaps("/proc/self/smaps");
  std::string line;
  while (std::getline(smaps, line) && line.rfind(at + "-", 0) != 0) {
  }
  while (std::getline(smaps, line) && line.rfind("ShmemPmdMapped:", 0) != 0) {
  }
  EXPECT_EQ(std::stoull("0" + line.substr(std::min(line.size(), line.find_first_of("0123456789")))), 0U) << line;
  EXPECT_FALSE(line.empty());
}

TEST(ReservedPages, TooFewAreAnErrorThatSaysHowMany) {
  EXPECT_TRUE(succeeds([] {
    if (::access(kHuge, F_OK) != 0) return true;
    const auto figure = [](const char* name, const char* value) { return show(std::string(kHuge) + name, value); };
    if (!private_mounts() || !figure("nr_hugepages", "20") || !figure("free_hugepages", "12") ||
        !figure("resv_hugepages", "5") || !figure("nr_overcommit_hugepages", "4") || !figure("surplus_hugepages", "1"))
      return false;
    auto ten = pool::reserved_limit(10 * kChunk, 1 << 30), eleven = pool::reserved_limit(10 * kChunk + 1, 1 << 30);
    auto all = pool::reserved_limit(0, 1 << 30), some = pool::reserved_limit(0, 6 * kMib);
    return ten.ok() && *ten == 10 * kChunk && all.ok() && *all == 10 * kChunk && some.ok() && *some == 6 * kMib &&
           eleven.code() == Code::kUnsupported &&
           eleven.status().what().find("needs 11 reserved pages of 2 MiB, and 10 are free (of 20)") !=
               std::string::npos &&
           eleven.status().what().find("vm.nr_hugepages=21") != std::string::npos;
  }));
  EXPECT_TRUE(succeeds([] {
    if (::access(kHuge, F_OK) != 0) return true;
    for (const char* name : {"free_hugepages", "nr_overcommit_hugepages"}) {
      if ((std::string(name) == "free_hugepages" && !private_mounts()) || !show(std::string(kHuge) + name, "0"))
        return false;
    }
    return Member::create(1, limits(0, PageKind::kReserved)).code() == Code::kUnsupported;
  }));
}

TEST(ReservedPages, AreTakenWholeAndNeverPrivate) {
  const Reserved reserved(16);
  if (!reserved.why().empty()) GTEST_SKIP() << reserved.why();
  const uint64_t free = os::huge_pages().free;
  auto made = Member::create(1, limits(32 * kMib, PageKind::kReserved));
  ASSERT_TRUE(made.ok()) << made.status().what();
  Member& member = **made;
  EXPECT_EQ(member.arena().page_kind(), PageKind::kReserved);
  EXPECT_TRUE(os::in_huge_pages(member.arena().data_fd()));
  EXPECT_FALSE(os::in_huge_pages(member.arena().control_fd()));
  EXPECT_EQ(os::huge_pages().free, free);
  auto block = member.allocate(3 * kMib, true);
  ASSERT_TRUE(block.ok());
  EXPECT_EQ(os::huge_pages().free, free - 2);
  EXPECT_EQ(member.stats().committed, 2 * kChunk);
  EXPECT_EQ(member.view(block->block, pool::Mode::kCopyOnWrite).code(), Code::kUnsupported);
  EXPECT_EQ(member.arena().make_private(0, kChunk, true).code(), Code::kUnsupported);
  EXPECT_TRUE(member.view(block->block, pool::Mode::kRead).ok());
  EXPECT_EQ(pool::check(member.arena(), {.at_rest = true}).first(), "");
  member.release(block->block, pool::Mode::kRead);
  member.release(block->block, pool::Mode::kReadWrite);
  EXPECT_EQ(member.trim(0), 2 * kChunk);
  EXPECT_EQ(os::huge_pages().free, free);
}

TEST(ReservedPages, ThatRunOutAreFullAndThoseOfTheDeadComeBack) {
  const Reserved reserved(8);
  if (!reserved.why().empty()) GTEST_SKIP() << reserved.why();
  const uint64_t free = os::huge_pages().free;
  EXPECT_TRUE(succeeds([] {
    auto made = Member::create(1, limits(16 * kMib, PageKind::kReserved));
    // Others take them: the kernel has no more than what is in use.
    if (!made || !(*made)->allocate(4 * kMib, false) || !Reserved::set(0)) return false;
    auto large = (*made)->allocate(6 * kMib, false), small = (*made)->allocate(1000, false);
    return large.code() == Code::kFull && small.code() == Code::kFull && (*made)->stats().committed == 4 * kMib &&
           (*made)->stats().live == 4 * kMib;
  }));
  ASSERT_TRUE(Reserved::set(free));
  EXPECT_EQ(os::huge_pages().free, free);
}

TEST(ReservedPages, NeedAKernelThatCanPopulate) {
  const Reserved reserved(4);
  if (!reserved.why().empty()) GTEST_SKIP() << reserved.why();
  EXPECT_TRUE(succeeds([] {
    auto made = Member::create(1, limits(8 * kMib, PageKind::kReserved));
    if (!made || !refuse(SYS_madvise, EINVAL, 2, 23)) return false;  // MADV_POPULATE_WRITE
    return (*made)->allocate(kMib, false).code() == Code::kUnsupported;
  }));
}

}  // namespace
}  // namespace torchshm
