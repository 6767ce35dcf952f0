// Holds in messages: one redemption each, a table that fills up, and taking back.
#include "pool/tickets.h"

#include <thread>

#include "parts.h"

namespace torchshm {
namespace {

using pool::Arena;
using pool::kTickets;
using pool::TicketId;
using pool::TicketValue;
using tests::fresh_arena;
using tests::Parts;

class TicketsTest : public testing::Test {
 protected:
  TicketValue ticket(uint32_t index) { return TicketValue::of(arena.ticket(index).value.load()); }
  uint32_t out() {
    uint32_t n = 0;
    for (uint32_t i = 0; i < arena.tickets_used(); ++i) n += ticket(i).sender != 0 ? 1 : 0;
    return n;
  }
  Arena arena = fresh_arena();
  Parts a{arena}, b{arena};
};

TEST_F(TicketsTest, EachIsRedeemedOnce) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  const auto id = a.tickets.issue(block, generation);
  ASSERT_TRUE(id.has_value());
  EXPECT_EQ(a.count(block), 2U);
  ASSERT_TRUE(b.ledger.attach(block, generation));
  EXPECT_TRUE(b.tickets.redeem(*id, block, generation));
  EXPECT_FALSE(b.tickets.redeem(*id, block, generation));
  EXPECT_EQ(a.count(block), 2U);
  EXPECT_EQ(out(), 0U);
}

TEST_F(TicketsTest, OfAnotherMessageOrBlockAreNotUsedUp) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  const auto id = a.tickets.issue(block, generation);
  ASSERT_TRUE(id.has_value());
  EXPECT_FALSE(a.tickets.redeem({id->index, id->nonce + 1}, block, generation));
  EXPECT_FALSE(a.tickets.redeem({id->index, id->nonce}, block + 1, generation));
  EXPECT_EQ(out(), 1U);
  EXPECT_EQ(a.count(block), 2U);
  EXPECT_TRUE(a.tickets.redeem(*id, block, generation));
}

TEST_F(TicketsTest, AreKeptForANameByTheirMessageAlone) {
  const uint32_t block = a.small();
  const auto id = a.tickets.issue(block, a.generation(block));
  ASSERT_TRUE(id.has_value());
  EXPECT_FALSE(b.tickets.keep({id->index, id->nonce + 1}, block));
  EXPECT_FALSE(b.tickets.keep(*id, block + 1));
  EXPECT_TRUE(b.tickets.keep(*id, block));
  EXPECT_EQ(ticket(id->index).sender, TicketValue::kName);
  a.die();
  EXPECT_EQ(b.reaper.reap_all(), 1U);
  EXPECT_EQ(b.tickets.take_back(0, true, 1), 0U);  // not its sender's any more
  EXPECT_EQ(b.count(block), 1U);
  EXPECT_TRUE(b.tickets.redeem(*id, block, b.generation(block)));
  EXPECT_FALSE(b.tickets.keep(*id, block));
}

TEST_F(TicketsTest, AreNotIssuedForABlockThatIsGone) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  a.ledger.drop(block);
  EXPECT_FALSE(a.tickets.issue(block, generation).has_value());
  EXPECT_EQ(out(), 0U);
  EXPECT_EQ(arena.lease(a.slot).intent.load(), 0U);
}

TEST_F(TicketsTest, ManyAreOutAtOnceAndEachIsItsOwn) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  std::vector<TicketId> ids;
  for (int i = 0; i < 5000; ++i) {  // more than the first window, in which every other one is then free
    ids.push_back(*a.tickets.issue(block, generation));
    if (i % 2 == 0) {
      ASSERT_TRUE(a.tickets.redeem(ids.back(), block, generation));
      ids.pop_back();
    }
  }
  EXPECT_EQ(out(), 2500U);
  EXPECT_EQ(a.count(block), 2501U);
  for (const TicketId& id : ids) ASSERT_TRUE(a.tickets.redeem(id, block, generation));
  EXPECT_EQ(a.count(block), 1U);
}

TEST_F(TicketsTest, AFullTableIsNoErrorOfTheBlock) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  for (uint32_t i = 0; i < kTickets; ++i) tests::set_ticket(arena, i, {1, TicketValue::sender_of(b.slot, 1), 7, 0});
  EXPECT_FALSE(a.tickets.issue(block, generation).has_value());
  EXPECT_EQ(a.count(block), 1U);
  tests::set_ticket(arena, kTickets - 1, {});
  EXPECT_TRUE(a.tickets.issue(block, generation).has_value());
}

