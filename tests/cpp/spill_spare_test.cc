// Discarded files are written anew for other values: whoever still reads one is told, and no byte of one value is taken for another's.
#include <sys/mount.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "base/failpoint.h"
#include "os/directory.h"
#include "spill_values.h"
#include "spills.h"
#include "store/spill_file.h"

namespace torchshm {
namespace {

using store::SpillDirectory;
using store::sweep_dead;
using tests::Blocks;
using tests::Folder;
using tests::head_of;
using tests::kSpillPool;
using tests::Lengths;
using tests::on_disk;
using tests::spill_past_cache;
using tests::spill_to;
using tests::succeeds;
using tests::TemporaryDirectory;

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kId = 1, kOther = 2;

std::string spill_name(uint64_t id) {
  std::array<char, 32> name;
  std::snprintf(name.data(), name.size(), "%016lx.spill", static_cast<unsigned long>(id));
  return name.data();
}

uint64_t inode(SpillDirectory& directory, uint64_t id) {
  auto info = os::info_at(directory.fd(), spill_name(id));
  return info ? info->inode : 0;
}

size_t spares(const std::string& directory) {
  size_t found = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    found += entry.path().extension() == ".spare";
  return found;
}

bool write(SpillDirectory& directory, uint64_t id, uint64_t bytes, uint64_t seed) {
  Blocks blocks({bytes});
  return directory.write(head_of({bytes}, id), blocks.fill(seed).from).ok();
}

Code read(SpillDirectory& directory, uint64_t id, uint64_t bytes, uint64_t seed) {
  Blocks expected({bytes});
  return tests::read(directory, expected.fill(seed), {bytes}, id);
}

TEST(SpillSpare, IsWrittenAnewForAValueOfAboutItsSize) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  for (const uint64_t bytes : {kMiB, kMiB + 4096, 2 * kMiB - 20000, kMiB + 1}) {
    ASSERT_TRUE(write(*directory, kId, kMiB + 300000, 1));
    const uint64_t before = inode(*directory, kId);
    ASSERT_TRUE(directory->discard(kId));
    EXPECT_FALSE(directory->discard(kId));
    EXPECT_EQ(directory->open(kId).code(), Code::kMissing);
    EXPECT_EQ(spares(directory->path()), 1U);
    EXPECT_TRUE(directory->list().empty());
    ASSERT_TRUE(write(*directory, kOther, bytes, 2));
    EXPECT_EQ(inode(*directory, kOther), before);
    EXPECT_EQ(spares(directory->path()), 0U);
    EXPECT_EQ(read(*directory, kOther, bytes, 2), Code::kOk);
    EXPECT_TRUE(directory->remove(kOther));
  }
}

TEST(SpillSpare, IsLeftToValuesOfItsOwnSize) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  ASSERT_TRUE(write(*directory, kId, kMiB, 1));
  ASSERT_TRUE(directory->discard(kId));
  for (const uint64_t bytes : {uint64_t{100}, kMiB / 2, 3 * kMiB}) {
    ASSERT_TRUE(write(*directory, kOther, bytes, 2));
    EXPECT_EQ(read(*directory, kOther, bytes, 2), Code::kOk);
    EXPECT_EQ(spares(directory->path()), 1U);
  }
  ASSERT_TRUE(write(*directory, kId, 5000, 1));  // small: it costs less to make another one
  ASSERT_TRUE(directory->discard(kId));
  EXPECT_EQ(spares(directory->path()), 1U);
  EXPECT_EQ(directory->sweep_parts(), 1U);
}

TEST(SpillSpare, IsNotMadeWhereFilesAreLeftToThePageCache) {
  const TemporaryDirectory place;
  const auto directory = spill_past_cache(place.path(), false);
  ASSERT_TRUE(write(*directory, kId, kMiB, 1));
  ASSERT_TRUE(directory->discard(kId));
  EXPECT_EQ(spares(directory->path()), 0U);
  EXPECT_EQ(directory->sweep_parts(), 1U);
}

TEST(SpillSpare, GoesWhenNobodyTakesItForASecond) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  ASSERT_TRUE(write(*directory, kId, kMiB, 1));
  ASSERT_TRUE(directory->discard(kId));
  EXPECT_EQ(directory->sweep_spares(false).left, 1U);
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  ASSERT_TRUE(write(*directory, kId, 70000, 1));
  ASSERT_TRUE(directory->discard(kId));
  const auto swept = directory->sweep_spares(false);
  EXPECT_EQ(swept.removed, 1U);
  EXPECT_EQ(swept.left, 1U);
  EXPECT_EQ(directory->sweep_spares(true).removed, 1U);
  EXPECT_EQ(spares(directory->path()), 0U);
}

