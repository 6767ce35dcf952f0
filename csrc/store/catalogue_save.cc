// How a name appears: a cell is claimed, filled, and put into the index. docs/store.md has the order of steps.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "base/failpoint.h"
#include "os/futex.h"
#include "pool/mark.h"
#include "store/catalogue.h"
#include "store/key.h"

namespace torchshm::store {
namespace {

using pool::Handle;
using pool::Pair;

constexpr uint32_t kBatch = 64;  // cells looked at before the table grows; arbitrary
constexpr uint64_t kMost = uint64_t{1} << 60;
constexpr const char* kNoRoom = "the catalogue has no room for a further name";

Part part_of(const Handle& handle) { return {handle.block, handle.ticket, handle.generation, handle.nonce}; }

void pause(int attempt) {
  thread_local std::minstd_rand random(std::random_device{}());
  const int most = 1 << std::min(attempt, 10);
  std::this_thread::sleep_for(std::chrono::microseconds(random() % static_cast<unsigned>(most)));
}

}  // namespace

std::optional<std::pair<uint32_t, CellValue>> Catalogue::claim_cell(Status& full) {
  touch();
  const uint64_t me = member_.identity();
  const auto take = [&](uint32_t cell) -> std::optional<std::pair<uint32_t, CellValue>> {
    CellValue found = cell_value(cell);
    if (found.state != CellState::kFree) return std::nullopt;
    ++found.life;
    CellValue before = found;
    --before.life;
    CellValue next = found;
    next.state = CellState::kMaking;
    next.owner = me;
    ++next.step;
    Pair expected = before.pair();
    if (!word(cell).value.exchange_if(expected, next.pair())) return std::nullopt;
    // Not the claim: who has it, from an earlier life, lets go of it.
    begin_standing(cell, {next.life});
    return std::make_pair(cell, next);
  };
  // Relaxed: where to begin is a matter of taste.
  uint32_t cursor = cursor_.load(std::memory_order_relaxed);
  for (uint32_t i = 0; i < kBatch && cells_used() > 0; ++i) {
    const uint32_t cell = (cursor + i) % cells_used();
    if (auto taken = take(cell)) {
      cursor_.store(cell + 1, std::memory_order_relaxed);
      return taken;
    }
  }
  for (;;) {
    const uint32_t used = cells_used();
    if (used == kCells || !(full = reserve_cells(std::min(used + kBatch, kCells)))) break;
    pool::raise(header().cells_used, std::min(used + kBatch, kCells));
    TORCHSHM_POINT("save.cells_raised");
    for (uint32_t cell = used; cell < std::min(used + kBatch, kCells); ++cell) {
      if (auto taken = take(cell)) {
        cursor_.store(cell + 1, std::memory_order_relaxed);
        return taken;
      }
    }
  }
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    if (auto taken = take(cell)) return taken;
  }
  return std::nullopt;
}

// REQUIRES: the cell is this process's. Those who were at work at an earlier life of it may still try to change that.
void Catalogue::begin_standing(uint32_t cell, const StandingValue& value) {
  pool::AtomicPair& word = use_of(cell).standing;
  Pair found = word.load();
  while (!word.exchange_if(found, value.pair())) continue;
}

