// Slots change hands: joined, dead, taken back, by several at once.
#include "pool/membership.h"

#include <thread>

#include "os/lock.h"
#include "parts.h"
#include "pool/mark.h"

namespace torchshm {
namespace {

using pool::Arena;
using pool::BlockValue;
using pool::kLeaseFree;
using pool::Lease;
using pool::Membership;
using pool::Op;
using tests::Between;
using tests::fresh_arena;
using tests::Parts;

TEST(Mark, EndsAtTheHighestThatAnybodyRaisedItTo) {
  for (int round = 0; round < 200; ++round) {
    std::atomic<uint32_t> mark{0};
    const auto work = [&](uint32_t first) {
      for (uint32_t value = first; value < 2000; value += 2) pool::raise(mark, value);
    };
    std::thread other([&] { work(1); });
    work(0);
    other.join();
    ASSERT_EQ(mark.load(), 1999U);
  }
  std::atomic<uint32_t> mark{7};
  pool::raise(mark, 3);
  EXPECT_EQ(mark.load(), 7U);
  EXPECT_EQ(pool::marked(mark, 5), 5U);
}

class MembershipTest : public testing::Test {
 protected:
  Lease& lease(uint32_t slot) { return arena.lease(slot); }
  Arena arena = fresh_arena();
};

TEST_F(MembershipTest, EachJoinerGetsASlotAndAnIncarnationOfItsOwn) {
  auto one = Membership::join(arena), two = Membership::join(arena);
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_NE(one->slot(), two->slot());
  EXPECT_NE(one->incarnation(), two->incarnation());
  EXPECT_EQ(lease(one->slot()).pid.load(), static_cast<uint32_t>(::getpid()));
  EXPECT_FALSE(Membership::dead(arena, two->slot(), one->slot()));
  EXPECT_FALSE(Membership::dead(arena, one->slot(), 99));  // never used
  one->abandon(arena);
  EXPECT_TRUE(Membership::dead(arena, two->slot(), one->slot()));
  EXPECT_FALSE(Membership::dead(arena, one->slot(), one->slot()));  // never of oneself
}

TEST_F(MembershipTest, ASlotWhoseLockIsHeldIsNotGivenOut) {
  const os::Fd other = os::reopen(arena.control_fd()).take();
  ASSERT_TRUE(*os::try_lock(other.get(), 0));
  auto joined = Membership::join(arena);
  ASSERT_TRUE(joined.ok());
  EXPECT_EQ(joined->slot(), 1U);
}

TEST_F(MembershipTest, WithOtherFilesUnderTheDescriptorsNobodyJoinsAndNobodyIsDead) {
  Parts a(arena), b(arena);
  b.die();
  EXPECT_TRUE(Membership::dead(arena, a.slot, b.slot));
  const os::Fd other = os::create_memfd("torchshm-test", 4096).take();
  ASSERT_EQ(::dup2(other.get(), arena.control_fd()), arena.control_fd());
  EXPECT_EQ(Membership::join(arena).code(), Code::kUnsupported);
  EXPECT_FALSE(Membership::dead(arena, a.slot, b.slot));
  EXPECT_EQ(a.reaper.reap_all(), 0U);
}

TEST_F(MembershipTest, ASlotIsNotGivenOutWhileSomebodyTakesItBack) {
  Parts a(arena);
  lease(a.slot).reaping.store(2);  // slot 1
  arena.header().slots_used.store(1);
  EXPECT_EQ(Membership::join(arena)->slot(), 2U);
}

// ---- reaping

TEST_F(MembershipTest, TheDeadAreTakenBackWithAllTheyHeld) {
  Parts a(arena), b(arena);
  const uint32_t small = b.small(), large = b.run(), shared = b.run();
  ASSERT_TRUE(a.ledger.attach(shared, a.generation(shared)));
  b.ledger.begin(Op::kIssue, small, b.generation(small));
  b.die();
  EXPECT_EQ(a.reaper.reap_all(), 1U);
  EXPECT_EQ(lease(b.slot).word.load(), kLeaseFree);
  EXPECT_EQ(lease(b.slot).intent.load(), 0U);
  EXPECT_FALSE(a.ledger.value(small).live);
  EXPECT_FALSE(a.ledger.value(large).live);
  EXPECT_EQ(a.count(shared), 1U);
  EXPECT_EQ(arena.header().reaped.load(), 1U);
  EXPECT_EQ(a.reaper.reap_all(), 0U);
  EXPECT_EQ(Membership::join(arena)->slot(), b.slot);
}

TEST_F(MembershipTest, TheLivingAreNotReaped) {
  Parts a(arena), b(arena);
  EXPECT_FALSE(a.reaper.reap(b.slot));
  EXPECT_FALSE(a.reaper.reap(a.slot));
  EXPECT_EQ(lease(a.slot).reaping.load(), 0U);
  EXPECT_NE(lease(b.slot).word.load(), kLeaseFree);
}

TEST_F(MembershipTest, AnIntentOnABlockThatSomebodyIsAtWorkOnComesBackLater) {
  Parts a(arena), b(arena), c(arena);
  const uint32_t block = a.small(), other = b.small();
  const uint64_t generation = a.generation(block);
  ASSERT_TRUE(b.ledger.attach(block, generation));
  b.ledger.begin(Op::kDrop, block, generation);
  b.die();
  a.ledger.begin(Op::kIssue, block, generation);  // asleep in the middle of it
  EXPECT_EQ(c.reaper.reap_all(), 0U);
  EXPECT_NE(lease(b.slot).word.load(), kLeaseFree);
  EXPECT_NE(lease(b.slot).intent.load(), 0U);
  EXPECT_EQ(lease(c.slot).reaping.load(), 0U);
  EXPECT_FALSE(c.ledger.value(other).live);  // all else is back
  a.ledger.end();
  EXPECT_EQ(c.reaper.reap_all(), 1U);
  EXPECT_EQ(a.count(block), 1U);
}

TEST_F(MembershipTest, AnIntentThatNamesNoBlockIsDroppedWithItsLease) {
  Parts a(arena), b(arena);
  b.ledger.begin(Op::kDrop, arena.pages(), 1);
  lease(b.slot).ledger_end.store(UINT64_MAX);
  b.die();
  EXPECT_EQ(a.reaper.reap_all(), 1U);
  EXPECT_EQ(lease(b.slot).intent.load(), 0U);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST_F(MembershipTest, AJoinerThatFindsItsSlotGoneOrBeingTakenBackTakesAnother) {
  Parts a(arena);
  {
    const Between between("join.in_sight", [&] { lease(1).word.store(pool::lease_word(77)); });
    EXPECT_EQ(Membership::join(arena)->slot(), 2U);
  }
  lease(1).word.store(kLeaseFree);
  {
    const Between between("join.claimed", [&] { lease(a.slot).reaping.store(2); });
    EXPECT_EQ(Membership::join(arena)->slot(), 3U);
    EXPECT_EQ(lease(1).word.load(), kLeaseFree);
  }
  lease(a.slot).reaping.store(0);
  EXPECT_EQ(Membership::join(arena)->slot(), 1U);
}

TEST_F(MembershipTest, ADeadLeaseIsSucceededByOneAloneAndAsItWas) {
  Parts a(arena);
  const os::Fd other = os::reopen(arena.control_fd()).take();
  const auto dies = [&] {
    auto dead = Membership::join(arena);
    ASSERT_TRUE(dead.ok());
    dead->abandon(arena);
  };
  dies();
  EXPECT_EQ(Membership::succeed(arena, 0)->slot(), 1U);
  {  // another locks it first
    const Between between("os.lock", [&] { ASSERT_TRUE(*os::try_lock(other.get(), 1)); });
    EXPECT_EQ(Membership::succeed(arena, 0).code(), Code::kNoSlot);
    ASSERT_TRUE(os::unlock(other.get(), 1));
  }
  {  // somebody takes it back, or has done so
    const Between between("succeed.locked", [&] { lease(a.slot).reaping.store(2); });
    EXPECT_EQ(Membership::succeed(arena, 0).code(), Code::kNoSlot);
    lease(a.slot).reaping.store(0);
  }
  {
    const Between between("succeed.locked", [&] { lease(1).word.store(kLeaseFree); });
    EXPECT_EQ(Membership::succeed(arena, 0).code(), Code::kNoSlot);
  }
  EXPECT_FALSE(os::locked_by_other(arena.control_fd(), 1));
  dies();
  for (const char* call : {"os.reopen", "os.lock"}) {
    const tests::Failing failing(call, ENOLCK);
    EXPECT_EQ(Membership::succeed(arena, 0).code(), Code::kSystem) << call;
  }
  const tests::Failing failing("os.reopen", EMFILE);
  EXPECT_EQ(Membership::join(arena).code(), Code::kSystem);
}

TEST_F(MembershipTest, OfTwoReapersOneFinishesWhateverTheOtherHasDone) {
  Parts a(arena), b(arena);
  for (const char* point : {"reap.announced", "reap.ledger_done", "reap.chunks_done"}) {
    Parts dead(arena);
    const uint32_t block = dead.small();
    dead.die();
    const uint64_t reaped = arena.header().reaped.load();
    const Between between(point, [&] { EXPECT_EQ(b.reaper.reap_all(), 1U); });
    EXPECT_EQ(a.reaper.reap_all(), 0U) << point;
    EXPECT_EQ(Between::passed(), 1);
    EXPECT_EQ(arena.header().reaped.load(), reaped + 1) << point;
    EXPECT_FALSE(a.ledger.value(block).live);
    EXPECT_EQ(lease(a.slot).reaping.load(), 0U);
  }
}

TEST_F(MembershipTest, ASlotThatHasANewOwnerIsNotReapedForTheOldOne) {
  Parts a(arena), b(arena), dead(arena);
  dead.die();
  const Between between("reap.announced", [&] {  // dead again, and another
    lease(dead.slot).word.store(pool::lease_word(99));
  });
  EXPECT_FALSE(a.reaper.reap(dead.slot));
  EXPECT_EQ(lease(dead.slot).word.load(), pool::lease_word(99));
  EXPECT_EQ(lease(a.slot).reaping.load(), 0U);
}

TEST_F(MembershipTest, ASlotWhoseWordChangesDuringTheLookIsNotDead) {
  // The look asks the kernel in the middle; what changes then is seen after it.
  Parts a(arena), dead(arena);
  lease(dead.slot).pid.store(1);
  dead.membership.abandon(arena);
  lease(dead.slot).pid.store(static_cast<uint32_t>(::getpid()) + 1);
  const Between between("os.getlock", [&] { lease(dead.slot).word.store(pool::lease_word(99)); });
  EXPECT_FALSE(Membership::dead(arena, a.slot, dead.slot));
}

#endif

}  // namespace
}  // namespace torchshm
