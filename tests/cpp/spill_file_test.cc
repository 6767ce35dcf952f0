// Values in files: what was written comes back, and nothing else is ever taken for it.
#include "store/spill_file.h"

#include <sys/file.h>

#include <fstream>
#include <limits>
#include <thread>

#include "base/failpoint.h"
#include "os/directory.h"
#include "spill_values.h"
#include "store/checksum.h"

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
using tests::TemporaryDirectory;

constexpr uint64_t kMiB = uint64_t{1} << 20;

std::vector<Lengths> shapes() {
  std::vector<Lengths> all = {{}, {0}, {0, 0, 0}, {1}, {63, 64, 65}, {4095}, {4096}, {4097}, {0, 5, 0, 0, 7, 0}};
  for (const uint64_t around : {uint64_t{65536}, uint64_t{2} * kMiB, uint64_t{4} * kMiB}) {
    for (const int more : {-4096, -1, 0, 1, 4096}) all.push_back({around + static_cast<uint64_t>(more)});
  }
  all.push_back({9 * kMiB + 1});
  all.push_back({100, 9 * kMiB, 3, 70000, 65535, 2 * kMiB - 1, 0, 1, 5 * kMiB, 17});
  all.push_back(Lengths(5000, 333));
  all.push_back(Lengths(60, 65537));
  return all;
}

std::string file_of(SpillDirectory& directory, uint64_t id = kSpillId) {
  std::array<char, 32> name;
  std::snprintf(name.data(), name.size(), "/%016lx.spill", static_cast<unsigned long>(id));
  return directory.path() + name.data();
}

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void every_shape_comes_back(SpillDirectory& directory) {
  uint64_t seed = 0;
  for (const Lengths& lengths : shapes()) {
    for (const uint64_t skew : {0, 64}) {
      Blocks blocks(lengths, skew);
      blocks.fill(++seed);
      const auto written = directory.write(head_of(lengths), blocks.from);
      ASSERT_TRUE(written.ok()) << written.what();
      ASSERT_EQ(tests::read(directory, blocks, lengths), Code::kOk) << seed;
      const auto files = directory.list();
      ASSERT_EQ(files.size(), 1U);
      ASSERT_EQ(files[0].bytes % 4096, 0U);
    }
  }
}

TEST(SpillFile, ValuesOfEveryShapeComeBack) {
  const TemporaryDirectory place;
  every_shape_comes_back(*spill_to(place.path()));
  for (const bool past : tests::kBothWays) every_shape_comes_back(*spill_past_cache(place.path(), past));
}

TEST(SpillDirectory, WhetherFilesAreWithTheDiskHoldsForAllWhoHaveIt) {
  const TemporaryDirectory place;
  const auto first = spill_past_cache(place.path(), false);
  const auto joined = SpillDirectory::join(os::duplicate(first->fd()).take(), kSpillPool);
  ASSERT_TRUE(joined.ok());
  EXPECT_FALSE((*joined)->synced());
  EXPECT_FALSE(spill_to(place.path())->synced());  // unless it is said, as it was
  EXPECT_TRUE(spill_past_cache(place.path(), true)->synced());
  EXPECT_TRUE(spill_to(place.path())->synced());
}

TEST(SpillFile, ValuesComeBackWhereNoThreadIsToBeHad) {
  TORCHSHM_NEEDS_SECCOMP();
  const TemporaryDirectory place;
  EXPECT_TRUE(tests::succeeds([&] {
    const auto directory = spill_past_cache(place.path());
    const Lengths lengths = {20 * kMiB};
    Blocks blocks(lengths);
    blocks.fill(1);
    return tests::refuse(SYS_clone3, EAGAIN) && tests::refuse(SYS_clone, EAGAIN) &&
           directory->write(head_of(lengths), blocks.from).ok() &&
           tests::read(*directory, blocks, lengths) == Code::kOk;
  }));
}