// Issues a ticket for everything, writes down each before the next, and makes them the name's when all is written.
Status Catalogue::fill(uint32_t cell, const Key& key, std::string_view text, const std::vector<uint32_t>& blocks,
                       const SaveOptions& options, const Origin* origin) {
  Body body;
  body.hash = key.hash;
  body.created = os::real_time();
  // A bound name lives as long as its owner, not as long as the store's data.
  const uint64_t standard = options.bound ? 0 : header().default_ttl.load(std::memory_order_relaxed);
  const uint64_t ttl = options.ttl != 0 ? options.ttl : standard;
  if (ttl != 0) body.expires = now() + std::min(ttl, kMost);
  body.owner = options.bound ? member_.identity() : 0;
  body.pid = member_.pid();
  uint64_t bytes = 0;
  for (const uint32_t block : blocks) {
    if (const auto extent = member_.arena().extent(block)) bytes += extent->length;
  }
  StandingValue known = standing(cell);
  known.policy = options.policy.value_or(static_cast<Policy>(header().policy.load(std::memory_order_relaxed)));
  if (origin != nullptr) {
    body.created = origin->created;
    body.expires = origin->expires;
    body.pid = origin->pid;
    bytes = origin->bytes;
    known.flags = origin->flags;
    known.file = origin->file;
  } else if (options.policy && !is_mark(key.text)) {
    header().policies.fetch_add(1, std::memory_order_relaxed);
  }
  if (options.bound || is_mark(key.text)) known.policy = Policy::kPin;
  Use& use = use_of(cell);
  use.bytes.store(bytes, std::memory_order_relaxed);
  use.shared_writes.store(header().shared_writes.load(std::memory_order_seq_cst), std::memory_order_seq_cst);
  use.used.store(header().clock.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  begin_standing(cell, known);
  body.key_bytes = static_cast<uint32_t>(key.text.size());
  body.text_bytes = static_cast<uint32_t>(text.size());
  const bool fits = key.text.size() + text.size() <= kInline;
  if (fits) {
    std::memcpy(body.text, key.text.data(), key.text.size());
    std::memcpy(body.text + key.text.size(), text.data(), text.size());
  }
  write_body(cell, body);
  TORCHSHM_POINT("save.body");

  std::vector<Handle> handles;
  handles.reserve(blocks.size() + 1);
  const uint64_t list = blocks.size() > 1 ? (blocks.size() - 1) * sizeof(Part) : 0;
  std::optional<pool::Member::View> overflow;
  Status failed;
  if (list != 0 || !fits) {
    auto made = member_.allocate(list + (fits ? 0 : key.text.size() + text.size()), false, true);
    if (!made) return std::move(made.status());
    overflow = *made;
    if (!fits) {
      std::memcpy(made->data + list, key.text.data(), key.text.size());
      std::memcpy(made->data + list + key.text.size(), text.data(), text.size());
    }
    if (auto handle = member_.issue(made->block)) {
      handles.push_back(*handle);
      body.overflow = part_of(*handle);
      write_body(cell, body);
      TORCHSHM_POINT("save.overflow");
    } else {
      failed = std::move(handle.status());
    }
  }
  for (size_t i = 0; failed && i < blocks.size(); ++i) {
    auto handle = member_.issue(blocks[i]);
    if (!handle) {
      failed = std::move(handle.status());
      break;
    }
    handles.push_back(*handle);
    const Part part = part_of(*handle);
    if (i == 0) {
      body.first = part;
    } else {
      std::memcpy(overflow->data + (i - 1) * sizeof(Part), &part, sizeof part);
    }
    body.parts = static_cast<uint32_t>(i + 1);
    std::atomic_thread_fence(std::memory_order_release);  // the list before its length
    write_body(cell, body);
    TORCHSHM_POINT("save.part");
  }
  for (const Handle& handle : handles) {
    if (!failed) break;
    if (!member_.keep(handle)) failed = Status(Code::kFull, "a full pool has taken back what was being saved");
    TORCHSHM_POINT("save.kept");
  }
  if (overflow) member_.release_made(overflow->block);
  return failed;
}

std::optional<Place> Catalogue::claim_slot(uint32_t cell, uint32_t life, const Key& key, Status& full) {
  bool grows = true;
  for (;;) {
    const uint32_t used = levels();
    for (uint32_t level = used; level-- > 0;) {
      for (uint32_t i = 0; i < kWindow; ++i) {
        Place place;
        place.index = slot_index(key.hash, level, i);
        place.value = SlotValue::of(slot(place.index).value.load());
        if (place.value.state != SlotState::kEmpty && place.value.state != SlotState::kGone) continue;
        SlotValue next{SlotState::kClaimed, key.tag, cell, life, place.value.sequence + 1};
        Pair expected = place.value.pair();
        if (!slot(place.index).value.exchange_if(expected, next.pair())) continue;
        place.value = next;
        return place;
      }
      if (grows && level + 1 == used && used < kLevels)
        break;  // the next level is empty; better than the crowded ones below
    }
    if (used == kLevels || !grows) return std::nullopt;
    full = reserve_level(used);
    grows = full.ok();
    if (!grows) continue;  // what is there may do
    pool::raise(header().levels, used + 1);
    TORCHSHM_POINT("save.level_raised");
  }
}

// Whoever claims a slot for a name looks, after that, at all others: for rivals, whose claims it ends, and for the name. Of two rivals one
// at least sees the other, so no two can both succeed; and one that is ended tries again.
Status Catalogue::publish(uint32_t cell, uint32_t life, const Key& key, bool overwrite) {
  for (int attempt = 0;; ++attempt) {
    if (const auto found = look(key)) {
      if (!overwrite) return Status(Code::kExists, "the name is taken");
      const SlotValue successor{SlotState::kNamed, key.tag, cell, life, 0};
      if (replace(*found, &successor)) return {};
      continue;
    }
    TORCHSHM_POINT("save.looked");
    Status full;
    auto place = claim_slot(cell, life, key, full);
    if (!place) return full ? Status(Code::kFull, kNoRoom) : std::move(full);
    TORCHSHM_POINT("save.claimed");
    while (auto rival = search(key, SlotState::kClaimed, place->index)) {
      (void)change_slot(rival->place, SlotState::kGone, 0, 0);
      TORCHSHM_POINT("save.rival_ended");
    }
    if (search(key, SlotState::kNamed)) {
      (void)change_slot(*place, SlotState::kGone, 0, 0);  // or a rival has done it
      TORCHSHM_POINT("save.unclaimed");
      continue;
    }
    if (change_slot(*place, SlotState::kNamed, cell, life)) return {};
    pause(attempt);
  }
}

Status Catalogue::save(std::string_view name, std::string_view text, const std::vector<uint32_t>& blocks,
                       const SaveOptions& options) {
  if (name.empty() || name.size() > (name[0] == 0 ? kMaxKey : kMaxName))
    return Status(Code::kInvalid, "a name has 1 to " + std::to_string(kMaxName) + " bytes");
  if (!is_mark(name) && !is_utf8(name))
    return Status(Code::kInvalid, "a name is text in UTF-8: others could not look for this one");
  if (blocks.size() > kMaxParts) return Status(Code::kInvalid, "too many parts for one name; save them under several");
  if (text.size() > kMaxText)
    return Status(Code::kInvalid,
                  "too many plain values for one name: all that is no array, tensor or buffer has 64 MiB at most; save "
                  "it in parts, or "
                  "as an array");
  const Key key(name);
  // Before the work: most that fail, fail here.
  if (!options.overwrite && look(key)) return Status(Code::kExists, "the name is taken");
  Status full(Code::kFull, kNoRoom);
  auto claimed = claim_cell(full);
  if (!claimed && sweep() > 0) claimed = claim_cell(full);
  if (!claimed) return full ? Status(Code::kFull, kNoRoom) : std::move(full);
  auto [cell, mine] = *claimed;
  TORCHSHM_POINT("save.cell");
  Status status = fill(cell, key, text, blocks, options, nullptr);
  TORCHSHM_POINT("save.filled");
  if (status) status = publish(cell, mine.life, key, options.overwrite);
  TORCHSHM_POINT("save.published");
  if (!status) {
    if (change_cell(cell, mine, CellState::kReleasing, mine.owner)) release_cell(cell);
    return status;
  }
  // Unless somebody has taken the name away already.
  (void)change_cell(cell, mine, options.bound ? CellState::kBound : CellState::kStanding,
                    options.bound ? mine.owner : 0);
  TORCHSHM_POINT("save.standing");
  header().saved.fetch_add(1, std::memory_order_relaxed);
  ring(name);
  return {};
}

Status Catalogue::succeed(const Found& found, std::string_view text, const std::vector<uint32_t>& blocks,
                          const Origin& origin, std::optional<Policy> only) {
  const auto name = key_of(found.body);
  if (!name) return Status(Code::kStale, "the name has gone");
  const Key key(*name);
  Status full(Code::kFull, kNoRoom);
  auto claimed = claim_cell(full);
  if (!claimed) return full ? Status(Code::kFull, kNoRoom) : std::move(full);
  auto [cell, mine] = *claimed;
  TORCHSHM_POINT("succeed.cell");
  SaveOptions options;
  options.policy = standing(found.place.value.cell).policy;
  Status status = fill(cell, key, text, blocks, options, &origin);
  TORCHSHM_POINT("succeed.filled");
  const SlotValue successor{SlotState::kNamed, key.tag, cell, mine.life, 0};
  if (status) {
    header().moves.fetch_add(1, std::memory_order_seq_cst);
    if (!replace(found, &successor, only)) status = Status(Code::kStale, "the name has been replaced");
  }
  TORCHSHM_POINT("succeed.exchanged");
  if (!status) {
    // The file is still the other cell's, or nobody's.
    (void)change_standing(cell, mine.life, [](StandingValue& value) { value.file = 0; });
    if (change_cell(cell, mine, CellState::kReleasing, mine.owner)) release_cell(cell);
    return status;
  }
  // Changed since it was read.
  const StandingValue late = standing(found.place.value.cell);
  if (late.life == found.place.value.life && late.policy != *options.policy)
    (void)change_standing(cell, mine.life, [&](StandingValue& value) {
      if (value.policy == *options.policy) value.policy = late.policy;
    });
  (void)change_cell(cell, mine, CellState::kStanding, 0);
  TORCHSHM_POINT("succeed.standing");
  return {};
}

}  // namespace torchshm::store
