// What is in memory and what on disk: loading, writing to what is loaded, policies, and what passes between the two, as Spill and Eviction do it.
#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "base/failpoint.h"
#include "store/catalogue.h"
#include "store/eviction.h"
#include "store/key.h"
#include "store/spill.h"

namespace torchshm::store {

using pool::Mode;

bool Catalogue::set_policy(std::string_view name, Policy policy) {
  const Key key(name);
  while (const auto found = look(key)) {
    Place place = found->place;
    touch();
    if (!change_standing(place.value.cell, place.value.life, [&](StandingValue& value) { value.policy = policy; }))
      continue;  // replaced, or brought back
    TORCHSHM_POINT("policy.changed");
    // Who has read the policy from before that must not remove the value by it any more: see replace(). Where its successor was made
    // before that, it is looked for again; where it is made after, its maker looks: see succeed().
    if (!change_slot(place, SlotState::kNamed, place.value.cell, place.value.life)) continue;
    header().policies.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  return false;
}

Result<Entry> Catalogue::load(std::string_view name) {
  auto entry = find(name);
  if (!entry || entry->spilled) return entry;
  if (!entry->blocks.empty()) member_.prefetch(entry->blocks.front().block);
  // Relaxed: a mistake makes it go a little early or late.
  std::atomic<uint64_t>& used = use_of(entry->cell).used;
  const uint64_t now = header().clock.load(std::memory_order_relaxed);
  if (used.load(std::memory_order_relaxed) != now) used.store(now, std::memory_order_relaxed);
  count(counters().loads);
  return entry;
}

Status Catalogue::restore(std::string_view name, bool alone) {
  for (int attempt = 0; attempt < 1000; ++attempt) {
    auto entry = find(name);
    if (!entry) return entry.code() == Code::kMissing ? Status() : std::move(entry.status());
    if (!entry->spilled) return {};
    Status back = spill_->back(*entry, alone);
    if (back.code() != Code::kStale) return back;
  }
  return Status(Code::kBusy, "the value changes all the time");
}

Result<Catalogue::Writing> Catalogue::hold_for_writing(const Entry& entry, bool alone) {
  Writing writing(*this);
  // First the flag, then the holds, then a look whether somebody is writing it out: who does that claims it first, and looks at holds and
  // flag afterwards. So one of the two sees the other.
  if (!change_standing(entry.cell, entry.life, [](StandingValue& value) { value.flags |= kWritten; }))
    return Status(Code::kStale, "the name has been replaced");
  TORCHSHM_POINT("writing.flagged");
  for (const Entry::Block& block : entry.blocks) {
    auto view = member_.attach(block.block, block.generation, Mode::kReadWrite);
    if (!view) return std::move(view.status());
    writing.blocks_.push_back(view->block);
  }
  TORCHSHM_POINT("writing.held");
  std::atomic<uint64_t>& claim = use_of(entry.cell).claim;
  uint64_t claimed = claim.load(std::memory_order_seq_cst);
  const bool busy = claimed != 0 && !member_.gone(claimed);
  if (busy && alone) return Status(Code::kBusy, "the value is just being written to disk");
  if (claimed != 0 && !busy) (void)claim.compare_exchange_strong(claimed, 0, std::memory_order_seq_cst);
  Found found;
  found.place = {entry.slot, SlotValue::of(slot(entry.slot).value.load())};
  const SlotValue& now = found.place.value;
  if (now.state != SlotState::kNamed || now.cell != entry.cell || now.life != entry.life)
    return Status(Code::kStale, "the name has been replaced");
  // Its file is known to be old by the flag; of another name that has the same blocks this process knows nothing. Who holds them besides
  // may be one.
  std::unordered_map<uint32_t, uint32_t> own;  // tickets
  for (const Entry::Block& block : entry.blocks) ++own[block.block];
  if (std::any_of(own.begin(), own.end(), [&](const auto& block) {
        const auto value = pool::BlockValue::of(member_.arena().block(block.first).value.load());
        return value.count > block.second + 1;
      }))
    header().shared_writes.fetch_add(1, std::memory_order_seq_cst);
  if (!busy) return writing;
  // In another cell the same blocks are in use: what the stopped one prepared for this cell fails.
  found.body = read_body(entry.cell);
  Status apart =
      succeed(found, entry.text, writing.blocks_, {entry.created, entry.expires, 0, entry.bytes, kWritten, entry.pid});
  if (!apart) return apart;
  return writing;
}

Catalogue::Writing::Writing(Writing&& other) noexcept
    : catalogue_(other.catalogue_), blocks_(std::exchange(other.blocks_, {})) {}

Catalogue::Writing::~Writing() {
  for (const uint32_t block : blocks_) catalogue_->member_.release(block, Mode::kReadWrite);
}

void Catalogue::use(std::unique_ptr<SpillDirectory> directory) { spill_->use(std::move(directory)); }

std::string Catalogue::directory() const {
  if (header().spilling.load(std::memory_order_acquire) == 0) return "";
  return {header().directory, ::strnlen(header().directory, sizeof(Header::directory))};
}

// REQUIRES: shorter than the field.
void Catalogue::set_directory(const std::string& path) {
  std::memcpy(header().directory, path.c_str(), path.size() + 1);
  header().spilling.store(1, std::memory_order_release);
}

int Catalogue::directory_fd() const { return spill_->directory_fd(); }

void Catalogue::leave_directory() { spill_->leave(); }

uint64_t Catalogue::make_room(uint64_t bytes) { return eviction_->make_room(bytes); }

std::string Catalogue::advice() const {
  const bool drops = header().policy.load(std::memory_order_relaxed) == static_cast<uint32_t>(Policy::kDrop);
  const bool may_spill = header().spilling.load(std::memory_order_acquire) == 0 && !backing_ && !drops;
  return std::string("remove names, or start the store with a larger limit=") + (may_spill ? ", or with spill=" : "");
}
uint64_t Catalogue::write_ahead() { return eviction_->write_ahead(); }
std::optional<uint32_t> Catalogue::sweep_files() { return spill_->sweep(); }
uint32_t Catalogue::sweep_discarded(bool all) { return spill_->sweep_discarded(all); }
std::string Catalogue::trouble() const { return spill_->trouble(); }

// ---- statistics

Counters& Catalogue::counters() const {
  return reinterpret_cast<Counters*>(file_.data() + offsets::kCountersAt)[member_.membership().slot()];
}

// With a single writer, or as good as.
void Catalogue::count(std::atomic<uint64_t>& counter, uint64_t by) {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

void Catalogue::count_wait() { count(counters().room_waits); }

Catalogue::Totals Catalogue::totals() const {
  Totals sum;
  for (uint32_t i = 0; i < member_.arena().slots_used(); ++i) {
    const Counters& of = reinterpret_cast<const Counters*>(file_.data() + offsets::kCountersAt)[i];
    sum.loads += of.loads.load(std::memory_order_relaxed);
    sum.restores += of.restores.load(std::memory_order_relaxed);
    sum.restored_bytes += of.restored_bytes.load(std::memory_order_relaxed);
    sum.spills += of.spills.load(std::memory_order_relaxed);
    sum.spilled_bytes += of.spilled_bytes.load(std::memory_order_relaxed);
    sum.written += of.written.load(std::memory_order_relaxed);
    sum.written_bytes += of.written_bytes.load(std::memory_order_relaxed);
    sum.evictions += of.evictions.load(std::memory_order_relaxed);
    sum.spill_errors += of.spill_errors.load(std::memory_order_relaxed);
    sum.room_waits += of.room_waits.load(std::memory_order_relaxed);
  }
  if (header().spilling.load(std::memory_order_relaxed) == 0) return sum;
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    const CellValue found = cell_value(cell);
    if (found.state != CellState::kStanding || (standing(cell).flags & kSpilled) == 0) continue;
    ++sum.names_on_disk;
    sum.bytes_on_disk += use_of(cell).bytes.load(std::memory_order_relaxed);
  }
  return sum;
}

}  // namespace torchshm::store