TEST(SpillFile, AnotherProcessReadsItThroughTheDescriptor) {
  const TemporaryDirectory place;
  auto directory = spill_to(place.path());
  const Lengths lengths = {300, 3 * kMiB};
  Blocks blocks(lengths);
  blocks.fill(3);
  ASSERT_TRUE(directory->write(head_of(lengths), blocks.from).ok());
  std::filesystem::rename(place.path(), place.path() + "-elsewhere");  // its path means nothing now
  EXPECT_TRUE(tests::succeeds([&] {
    auto joined = SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool);
    if (!joined || tests::read(**joined, blocks, lengths) != Code::kOk) return false;
    blocks.fill(4);
    return (*joined)->write(head_of(lengths, 9), blocks.from).ok();
  }));
  std::filesystem::rename(place.path() + "-elsewhere", place.path());
  blocks.fill(4);
  EXPECT_EQ(tests::read(*directory, blocks, lengths, 9), Code::kOk);
}

TEST(SpillFile, ANewerOneTakesThePlaceAndReadersKeepTheirs) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  const Lengths lengths = {100000}, longer = {5, 200000};
  Blocks old(lengths), newer(longer);
  old.fill(1);
  newer.fill(2);
  ASSERT_TRUE(directory->write(head_of(lengths), old.from).ok());
  auto reader = directory->open(kSpillId);
  ASSERT_TRUE(directory->write(head_of(longer), newer.from).ok());
  EXPECT_EQ(tests::read(*directory, newer, longer), Code::kOk);
  const Blocks read(lengths);
  EXPECT_TRUE(reader->read(read.into).ok());
  EXPECT_TRUE(directory->remove(kSpillId));
  EXPECT_FALSE(directory->remove(kSpillId));
  EXPECT_TRUE(reader->read(read.into).ok());
  EXPECT_TRUE(read.same(old));
  EXPECT_EQ(directory->open(kSpillId).code(), Code::kMissing);
  EXPECT_TRUE(directory->list().empty());
}

TEST(SpillFile, WhatDoesNotFitTogetherIsRefused) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  const Blocks blocks({5});
  EXPECT_EQ(directory->write(head_of({5, 6}), blocks.from).code(), Code::kInvalid);
  EXPECT_EQ(directory->write(head_of({uint64_t{1} << 62}), blocks.from).code(), Code::kInvalid);
  auto foreign = head_of({5});
  foreign.pool_id = 1;
  EXPECT_EQ(directory->write(foreign, blocks.from).code(), Code::kInvalid);
  ASSERT_TRUE(directory->write(head_of({5}), blocks.from).ok());
  EXPECT_EQ(directory->open(kSpillId)->read({}).code(), Code::kInvalid);
  EXPECT_EQ(directory->list().size(), 1U);
}

TEST(SpillFile, OfAnotherValueOrStoreIsNotTakenForThisOne) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path()), other = spill_to(place.path(), kSpillPool + 1);
  const Blocks blocks({5});
  ASSERT_TRUE(directory->write(head_of({5}), blocks.from).ok());
  std::filesystem::copy(file_of(*directory), file_of(*directory, 77));
  std::filesystem::copy(file_of(*directory), file_of(*other));
  EXPECT_EQ(directory->open(77).code(), Code::kCorrupt);
  EXPECT_EQ(other->open(kSpillId).code(), Code::kCorrupt);
  // Nor is what is no file; and none of it is waited for.
  ASSERT_EQ(::mkfifo(file_of(*directory, 78).c_str(), 0600), 0);
  EXPECT_EQ(directory->open(78).code(), Code::kCorrupt);
  std::filesystem::create_directory(file_of(*directory, 79));
  EXPECT_EQ(directory->open(79).code(), Code::kCorrupt);
  std::filesystem::create_symlink(file_of(*directory), file_of(*directory, 80));
  EXPECT_EQ(directory->open(80).code(), Code::kSystem);
}

// ---- damage

void change_each(const Lengths& lengths, size_t step, bool past_cache = false) {
  const TemporaryDirectory place;
  const auto directory = spill_past_cache(place.path(), past_cache);
  Blocks blocks(lengths);
  blocks.fill(1);
  ASSERT_TRUE(directory->write(head_of(lengths), blocks.from).ok());
  const std::string whole = content(file_of(*directory));
  const os::Fd file(::open(file_of(*directory).c_str(), O_RDWR | O_CLOEXEC));
  for (size_t i = 0; i < whole.size(); i += step) {
    const char changed = static_cast<char>(whole[i] ^ (1 << i % 8));
    ASSERT_EQ(::pwrite(file.get(), &changed, 1, static_cast<off_t>(i)), 1);
    ASSERT_EQ(tests::read(*directory, blocks, lengths), Code::kCorrupt) << i;
    ASSERT_EQ(::pwrite(file.get(), &whole[i], 1, static_cast<off_t>(i)), 1);
  }
  EXPECT_EQ(tests::read(*directory, blocks, lengths), Code::kOk);
}