TEST(SpillSpare, ThereAreOnlySoManyOfASize) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  for (uint64_t id = 1; id <= 20; ++id) ASSERT_TRUE(write(*directory, id, 100000, id));
  for (uint64_t id = 1; id <= 20; ++id) ASSERT_TRUE(directory->discard(id));
  EXPECT_EQ(spares(directory->path()), 16U);
  EXPECT_EQ(directory->sweep_parts(), 4U);
  EXPECT_EQ(directory->sweep_spares(true).removed, 16U);
}

TEST(SpillSpare, WhoReadsItMeanwhileIsToldAndNeverGetsTheOther) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  for (const uint64_t bytes : {uint64_t{200000}, 9 * kMiB}) {
    ASSERT_TRUE(write(*directory, kId, bytes, 1));
    auto reader = directory->open(kId);
    ASSERT_TRUE(reader.ok());
    ASSERT_TRUE(directory->discard(kId));
    Blocks into({bytes});
    EXPECT_TRUE(reader->read(into.into).ok());  // nobody has taken it yet
    ASSERT_TRUE(write(*directory, kOther, bytes, 2));
    EXPECT_EQ(reader->read(into.into).code(), Code::kCorrupt);
    EXPECT_TRUE(directory->remove(kOther));
  }
}

TEST(SpillSpare, ManyThreadsNeverReadAnothersValue) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  constexpr uint64_t kThreads = 4, kBytes = 300000;
  std::vector<std::unique_ptr<Blocks>> values;
  for (uint64_t i = 0; i < kThreads; ++i) {
    values.push_back(std::make_unique<Blocks>(Lengths{kBytes}));
    values.back()->fill(i);
  }
  std::atomic<int> wrong{0}, found{0};
  const auto busy = [&](uint64_t own) {
    const Blocks into({kBytes});
    for (uint64_t i = 0; i < 200; ++i) {
      if (!directory->write(head_of({kBytes}, own), values[own]->from).ok()) ++wrong;
      const uint64_t whose = (own + i) % kThreads;
      auto reader = directory->open(whose);
      const Code code = reader ? reader->read(into.into).code() : reader.code();
      if (code == Code::kOk) {
        wrong += into.same(*values[whose]) ? 0 : 1;
        ++found;
      } else if (whose == own || (code != Code::kMissing && code != Code::kCorrupt)) {
        ++wrong;
      }
      if (!directory->discard(own)) ++wrong;
      if (i % 50 == 25) (void)directory->sweep_spares(true);
    }
  };
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < kThreads; ++i) threads.emplace_back(busy, i);
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GE(found, 200);
  (void)directory->sweep_parts();
  (void)directory->sweep_spares(true);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory->path()), {}), 1);  // alive
}

TEST(SpillSpare, OfTheDeadIsSwept) {
  const TemporaryDirectory place;
  (void)tests::wait_for(tests::start([&] {
    const auto directory = spill_to(place.path());
    if (!write(*directory, kId, kMiB, 1) || !directory->discard(kId)) return false;
    std::raise(SIGKILL);
    return true;
  }));
  EXPECT_EQ(sweep_dead(place.path()), 1U);
  EXPECT_TRUE(std::filesystem::is_empty(place.path()));
}

TEST(SpillSpare, OfAnotherUserIsLeftToHim) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can be another user";
  const TemporaryDirectory place;
  ASSERT_EQ(::chmod(place.path().c_str(), 0711), 0);
  EXPECT_TRUE(succeeds([&] {
    const auto directory = spill_to(place.path() + "/of-group", kSpillPool, false, 4242);
    const auto as_member = [&](const std::function<bool(SpillDirectory&)>& work) {
      return succeeds([&] {
        if (::setgid(4242) != 0 || ::setuid(4343) != 0) return false;
        auto joined = SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool);
        return joined.ok() && work(**joined);
      });
    };
    if (!write(*directory, kId, kMiB, 1)) return false;
    return as_member([](SpillDirectory& mine) { return mine.discard(kId) && write(mine, kOther, kMiB, 2); }) &&
           spares(directory->path()) == 1 && read(*directory, kOther, kMiB, 2) == Code::kOk &&
           as_member([](SpillDirectory& mine) { return mine.discard(kOther) && write(mine, 3, kMiB, 3); }) &&
           spares(directory->path()) == 1 && read(*directory, 3, kMiB, 3) == Code::kOk;
  }));
}

// ---- of a store with a service, which discards

tests::Spilling served(const Folder& folder, uint64_t limit = uint64_t{256} << 20) {
  auto store = tests::fresh_spilling(folder, limit);
  store->header().service.store(store.member->identity());
  return store;
}