TEST_F(TicketsTest, ManyLeasesIssueAndRedeemAtOnce) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  Parts c(arena);
  const auto work = [&](Parts& parts) {
    for (int i = 0; i < 20000; ++i) {
      const auto id = parts.tickets.issue(block, generation);
      EXPECT_TRUE(id && parts.tickets.redeem(*id, block, generation));
    }
  };
  std::thread one([&] { work(b); }), two([&] { work(c); });
  one.join();
  two.join();
  EXPECT_EQ(a.count(block), 1U);
  EXPECT_EQ(out(), 0U);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST_F(TicketsTest, AnEntryThatSomebodyElseTakesFirstIsLeftToIt) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  uint32_t theirs = 0;
  const tests::Between between("issue.in_sight", [&] {
    theirs = arena.tickets_used() - 1;
    tests::set_ticket(arena, theirs, {5, TicketValue::sender_of(b.slot, 1), 7, 0});
  });
  const auto id = a.tickets.issue(block, generation);
  ASSERT_TRUE(id.has_value());
  EXPECT_NE(id->index, theirs);
  EXPECT_EQ(ticket(theirs).block, 7U);
}

#endif

// ---- taking back

TEST_F(TicketsTest, OnlyThoseOfTheDeadAreTakenBackAsSuch) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  Parts earlier(arena), gone(arena);
  ASSERT_TRUE(b.tickets.issue(block, generation).has_value());
  ASSERT_TRUE(gone.tickets.issue(block, generation).has_value());
  ASSERT_TRUE(gone.tickets.issue(block, generation).has_value());
  gone.die();
  EXPECT_EQ(a.tickets.take_back(0, true, UINT64_MAX), 2U);
  EXPECT_EQ(a.count(block), 2U);
  EXPECT_EQ(arena.header().taken_back.load(), 2U);
  // The slot has a new incarnation, or none: its tickets are still those of the dead.
  ASSERT_TRUE(b.tickets.issue(block, generation).has_value());
  ASSERT_TRUE(earlier.tickets.issue(block, generation).has_value());
  earlier.die();
  EXPECT_EQ(a.reaper.reap_all(), 2U);
  EXPECT_EQ(a.tickets.take_back(0, true, UINT64_MAX), 1U);
  EXPECT_EQ(out(), 2U);
}

TEST_F(TicketsTest, OldOnesAreTakenBackOldestFirstUntilThereIsEnough) {
  const uint32_t old = a.small(), older = a.small(), fresh = a.small();
  const uint32_t now = pool::Tickets::now();
  uint32_t second = now - 100;
  for (const uint32_t block : {old, older, fresh}) {
    const auto id = a.tickets.issue(block, a.generation(block));
    ASSERT_TRUE(id.has_value());
    TicketValue value = ticket(id->index);
    value.second = block == fresh   ? now + 5
                   : block == older ? second - 100
                                    : second;  // it may be issued after the look
    tests::set_ticket(arena, id->index, value);
    a.ledger.drop(block);
  }
  EXPECT_EQ(b.tickets.take_back(50, false, 1), 1U);
  EXPECT_FALSE(a.ledger.value(older).live);
  EXPECT_TRUE(a.ledger.value(old).live);
  EXPECT_EQ(b.tickets.take_back(50, false, UINT64_MAX), 1U);
  EXPECT_FALSE(a.ledger.value(old).live);
  EXPECT_TRUE(a.ledger.value(fresh).live);
}

TEST_F(TicketsTest, WhatSomebodyElseHoldsBringsNoRoom) {
  const uint32_t held = a.small(), free = a.small();
  for (const uint32_t block : {held, free}) ASSERT_TRUE(a.tickets.issue(block, a.generation(block)).has_value());
  a.ledger.drop(free);
  EXPECT_EQ(b.tickets.take_back(0, false, 1), 2U);  // the first freed nothing
}

TEST_F(TicketsTest, EntriesThatMakeNoSenseAreLeftAlone) {
  tests::set_ticket(arena, 0, {1, 0xfff, 3, 0});  // no such slot
  tests::set_ticket(arena, 1, {1, TicketValue::sender_of(b.slot, 1), arena.pages(), 0});
  EXPECT_EQ(a.tickets.take_back(0, false, UINT64_MAX), 0U);
  // A sender without a block behind it: the block's descriptor has no length.
  tests::set_ticket(arena, 2, {1, TicketValue::sender_of(b.slot, 1), arena.pages() - 1, 0});
  EXPECT_EQ(a.tickets.take_back(0, false, UINT64_MAX), 1U);
}

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS

TEST_F(TicketsTest, ThatAreRedeemedMeanwhileAreNotTakenBack) {
  const uint32_t block = a.small();
  const uint64_t generation = a.generation(block);
  const auto id = a.tickets.issue(block, generation);
  ASSERT_TRUE(id.has_value());
  const tests::Between between("take_back.intent", [&] { EXPECT_TRUE(a.tickets.redeem(*id, block, generation)); });
  EXPECT_EQ(b.tickets.take_back(0, false, UINT64_MAX), 0U);
  EXPECT_EQ(a.count(block), 1U);
}

#endif

}  // namespace
}  // namespace torchshm