TEST(SpillFile, AnyByteThatChangedIsNoticed) {
  change_each({100, 5000}, 1);
  change_each({100, 200000, 70001}, 997);  // read by several calls
  change_each({3, 9 * kMiB + 1, 5}, 99991);
  // And by two threads, several pieces at once.
  change_each({3, 9 * kMiB + 1, 5}, 299993, true);
  change_each({20 * kMiB, 100, kMiB}, 999983, true);
}

TEST(SpillFile, AnyOtherLengthIsNoticed) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  const Lengths lengths = {100, 5000};
  Blocks blocks(lengths);
  blocks.fill(1);
  ASSERT_TRUE(directory->write(head_of(lengths), blocks.from).ok());
  const auto bytes = static_cast<off_t>(std::filesystem::file_size(file_of(*directory)));
  ASSERT_EQ(::truncate(file_of(*directory).c_str(), bytes + 4096), 0);
  ASSERT_EQ(directory->open(kSpillId).code(), Code::kCorrupt);
  for (off_t length = bytes + 1; length >= 0; --length) {
    ASSERT_EQ(::truncate(file_of(*directory).c_str(), length), 0);
    ASSERT_EQ(tests::read(*directory, blocks, lengths), length == bytes ? Code::kOk : Code::kCorrupt) << length;
  }
}

TEST(SpillFile, CutShortUnderAReaderIsAnError) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  const Lengths lengths = {20 * kMiB};
  Blocks blocks(lengths);
  blocks.fill(1);
  ASSERT_TRUE(directory->write(head_of(lengths), blocks.from).ok());
  auto reader = directory->open(kSpillId);
  ASSERT_EQ(::truncate(file_of(*directory).c_str(), 7 * kMiB + 5), 0);
  const auto status = reader->read(blocks.into);
  EXPECT_EQ(status.code(), Code::kCorrupt);
  EXPECT_NE(status.what().find(file_of(*directory)), std::string::npos) << status.what();
}

TEST(SpillFile, ForgedNumbersAreNotBelieved) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  const Lengths lengths = {100, 5000, 0};
  Blocks blocks(lengths);
  blocks.fill(1);
  ASSERT_TRUE(directory->write(head_of(lengths), blocks.from).ok());
  const std::string whole = content(file_of(*directory));
  const os::Fd file(::open(file_of(*directory).c_str(), O_RDWR | O_CLOEXEC));
  const uint64_t most = std::numeric_limits<uint64_t>::max();
  // Version, ids, sizes, counts, lengths: each number of the head in turn, under a checksum that is right.
  for (size_t at = 16; at < 88 + 3 * 8; at += 8) {
    uint64_t before = 0;
    std::memcpy(&before, &whole[at], 8);
    std::vector<uint64_t> values = {0, 1, 2, most, most - 1, most / 2, most / 8, most / 8 + 1, most - 4095, 4096, 8192};
    for (int bit = 0; bit < 64; ++bit) values.insert(values.end(), {before + (uint64_t{1} << bit), uint64_t{1} << bit});
    for (const int less : {1, 64, 4096}) values.push_back(before - static_cast<uint64_t>(less));
    for (const uint64_t value : values) {
      if (value == before) continue;
      std::string forged = whole;
      std::memcpy(&forged[at], &value, 8);
      const uint64_t sum = store::checksum(reinterpret_cast<const std::byte*>(&forged[16]), 4096 - 16);
      std::memcpy(&forged[8], &sum, 8);
      ASSERT_EQ(::pwrite(file.get(), forged.data(), 4096, 0), 4096);
      auto reader = directory->open(kSpillId);
      // Fewer blocks, a shorter key or text, or lengths that come to the same places, are another value, which a forger may make.
      if (reader) {
        ASSERT_GE(at, 56U) << value;
        const Blocks into(reader->head().lengths);
        (void)reader->read(into.into);
      } else {
        ASSERT_EQ(reader.code(), Code::kCorrupt) << at << " " << value;
      }
    }
  }
}

