#include "step_verify.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include "os/memfd.h"
#if __has_include("pool/checker.h")
#include "pool/checker.h"
#define TORCHSHM_HAS_CHECKER 1
#endif

namespace torchshm::torture {

using pool::Arena;
using pool::BlockValue;
using pool::Handle;
using pool::Member;
using pool::Mode;

namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

bool all(const std::byte* data, uint64_t bytes, unsigned char pattern) {
  return std::all_of(data, data + bytes, [=](std::byte b) { return static_cast<unsigned char>(b) == pattern; });
}

std::string held_bytes(const Scene& s) {
  for (const Held& h : s.held) {
    if (!all(h.data, h.bytes, h.pattern))
      return "; the bytes of held block " + std::to_string(h.block) + " have changed";
  }
  return {};
}

uint64_t pages_behind(const Arena& arena) {
  struct stat st {};
  (void)::fstat(arena.data_fd(), &st);
  return static_cast<uint64_t>(st.st_blocks) * 512;
}

std::string leases(Scene& s, size_t alive) {
  std::string wrong;
  const auto stats = s.survivor->stats();
  if (stats.leases.size() != 1 + alive) wrong += "; " + std::to_string(stats.leases.size()) + " leases";
  const Arena& arena = s.survivor->arena();
  for (uint32_t slot = 0; slot < arena.slots_used(); ++slot) {
    const pool::Lease& lease = arena.lease(slot);
    if (lease.reaping.load() != 0)
      wrong += "; lease " + std::to_string(slot) + " is taking back " + std::to_string(lease.reaping.load() - 1);
    if (alive == 0 && lease.intent.load() != 0) wrong += "; lease " + std::to_string(slot) + " has an intent";
  }
  return wrong;
}

// Every live block is used by somebody, as often as its count says. REQUIRES: nobody alive is inside an operation.
std::string counts(const Scene& s) {
  std::string wrong;
  const Arena& arena = s.survivor->arena();
  std::map<uint32_t, uint32_t> tickets;
  for (uint32_t i = 0; i < arena.tickets_used(); ++i) {
    const auto ticket = pool::TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender != 0) ++tickets[ticket.block];
  }
  for (uint32_t block = 0; block < arena.chunks_used() * pool::kPagesPerChunk; ++block) {
    const BlockValue value = BlockValue::of(arena.block(block).value.load());
    const auto out = tickets.find(block);
    uint32_t users = out != tickets.end() ? out->second : 0;
    for (uint32_t slot = 0; slot < arena.slots_used(); ++slot)
      users += arena.ledger(slot, block / 64).load() >> block % 64 & 1;
    if (users == (value.live ? value.count : 0) && (users != 0 || !value.live)) continue;
    wrong += "; block " + std::to_string(block) + (value.live ? " (live)" : " (free)") + " has " +
             std::to_string(users) + " users and counts " + std::to_string(value.count);
  }
  return wrong;
}

std::string checker(const Scene& s) {
#ifdef TORCHSHM_HAS_CHECKER
  pool::CheckOptions options;
  options.at_rest = true;
  const auto report = pool::check(s.survivor->arena(), options);
  if (!report.ok()) return "; checker: " + report.first();
#else
  (void)s;
#endif
  return {};
}

std::string error_for(Scene& s, const Handle& handle, const char* which) {
  auto view = s.survivor->redeem(handle, Mode::kRead);
  if (!view)
    return view.code() == Code::kStale ? std::string() : std::string("; ") + which + ": " + view.status().what();
  return std::string("; ") + which + " gives a block";
}

std::string receive_letter(Scene& s, bool reaped) {
  std::string wrong;
  auto view = s.survivor->redeem(s.letter, Mode::kRead);
  if (!view) {
    // Where messages of any age may be given up for room, it may have been.
    if (view.code() == Code::kStale && s.survivor->arena().header().ticket_age.load() == 0) return wrong;
    wrong += "; the survivor's message is lost: " + view.status().what();
  } else {
    if (!all(view->data, kLetterBytes, kLetter)) wrong += "; the bytes of the survivor's message have changed";
    s.survivor->release(view->block, Mode::kRead);
    // As long as the dead who were at work on the block were not reaped it may count too high, and be there: with its own bytes.
    auto again = s.survivor->redeem(s.letter, Mode::kRead);
    if (again) {
      if (reaped) wrong += "; the received message gives a block";
      if (!all(again->data, kLetterBytes, kLetter)) wrong += "; the received message gives other data";
      s.survivor->release(again->block, Mode::kRead);
    } else if (again.code() != Code::kStale) {
      wrong += "; the received message: " + again.status().what();
    }
  }
  return wrong;
}

std::string receive(Scene& s, bool reaped) {
  std::string wrong = receive_letter(s, reaped);
  for (const Handle& handle : s.messages()) {
    auto message = s.survivor->redeem(handle, Mode::kReadWrite);
    if (!message) {
      wrong += "; message " + std::to_string(handle.ticket) + " is lost: " + message.status().what();
    } else {
      s.survivor->release(message->block, Mode::kReadWrite);
    }
  }
  return wrong;
}

