// Names: what a catalogue promises to many processes at once, and when they die at any point.
#include <cstring>
#include <random>
#include <set>

#include "base/failpoint.h"
#include "os/futex.h"
#include "parts.h"
#include "pool/checker.h"
#include "store/lock.h"
#include "stores.h"

namespace torchshm {
namespace {

using pool::Mode;
using tests::Between;
using tests::fresh_store;
using tests::join;
using tests::loaded;
using tests::save_filled;
using tests::Store;
using tests::unsound;

constexpr uint64_t kSecond = 1'000'000'000;

TEST(Store, SavesFindsAndRemoves) {
  auto store = fresh_store();
  EXPECT_EQ(store->find("a").code(), Code::kMissing);
  ASSERT_TRUE(save_filled(store, "a", 7));
  EXPECT_EQ(loaded(store, "a"), 7);
  EXPECT_TRUE(store->contains("a"));
  EXPECT_EQ(store->size(), 1U);
  EXPECT_EQ(save_filled(store, "a", 8).code(), Code::kExists);
  EXPECT_EQ(loaded(store, "a"), 7);
  EXPECT_TRUE(save_filled(store, "a", 9, 5000, {.overwrite = true}));
  EXPECT_EQ(loaded(store, "a"), 9);
  EXPECT_EQ(unsound(store), "");
  EXPECT_EQ(pool::check(store.member->arena(), {.at_rest = true}).first(), "");
  EXPECT_TRUE(store->remove("a"));
  EXPECT_FALSE(store->remove("a"));
  EXPECT_EQ(store->find("a").code(), Code::kMissing);
  EXPECT_EQ(store.member->stats().blocks, 0U);
  EXPECT_EQ(store.member->stats().tickets, 0U);
  EXPECT_EQ(unsound(store), "");
}

TEST(Store, KeepsWhatTheSaverHasDroppedAndReadersWhatIsRemoved) {
  auto store = fresh_store();
  auto reader = join(store);
  ASSERT_TRUE(save_filled(store, "a", 7));
  auto entry = reader->find("a");
  ASSERT_TRUE(entry.ok());
  auto view = reader.member->attach(entry->blocks[0].block, entry->blocks[0].generation, Mode::kRead);
  ASSERT_TRUE(view.ok());
  EXPECT_TRUE(store->remove("a"));
  EXPECT_EQ(view->data[4999], std::byte{7});
  EXPECT_EQ(store.member->stats().blocks, 1U);
  reader.member->release(view->block, Mode::kRead);
  EXPECT_EQ(store.member->stats().blocks, 0U);
  EXPECT_EQ(reader.member->attach(entry->blocks[0].block, entry->blocks[0].generation, Mode::kRead).code(),
            Code::kStale);
}

TEST(Store, NamesOfManyBlocksAndLongKeysAndTexts) {
  auto store = fresh_store();
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 300; ++i) blocks.push_back(store.member->allocate(4096, true)->block);
  blocks.push_back(blocks[0]);  // one block may be there twice
  const std::string key(store::kMaxName, 'k'), text(100000, 't');
  ASSERT_TRUE(store->save(key, text, blocks));
  ASSERT_TRUE(store->save(key.substr(1), "", {}));
  ASSERT_TRUE(store->save("short", text, {blocks[1]}));
  ASSERT_TRUE(store->save("s", "", blocks));
  for (size_t i = 0; i < 300; ++i) store.member->release(blocks[i], Mode::kReadWrite);
  auto entry = store->find(key);
  ASSERT_TRUE(entry.ok());
  EXPECT_EQ(entry->key, key);
  EXPECT_EQ(entry->text, text);
  ASSERT_EQ(entry->blocks.size(), blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) EXPECT_EQ(entry->blocks[i].block, blocks[i]);
  EXPECT_EQ(store->find("short")->text, text);
  EXPECT_EQ(store->find("s")->blocks.size(), blocks.size());
  EXPECT_EQ(unsound(store), "");
  EXPECT_EQ(store->save("", "", {}).code(), Code::kInvalid);
  EXPECT_EQ(store->save(key + "k", "", {}).code(), Code::kInvalid);
  for (const std::string& name : {key, key.substr(1), std::string("short"), std::string("s")})
    EXPECT_TRUE(store->remove(name));
  EXPECT_EQ(store.member->stats().blocks, 0U);
  EXPECT_EQ(unsound(store), "");
}

TEST(Store, HoldsManyNames) {
  auto store = fresh_store(uint64_t{1} << 30);
  auto view = store.member->allocate(4096, true);
  constexpr int kNames = 120000;
  for (int i = 0; i < kNames; ++i) {
    const Status saved = store->save("name/" + std::to_string(i), std::to_string(i), {view->block});
    ASSERT_TRUE(saved) << i << ": " << saved.what();
  }
  EXPECT_GT(store->levels(), 1U);
  EXPECT_EQ(store->size(), uint64_t{kNames});
  for (int i = 0; i < kNames; ++i) ASSERT_EQ(store->find("name/" + std::to_string(i))->text, std::to_string(i));
  EXPECT_EQ(store->keys("name/11999").size(), 1U + 10);  // 11999 and 119990 to 119999
  for (int i = 0; i < kNames; i += 2) ASSERT_TRUE(store->remove("name/" + std::to_string(i)));
  for (int i = 0; i < kNames; ++i) ASSERT_EQ(store->contains("name/" + std::to_string(i)), i % 2 == 1);
  EXPECT_EQ(unsound(store), "");
}

TEST(Store, NamesAreUtf8) {
  auto store = fresh_store();
  for (const char* name :
       {"plain", "caf\xc3\xa9", "\xed\x9f\xbf", "\xee\x80\x80", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"})
    EXPECT_TRUE(store->save(name, "", {})) << name;
  // Cut short, without a beginning, longer than needed, surrogates, beyond the last one.
  for (const char* name : {"caf\xe9", "\xc3", "\xe2\x82", "\x80", "\xc0\x80", "\xe0\x9f\xbf", "\xed\xa0\x80",
                           "\xed\xb3\xa9", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff"})
    EXPECT_EQ(store->save(name, "", {}).code(), Code::kInvalid) << name;
  EXPECT_EQ(store->size(), 6U);
}

TEST(Store, ExpiredNamesAreMissingAndFree) {
  auto store = fresh_store();
  ASSERT_TRUE(save_filled(store, "soon", 1, 5000, {.ttl = kSecond / 2}));
  ASSERT_TRUE(save_filled(store, "later", 2, 5000, {.ttl = 1000 * kSecond}));
  ASSERT_TRUE(save_filled(store, "swept", 3, 5000, {.ttl = kSecond / 2}));
  EXPECT_EQ(loaded(store, "soon"), 1);
  ::usleep(600000);
  EXPECT_FALSE(store->contains("soon"));
  EXPECT_EQ(store->sweep(), 1U);
  EXPECT_EQ(store.member->stats().blocks, 1U);
  EXPECT_TRUE(save_filled(store, "soon", 4));
  EXPECT_EQ(loaded(store, "soon"), 4);
  EXPECT_EQ(unsound(store), "");
}

TEST(Store, WaitersWakeWhenTheNameComes) {
  auto store = fresh_store();
  const pid_t pid = tests::start([&] {
    auto other = join(store);
    for (;;) {
      const uint32_t bell = other->bell("late");
      if (loaded(other, "late") == 5) return true;
      (void)other->wait("late", bell, 20 * kSecond);
    }
  });
  ::usleep(50000);
  ASSERT_TRUE(save_filled(store, "late", 5));
  EXPECT_EQ(tests::wait_for(pid), 0);
}

TEST(Store, BoundNamesGoWithTheirOwner) {
  auto store = fresh_store();
  const pid_t pid = tests::start([&] {
    auto other = join(store);
    return save_filled(other, "bound", 1, 5000, {.bound = true}).ok() && ::kill(::getpid(), SIGKILL) == 0;
  });
  (void)tests::wait_for(pid);
  EXPECT_TRUE(store->contains("bound"));
  EXPECT_TRUE(store.member->gone(store->find("bound")->owner));
  EXPECT_EQ(store->sweep(), 1U);
  EXPECT_FALSE(store->contains("bound"));
  ASSERT_TRUE(save_filled(store, "bound", 2, 5000, {.bound = true}));
  EXPECT_EQ(store->sweep(), 0U);
  EXPECT_EQ(loaded(store, "bound"), 2);
  EXPECT_EQ(unsound(store), "");
}

TEST(Store, BoundNamesDoNotExpireLikeData) {
  Store store = fresh_store();
  store->header().default_ttl.store(kSecond / 20);
  ASSERT_TRUE(store->save("data", "", {}));
  ASSERT_TRUE(store->save("bound", "", {}, {.bound = true}));
  while (store->contains("data")) ::usleep(1000);
  EXPECT_TRUE(store->contains("bound"));
}

TEST(Store, ABoundNameThatExpiresGoesInASweepToo) {
  auto store = fresh_store();
  ASSERT_TRUE(save_filled(store, "bound", 1, 5000, {.ttl = 1, .bound = true}));
  EXPECT_EQ(store->sweep(), 1U);
  EXPECT_EQ(store.member->stats().blocks, 0U);
  EXPECT_EQ(unsound(store), "");
}

TEST(Store, MarksAreFoundByThoseWhoAskForThemAndNotCounted) {
  Store store = fresh_store();
  const std::string mark("\0mark", 5);
  ASSERT_TRUE(store->save(mark, "", {}, {.bound = true}));
  const std::string told = mark + " with much to say";
  ASSERT_TRUE(store->save(told, std::string(300, 'x'), {}));  // in a block of its own
  ASSERT_TRUE(store->save("data", "", {}));
  EXPECT_EQ(store->size(), 1U);
  EXPECT_EQ(store->keys(""), std::vector<std::string>{"data"});
  EXPECT_EQ(store->keys(std::string_view("\0", 1)), (std::vector<std::string>{mark, told}));
}

TEST(Store, OfManySaversOfOneNameOneSucceeds) {
  auto store = fresh_store();
  auto shared = os::create_memfd("count", 4096);
  auto mapped = os::Mapping::map(os::Mapping::Kind::kShared, shared->get(), 4096);
  auto* wins = reinterpret_cast<std::atomic<uint32_t>*>(mapped->data());
  constexpr int kKeys = 400, kProcesses = 6;
  std::vector<pid_t> processes;
  for (int p = 0; p < kProcesses; ++p) {
    processes.push_back(tests::start([&, p] {
      auto other = join(store);
      for (int key = 0; key < kKeys; ++key) {
        const Status saved = save_filled(other, std::to_string(key), static_cast<uint8_t>(p + 1));
        if (saved) wins[key].fetch_add(1);
        if (!saved && saved.code() != Code::kExists) return false;
        const int byte = loaded(other, std::to_string(key));
        if (byte < 1 || byte > kProcesses) return false;
      }
      return true;
    }));
  }
  for (const pid_t pid : processes) EXPECT_EQ(tests::wait_for(pid), 0);
  for (int key = 0; key < kKeys; ++key) ASSERT_EQ(wins[key].load(), 1U) << key;
  EXPECT_EQ(store->size(), uint64_t{kKeys});
  EXPECT_EQ(unsound(store), "");
  EXPECT_EQ(store.member->stats().blocks, uint64_t{kKeys});
}

// Saves, overwrites, removes and loads a handful of names at random, for as long as it lives.
bool work_on_few_names(Store& store, unsigned seed, int steps) {
  std::minstd_rand random(seed);
  for (int i = 0; i < steps; ++i) {
    const std::string key = "k" + std::to_string(random() % 5);
    const auto byte = static_cast<uint8_t>(random() % 255);
    switch (random() % 4) {
      case 0: {
        const Status saved = save_filled(store, key, byte);
        if (!saved && saved.code() != Code::kExists) return false;
        break;
      }
      case 1:
        if (!save_filled(store, key, byte, 5000, {.overwrite = true})) return false;
        break;
      case 2:
        (void)store->remove(key);
        break;
      default:
        if (loaded(store, key) == -2) return false;
    }
  }
  return true;
}

TEST(Store, ChangesOfFewNamesByManyLeaveNothingBehind) {
  auto store = fresh_store();
  std::vector<pid_t> processes;
  for (unsigned p = 0; p < 6; ++p) {
    processes.push_back(tests::start([&, p] {
      auto other = join(store);
      return work_on_few_names(other, p + 1, 4000);
    }));
  }
  for (const pid_t pid : processes) EXPECT_EQ(tests::wait_for(pid), 0);
  (void)store.member->reap();
  EXPECT_EQ(unsound(store), "");
  EXPECT_EQ(store.member->stats().blocks, store->size());
}

TEST(Store, KillsAtRandomLeaveItSound) {
  auto store = fresh_store();
  std::minstd_rand random(1);
  std::vector<pid_t> processes(5, 0);
  for (unsigned round = 0; round < 300; ++round) {
    const size_t at = random() % processes.size();
    if (processes[at] != 0) {
      ::kill(processes[at], SIGKILL);
      (void)tests::wait_for(processes[at]);
    }
    processes[at] = tests::start([&, round] {
      auto other = join(store);
      (void)other->sweep();
      return work_on_few_names(other, round + 1, 1 << 30);
    });
    ::usleep(static_cast<useconds_t>(random() % 4000));
    for (int key = 0; key < 5; ++key) ASSERT_NE(loaded(store, "k" + std::to_string(key)), -2) << round;
  }
  for (const pid_t pid : processes) {
    ::kill(pid, SIGKILL);
    (void)tests::wait_for(pid);
  }
  (void)store.member->reap();
  (void)store->sweep();
  EXPECT_EQ(unsound(store), "");
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

// Every operation on names, killed at its every point, the sweeper after it as well.
bool life_among_names(Store& store) {
  auto other = join(store);
  bool fine = save_filled(other, "new", 1).ok();
  fine = save_filled(other, "there", 2, 5000, {.overwrite = true}).ok() && fine;
  std::vector<uint32_t> blocks;
  for (int i = 0; i < 3; ++i) blocks.push_back(other.member->allocate(4096, true)->block);
  fine = other->save("many", std::string(500, 'x'), blocks).ok() && fine;
  for (const uint32_t block : blocks) other.member->release(block, Mode::kReadWrite);
  fine = save_filled(other, "bound", 3, 5000, {.bound = true}).ok() && fine;
  fine = save_filled(other, "there", 3).code() == Code::kExists && fine;
  fine = other->remove("gone") && fine;
  fine = other->remove("many") && fine;
  return fine;
}

TEST(Store, DeathAtEveryPointLeavesAllOfANameOrNothing) {
  const bool everywhere = std::getenv("TORCHSHM_TORTURE") != nullptr;
  uint64_t kills = 0, nested = 0;
  for (uint64_t at = 1;; ++at) {
    bool killed = false;
    for (uint64_t again = 0;; ++again) {  // 0: the sweeper lives
      auto store = fresh_store(uint64_t{64} << 20);
      ASSERT_TRUE(save_filled(store, "there", 9));
      ASSERT_TRUE(save_filled(store, "gone", 8));
      ASSERT_TRUE(save_filled(store, "kept", 7));
      failpoint::Plan plan;
      plan.action = failpoint::Action::kKill;
      plan.at = at;
      const pid_t pid = tests::start([&] {
        failpoint::arm(plan);
        return life_among_names(store);
      });
      const int status = tests::wait_for(pid);
      killed = WIFSIGNALED(status);
      if (!killed) {
        ASSERT_EQ(status, 0) << at;
      }
      bool swept = true;
      if (again > 0) {
        plan.at = again;
        swept = !WIFSIGNALED(tests::wait_for(tests::start([&] {
          auto sweeper = join(store);
          failpoint::arm(plan);
          (void)sweeper.member->reap();
          (void)sweeper->sweep();
          return true;
        })));
        nested += swept ? 0 : 1;
      }
      (void)store.member->reap();
      (void)store->sweep();
      const auto where = std::to_string(at) + "/" + std::to_string(again);
      ASSERT_EQ(unsound(store), "") << where;
      ASSERT_EQ(loaded(store, "kept"), 7) << where;
      const int there = loaded(store, "there"), fresh = loaded(store, "new"), gone = loaded(store, "gone");
      ASSERT_TRUE(there == 9 || there == 2) << where << ": " << there;
      ASSERT_TRUE(fresh == -1 || fresh == 1) << where << ": " << fresh;
      ASSERT_TRUE(gone == -1 || gone == 8) << where << ": " << gone;
      ASSERT_FALSE(store->contains("bound")) << where;
      if (const auto many = store->find("many"); many.ok()) {
        ASSERT_EQ((*many).blocks.size(), 3U) << where;
      }
      // What is left beyond the names are tickets of the dead, which a full pool takes back.
      auto filler = store.member->allocate(uint64_t{58} << 20, false);
      ASSERT_TRUE(filler.ok()) << where << ": " << filler.status().what();
      // Every twenty-ninth point here; all of them in the torture.
      if (!killed || (again > 0 && swept) || (at % 29 != 0 && !everywhere)) break;
    }
    if (!killed) break;
    ++kills;
  }
  EXPECT_GT(kills, 60U);
  EXPECT_GT(nested, 20U);
}

TEST(Store, NamesThatAreReplacedMeanwhileAreListedOnce) {
  Store store = fresh_store();
  std::vector<std::string> names;
  for (int i = 0; i < 40; ++i) names.push_back("name/" + std::to_string(10 + i));
  for (const std::string& name : names) ASSERT_TRUE(store->save(name, "first", {}));
  // Others give them other cells, those that have just become free again too.
  int replaced = 0;
  const Between between(
      "names.slot_seen",
      [&] {
        const std::string& name = names[static_cast<size_t>(++replaced * 7) % names.size()];
        ASSERT_TRUE(store->save(name, "again", {}, {.overwrite = true}));
      },
      Between::kEachTime);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(store->keys(""), names);
    EXPECT_EQ(store->size(), names.size());
  }
  EXPECT_GT(replaced, 1000);
}

TEST(Store, AnExpiredNameGoesAlsoWhenASweeperMovesItsSlotMeanwhile) {
  auto store = fresh_store();
  ASSERT_TRUE(save_filled(store, "there", 9, 5000, {.ttl = 1}));
  // Another sweeper, which had taken the cell over from a dead remover and lets the name stand.
  const Between between("replace.marked", [&] {
    for (uint32_t i = 0; i < store::level_size(0); ++i) {
      pool::Pair found = store->slot(i).value.load();
      store::SlotValue next = store::SlotValue::of(found);
      if (next.state != store::SlotState::kNamed) continue;
      ++next.sequence;
      ASSERT_TRUE(store->slot(i).value.exchange_if(found, next.pair()));
    }
  });
  EXPECT_EQ(store->sweep(), 1U);
  EXPECT_EQ(unsound(store), "");
  EXPECT_EQ(store.member->stats().blocks, 0U);
}

TEST(Store, ABoundNameOutlivesOneThatDiesReplacingIt) {
  auto store = fresh_store();
  ASSERT_TRUE(save_filled(store, "bound", 1, 5000, {.bound = true}));
  for (const bool overwrites : {true, false}) {
    const int status = tests::wait_for(tests::start([&] {
      auto other = join(store);
      failpoint::arm({.action = failpoint::Action::kKill, .only = "replace.marked"});
      return overwrites ? save_filled(other, "bound", 2, 5000, {.overwrite = true}).ok() : other->remove("bound");
    }));
    ASSERT_TRUE(WIFSIGNALED(status));
    (void)store.member->reap();
    (void)store->sweep();
    EXPECT_EQ(unsound(store), "");
    EXPECT_EQ(loaded(store, "bound"), 1);
    EXPECT_EQ(store->find("bound")->owner, store.member->identity());
  }
}

TEST(Store, NobodyWaitsForAStoppedProcess) {
  for (uint64_t at = 1;; ++at) {
    auto store = fresh_store(uint64_t{64} << 20);
    ASSERT_TRUE(save_filled(store, "there", 9));
    ASSERT_TRUE(save_filled(store, "gone", 8));
    failpoint::Plan plan;
    plan.action = failpoint::Action::kStop;
    plan.at = at;
    const pid_t pid = tests::start([&] {
      failpoint::arm(plan);
      (void)life_among_names(store);
      return true;
    });
    int status = 0;
    ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
    const bool stopped = WIFSTOPPED(status);
    for (const char* key : {"there", "gone", "new", "bound"}) {
      ASSERT_TRUE(save_filled(store, key, 5, 5000, {.overwrite = true})) << at << key;
      ASSERT_EQ(loaded(store, key), 5) << at << key;
      ASSERT_TRUE(store->remove(key)) << at << key;
      ASSERT_TRUE(save_filled(store, key, 6)) << at << key;
    }
    (void)store->sweep();
    if (stopped) {
      ::kill(pid, SIGCONT);
      status = tests::wait_for(pid);
      ASSERT_EQ(status, 0) << at;
    }
    (void)store.member->reap();
    (void)store->sweep();
    ASSERT_EQ(unsound(store), "") << at;
    for (const char* key : {"there", "new"}) ASSERT_NE(loaded(store, key), -2) << at << key;
    if (!stopped) break;
  }
}

#endif

// ---- locks

// A lock of "key" in a client of its own; both live as long as this.
struct Holder {
  explicit Holder(Store& other) : store(join(other)), lock(std::move(store.catalogue), "key") {}
  bool take(bool shared = false) {
    auto taken = lock.try_acquire(shared);
    EXPECT_TRUE(taken.ok()) << taken.status().what();
    return taken.ok() && *taken;
  }
  Store store;
  store::Lock lock;
};

TEST(StoreLocks, OneHasItAloneOrManyShareIt) {
  Store store = fresh_store();
  Holder a(store), b(store);
  EXPECT_TRUE(a.take() && !b.take() && !b.take(true));
  EXPECT_FALSE(a.take()) << "it is not re-entrant";
  EXPECT_TRUE(a.lock.release().ok());
  EXPECT_EQ(a.lock.release().code(), Code::kMissing);
  EXPECT_TRUE(a.take(true) && b.take(true));
}

TEST(StoreLocks, TheKilledLetGo) {
  Store store = fresh_store();
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t pid = tests::start([&] {
    Holder mine(store);
    if (!mine.take() || ::write(ready[1], ".", 1) != 1) return false;
    for (;;) ::pause();
  });
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  Holder mine(store);
  EXPECT_FALSE(mine.take());
  ::kill(pid, SIGKILL);
  tests::wait_for(pid);
  EXPECT_TRUE(mine.take());
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(StoreLocks, AForkedChildHasNone) {
  Store store = fresh_store();
  auto mine = std::make_unique<Holder>(store);
  EXPECT_TRUE(mine->take());
  EXPECT_TRUE(tests::succeeds([&] {
    Holder another(store);
    const bool none = !mine->lock.held() && mine->lock.left_to_parent() && !another.take();
    return none && mine->lock.release().code() == Code::kMissing;
  }));
  EXPECT_TRUE(mine->lock.held());
  mine.reset();
  EXPECT_TRUE(Holder(store).take());
}

}  // namespace
}  // namespace torchshm
