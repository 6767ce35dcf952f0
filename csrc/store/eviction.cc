#include "store/eviction.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <deque>
#include <thread>
#include <unordered_map>

#include "base/failpoint.h"
#include "os/futex.h"

namespace torchshm::store {
namespace {

using pool::BlockValue;
using How = Spill::How;

constexpr uint32_t kFewCells = 4096;
constexpr uint64_t kListed = 32;  // of the limit, as much as is taken by one list
constexpr uint64_t kFit = 4;      // of all that could go, as much as is looked at for neighbours; arbitrary
constexpr uint32_t kInOrder = 4;  // how often the order alone counts; arbitrary
constexpr uint64_t kLookAnyway = 2'000'000'000, kTryAgain = 1'000'000'000;  // ns
constexpr int kBusyTries = 20;
constexpr std::chrono::milliseconds kBusyRest{1};
// Of the limit: from where on files are written ahead, and how much of what goes next should have one.
constexpr uint64_t kFilling = 4, kAhead = 4;

uint32_t chunks_of(uint64_t bytes) { return static_cast<uint32_t>((bytes + pool::kChunk - 1) / pool::kChunk); }

uint32_t rank_of(Policy policy) {
  switch (policy) {
    case Policy::kDrop:
      return 0;
    case Policy::kSpill:
      return 1;
    default:
      return 2;
  }
}

}  // namespace

std::vector<Eviction::Unit> Eviction::gather() const {
  const pool::Arena& arena = catalogue_.member().arena();
  std::vector<Unit> units;
  std::unordered_map<uint32_t, size_t> chunks;  // which unit is a chunk's
  for (uint32_t cell = 0, used = catalogue_.cells_used(); cell < used; ++cell) {
    const CellValue value = catalogue_.cell_value(cell);
    if (value.state != CellState::kStanding) continue;
    const StandingValue known = catalogue_.standing(cell);
    const Policy policy = known.policy;
    if (policy == Policy::kPin || (policy != Policy::kDrop && !spill_.ready())) continue;
    if (known.life != value.life || (known.flags & kSpilled) != 0) continue;
    const Use& use = catalogue_.use_of(cell);
    const Name name{cell, value.life, use.used.load(std::memory_order_relaxed),
                    use.bytes.load(std::memory_order_relaxed)};
    if (name.bytes == 0) continue;
    const Body body = catalogue_.read_body(cell);
    if (body.parts == 0 || body.first.block >= arena.pages()) continue;
    const BlockValue block = BlockValue::of(arena.block(body.first.block).value.load());
    // In use: it would be looked at in vain.
    if (!block.live || block.generation != body.first.generation || (body.parts == 1 && block.count != 1)) continue;
    size_t at = units.size();
    if (block.granules != 0) {
      const auto [known, fresh] = chunks.try_emplace(body.first.block / pool::kPagesPerChunk, at);
      at = known->second;
      if (fresh) units.emplace_back();
    } else {
      units.emplace_back();
    }
    Unit& unit = units[at];
    unit.rank = std::max(unit.rank, rank_of(policy));
    unit.used += name.used;
    unit.bytes += name.bytes;
    if (block.granules == 0 && body.parts == 1) {
      const auto extent = arena.extent(body.first.block);
      unit.first = body.first.block / pool::kPagesPerChunk;
      unit.chunks = extent ? chunks_of(extent->length) : 0;  // more than the value: it may have a head
    }
    unit.names.push_back(name);
  }
  for (Unit& unit : units) unit.used /= unit.names.size();
  std::sort(units.begin(), units.end(),
            [](const Unit& a, const Unit& b) { return a.rank != b.rank ? a.rank < b.rank : a.used < b.used; });
  return units;
}

// A look at few names costs little. At many it is done once for a part of the memory.
bool Eviction::stale(const List& list) const {
  return catalogue_.cells_used() < kFewCells || list.good_for == 0 ||
         list.policies != catalogue_.header().policies.load(std::memory_order_relaxed);
}

size_t Eviction::fit(List& list, uint64_t bytes) {
  const pool::Arena& arena = catalogue_.member().arena();
  const uint32_t need = chunks_of(bytes), used = arena.chunks_used();
  if (need <= 1 || need > used || list.next == list.units.size()) return 0;
  const bool oldest_too = turn_.fetch_add(1, std::memory_order_relaxed) % kInOrder == kInOrder - 1;
  constexpr uint64_t kNever = ~uint64_t{0};
  // Of each chunk: how much would have gone when it is free, in order.
  std::vector<uint64_t> cost(used, kNever);
  for (uint32_t i = 0; i < used; ++i) {
    if (pool::ChunkValue::of(arena.chunk(i).value.load()).state == pool::ChunkState::kIdle) cost[i] = 0;
  }
  const auto begin = list.units.begin() + static_cast<std::ptrdiff_t>(list.next);
  uint64_t all = 0;
  for (auto at = begin; at != list.units.end(); ++at) all += at->bytes;
  const uint64_t most = std::max(all / kFit, 2 * bytes);
  auto end = begin;
  for (uint64_t before = 0; end != list.units.end() && end->rank == begin->rank && before < most; ++end) {
    before += end->bytes;
    const Name& name = end->names.front();
    if (catalogue_.use_of(name.cell).used.load(std::memory_order_relaxed) != name.used) continue;
    for (uint32_t i = end->first; i < std::min(end->first + end->chunks, used); ++i) cost[i] = before;
  }
  // The run whose dearest chunk is the cheapest: `dearest` has those that may yet be one, the dearest first.
  uint64_t best = kNever;
  uint32_t where = 0;
  std::deque<uint32_t> dearest;
  for (uint32_t i = 0; i < used; ++i) {
    while (!dearest.empty() && cost[dearest.back()] <= cost[i]) dearest.pop_back();
    dearest.push_back(i);
    if (dearest.front() + need <= i) dearest.pop_front();
    if (i + 1 < need || cost[dearest.front()] >= best) continue;
    best = cost[dearest.front()];
    where = i + 1 - need;
  }
  if (best == kNever) return 0;
  const auto after = std::stable_partition(begin, end, [&](const Unit& unit) {
    return unit.chunks != 0 && unit.first < where + need && unit.first + unit.chunks > where;
  });
  return static_cast<size_t>(after - begin) + (oldest_too && after != list.units.end() ? 1 : 0);
}

// Where one is too large for a disk that is nearly full, or for a limit of files, smaller ones may not be: half as large at most, so that few
// are tried in vain.
void Eviction::Writable::failed(const Status& status, uint64_t bytes) {
  const bool large = status.error() == ENOSPC || status.error() == EDQUOT || status.error() == EFBIG;
  most_ = large ? std::min(most_, bytes / 2) : 0;
}

uint64_t Eviction::take(List& list, uint64_t bytes) {
  uint64_t freed = 0;
  Writable writable;  // for now
  if (stale(list)) list.next = list.units.size();
  size_t together = list.next + fit(list, bytes);  // until there
  for (int attempt = 0; attempt < kBusyTries; ++attempt) {
    bool busy = false;
    for (; list.next < list.units.size() && (freed < bytes || list.next < together); ++list.next) {
      for (const Name& name : list.units[list.next].names) {
        // Loaded since the list was made: it is not next any more.
        if (attempt == 0 && catalogue_.use_of(name.cell).used.load(std::memory_order_relaxed) != name.used) continue;
        auto given = spill_.out(name.cell, name.life, writable(name.bytes) ? How::kWrite : How::kFree);
        if (given) {
          freed += *given;
          list.good_for -= std::min(list.good_for, *given);
        } else if (given.code() == Code::kBusy) {
          busy = true;
        } else {
          writable.failed(given.status(), name.bytes);  // others may have their files
        }
      }
    }
    if (freed >= bytes) break;
    if (attempt > 0 && freed > 0) break;
    // Used up: once more from the beginning. What another one is just writing out will be room in a moment.
    if (attempt > 0 && !busy) break;
    if (attempt > 0) std::this_thread::sleep_for(kBusyRest);
    if (attempt == 0 && catalogue_.sweep() > 0) list.good_for = 0;
    list.policies = catalogue_.header().policies.load(std::memory_order_relaxed);
    list.good_for = catalogue_.member().usage().limit / kListed;
    list.units = gather();
    list.next = 0;
    together = fit(list, bytes);
  }
  return freed;
}

uint64_t Eviction::make_room(uint64_t bytes) {
  catalogue_.header().room_wanted.fetch_add(1, std::memory_order_relaxed);
  os::wake_all(catalogue_.header().room_wanted);
  const pool::Member::Restraint restraint;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock.owns_lock()) return take(list_, bytes);
  List own;
  return take(own, bytes);
}