// ---- directories

TEST(SpillDirectory, TwoStoresShareAPlace) {
  const TemporaryDirectory place;
  auto one = spill_to(place.path(), 1), two = spill_to(place.path(), 2);
  const Lengths lengths = {1000};
  Blocks first(lengths), second(lengths);
  first.fill(1);
  second.fill(2);
  auto head = head_of(lengths);
  head.pool_id = 1;
  ASSERT_TRUE(one->write(head, first.from).ok());
  head.pool_id = 2;
  ASSERT_TRUE(two->write(head, second.from).ok());
  EXPECT_EQ(tests::read(*one, first, lengths), Code::kOk);
  EXPECT_EQ(tests::read(*two, second, lengths), Code::kOk);
  one.reset();
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(place.path()), {}), 1);
  EXPECT_EQ(sweep_dead(place.path()), 0U);
  EXPECT_EQ(tests::read(*two, second, lengths), Code::kOk);
}

TEST(SpillDirectory, OfTheDeadIsSweptAndNobodyElses) {
  const TemporaryDirectory place;
  std::filesystem::create_directory(place.path() + "/results-0123456789abcdef");
  tests::write_file(place.path() + "/results-0123456789abcdef/mine", "x");
  tests::write_file(place.path() + "/notes", "x");
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t owner = tests::start([&] {
    const auto directory = spill_to(place.path());
    const Blocks blocks({5000});
    (void)directory->write(head_of({5000}), blocks.from);
    tests::write_file(directory->path() + "/0000000000000001.part", "left by a writer that died");
    (void)!::write(ends[1], "x", 1);
    ::pause();
    return true;
  });
  char byte = 0;
  ASSERT_EQ(::read(ends[0], &byte, 1), 1);
  EXPECT_EQ(sweep_dead(place.path()), 0U);
  ::kill(owner, SIGKILL);
  (void)tests::wait_for(owner);
  EXPECT_EQ(sweep_dead(place.path()), 1U);
  EXPECT_EQ(sweep_dead(place.path()), 0U);
  EXPECT_TRUE(std::filesystem::exists(place.path() + "/results-0123456789abcdef/mine"));
  EXPECT_TRUE(std::filesystem::exists(place.path() + "/notes"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(place.path()), {}), 2);
  EXPECT_EQ(sweep_dead(place.path() + "/nowhere"), 0U);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(SpillDirectory, IsAliveAsLongAsAnyoneHasIt) {
  const TemporaryDirectory place;
  auto directory = spill_to(place.path());
  auto joined = SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool).take();
  os::Fd later = os::duplicate(directory->fd()).take();
  directory.reset();
  EXPECT_EQ(sweep_dead(place.path()), 0U);
  const pid_t child = tests::start([] {
    ::pause();
    return true;
  });
  joined.reset();
  EXPECT_EQ(sweep_dead(place.path()), 0U);  // the child's
  ::kill(child, SIGKILL);
  (void)tests::wait_for(child);
  EXPECT_EQ(sweep_dead(place.path()), 1U);
  EXPECT_EQ(SpillDirectory::join(std::move(later), kSpillPool).code(), Code::kMissing);
}

TEST(SpillDirectory, OfAPersistentStoreStays) {
  const TemporaryDirectory place;
  const Lengths lengths = {1000};
  Blocks blocks(lengths);
  blocks.fill(1);
  ASSERT_TRUE(spill_to(place.path(), kSpillPool, true)->write(head_of(lengths), blocks.from).ok());
  EXPECT_EQ(sweep_dead(place.path()), 0U);
  const auto again = spill_to(place.path(), kSpillPool, true);
  EXPECT_EQ(tests::read(*again, blocks, lengths), Code::kOk);
  EXPECT_TRUE(again->sync().ok());
  EXPECT_GT(again->free_bytes(), 0U);
}

