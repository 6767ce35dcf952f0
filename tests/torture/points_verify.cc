// What must hold after a trial, with the driver and the survivor at rest.
#include <sys/stat.h>

#include "points_session.h"
#include "pool/checker.h"
#include "pool/tickets.h"

namespace torchshm::torture {

using pool::BlockValue;
using pool::ChunkState;
using pool::ChunkValue;
using pool::Lease;
using pool::Mode;

void Session::take(Message& message, bool must, const char* what) {
  const uint32_t state = message.state.exchange(kNothing);
  if (state == kNothing || state == kWriting) return;
  must = must && state == kUp;
  auto view = driver->redeem(message.handle, Mode::kReadWrite);
  if (!view) {
    if (must || view.code() != Code::kStale) wrong("%s: a message was lost: %s", what, view.status().what().c_str());
    return;
  }
  const Held got{view->block, Mode::kReadWrite, view->data, message.bytes, message.seed};
  if (!intact(got)) wrong("%s: block %u was received with other data", what, got.block);
  driver->release(got.block, got.mode);
}

void Session::verify(const Trial& trial, const Operation& operation) {
  Board& board = *here.board;
  pool::Arena& arena = member_->arena();
  const bool tolerant = board.tolerant.load() != 0;
  arena.header().limit.store(kLimit);
  arena.header().warm.store(uint64_t{1} << 40);
  arena.header().ticket_age.store(300);
  arena.lease(member_->membership().slot()).reaping.store(0);
  Scene& d = *scene_;
  (void)member_->reap();
  // What the system refused to take back once is tried again then.
  if ((operation.flags & kRaisesLimit) != 0 || trial.run == Run::kFail) (void)driver->trim(0);
  if (subject().verify) {
    if (const std::string what = subject().verify(d, operation); !what.empty()) wrong("%s", what.c_str());
  }
  for (uint32_t i = 0; i < 2; ++i) take(board.inbox[i], true, "the inbox");  // the driver holds these
  const pool::Handle gift = board.gift.handle;
  const bool had_gift = board.gift.state.load() != kNothing;
  take(board.gift, !tolerant, "the gift");
  pool::Handle street[kStreet];
  bool was_up[kStreet];
  for (uint32_t i = 0; i < kStreet; ++i) {
    was_up[i] = board.street[i].state.load() == kUp;
    street[i] = board.street[i].handle;
    take(board.street[i], !tolerant, "the street");
  }
  // What was only in lost messages of the dead.
  pool::Ledger ledger(arena, member_->membership().slot(), *member_);
  pool::Tickets tickets(arena, ledger, member_->membership().slot());
  (void)tickets.take_back(0, true, ~uint64_t{0});
  const auto must_be_stale = [&](const pool::Handle& handle, const char* what) {
    auto view = driver->redeem(handle, Mode::kReadWrite);
    if (view || view.code() != Code::kStale) wrong("a handle of %s, gone, is not an error", what);
    if (view) driver->release(view->block, Mode::kReadWrite);
  };
  if (board.stale_set.load() != 0) must_be_stale(board.stale, "the actor");
  if (had_gift) must_be_stale(gift, "the gift");
  if ((operation.flags & kGone) != 0) must_be_stale(board.gone.handle, "a released block");
  for (uint32_t i = 0; i < kStreet; ++i) {
    if (was_up[i]) must_be_stale(street[i], "the street");
  }
  if (!intact(kept_[0]) || !intact(kept_[1])) wrong("a block that the driver holds has changed");
  if (!wrong_.empty()) return;
  verify_table();
  if (wrong_.empty()) {
    pool::CheckOptions options;
    options.at_rest = true;
    const pool::CheckReport report = pool::check(arena, options);
    if (!report.ok()) wrong("the checker: %s", report.first().c_str());
  }
  if (trial.whole && wrong_.empty()) verify_whole();
}

// Leases, blocks, tickets and chunks as they must be with two members at rest.
void Session::verify_table() {
  Board& board = *here.board;
  pool::Arena& arena = member_->arena();
  uint32_t living = 0;
  for (uint32_t slot = 0; slot < arena.slots_used(); ++slot) {
    const Lease& lease = arena.lease(slot);
    if ((lease.word.load() & 0xff) == pool::kLeaseFree) continue;
    ++living;
    if (lease.intent.load() != 0) wrong("lease %u has an intent at rest", slot);
    if (lease.reaping.load() != 0) wrong("lease %u is reaping at rest", slot);
  }
  if (living != 2) wrong("%u leases live, not two", living);
  uint32_t blocks = 0;
  uint64_t committed = 0;
  for (uint32_t i = 0; i < arena.chunks_used(); ++i) {
    const ChunkValue chunk = ChunkValue::of(arena.chunk(i).value.load());
    committed += chunk.committed * pool::kPage;
    bool live = false;
    for (uint32_t page = 0; page < pool::kPagesPerChunk; ++page) {
      const BlockValue block = BlockValue::of(arena.block(i * pool::kPagesPerChunk + page).value.load());
      if (!block.live) continue;
      live = true;
      ++blocks;
      if (block.count == 0) wrong("block %u is live and used by nobody", i * pool::kPagesPerChunk + page);
    }
    switch (chunk.state) {
      case ChunkState::kHole:
      case ChunkState::kIdle:
        if (live) wrong("chunk %u is free with a live block in it", i);
        break;
      case ChunkState::kRun: {
        const BlockValue head = BlockValue::of(arena.block(chunk.head * pool::kPagesPerChunk).value.load());
        if (!head.live || head.generation != chunk.generation) wrong("chunk %u belongs to a run that is not", i);
        break;
      }
      case ChunkState::kSmall:
        if (chunk.owner == pool::kNobody ? !live : (arena.lease(chunk.owner).word.load() & 0xff) == pool::kLeaseFree)
          wrong("chunk %u of small blocks is lost (owner %u)", i, chunk.owner);
        break;
      default:
        wrong("chunk %u is left in state %d", i, static_cast<int>(chunk.state));
    }
  }
  const uint32_t expected = static_cast<uint32_t>(scene_->held.size()) + board.survivor_blocks.load();
  if (blocks != expected) wrong("%u blocks are live, %u expected", blocks, expected);
  for (uint32_t i = 0; i < arena.tickets_used(); ++i) {
    const auto ticket = pool::TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender != 0) wrong("ticket %u for block %u is left", i, ticket.block);
  }
  if (committed > kLimit) wrong("%lu bytes committed, over the limit", committed);
  struct stat file {};
  (void)::fstat(arena.data_fd(), &file);
  if (static_cast<uint64_t>(file.st_blocks) * 512 > committed)
    wrong("the data file has %lu bytes, %lu are accounted for", static_cast<uint64_t>(file.st_blocks) * 512, committed);
}

void Session::verify_whole() {
  here.totals->wholes.fetch_add(1, std::memory_order_relaxed);
  (void)driver->trim(0);
  const uint64_t used = scene_->committed();
  auto rest = driver->allocate(kLimit - used, false);
  if (!rest)
    return wrong("the rest of the limit, %lu bytes, can't be allocated: %s", kLimit - used,
                 rest.status().what().c_str());
  driver->release(rest->block, Mode::kReadWrite);
  (void)driver->trim(0);
  if (scene_->committed() > used) wrong("%lu bytes stay committed, %lu before", scene_->committed(), used);
}

}  // namespace torchshm::torture