TEST(SpillSpare, GivesItsRoomToAValueOfAnotherSize) {
  TORCHSHM_NEEDS_MOUNTS();
  const Folder folder;
  EXPECT_TRUE(succeeds([&] {
    if (!tests::private_mounts() || ::mount("none", folder.path().c_str(), "tmpfs", 0, "size=24m,mode=700") != 0)
      return false;
    auto store = served(folder);
    if (!tests::save_filled(store, "a", 1, 8 * kMiB) || !tests::out(store, "a").ok() || !store->remove("a"))
      return false;
    const std::string own = std::filesystem::directory_iterator(folder.path())->path();
    if (spares(own) != 1 || !tests::save_filled(store, "b", 2, 20 * kMiB)) return false;
    auto gone = tests::out(store, "b");
    return gone.ok() && *gone == 20 * kMiB && spares(own) == 0 && tests::back(store, "b", 20 * kMiB) == 2;
  }));
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

// A reader at any place, while the name is replaced and its file goes to another value.
TEST(SpillSpare, AReaderOfAReplacedNameGetsTheNewValue) {
  for (const auto& [point, bytes] : std::vector<std::pair<const char*, uint64_t>>{{"restore.room", kMiB},
                                                                                  {"restore.room", kMiB + kMiB / 2},
                                                                                  {"restore.room", kMiB + 4096},
                                                                                  {"restore.read", kMiB},
                                                                                  {"spill.claimed", kMiB}}) {
    SCOPED_TRACE(point);
    const Folder folder;
    auto store = served(folder);
    const auto directory = spill_to(folder.path(), store.member->pool_id());
    auto other = tests::join_spilling(store, folder);
    ASSERT_TRUE(tests::save_filled(store, "a", 7, kMiB));
    ASSERT_GT(*tests::out(store, "a"), 0U);
    const auto file_of = [&](const std::string& key) {
      return inode(*directory, tests::standing(store, store->find(key)->cell).file);
    };
    const uint64_t old = file_of("a");
    ASSERT_NE(old, 0U);
    Status restored;
    {
      tests::HeldUp reader(point, [&] { restored = other->restore("a"); });
      ASSERT_TRUE(tests::save_filled(store, "a", 9, kMiB, {.overwrite = true}));
      ASSERT_TRUE(tests::save_filled(store, "b", 8, bytes));
      ASSERT_GT(*tests::out(store, "b"), 0U);
      EXPECT_EQ(file_of("b"), old);
    }
    EXPECT_TRUE(restored.ok()) << restored.what();
    EXPECT_EQ(store->totals().spill_errors, 0U);
    EXPECT_EQ(tests::back(store, "a", kMiB), 9);
    EXPECT_EQ(tests::back(store, "b", bytes), 8);
    EXPECT_EQ(tests::unsound(store), "");
  }
}

// The one that was locked is swept, and another file gets its name, before it is renamed.
TEST(SpillSpare, WhoIsHeldUpTakesNoOther) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  for (const uint64_t id : {kId, kOther}) ASSERT_TRUE(write(*directory, id, kMiB, id));
  ASSERT_TRUE(directory->discard(kId));
  bool written = false;
  {
    tests::HeldUp writer("spill.spare_locked", [&] { written = write(*directory, 3, kMiB, 3); });
    EXPECT_EQ(directory->sweep_spares(true).removed, 1U);
    ASSERT_TRUE(directory->discard(kOther));
  }
  EXPECT_TRUE(written);
  EXPECT_EQ(read(*directory, 3, kMiB, 3), Code::kOk);
  EXPECT_EQ(directory->sweep_parts(), 1U);
  EXPECT_EQ(directory->list().size(), 1U);
}

TEST(SpillSpare, ThatCantBeWrittenIsLeftForANewFile) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  for (const char* call : {"os.pwrite", "os.file_allocate", "os.rename"}) {
    ASSERT_TRUE(write(*directory, kId, kMiB, 1));
    ASSERT_TRUE(directory->discard(kId));
    failpoint::Plan plan;
    plan.action = failpoint::Action::kFail;
    plan.only = call;
    plan.error = EIO;
    failpoint::arm(plan);
    const bool written = write(*directory, kOther, kMiB + 100000, 2);
    failpoint::disarm();
    EXPECT_TRUE(written) << call;
    EXPECT_EQ(read(*directory, kOther, kMiB + 100000, 2), Code::kOk) << call;
    EXPECT_EQ(spares(directory->path()), 0U) << call;
    EXPECT_EQ(directory->list().size(), 1U) << call;
    EXPECT_TRUE(directory->remove(kOther));
  }
}