TEST(SpillDirectory, WhereOthersMayWriteIsRefusedWithWhatToDo) {
  const TemporaryDirectory place;
  const auto refusal = [&](const std::string& dir) {
    auto made = SpillDirectory::make(dir, "test", kSpillPool, false, -1);
    return made ? "none" : made.code() == Code::kInvalid ? made.status().what() : "another: " + made.status().what();
  };
  ASSERT_EQ(::chmod(place.path().c_str(), 0777), 0);
  EXPECT_NE(refusal(place.path()).find("chmod o-w"), std::string::npos);
  ASSERT_EQ(::chmod(place.path().c_str(), 01777), 0);  // as /tmp
  EXPECT_EQ(refusal(place.path()), "none");
  ASSERT_EQ(::chmod(place.path().c_str(), 0775), 0);
  EXPECT_EQ(refusal(place.path()), "none");
  EXPECT_NE(refusal(place.path() + "/a/b").find("does not exist"), std::string::npos);
  tests::write_file(place.path() + "/file", "");
  EXPECT_NE(refusal(place.path() + "/file").find("Not a directory"), std::string::npos);
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give directories away";
  ASSERT_EQ(::chown(place.path().c_str(), 0, 4242), 0);
  EXPECT_NE(refusal(place.path()).find("chmod g-w"), std::string::npos);
  EXPECT_TRUE(SpillDirectory::make(place.path(), "test", kSpillPool, false, 4242).ok());
  ASSERT_EQ(::chown(place.path().c_str(), 4242, 0), 0);
  EXPECT_NE(refusal(place.path()).find("belongs to user 4242"), std::string::npos);
  ASSERT_EQ(::chown(place.path().c_str(), 0, 0), 0);
  const auto mine = spill_to(place.path());
  ASSERT_EQ(::chown(mine->path().c_str(), 4242, 0), 0);
  EXPECT_NE(refusal(place.path()).find("belongs to user 4242"), std::string::npos);
}

TEST(SpillDirectory, OfAGroupIsItsMembersToo) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can be another user";
  const TemporaryDirectory place;
  ASSERT_EQ(::chmod(place.path().c_str(), 0711), 0);
  const Lengths lengths = {1000};
  Blocks blocks(lengths);
  blocks.fill(1);
  EXPECT_TRUE(tests::succeeds([&] {
    ::umask(077);
    const auto directory = spill_to(place.path() + "/of-group", kSpillPool, false, 4242);
    if (!directory->write(head_of(lengths, 1), blocks.from).ok()) return false;
    return tests::succeeds([&] {
             if (::setgid(4242) != 0 || ::setuid(4343) != 0) return false;
             auto joined = SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool);
             return joined && tests::read(**joined, blocks, lengths, 1) == Code::kOk &&
                    (*joined)->write(head_of(lengths, 2), blocks.from).ok() && (*joined)->remove(1);
           }) &&
           tests::read(*directory, blocks, lengths, 2) == Code::kOk && !tests::succeeds([&] {
             return ::setgid(4343) == 0 && ::setuid(4343) == 0 &&
                    SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool).ok();
           });
  }));
}

TEST(SpillDirectory, ManyThreadsUseItAtOnce) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  const Lengths lengths = {300, 100000};
  std::vector<std::unique_ptr<Blocks>> values;
  for (uint64_t i = 0; i < 4; ++i) {
    values.push_back(std::make_unique<Blocks>(lengths));
    values.back()->fill(i);
  }
  std::atomic<int> wrong{0}, found{0};
  const auto busy = [&](uint64_t own) {
    for (int i = 0; i < 50; ++i) {
      if (!directory->write(head_of(lengths, 1), values[own]->from).ok()) ++wrong;  // all of them the same
      auto reader = directory->open(1);
      if (reader) {
        const Blocks into(lengths);
        if (!reader->read(into.into).ok()) ++wrong;
        bool known = false;
        for (const auto& value : values) known = known || into.same(*value);
        if (!known) ++wrong;
        ++found;
      } else if (reader.code() != Code::kMissing) {
        ++wrong;
      }
      if (i % 10 == 0) (void)directory->remove(1);
      if (i % 10 == 5) (void)directory->sweep_parts();
    }
  };
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 4; ++i) threads.emplace_back(busy, i);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(found, 0);
  EXPECT_EQ(directory->sweep_parts(), 0U);
  EXPECT_EQ(directory->list().size(), 1U);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST(SpillFile, ValuesComeBackThroughThePageCache) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  failpoint::arm({failpoint::Action::kFail, 1, true, EINVAL, "os.direct"});
  every_shape_comes_back(*directory);
  failpoint::disarm();
}

#endif

}  // namespace
}  // namespace torchshm