// The survivor gets all that nobody else has, in one block, and writes to it.
std::string all_memory(Scene& s) {
  (void)s.survivor->trim(0);
  // A run takes the pages that its chunks have, which may be more than it needs: those of an idle chunk.
  std::set<uint64_t> chunks;
  uint64_t taken = 0;
  for (const Held& h : s.held) {
    const auto& arena = s.survivor->arena();
    const auto extent = arena.extent(h.block);
    if (!extent) continue;
    for (uint64_t c = extent->offset / pool::kChunk; c <= (extent->offset + extent->length - 1) / pool::kChunk; ++c) {
      if (!chunks.insert(c).second) continue;
      const auto chunk = pool::ChunkValue::of(arena.chunk(static_cast<uint32_t>(c)).value.load());
      taken += chunk.state == pool::ChunkState::kRun ? chunk.committed * os::kPageBytes : pool::kChunk;
    }
  }
  const uint64_t limit = s.survivor->arena().header().limit.load();
  if (taken > limit) return "; what the survivor holds takes more than the limit";
  if (taken == limit) return {};
  const uint64_t rest = limit - taken;
  auto view = s.survivor->allocate(rest, false);
  if (!view) return "; " + view.status().what();
  for (uint64_t at = 0; at < rest; at += pool::kGranule) view->data[at] = std::byte{0x99};
  std::string wrong = held_bytes(s);
  s.survivor->release(view->block, Mode::kReadWrite);
  return wrong;
}

std::string work(Scene& s) {
  auto view = s.survivor->allocate(9000, false);
  if (!view) return {};  // full, until the dead are reaped by whoever needs more; all_memory() says whether it stays so
  std::memset(view->data, 0x33, 9000);
  auto handle = s.survivor->issue(view->block);
  if (!handle) return "; issue: " + handle.status().what();
  auto again = s.survivor->redeem(*handle, Mode::kReadWrite);
  if (!again) return "; redeem: " + again.status().what();
  s.survivor->release(view->block, Mode::kReadWrite);
  s.survivor->release(view->block, Mode::kReadWrite);
  return {};
}

std::string newcomer(Scene& s) {
  const Arena& arena = s.survivor->arena();
  auto member = Member::attach(os::duplicate(arena.data_fd()).take(), os::duplicate(arena.control_fd()).take());
  if (!member) return "; a newcomer: " + member.status().what();
  auto view = (*member)->allocate(7000, false);
  if (view) (*member)->release(view->block, Mode::kReadWrite);
  (*member)->membership().abandon((*member)->arena());
  return {};
}

}  // namespace

std::string verify_beside(Scene& s, size_t alive) {
  std::string wrong = held_bytes(s);
  wrong += leases(s, alive);
  wrong += counts(s);
  wrong += checker(s);
  return wrong.empty() ? wrong : wrong.substr(2);
}

std::string verify(Scene& s, unsigned variant) {
  std::string wrong = held_bytes(s);
  wrong += error_for(s, s.stale, "the stale handle");
  switch (variant % kVariants) {
    case 0:
      (void)s.survivor->reap();
      break;
    case 1:
      wrong += work(s);
      break;
    case 2:
      wrong += newcomer(s);
      break;
    default:
      wrong += receive(s, false);
      break;
  }
  wrong += leases(s, 0);
  wrong += counts(s);
  wrong += checker(s);
  if (pages_behind(s.survivor->arena()) > s.survivor->stats().committed) wrong += "; more pages than are counted";
  wrong += verify_queue(s);
  if (variant % kVariants == 1) {
    // Messages are given up where there is no room otherwise; they are stale then, unless the survivor holds the block itself.
    const auto messages = s.messages();
    s.survivor->set_ticket_age(0);
    if (s.survivor->allocate(s.survivor->arena().header().limit.load(), false)) wrong += "; more memory than there is";
    wrong += all_memory(s);
    wrong += error_for(s, s.letter, "the message that was taken back");
    for (const Handle& handle : messages) {
      const bool own =
          std::any_of(s.held.begin(), s.held.end(), [&](const Held& h) { return h.block == handle.block; });
      if (!own) wrong += error_for(s, handle, "a message that was taken back");
    }
  } else {
    if (variant % kVariants != 3) wrong += receive(s, true);
    wrong += all_memory(s);
  }
  const auto blocks = s.survivor->stats().blocks;
  if (blocks != s.held.size()) wrong += "; " + std::to_string(blocks) + " blocks in the end";
  wrong += counts(s);
  wrong += checker(s);
  wrong += held_bytes(s);
  wrong += error_for(s, s.stale, "the stale handle");
  while (!s.held.empty()) s.let_go();
  (void)s.survivor->trim(0);
  const uint64_t committed = s.survivor->stats().committed, behind = pages_behind(s.survivor->arena());
  if (committed != 0) wrong += "; " + std::to_string(committed) + " bytes count as committed in the end";
  if (behind != 0) wrong += "; " + std::to_string(behind) + " bytes have pages in the end";
  wrong += checker(s);
  return wrong.empty() ? wrong : wrong.substr(2);
}

}  // namespace torchshm::torture
