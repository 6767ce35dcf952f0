// How a name goes: removed, replaced, expired, or left behind half done by a process that died. docs/store.md has the order of steps.
#include <cstring>
#include <utility>

#include "base/failpoint.h"
#include "os/futex.h"
#include "store/catalogue.h"
#include "store/key.h"
#include "store/spill.h"

namespace torchshm::store {

using pool::Mode;

// Marks the cell first, so that it is known whose work it is when this process dies between the exchange and the release. Marks are taken
// over from anyone: whoever finds that the slot has let go of the cell, by its own exchange or another's, lets the cell go. A policy that
// changes moves the slot's sequence afterwards: what was read before it then fails, and is read again.
bool Catalogue::replace(const Found& found, const SlotValue* successor, std::optional<Policy> only) {
  Place place = found.place;
  const uint32_t cell = place.value.cell, life = place.value.life;
  const uint64_t me = member_.identity();
  touch();
  CellValue marked, before;  // by this one, and what it was before that
  for (;;) {
    CellValue now = cell_value(cell);
    do {
      if (now.life != life || now.state == CellState::kFree || now.state == CellState::kReleasing) return false;
      if (now != marked) before = now;
    } while (!change_cell(cell, now, CellState::kLeaving, me));
    marked = now;
    TORCHSHM_POINT("replace.marked");
    if (only && standing(cell).policy != *only) {
      // Unless another one has it by now. A mark of the dead, which was there before, is finished by who finds it.
      (void)change_cell(cell, marked, before.state, before.owner);
      return false;
    }
    TORCHSHM_POINT("replace.policy_seen");
    const bool done = successor != nullptr ? change_slot(place, SlotState::kNamed, successor->cell, successor->life)
                                           : change_slot(place, SlotState::kGone, 0, 0);
    TORCHSHM_POINT("replace.exchanged");
    // A sweeper moves the sequence alone; whoever gave up then would leave a mark of the living, which nobody takes over.
    if (!done && place.value.state == SlotState::kNamed && place.value.cell == cell && place.value.life == life)
      continue;
    let_go(cell, life);
    return done;
  }
}

// REQUIRES: no slot names the cell any more in this life.
void Catalogue::let_go(uint32_t cell, uint32_t life) {
  const uint64_t me = member_.identity();
  CellValue found = cell_value(cell);
  do {
    if (found.life != life || found.state == CellState::kFree || found.state == CellState::kReleasing) return;
  } while (!change_cell(cell, found, CellState::kReleasing, me));
  TORCHSHM_POINT("replace.releasing");
  release_cell(cell);
}

// REQUIRES: the cell is kReleasing and this process's. The overflow block goes last, since it lists the others.
void Catalogue::release_cell(uint32_t cell) {
  Body body = read_body(cell);
  const auto give_up = [&](const Part& part) {
    if (part.nonce != 0) member_.give_up({member_.pool_id(), part.generation, part.block, part.ticket, part.nonce});
    TORCHSHM_POINT("release.part");
  };
  if (body.overflow.nonce != 0) {
    if (auto view = member_.attach(body.overflow.block, body.overflow.generation, Mode::kReadWrite)) {
      for (uint32_t i = 1; i < body.parts && i * sizeof(Part) <= view->length; ++i) {
        Part part;
        std::memcpy(&part, view->data + (i - 1) * sizeof(Part), sizeof part);
        give_up(part);
      }
      member_.release(view->block, Mode::kReadWrite);
    }
  }
  if (body.parts > 0) give_up(body.first);
  give_up(body.overflow);
  forget_file(cell, cell_value(cell).life, body.hash);
  write_body(cell, Body{});
  TORCHSHM_POINT("release.cleared");
  CellValue found = cell_value(cell);
  if (found.state == CellState::kReleasing) (void)change_cell(cell, found, CellState::kFree, 0);
}

// The file goes with the value's last cell. One that has been handed on is named by the slot now, since it goes from cell to cell with one
// exchange of it: what is said of a slot's cell counts only while the slot stays as it is.
void Catalogue::forget_file(uint32_t cell, uint32_t life, uint64_t hash) {
  uint64_t file = 0;
  (void)change_standing(cell, life, [&](StandingValue& value) { file = std::exchange(value.file, 0); });
  if (file == 0) return;
  for (uint32_t level = levels(); level-- > 0;) {
    for (uint32_t i = 0; i < kWindow; ++i) {
      const Slot& at = slot(slot_index(hash, level, i));
      SlotValue value = SlotValue::of(at.value.load());
      for (bool same = false; !same;) {
        if (value.state != SlotState::kNamed || value.cell >= kCells || value.cell == cell) break;
        TORCHSHM_POINT("release.slot_seen");
        if (standing(value.cell).file == file) return;
        const SlotValue now = SlotValue::of(at.value.load());
        same = now == value;
        value = now;
      }
      if (value.state == SlotState::kEmpty) break;
    }
  }
  spill_->remove(file);
  TORCHSHM_POINT("release.file");
}

bool Catalogue::remove(std::string_view name) {
  const Key key(name);
  while (const auto found = look(key)) {
    if (!replace(*found, nullptr)) continue;
    header().removed.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  return false;
}

// A dead owner's cell. First it becomes this process's, so that one of several sweepers goes on.
void Catalogue::finish(uint32_t cell, CellValue found) {
  const uint64_t me = member_.identity();
  if (found.state == CellState::kReleasing) {
    if (change_cell(cell, found, CellState::kReleasing, me)) release_cell(cell);
    return;
  }
  if (!change_cell(cell, found, CellState::kLeaving, me)) return;
  TORCHSHM_POINT("sweep.marked");
  const Body body = read_body(cell);
  for (;;) {
    auto place = referring(cell, found.life, body.hash);
    if (!place) {
      let_go(cell, found.life);
      return;
    }
    const bool bound = body.owner != 0;
    const bool stays = place->value.state == SlotState::kNamed && !(bound && member_.gone(body.owner));
    // Also where the name stays: an exchange of the slot that somebody prepared before this process marked the cell must fail, or its cell
    // would be nobody's work.
    const bool moved =
        stays ? change_slot(*place, SlotState::kNamed, cell, found.life) : change_slot(*place, SlotState::kGone, 0, 0);
    TORCHSHM_POINT("sweep.moved");
    if (moved && stays) {
      (void)change_cell(cell, found, bound ? CellState::kBound : CellState::kStanding, body.owner);
      return;
    }
  }
}

uint32_t Catalogue::sweep() {
  uint32_t finished = 0;
  const uint64_t moment = now();
  for (uint32_t cell = 0, used = cells_used(); cell < used; ++cell) {
    const CellValue found = cell_value(cell);
    if (found.state == CellState::kFree) continue;
    if (found.state == CellState::kStanding || found.state == CellState::kBound) {
      const Body body = read_body(cell);
      const bool expired = body.expires != 0 && body.expires <= moment;
      const auto place = expired ? referring(cell, found.life, body.hash) : std::nullopt;
      if (place && place->value.state == SlotState::kNamed && replace({*place, body}, nullptr)) {
        header().expired.fetch_add(1, std::memory_order_relaxed);
        ++finished;
        continue;
      }
    }
    if (found.state == CellState::kStanding) continue;
    if (!member_.gone(found.owner)) continue;
    finish(cell, found);
    ++finished;
  }
  return finished;
}

}  // namespace torchshm::store
