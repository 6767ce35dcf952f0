// A pool's two files: made under any limits, and attached only when they are what they say.
#include "pool/arena.h"

#include <cstring>
#include <fstream>

#include "kernel.h"
#include "os/memory.h"
#include "parts.h"

namespace torchshm {
namespace {

using os::Fd;
using pool::Arena;
using pool::Header;
using pool::kChunk;
using pool::kPage;
using pool::Mode;
using pool::Offsets;
using tests::fresh_arena;
using tests::refuse;
using tests::succeeds;

constexpr uint64_t kMib = uint64_t{1} << 20;

// ---- create

TEST(Arena, TakesHalfOfTheMemoryAndAQuarterOfThatWarmUnlessItIsTold) {
  auto standard = Arena::create(1, {});
  ASSERT_TRUE(standard.ok()) << standard.status().what();
  EXPECT_EQ(standard->header().limit.load(), os::memory_allowed() / 2);
  EXPECT_EQ(standard->header().warm.load(), standard->header().limit.load() / 4);
  auto told = Arena::create(7, {64 * kMib, 5 * kMib});
  ASSERT_TRUE(told.ok());
  EXPECT_EQ(told->header().limit.load(), 64 * kMib);
  EXPECT_EQ(told->header().warm.load(), 5 * kMib);
  EXPECT_EQ(told->header().family, 7U);
  EXPECT_EQ(told->chunks(), 128U);
  EXPECT_NE(told->header().pool_id, standard->header().pool_id);
  EXPECT_NE(told->header().secret, told->header().pool_id);
}

TEST(Arena, ReservesLessWhereFilesMustBeSmaller) {
  const tests::Limited files(RLIMIT_FSIZE, 600 * kMib);
  auto arena = Arena::create(1, {256 * kMib, 0});
  ASSERT_TRUE(arena.ok()) << arena.status().what();
  EXPECT_EQ(arena->chunks(), 256U);  // twice the limit
}

TEST(Arena, IsRefusedWhereNoFileIsLargeEnough) {
  for (const uint64_t most : {uint64_t{1}, 200 * kMib}) {  // the control file; the data file
    const tests::Limited files(RLIMIT_FSIZE, most);
    EXPECT_EQ(Arena::create(1, {256 * kMib, 0}).code(), Code::kUnsupported) << most;
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they reserve address space themselves

uint64_t address_space_used() {
  std::ifstream statm("/proc/self/statm");
  uint64_t pages = 0;
  statm >> pages;
  return pages * 4096;
}

TEST(Arena, DoesWithoutTheOtherFacesWhereAddressSpaceIsShort) {
  if (tests::under_valgrind()) GTEST_SKIP() << "it reserves address space itself";
  const uint64_t before = address_space_used();
  const tests::Limited space(RLIMIT_AS, before + 700 * kMib);
  auto arena = Arena::create(1, {256 * kMib, 0});
  ASSERT_TRUE(arena.ok()) << arena.status().what();
  EXPECT_EQ(arena->chunks(), 256U);  // four times would not fit
  EXPECT_NE(arena->address(Mode::kReadWrite, 0), nullptr);
  EXPECT_EQ(arena->address(Mode::kRead, 0), nullptr);
  EXPECT_EQ(arena->address(Mode::kCopyOnWrite, 0), nullptr);
  EXPECT_FALSE(arena->locate(&before).has_value());
}

TEST(Arena, IsRefusedWithoutAddressSpace) {
  if (tests::under_valgrind()) GTEST_SKIP() << "it reserves address space itself";
  const tests::Limited space(RLIMIT_AS, address_space_used() + 100 * kMib);
  EXPECT_EQ(Arena::create(1, {256 * kMib, 0}).code(), Code::kUnsupported);
}

#endif

TEST(Arena, IsRefusedWithoutRandomNumbers) {
  const tests::Limited files(RLIMIT_NOFILE, 0);
  auto arena = Arena::create(1, {64 * kMib, 0});
  EXPECT_EQ(arena.code(), Code::kUnsupported);
  EXPECT_NE(arena.status().what().find("urandom"), std::string::npos);
}

TEST(Arena, IsRefusedWhereTheRandomNumbersAreNone) {
  TORCHSHM_NEEDS_MOUNTS();
  for (const std::string& bytes : {std::string("short"), std::string(16, '\0')}) {
    EXPECT_TRUE(succeeds([&] {
      return tests::private_mounts() && tests::show("/dev/urandom", bytes) &&
             Arena::create(1, {64 * kMib, 0}).code() == Code::kUnsupported;
    }));
  }
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(Arena, IsRefusedWhenAnyStepOfMakingItFailsForGood) {
  for (const char* call : {"create.random", "os.memfd_create", "os.mmap", "os.fstat"}) {
    for (uint64_t at = 1; at <= 2; ++at) {  // control file, data file
      const tests::Failing failing(call, EPERM, at);
      EXPECT_FALSE(Arena::create(1, {64 * kMib, 0}).ok()) << call << at;
    }
  }
}

TEST(Arena, IsAttachedWithoutTheFacesThatCanNotBeMapped) {
  const Arena arena = fresh_arena();
  for (uint64_t at = 1; at <= 4; ++at) {
    Fd data = os::duplicate(arena.data_fd()).take(), control = os::duplicate(arena.control_fd()).take();
    const tests::Failing failing("os.mmap", ENOMEM, at, false);
    auto attached = Arena::attach(std::move(data), std::move(control));
    if (at <= 2) {
      EXPECT_EQ(attached.code(), Code::kUnsupported);
      continue;
    }
    ASSERT_TRUE(attached.ok()) << attached.status().what();
    EXPECT_EQ(attached->address(Mode::kRead, 0) == nullptr, at == 3);
    EXPECT_EQ(attached->address(Mode::kCopyOnWrite, 0) == nullptr, at == 4);
  }
}

#endif

// ---- attach

// The two files of a pool of 16 chunks, with a header of the test's own.
struct Files {
  Fd data, control;
  uint64_t control_size = Offsets::of(16).total;
  Header* header = nullptr;
  os::Mapping mapped;

  explicit Files(uint64_t data_size = 16 * kChunk, uint64_t size = Offsets::of(16).total)
      : data(os::create_memfd("torchshm-test-data", data_size).take()),
        control(os::create_memfd("torchshm-test-control", size).take()),
        control_size(size),
        mapped(os::Mapping::map(os::Mapping::Kind::kShared, control.get(), size).take()) {
    header = reinterpret_cast<Header*>(mapped.data());
    header->magic = pool::kMagic;
    header->version = pool::kVersion;
    header->layout_hash = pool::kLayoutHash;
    header->family = 9;
    header->chunks = 16;
    header->ready.store(1);
  }
  Result<Arena> attach() const {
    return Arena::attach(os::duplicate(data.get()).take(), os::duplicate(control.get()).take());
  }
};

TEST(Attach, AcceptsWhatCreateMade) {
  const Arena arena = fresh_arena();
  auto other = Arena::attach(os::duplicate(arena.data_fd()).take(), os::duplicate(arena.control_fd()).take());
  ASSERT_TRUE(other.ok()) << other.status().what();
  EXPECT_EQ(other->chunks(), arena.chunks());
  arena.data()[5] = std::byte{1};
  EXPECT_EQ(other->data()[5], std::byte{1});
  EXPECT_TRUE(Files().attach().ok());
}

TEST(Attach, RefusesWhatIsNoSealedMemoryFile) {
  const Files files;
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const Fd read(ends[0]), write(ends[1]);
  EXPECT_EQ(Arena::attach(os::duplicate(files.data.get()).take(), os::duplicate(read.get()).take()).code(),
            Code::kInvalid);
  EXPECT_EQ(Arena::attach(os::duplicate(read.get()).take(), os::duplicate(files.control.get()).take()).code(),
            Code::kInvalid);
  EXPECT_EQ(Arena::attach(Fd(), Fd()).code(), Code::kInvalid);
}

TEST(Attach, RefusesAHeaderThatIsNone) {
  const Fd tiny = os::create_memfd("torchshm-test-tiny", sizeof(Header) - 1).take();
  const Files files;
  EXPECT_EQ(Arena::attach(os::duplicate(files.data.get()).take(), os::duplicate(tiny.get()).take()).code(),
            Code::kInvalid);
  files.header->magic ^= 1;
  EXPECT_EQ(files.attach().code(), Code::kInvalid);
}

TEST(Attach, RefusesAnotherVersionAndSaysSo) {
  const Files files;
  files.header->version += 1;
  auto attached = files.attach();
  EXPECT_EQ(attached.code(), Code::kInvalid);
  EXPECT_NE(attached.status().what().find("another version"), std::string::npos);
  files.header->version -= 1;
  files.header->layout_hash ^= 1;
  EXPECT_NE(files.attach().status().what().find("another version"), std::string::npos);
}

TEST(Attach, RefusesAPoolThatIsNotFinished) {
  const Files files;
  files.header->ready.store(0);
  auto attached = files.attach();
  EXPECT_EQ(attached.code(), Code::kInvalid);
  EXPECT_NE(attached.status().what().find("not finished"), std::string::npos);
}

TEST(Attach, RefusesAHeaderThatContradictsTheFiles) {
  const Files files;
  for (const uint64_t chunks : {uint64_t{0}, uint64_t{15}, uint64_t{17}, uint64_t{1} << 23, UINT64_MAX}) {
    files.header->chunks = chunks;
    EXPECT_EQ(files.attach().code(), Code::kCorrupt) << chunks;
  }
  EXPECT_EQ(Files(16 * kChunk, Offsets::of(16).total + kPage).attach().code(), Code::kCorrupt);
  EXPECT_EQ(Files(17 * kChunk).attach().code(), Code::kCorrupt);
}

TEST(Attach, ReadsTheFamilyOfAFileWithoutJoining) {
  const Files files;
  auto family = Arena::family_of(files.control.get());
  ASSERT_TRUE(family.ok());
  EXPECT_EQ(*family, 9U);
  EXPECT_EQ(Arena::family_of(-1).code(), Code::kInvalid);
  const Fd tiny = os::create_memfd("torchshm-test-tiny", sizeof(Header) - 1).take();
  EXPECT_EQ(Arena::family_of(tiny.get()).code(), Code::kInvalid);
#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS
  const tests::Failing failing("os.mmap", ENOMEM);
  EXPECT_EQ(Arena::family_of(files.control.get()).code(), Code::kUnsupported);
#endif
}

// ---- addresses and extents

TEST(Arena, TellsFaceAndOffsetOfAnAddress) {
  const Arena arena = fresh_arena();
  for (const Mode mode : {Mode::kReadWrite, Mode::kRead, Mode::kCopyOnWrite}) {
    const auto found = arena.locate(arena.address(mode, 12345));
    ASSERT_TRUE(found.has_value());
    EXPECT_EQ(found->first, mode);
    EXPECT_EQ(found->second, 12345U);
  }
  const int outside = 0;
  EXPECT_FALSE(arena.locate(&outside).has_value());
}

TEST(Arena, NeverTellsAnExtentOutsideTheFile) {
  Arena arena = fresh_arena();
  EXPECT_FALSE(arena.extent(arena.pages()).has_value());
  EXPECT_FALSE(arena.extent(0).has_value());  // never used: no length
  pool::BlockValue value;
  value.granules = 16;
  value.first = 3;
  tests::set_block(arena, 8, value);
  ASSERT_TRUE(arena.extent(8).has_value());
  EXPECT_EQ(arena.extent(8)->offset, 8 * kPage + 3 * pool::kGranule);
  EXPECT_EQ(arena.extent(8)->length, 16 * pool::kGranule);
  tests::set_block(arena, arena.pages() - 1, value);  // begins inside, ends outside
  EXPECT_FALSE(arena.extent(arena.pages() - 1).has_value());
  arena.block(0).granules.store(UINT32_MAX);  // longer than the file
  EXPECT_FALSE(arena.extent(0).has_value());
}

TEST(Arena, KnowsItsDescriptorsFromOthersUnderTheSameNumber) {
  Arena arena = fresh_arena();
  EXPECT_TRUE(arena.owns_descriptors());
  EXPECT_TRUE(arena.is_control(arena.control_fd()));
  EXPECT_FALSE(arena.is_control(arena.data_fd()));
  EXPECT_FALSE(arena.is_control(-1));
  EXPECT_TRUE(arena.make_private(0, kPage, true).ok());
  EXPECT_TRUE(arena.make_private(0, kPage, false).ok());
  const Fd other = os::create_memfd("torchshm-test", kChunk).take();
  ASSERT_EQ(::dup2(other.get(), arena.control_fd()), arena.control_fd());
  ASSERT_EQ(::dup2(other.get(), arena.data_fd()), arena.data_fd());
  EXPECT_FALSE(arena.owns_descriptors());
  EXPECT_EQ(arena.make_private(0, kPage, true).code(), Code::kUnsupported);
  ::close(arena.data_fd());
  EXPECT_EQ(arena.make_private(0, kPage, true).code(), Code::kUnsupported);
}

}  // namespace
}  // namespace torchshm
