#include "pool/stats.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

namespace torchshm::pool {
namespace {

std::string readable(uint64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(units); ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return text;
}

void add_block(const Arena& arena, uint32_t block, Stats& stats) {
  if (!BlockValue::of(arena.block(block).value.load()).live) return;
  if (const auto extent = arena.extent(block)) {
    ++stats.blocks;
    stats.live += extent->length;
  }
}

Signature signature_of(const Lease& lease) {
  const uint64_t words[2] = {lease.name[0].load(std::memory_order_relaxed),
                             lease.name[1].load(std::memory_order_relaxed)};
  char name[sizeof words + 1] = {};
  std::memcpy(name, words, sizeof words);
  return {lease.pid.load(std::memory_order_relaxed), name};
}

LeaseStats describe(const Arena& arena, uint32_t slot) {
  const Lease& lease = arena.lease(slot);
  LeaseStats out;
  out.slot = slot;
  const Signature signature = signature_of(lease);
  out.pid = signature.pid;
  out.name = signature.name;
  out.allocations = lease.allocations.load(std::memory_order_relaxed);
  out.fallbacks = lease.fallbacks.load(std::memory_order_relaxed);
  out.grown_bytes = lease.grown.load(std::memory_order_relaxed);
  const uint64_t end = std::min<uint64_t>(lease.ledger_end.load(std::memory_order_relaxed), arena.pages() / 64);
  for (uint64_t word = 0; word < end; ++word) {
    for (uint64_t bits = arena.ledger(slot, word).load(std::memory_order_relaxed); bits != 0; bits &= bits - 1) {
      if (const auto extent =
              arena.extent(static_cast<uint32_t>(word * 64 + static_cast<uint64_t>(std::countr_zero(bits))))) {
        ++out.held_blocks;
        out.held_bytes += extent->length;
      }
    }
  }
  return out;
}

}  // namespace

std::vector<Signature> signatures(const Arena& arena) {
  std::vector<Signature> all;
  for (uint32_t slot = 0, used = arena.slots_used(); slot < used; ++slot) {
    const Lease& lease = arena.lease(slot);
    if ((lease.word.load(std::memory_order_acquire) & 0xff) == kLeaseLive) all.push_back(signature_of(lease));
  }
  return all;
}

Stats collect(const Arena& arena) {
  Stats stats;
  const Header& header = arena.header();
  stats.limit = header.limit.load(std::memory_order_relaxed);
  stats.warm_limit = header.warm.load(std::memory_order_relaxed);
  stats.reaped = header.reaped.load(std::memory_order_relaxed);
  stats.taken_back = header.taken_back.load(std::memory_order_relaxed);
  for (uint32_t i = 0, used = arena.chunks_used(); i < used; ++i) {
    const ChunkValue chunk = ChunkValue::of(arena.chunk(i).value.load());
    stats.committed += chunk.committed * kPage;
    if (chunk.state == ChunkState::kIdle) stats.warm += chunk.committed * kPage;
    if (chunk.state == ChunkState::kRun && chunk.head == i) add_block(arena, i * kPagesPerChunk, stats);
    if (chunk.state == ChunkState::kSmall) {
      for (uint32_t page = 0; page < kPagesPerChunk; ++page) add_block(arena, i * kPagesPerChunk + page, stats);
    }
  }
  std::vector<uint32_t> under_way;
  for (uint32_t i = 0, used = arena.tickets_used(); i < used; ++i) {
    const TicketValue ticket = TicketValue::of(arena.ticket(i).value.load());
    if (ticket.sender == 0) continue;
    ++(ticket.sender == TicketValue::kName ? stats.named : stats.tickets);
    if (ticket.sender != TicketValue::kName) under_way.push_back(ticket.block);
  }
  // A block may be in several messages.
  std::sort(under_way.begin(), under_way.end());
  under_way.erase(std::unique(under_way.begin(), under_way.end()), under_way.end());
  for (const uint32_t block : under_way) {
    if (block >= arena.pages() || !BlockValue::of(arena.block(block).value.load()).live) continue;
    if (const auto extent = arena.extent(block)) stats.ticket_bytes += extent->length;
  }
  for (uint32_t slot = 0, used = arena.slots_used(); slot < used; ++slot) {
    if ((arena.lease(slot).word.load(std::memory_order_acquire) & 0xff) == kLeaseLive)
      stats.leases.push_back(describe(arena, slot));
  }
  stats.control = stats.blocks * sizeof(Block) + arena.chunks_used() * sizeof(Chunk) +
                  arena.tickets_used() * sizeof(Ticket) +
                  stats.leases.size() * (arena.chunks_used() * (kPagesPerChunk / 8) + sizeof(Lease));
  return stats;
}

std::string summary(const Stats& stats) {
  std::string text = readable(stats.live) + " live in " + std::to_string(stats.blocks) + " blocks, " +
                     readable(stats.warm) + " warm, limit " + readable(stats.limit) + ", " +
                     std::to_string(stats.tickets) + " unreceived" +
                     (stats.named != 0 ? ", " + std::to_string(stats.named) + " kept by names" : "");
  std::vector<LeaseStats> largest = stats.leases;
  std::sort(largest.begin(), largest.end(), [](const auto& a, const auto& b) { return a.held_bytes > b.held_bytes; });
  if (largest.size() > 4) largest.resize(4);
  for (const LeaseStats& lease : largest) {
    if (lease.held_bytes == 0) break;
    text += "; pid " + std::to_string(lease.pid) + " (" + lease.name + ") holds " + readable(lease.held_bytes);
  }
  return text;
}

}  // namespace torchshm::pool
