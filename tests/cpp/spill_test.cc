// One value to disk and back: what stays when somebody else is at it, dies over it, or writes to it, at each step.
#include "store/spill.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>

#include "parts.h"
#include "pool/members.h"
#include "spills.h"

namespace torchshm {
namespace {

using pool::Mode;
using store::Policy;
using tests::back;
using tests::Between;
using tests::dies_at;
using tests::Folder;
using tests::fresh_spilling;
using tests::HeldUp;
using tests::How;
using tests::join_spilling;
using tests::loaded;
using tests::on_disk;
using tests::out;
using tests::save_filled;
using tests::Spilling;
using tests::unsound;

constexpr uint64_t kSecond = 1'000'000'000;

uint64_t blocks_of(Spilling& store) {
  (void)store.member->reap();
  return store.member->stats().blocks;
}

TEST(Spill, GoesOutAndComesBackAndGoesAgainWithoutAWrite) {
  Folder folder;
  auto store = fresh_spilling(folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  EXPECT_EQ(*out(store, "a", How::kFree), 0U);  // no file has it
  EXPECT_FALSE(on_disk(store, "a"));
  ASSERT_GT(*out(store, "a"), 0U);
  EXPECT_TRUE(on_disk(store, "a"));
  EXPECT_EQ(blocks_of(store), 0U);
  EXPECT_EQ(store->find("a")->bytes, store->totals().bytes_on_disk);
  EXPECT_EQ(unsound(store), "");
  const auto files = folder.files();
  ASSERT_EQ(files.size(), 1U);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(back(store, "a"), 7);
    EXPECT_EQ(folder.files(), files);
    ASSERT_GT(*out(store, "a", How::kFree), 0U);  // from cell to cell
    EXPECT_EQ(folder.files(), files);
  }
  EXPECT_EQ(store->totals().written, 1U);
  EXPECT_EQ(store->totals().spills, 4U);
  EXPECT_TRUE(store->remove("a"));
  EXPECT_TRUE(folder.files().empty());
  EXPECT_EQ(unsound(store), "");
}

TEST(Spill, ACopyKeepsTheMemory) {
  Folder folder;
  auto store = fresh_spilling(folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  ASSERT_GT(*out(store, "a", How::kCopy), 0U);
  EXPECT_EQ(loaded(store, "a"), 7);
  EXPECT_EQ(folder.files().size(), 1U);
  ASSERT_GT(*out(store, "a", How::kFree), 0U);
  EXPECT_TRUE(on_disk(store, "a"));
  EXPECT_EQ(back(store, "a"), 7);
}

TEST(Spill, ValuesOfManyBlocksWithLongKeysAndTexts) {
  Folder folder;
  auto store = fresh_spilling(folder);
  const std::string key(20000, 'k'), text = "J" + std::string(3000, 't');
  std::vector<uint32_t> blocks;
  for (uint64_t i = 0; i < 50; ++i) {
    auto view = store.member->allocate(100 + 3000 * i, i % 2 == 0);
    std::memset(view->data, static_cast<int>(i), view->length);
    blocks.push_back(view->block);
  }
  ASSERT_TRUE(store->save(key, text, blocks));
  for (const uint32_t block : blocks) store.member->release(block, Mode::kReadWrite);
  for (int round = 0; round < 2; ++round) {
    ASSERT_GT(*out(store, key), 0U);
    EXPECT_EQ(blocks_of(store), 1U);  // its key
    EXPECT_EQ(unsound(store), "");
    ASSERT_TRUE(store->restore(key));
    auto entry = store->find(key);
    EXPECT_EQ(entry->text, text);
    ASSERT_EQ(entry->blocks.size(), blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
      auto view = store.member->attach(entry->blocks[i].block, entry->blocks[i].generation, Mode::kRead);
      ASSERT_TRUE(view.ok());
      EXPECT_GE(view->length, 100 + 3000 * i);
      for (uint64_t at = 0; at < 100 + 3000 * i; ++at) ASSERT_EQ(view->data[at], static_cast<std::byte>(i)) << at;
      store.member->release(view->block, Mode::kRead);
    }
  }
  EXPECT_EQ(unsound(store), "");
  EXPECT_TRUE(store->remove(key));
  EXPECT_EQ(blocks_of(store), 0U);
  EXPECT_TRUE(folder.files().empty());
}

TEST(Spill, WhatIsInUseStays) {
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  auto view = store.member->allocate(5000, true);
  std::memset(view->data, 1, 5000);
  ASSERT_TRUE(store->save("held", "\1", {view->block}));
  EXPECT_EQ(*out(other, "held"), 0U);
  ASSERT_TRUE(store->save("twin", "\1", {view->block}));
  store.member->release(view->block, Mode::kReadWrite);
  EXPECT_EQ(*out(other, "held"), 0U);
  EXPECT_EQ(*out(other, "twin"), 0U);
  ASSERT_TRUE(store->remove("held"));
  EXPECT_GT(*out(other, "twin"), 0U);
  ASSERT_TRUE(save_filled(store, "pinned", 2, 5000, {.policy = Policy::kPin}));
  EXPECT_EQ(*out(other, "pinned"), 0U);
  ASSERT_TRUE(save_filled(store, "bound", 2, 5000, {.bound = true, .policy = Policy::kDrop}));
  EXPECT_EQ(*out(other, "bound"), 0U);
  ASSERT_TRUE(store->save("empty", "", {}));
  EXPECT_EQ(*out(other, "empty"), 0U);
  ASSERT_TRUE(save_filled(store, "dropped", 2, 5000, {.policy = Policy::kDrop}));
  EXPECT_EQ(*out(other, "dropped", How::kCopy), 0U);
  EXPECT_GT(*out(other, "dropped", How::kFree), 0U);
  EXPECT_FALSE(store->contains("dropped"));
  EXPECT_EQ(back(store, "twin"), 1);
  EXPECT_EQ(unsound(store), "");
}

TEST(Spill, FilesGoWithOverwrittenAndExpiredNames) {
  Folder folder;
  auto store = fresh_spilling(folder);
  ASSERT_TRUE(save_filled(store, "over", 1));
  ASSERT_TRUE(save_filled(store, "soon", 2, 5000, {.ttl = kSecond / 2}));
  ASSERT_GT(*out(store, "over"), 0U);
  ASSERT_GT(*out(store, "soon"), 0U);
  EXPECT_EQ(folder.files().size(), 2U);
  ASSERT_TRUE(save_filled(store, "over", 3, 5000, {.overwrite = true}));
  EXPECT_EQ(folder.files().size(), 1U);
  EXPECT_EQ(loaded(store, "over"), 3);
  while (store->contains("soon")) ::usleep(1000);
  EXPECT_TRUE(store->restore("soon"));  // of what has gone
  EXPECT_TRUE(folder.files().empty());
  EXPECT_EQ(unsound(store), "");
}

TEST(Spill, KeepsWhenItWasSavedAndWhenItExpires) {
  Folder folder;
  auto store = fresh_spilling(folder);
  ASSERT_TRUE(save_filled(store, "a", 1, 5000, {.ttl = 1000 * kSecond, .policy = Policy::kSpill}));
  const auto before = *store->find("a");
  ASSERT_GT(*out(store, "a"), 0U);
  const auto away = *store->find("a");
  EXPECT_EQ(back(store, "a"), 1);
  for (const auto& now : {away, *store->find("a")}) {
    EXPECT_EQ(now.created, before.created);
    EXPECT_EQ(now.expires, before.expires);
    EXPECT_EQ(now.pid, before.pid);
    EXPECT_EQ(now.policy, Policy::kSpill);
    EXPECT_EQ(now.bytes, before.bytes);
  }
}

// ---- two at it

TEST(Spill, AClaimOfTheLivingIsRespectedAndOfTheDeadTakenOver) {
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  {
    HeldUp writing("spill.held", [&] { EXPECT_GT(*out(other, "a"), 0U); });
    EXPECT_EQ(out(store, "a").code(), Code::kBusy);
    EXPECT_EQ(store->hold_for_writing(*store->load("a")).code(), Code::kBusy);
    EXPECT_EQ(loaded(store, "a"), 7);  // to be read it may be held
  }
  EXPECT_TRUE(on_disk(store, "a"));
  {
    HeldUp reading("restore.room", [&] { EXPECT_EQ(other->restore("a").code(), Code::kOk); });
    EXPECT_EQ(store->restore("a").code(), Code::kBusy);
    EXPECT_TRUE(on_disk(store, "a"));
    EXPECT_TRUE(store->restore("a", false));  // the other one may be stopped
    EXPECT_EQ(loaded(store, "a"), 7);
    EXPECT_EQ(out(store, "a", How::kFree).code(), Code::kOk);  // the claim is of the cell that it was spilled to
    EXPECT_TRUE(on_disk(store, "a"));
  }
  EXPECT_EQ(back(store, "a"), 7);
  ASSERT_TRUE(save_filled(store, "a", 7, 5000, {.overwrite = true}));
  ASSERT_TRUE(dies_at(store, folder, "spill.held", [](Spilling& mine) { (void)out(mine, "a"); }));
  (void)store.member->reap();
  EXPECT_GT(*out(store, "a"), 0U);
  ASSERT_TRUE(dies_at(store, folder, "restore.read", [](Spilling& mine) { (void)mine->restore("a"); }));
  EXPECT_EQ(back(store, "a"), 7);
  (void)store.member->reap();
  (void)store->sweep();
  EXPECT_EQ(blocks_of(store), 1U);
  EXPECT_EQ(unsound(store), "");
}

// Writes to a value as "r+" does; false where it has to look again.
bool write_to(Spilling& store, const std::string& key, uint8_t byte) {
  auto entry = store->load(key);
  if (!entry || entry->spilled) return false;
  auto held = store->hold_for_writing(*entry);
  if (!held) {
    EXPECT_TRUE(held.code() == Code::kBusy || held.code() == Code::kStale) << held.status().what();
    return false;
  }
  auto view = store.member->attach(entry->blocks[0].block, entry->blocks[0].generation, Mode::kReadWrite);
  EXPECT_TRUE(view.ok());
  std::memset(view->data, byte, 5000);
  store.member->release(view->block, Mode::kReadWrite);
  return true;
}

int first_byte(Spilling& store, const std::string& key) {
  if (!store->restore(key, false)) return -3;
  auto entry = store->find(key);
  if (!entry || entry->blocks.empty()) return -1;
  auto view = store.member->attach(entry->blocks[0].block, entry->blocks[0].generation, Mode::kRead);
  if (!view) return -2;
  const int byte = static_cast<int>(view->data[4321]);
  store.member->release(view->block, Mode::kRead);
  return byte;
}

TEST(Spill, NoWriteIsLostWhereverTheSpillerIs) {
  for (const How how : {How::kWrite, How::kCopy}) {
    for (const char* point :
         {"spill.claimed", "spill.held", "spill.part_made", "spill.allocated", "spill.renamed", "spill.written",
          "spill.file_told", "succeed.cell", "save.body", "succeed.filled", "replace.marked", "replace.exchanged",
          "replace.releasing", "release.part", "release.slot_seen", "release.cleared", "succeed.exchanged",
          "succeed.standing", "spill.let_go"}) {
      SCOPED_TRACE(point);
      Folder folder;
      auto store = fresh_spilling(folder);
      auto other = join_spilling(store, folder);
      ASSERT_TRUE(save_filled(store, "a", 7));
      const std::string passed = point;
      if (how == How::kCopy && (passed.rfind("spill.", 0) != 0)) continue;
      bool wrote = false;
      {
        HeldUp spiller(point, [&] { EXPECT_TRUE(out(other, "a", how).ok()); });
        wrote = write_to(store, "a", 99);
      }
      EXPECT_EQ(first_byte(store, "a"), wrote ? 99 : 7);
      (void)out(other, "a", How::kFree);
      (void)out(other, "a", How::kWrite);
      EXPECT_EQ(first_byte(store, "a"), wrote ? 99 : 7);
      EXPECT_EQ(unsound(store), "");
    }
  }
}

TEST(Spill, NoWriteIsLostWhereverTheWriterIs) {
  for (const bool copied : {false, true}) {
    for (const char* point : {"writing.flagged", "writing.held"}) {
      SCOPED_TRACE(point);
      Folder folder;
      auto store = fresh_spilling(folder);
      auto other = join_spilling(store, folder);
      ASSERT_TRUE(save_filled(store, "a", 7));
      if (copied) {
        ASSERT_GT(*out(store, "a", How::kCopy), 0U);
      }
      bool wrote = false;
      {
        HeldUp writer(point, [&] { wrote = write_to(store, "a", 99); });
        auto went = out(other, "a", How::kWrite);
        ASSERT_TRUE(went.ok());
        if (point == std::string("writing.held")) {
          EXPECT_EQ(*went, 0U);
        }
      }
      EXPECT_EQ(first_byte(store, "a"), wrote ? 99 : 7);
      (void)out(other, "a", How::kFree);
      (void)out(other, "a", How::kWrite);
      EXPECT_TRUE(on_disk(store, "a"));
      EXPECT_EQ(first_byte(store, "a"), wrote ? 99 : 7);
    }
  }
}

TEST(Spill, AFileFromBeforeAWriteByAnotherNameIsNotBelieved) {
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  ASSERT_GT(*out(store, "a", How::kCopy), 0U);
  auto entry = *store->find("a");
  auto view = store.member->attach(entry.blocks[0].block, entry.blocks[0].generation, Mode::kRead);
  ASSERT_TRUE(store->save("b", entry.text, {view->block}));
  store.member->release(view->block, Mode::kRead);
  ASSERT_TRUE(write_to(other, "b", 99));
  EXPECT_EQ(first_byte(store, "a"), 99);
  ASSERT_TRUE(store->remove("b"));
  EXPECT_EQ(*out(store, "a", How::kFree), 0U);
  EXPECT_GT(*out(store, "a", How::kWrite), 0U);
  EXPECT_EQ(first_byte(store, "a"), 99);
}

TEST(Spill, APolicySetMeanwhileHolds) {
  for (const Policy before : {Policy::kKeep, Policy::kDrop}) {
    for (const char* point :
         {"spill.held", "succeed.cell", "succeed.filled", "replace.marked", "replace.policy_seen"}) {
      const bool drops = before == Policy::kDrop;
      if (drops && std::string(point).starts_with("s")) continue;  // nothing is written
      SCOPED_TRACE(point);
      Folder folder;
      auto store = fresh_spilling(folder);
      auto other = join_spilling(store, folder);
      ASSERT_TRUE(save_filled(store, "a", 7, 5000, {.policy = before}));
      {
        HeldUp spiller(point, [&] { EXPECT_EQ(*out(other, "a"), 0U); });
        EXPECT_TRUE(store->set_policy("a", Policy::kPin));
      }
      ASSERT_TRUE(store->contains("a"));
      EXPECT_FALSE(on_disk(store, "a"));
      EXPECT_EQ(store->find("a")->policy, Policy::kPin);
      EXPECT_EQ(first_byte(store, "a"), 7);
      EXPECT_EQ(*out(store, "a"), 0U);
      EXPECT_TRUE(store->set_policy("a", before));
      EXPECT_GT(*out(store, "a"), 0U);
      EXPECT_EQ(unsound(store), "");
    }
  }
}

TEST(Spill, APolicySetMeanwhileIsTheSuccessors) {
  {
    Folder folder;
    auto store = fresh_spilling(folder);
    auto other = join_spilling(store, folder);
    ASSERT_TRUE(save_filled(store, "a", 7));
    ASSERT_GT(*out(store, "a"), 0U);
    {
      HeldUp reader("succeed.filled", [&] { EXPECT_EQ(back(other, "a"), 7); });
      EXPECT_TRUE(store->set_policy("a", Policy::kPin));
    }
    EXPECT_FALSE(on_disk(store, "a"));
    EXPECT_EQ(store->find("a")->policy, Policy::kPin);
  }
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  {
    // The value moves between the change and the look after it.
    HeldUp setter("policy.changed", [&] { EXPECT_TRUE(other->set_policy("a", Policy::kDrop)); });
    ASSERT_TRUE(save_filled(store, "a", 8, 5000, {.overwrite = true}));
  }
  EXPECT_EQ(store->find("a")->policy, Policy::kDrop);
}

// Saves names until one has that cell.
std::string reuse(Spilling& store, uint32_t cell) {
  for (int i = 0; i < 500; ++i) {
    const std::string key = "next/" + std::to_string(i);
    if (!save_filled(store, key, 50)) break;
    if (store->find(key)->cell == cell) return key;
  }
  ADD_FAILURE() << "the cell was not used again";
  return "";
}

TEST(Spill, AWriterOfAnEarlierLifeChangesNothing) {
  for (const char* point : {"spill.claimed", "spill.held", "spill.written", "spill.file_told", "succeed.filled"}) {
    SCOPED_TRACE(point);
    Folder folder;
    auto store = fresh_spilling(folder);
    auto other = join_spilling(store, folder);
    ASSERT_TRUE(save_filled(store, "a", 7));
    const auto entry = *store->find("a");
    std::string next;
    {
      HeldUp spiller(point, [&] {
        auto went = other.spill->out(entry.cell, entry.life, How::kWrite);
        EXPECT_TRUE(went.ok() && *went == 0);
      });
      ASSERT_TRUE(store->remove("a"));
      next = reuse(store, entry.cell);
      EXPECT_TRUE(store->set_policy(next, Policy::kSpill));
    }
    const auto standing = tests::standing(store, entry.cell);
    EXPECT_EQ(standing.file, 0U);
    EXPECT_EQ(standing.flags, 0);
    EXPECT_EQ(standing.policy, Policy::kSpill);
    EXPECT_EQ(loaded(store, next), 50);
    EXPECT_TRUE(folder.files().empty());
    EXPECT_EQ(store->hold_for_writing(entry).code(), Code::kStale);
    EXPECT_EQ(tests::standing(store, entry.cell).flags, 0);
    EXPECT_EQ(unsound(store), "");
    EXPECT_GT(*out(store, next), 0U);
    EXPECT_EQ(back(store, next), 50);
  }
}

TEST(Spill, WhoRestoresWhatWasReplacedLooksAgain) {
  for (const char* point : {"spill.claimed", "restore.room", "restore.read", "succeed.filled"}) {
    SCOPED_TRACE(point);
    Folder folder;
    auto store = fresh_spilling(folder);
    auto other = join_spilling(store, folder);
    ASSERT_TRUE(save_filled(store, "a", 7));
    ASSERT_GT(*out(store, "a"), 0U);
    const uint32_t cell = store->find("a")->cell;
    {
      HeldUp reader(point, [&] { EXPECT_TRUE(other->restore("a")); });
      ASSERT_TRUE(save_filled(store, "a", 8, 5000, {.overwrite = true}));
      const std::string next = reuse(store, cell);
      ASSERT_TRUE(store->remove(next));
    }
    EXPECT_EQ(loaded(other, "a"), 8);
    EXPECT_EQ(unsound(store), "");
    EXPECT_TRUE(folder.files().empty());
  }
}

TEST(Spill, ANameThatStandsAgainHasNoFileThatIsNotThere) {
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  {
    HeldUp spiller("spill.held", [&] { EXPECT_EQ(*out(other, "a", How::kCopy), 0U); });
    // Marked to be removed, and not removed.
    ASSERT_TRUE(dies_at(store, folder, "replace.marked", [](Spilling& mine) { (void)mine->remove("a"); }));
  }
  (void)store.member->reap();
  (void)store->sweep();
  (void)out(store, "a", How::kFree);
  EXPECT_EQ(back(store, "a"), 7);
  (void)out(store, "a", How::kWrite);
  EXPECT_TRUE(on_disk(store, "a"));
  EXPECT_EQ(back(store, "a"), 7);
}

TEST(Spill, AFileGoesOnWhileTheCellItWasInIsGivenBack) {
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  ASSERT_GT(*out(store, "a"), 0U);
  ASSERT_TRUE(dies_at(store, folder, "succeed.exchanged", [](Spilling& mine) { (void)mine->restore("a"); }) ||
              dies_at(store, folder, "replace.exchanged", [](Spilling& mine) { (void)mine->restore("a"); }));
  ASSERT_TRUE(store->remove("a"));

  // The restorer dies after its exchange. One finishes what it left, another one spills again in between.
  ASSERT_TRUE(save_filled(store, "a", 7));
  ASSERT_GT(*out(store, "a"), 0U);
  ASSERT_TRUE(dies_at(store, folder, "replace.exchanged", [](Spilling& mine) { (void)mine->restore("a"); }));
  (void)store.member->reap();
  {
    HeldUp sweeper("release.slot_seen", [&] { (void)other->sweep(); });
    (void)store->sweep();
    ASSERT_GT(*out(store, "a", How::kFree), 0U);
  }
  (void)store->sweep();
  EXPECT_EQ(folder.files().size(), 1U);
  EXPECT_EQ(back(store, "a"), 7);
  EXPECT_EQ(unsound(store), "");
}

// ---- files of the dead

TEST(SpillSweep, RemovesWhatNoCellHasAndNothingElse) {
  Folder folder;
  auto store = fresh_spilling(folder);
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(save_filled(store, std::to_string(i), static_cast<uint8_t>(i)));
  for (int i = 0; i < 20; i += 2) ASSERT_GT(*out(store, std::to_string(i), How::kWrite), 0U);
  for (int i = 1; i < 20; i += 4) ASSERT_GT(*out(store, std::to_string(i), How::kCopy), 0U);
  EXPECT_EQ(folder.files().size(), 15U);
  EXPECT_EQ(store->sweep_files(), 0U);
  for (const char* point : {"spill.part_made", "spill.head_written", "spill.renamed", "spill.written"})
    ASSERT_TRUE(dies_at(store, folder, point, [&](Spilling& mine) {
      for (int i = 3; i < 20; i += 4) (void)out(mine, std::to_string(i), How::kCopy);
    })) << point;
  (void)store.member->reap();
  EXPECT_GT(folder.files().size(), 15U);
  {
    const Between between(
        "spill.scanning", [&] { store->header().moves.fetch_add(1); }, Between::kEachTime);
    EXPECT_EQ(store->sweep_files(), std::nullopt);  // to be tried again
  }
  EXPECT_GT(folder.files().size(), 15U);
  EXPECT_GT(store->sweep_files(), 0U);
  EXPECT_EQ(folder.files().size(), 15U);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(back(store, std::to_string(i)), i);
  EXPECT_EQ(unsound(store), "");
}

TEST(SpillSweep, LeavesAFileThatIsWrittenAnewMeanwhile) {
  Folder folder;
  auto store = fresh_spilling(folder);
  auto other = join_spilling(store, folder);
  ASSERT_TRUE(save_filled(store, "a", 7));
  ASSERT_TRUE(dies_at(store, folder, "spill.written", [](Spilling& mine) { (void)out(mine, "a", How::kCopy); }));
  (void)store.member->reap();
  ASSERT_EQ(folder.files().size(), 1U);  // and no cell has it
  {
    HeldUp sweeper("spill.scanned", [&] { (void)other.spill->sweep(); });
    ASSERT_GT(*out(store, "a", How::kWrite), 0U);
  }
  EXPECT_EQ(folder.files().size(), 1U);
  EXPECT_EQ(back(store, "a"), 7);
}

TEST(SpillSweep, LeavesWhatIsJustBeingWrittenOrMoved) {
  for (const char* point :
       {"spill.held", "spill.renamed", "spill.written", "spill.file_told", "succeed.cell", "succeed.filled",
        "replace.marked", "replace.exchanged", "replace.releasing", "succeed.exchanged", "succeed.standing"}) {
    SCOPED_TRACE(point);
    Folder folder;
    auto store = fresh_spilling(folder);
    auto other = join_spilling(store, folder);
    ASSERT_TRUE(save_filled(store, "a", 7));
    {
      HeldUp spiller(point, [&] { EXPECT_GT(*out(other, "a"), 0U); });
      (void)store.spill->sweep();
    }
    EXPECT_EQ(back(store, "a"), 7);
    if (std::string(point).rfind("spill.", 0) == 0) continue;
    {
      HeldUp spiller(point, [&] { EXPECT_GT(*out(other, "a", How::kFree), 0U); });
      (void)store.spill->sweep();
    }
    {
      HeldUp restorer(point, [&] { EXPECT_TRUE(other->restore("a")); });
      (void)store.spill->sweep();
    }
    ASSERT_GT(*out(other, "a", How::kFree), 0U);
    EXPECT_EQ(back(store, "a"), 7);
  }
}

// ---- a disk that fails

TEST(SpillErrors, AFailedSystemCallLosesNothing) {
  struct Case {
    const char* what;
    int error;
    bool restoring;
  };
  for (const Case& test : {Case{"a full disk", ENOSPC, false}, Case{"a broken disk", EIO, false},
                           Case{"a broken disk", EIO, true}, Case{"no memory", ENOMEM, true}}) {
    SCOPED_TRACE(test.what);
    bool more = true;
    int failed = 0;
    for (uint64_t at = 1; more; ++at) {
      Folder folder;
      auto store = fresh_spilling(folder);
      ASSERT_TRUE(save_filled(store, "a", 7, 300000));
      if (test.restoring) {
        ASSERT_GT(*out(store, "a"), 0U);
      }
      failpoint::Plan plan;
      plan.action = failpoint::Action::kFail;
      plan.at = at;
      plan.error = test.error;
      failpoint::arm(plan);
      Status status;
      if (test.restoring) {
        status = store->restore("a");
      } else {
        auto went = out(store, "a");
        if (!went) status = std::move(went.status());
      }
      more = failpoint::reached() >= at;
      const std::string where = std::string(failpoint::last()) + ", call " + std::to_string(at);
      failpoint::disarm();
      if (!status) {
        ++failed;
        EXPECT_NE(status.what().find("'a'"), std::string::npos) << where << ": " << status.what();
        if (!test.restoring) {
          EXPECT_TRUE(folder.files().empty()) << where;
          EXPECT_FALSE(store->trouble().empty()) << where;
        }
      }
      EXPECT_EQ(back(store, "a", 300000), 7) << where;
      EXPECT_EQ(unsound(store), "") << where;
      EXPECT_GE(*out(store, "a"), 300000U) << where;
      EXPECT_TRUE(store->trouble().empty()) << where;
      EXPECT_EQ(back(store, "a", 300000), 7) << where;
      EXPECT_TRUE(store->remove("a"));
      (void)store->sweep_files();  // a part whose name could not be looked at
      EXPECT_TRUE(folder.files().empty()) << where;
      EXPECT_EQ(blocks_of(store), 0U) << where;
    }
    EXPECT_GT(failed, 2);
  }
}

TEST(SpillErrors, ADamagedOrMissingFileIsAnErrorThatNamesKeyAndFile) {
  Folder folder;
  auto store = fresh_spilling(folder);
  ASSERT_TRUE(save_filled(store, "a", 7, 300000));
  ASSERT_GT(*out(store, "a"), 0U);
  const std::string path = folder.files().at(0);
  std::FILE* file = std::fopen(path.c_str(), "r+b");
  ASSERT_NE(file, nullptr);
  std::fseek(file, 100000, SEEK_SET);
  std::fputc(8, file);
  std::fclose(file);
  Status status = store->restore("a");
  EXPECT_EQ(status.code(), Code::kCorrupt);
  EXPECT_NE(status.what().find("'a'"), std::string::npos);
  EXPECT_NE(status.what().find(path.substr(path.rfind('/') + 1)), std::string::npos) << status.what();
  EXPECT_EQ(blocks_of(store), 0U);
  std::filesystem::remove(path);
  status = store->restore("a");
  EXPECT_EQ(status.code(), Code::kCorrupt);
  EXPECT_NE(status.what().find(folder.path()), std::string::npos);
  EXPECT_TRUE(store->remove("a"));
  EXPECT_EQ(unsound(store), "");
}

}  // namespace
}  // namespace torchshm