uint64_t Eviction::write_ahead() {
  const pool::Member::Usage usage = catalogue_.member().usage();
  if (!spill_.ready() || usage.committed - usage.idle < usage.limit / kFilling * (kFilling - 1)) return 0;
  // What has not come since cannot need a file, but for what somebody has let go of.
  const uint64_t clock = catalogue_.header().clock.load(std::memory_order_relaxed), now = os::boot_time();
  if (clock == nothing_at_ && now - nothing_since_ < kLookAnyway) return 0;
  const pool::Member::Restraint restraint;
  uint64_t ready = 0, written = 0;
  // What could not be written is tried again in a while: each try may fill a disk for everybody.
  if (now - ahead_since_ > kTryAgain) ahead_ = {};
  for (const Unit& unit : gather()) {
    if (ready >= usage.limit / kAhead) break;
    for (const Name& name : unit.names) {
      ready += name.bytes;
      const StandingValue known = catalogue_.standing(name.cell);
      if (known.life != name.life || known.file != 0 || !ahead_(name.bytes)) continue;
      auto copied = spill_.out(name.cell, name.life, How::kCopy);
      if (copied) written += *copied;
      if (!copied && copied.code() != Code::kBusy) {
        ahead_.failed(copied.status(), name.bytes);
        ahead_since_ = now;
      }
      if (ahead_.none()) return written;
    }
  }
  if (written == 0) {
    nothing_at_ = clock;
    nothing_since_ = now;
  }
  return written;
}

}  // namespace torchshm::store