TEST(SpillSpare, GoesWhereAQuotaIsReached) {
  const Folder folder;
  auto store = served(folder);
  ASSERT_TRUE(tests::save_filled(store, "a", 1, kMiB));
  ASSERT_GT(*tests::out(store, "a"), 0U);
  ASSERT_TRUE(store->remove("a"));
  ASSERT_EQ(folder.files().size(), 1U);
  ASSERT_TRUE(tests::save_filled(store, "b", 2, 4 * kMiB));
  failpoint::Plan plan;
  plan.action = failpoint::Action::kFail;
  plan.only = "os.file_allocate";
  plan.error = EDQUOT;
  failpoint::arm(plan);
  const auto gone = tests::out(store, "b");
  failpoint::disarm();
  ASSERT_TRUE(gone.ok()) << gone.status().what();
  EXPECT_EQ(folder.files().size(), 1U);
  EXPECT_EQ(tests::back(store, "b", 4 * kMiB), 2);
}

TEST(SpillSpare, OfAServiceThatIsGoneIsSweptByTheNextRemoval) {
  const Folder folder;
  auto store = served(folder);
  for (const char* key : {"a", "b"}) {
    ASSERT_TRUE(tests::save_filled(store, key, 1, kMiB));
    ASSERT_GT(*tests::out(store, key), 0U);
  }
  ASSERT_TRUE(store->remove("a"));
  EXPECT_EQ(folder.files().size(), 2U);
  store->header().service.store(uint64_t{77} << 12 | 5);  // of nobody
  ASSERT_TRUE(store->remove("b"));
  EXPECT_TRUE(folder.files().empty());
}

// One that was discarded is written anew over an old one of the id, by a process that dies at each point or whose calls fail.
bool written_anew(SpillDirectory& directory) {
  return directory.discard(kOther) && write(directory, kId, kMiB, 2) && directory.discard(3);
}

TEST(SpillSpare, DeathAtAnyPointLeavesWholeFiles) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  uint64_t kills = 0;
  for (uint64_t at = 1;; ++at) {
    for (const uint64_t id : {kId, kOther, uint64_t{3}}) ASSERT_TRUE(write(*directory, id, kMiB, id == kId ? 1 : id));
    const int status = tests::wait_for(tests::start([&] {
      failpoint::Plan plan;
      plan.action = failpoint::Action::kKill;
      plan.at = at;
      auto joined = SpillDirectory::join(os::duplicate(directory->fd()).take(), kSpillPool);
      failpoint::arm(plan);
      return written_anew(**joined) && (*joined)->sweep_spares(true).removed == 1;
    }));
    ASSERT_TRUE(read(*directory, kId, kMiB, 1) == Code::kOk || read(*directory, kId, kMiB, 2) == Code::kOk) << at;
    for (const uint64_t id : {kOther, uint64_t{3}}) {
      const Code code = read(*directory, id, kMiB, id);
      ASSERT_TRUE(code == Code::kOk || code == Code::kMissing) << at;
      (void)directory->remove(id);
    }
    (void)directory->sweep_parts();
    (void)directory->sweep_spares(true);
    ASSERT_EQ(directory->list().size(), 1U) << at;
    ASSERT_EQ(spares(directory->path()), 0U) << at;
    if (!WIFSIGNALED(status)) {
      ASSERT_EQ(status, 0) << at;
      break;
    }
    ++kills;
  }
  EXPECT_GT(kills, 20U);
}

TEST(SpillSpare, AnyCallThatFailsLeavesWholeFiles) {
  const TemporaryDirectory place;
  const auto directory = spill_to(place.path());
  uint64_t failures = 0;
  for (const int error : {EIO, ENOSPC, EINVAL, EDQUOT}) {
    for (const bool persistent : {false, true}) {
      for (uint64_t at = 1;; ++at) {
        for (const uint64_t id : {kId, kOther, uint64_t{3}})
          ASSERT_TRUE(write(*directory, id, kMiB, id == kId ? 1 : id));
        failpoint::Plan plan;
        plan.action = failpoint::Action::kFail;
        plan.at = at;
        plan.persistent = persistent;
        plan.error = error;
        failpoint::arm(plan);
        const bool good = written_anew(*directory);
        const bool more = failpoint::reached() >= at;
        const std::string last = failpoint::last();
        failpoint::disarm();
        ASSERT_TRUE(read(*directory, kId, kMiB, 1) == Code::kOk || read(*directory, kId, kMiB, 2) == Code::kOk) << last;
        ASSERT_TRUE(!good || read(*directory, kId, kMiB, 2) == Code::kOk) << last;
        for (const uint64_t id : {kOther, uint64_t{3}}) {
          const Code code = read(*directory, id, kMiB, id);
          ASSERT_TRUE(code == Code::kOk || code == Code::kMissing) << last;
          (void)directory->remove(id);
        }
        (void)directory->sweep_parts();
        (void)directory->sweep_spares(true);
        ASSERT_EQ(directory->list().size(), 1U) << last;
        ASSERT_EQ(spares(directory->path()), 0U) << last;
        failures += good ? 0 : 1;
        if (!more) break;
      }
    }
  }
  EXPECT_GT(failures, 30U);
}

#endif

}  // namespace
}  // namespace torchshm
