#include "store/spill.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "base/failpoint.h"
#include "os/futex.h"
#include "pool/array_wire.h"
#include "store/key.h"

namespace torchshm::store {

using pool::BlockValue;
using pool::Member;
using pool::Mode;

namespace {

// ns after a value went or came for which freed memory is kept for the next
constexpr uint64_t kMoving = uint64_t{10} * 1'000'000'000;
constexpr uint64_t kRecently = uint64_t{10} * 1'000'000'000;  // ns
constexpr int kQuietScans = 8;                                // tries at a scan during which no file changes hands

uint64_t file_of(uint32_t cell, uint32_t life) { return uint64_t{cell} << 32 | life; }

// Blocks in the making, given up unless they are kept.
class Making {
 public:
  explicit Making(Member& member) : member_(member) {}
  ~Making() {
    for (const Member::View& view : views_) member_.release_made(view.block);
  }
  Making(const Making&) = delete;
  Making& operator=(const Making&) = delete;
  Status add(uint64_t bytes) {
    auto view = member_.allocate(bytes, true, true);
    if (!view) return std::move(view.status());
    views_.push_back(*view);
    return {};
  }
  std::vector<std::byte*> data() const {
    std::vector<std::byte*> places;
    for (const Member::View& view : views_) places.push_back(view.data);
    return places;
  }
  std::vector<uint32_t> blocks() const {
    std::vector<uint32_t> indices;
    for (const Member::View& view : views_) indices.push_back(view.block);
    return indices;
  }

 private:
  Member& member_;
  std::vector<Member::View> views_;
};

// The text of an array names its block; all others name theirs by order.
Status rename_block(Member& member, std::string& text, const std::vector<uint32_t>& blocks) {
  if (text.empty() || text[0] != 'A') return {};
  auto wire = pool::decode(text.data() + 1, text.size() - 1);
  if (!wire) return std::move(wire.status());
  if (wire->carries) return {};
  if (blocks.size() != 1) return Status(Code::kCorrupt, "an array without its block");
  // A ticket that has been used: nobody gives it out again under this nonce.
  auto handle = member.issue(blocks[0]);
  if (!handle) return std::move(handle.status());
  member.give_up(*handle);
  wire->handle = *handle;
  char bytes[pool::kWireMost];
  const size_t length = pool::encode(*wire, bytes, member.arena().header().secret);
  text.assign(1, 'A').append(bytes, length);
  return {};
}

}  // namespace

class Spill::Claim {
 public:
  Claim(Catalogue& catalogue, uint32_t cell) : word_(catalogue.use_of(cell).claim), me_(catalogue.member().identity()) {
    uint64_t found = 0;
    taken_ = word_.compare_exchange_strong(found, me_, std::memory_order_seq_cst);
    if (!taken_ && catalogue.member().gone(found))
      taken_ = word_.compare_exchange_strong(found, me_, std::memory_order_seq_cst);
    TORCHSHM_POINT("spill.claimed");
  }
  ~Claim() {
    uint64_t found = me_;
    if (taken_) (void)word_.compare_exchange_strong(found, 0, std::memory_order_seq_cst);
    TORCHSHM_POINT("spill.let_go");
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  explicit operator bool() const { return taken_; }

 private:
  std::atomic<uint64_t>& word_;
  uint64_t me_;
  bool taken_;
};

struct Spill::Standing {
  Found found;
  Entry entry;
  uint64_t file;
};

Status Spill::fail(const std::string& doing, const std::string& key, Status status) {
  Catalogue::count(catalogue_.counters().spill_errors);
  if (status.error() != 0 && doing[0] == 'w')
    catalogue_.header().spill_failed.store(static_cast<uint32_t>(status.error()), std::memory_order_relaxed);
  return Status(status.code(), doing + " '" + key + "': " + status.what(), status.error());
}

std::string Spill::trouble() const {
  const uint32_t error = catalogue_.header().spill_failed.load(std::memory_order_relaxed);
  if (error == 0) return "";
  return std::string("values can't be written to the spill directory") +
         (directory_ ? " " + directory_->path() : std::string()) + ": " + std::strerror(static_cast<int>(error));
}

void Spill::remove(uint64_t file) {
  if (!directory_) return;
  const uint64_t service = catalogue_.header().service.load(std::memory_order_relaxed);
  if (service == 0 || catalogue_.member().gone(service)) {
    (void)directory_->remove(file);
    if (alone_since_.exchange(service, std::memory_order_relaxed) != service) (void)directory_->sweep_spares(true);
  } else if (directory_->discard(file)) {
    catalogue_.header().discarded.fetch_add(1, std::memory_order_relaxed);
  }
}

// Whether the name alone keeps its blocks.
bool Spill::unused(const Entry& entry) const {
  std::unordered_map<uint32_t, uint64_t> own;  // tickets
  for (const Entry::Block& block : entry.blocks) ++own[block.block];
  const pool::Arena& arena = catalogue_.member().arena();
  return std::all_of(entry.blocks.begin(), entry.blocks.end(), [&](const Entry::Block& block) {
    if (block.block >= arena.pages()) return false;
    const BlockValue value = BlockValue::of(arena.block(block.block).value.load());
    return value.live && value.generation == block.generation && value.count == own[block.block];
  });
}

Status Spill::write(const Standing& what) {
  Member& member = catalogue_.member();
  SpillHead head;
  head.pool_id = member.pool_id();
  head.id = file_of(what.entry.cell, what.entry.life);
  head.key = what.entry.key;
  head.text = what.entry.text;
  std::vector<uint32_t> held;
  std::vector<const std::byte*> places;
  Status status;
  for (const Entry::Block& block : what.entry.blocks) {
    auto view = member.attach(block.block, block.generation, Mode::kReadWrite);
    if (!view) {
      status = Status(Code::kStale, "the name has gone");
      break;
    }
    held.push_back(view->block);
    places.push_back(view->data);
    head.lengths.push_back(view->length);
  }
  TORCHSHM_POINT("spill.held");
  if (status) status = directory_->write(head, places);
  // What was discarded still has its room.
  if ((status.error() == ENOSPC || status.error() == EDQUOT) &&
      directory_->sweep_parts() + directory_->sweep_spares(true).removed > 0)
    status = directory_->write(head, places);
  TORCHSHM_POINT("spill.written");
  for (const uint32_t block : held) member.release(block, Mode::kReadWrite);
  if (!status) return status;
  uint64_t bytes = 0;
  for (const uint64_t length : head.lengths) bytes += length;
  Catalogue::count(catalogue_.counters().written);
  Catalogue::count(catalogue_.counters().written_bytes, bytes);
  // Where a larger one has just failed here, it says nothing that a smaller one has been written.
  const bool well = bytes >= failed_bytes_.load(std::memory_order_relaxed) ||
                    os::boot_time() - failed_at_.load(std::memory_order_relaxed) > kRecently;
  if (well && catalogue_.header().spill_failed.load(std::memory_order_relaxed) != 0)
    catalogue_.header().spill_failed.store(0, std::memory_order_relaxed);
  return {};
}

Result<uint64_t> Spill::out(uint32_t cell, uint32_t life, How how) {
  const Claim claim(catalogue_, cell);
  if (!claim) return Status(Code::kBusy, "somebody else is at it");
  const CellValue value = catalogue_.cell_value(cell);
  if (value.state != CellState::kStanding || value.life != life) return uint64_t{0};
  const Body body = catalogue_.read_body(cell);
  const auto place = catalogue_.referring(cell, life, body.hash);
  if (!place || place->value.state != SlotState::kNamed) return uint64_t{0};
  const StandingValue known = catalogue_.standing(cell);
  if (known.life != life) return uint64_t{0};
  Standing what{{*place, body}, {}, known.file};
  auto entry = catalogue_.entry_of(what.found);
  if (!entry || entry->spilled || entry->policy == Policy::kPin || entry->blocks.empty()) return uint64_t{0};
  what.entry = std::move(*entry);
  // After the claim: see hold_for_writing().
  if (!unused(what.entry)) return uint64_t{0};
  // After that: who has written by another name of these blocks has gone, and has told before.
  const uint64_t shared_writes = catalogue_.header().shared_writes.load(std::memory_order_seq_cst);
  std::atomic<uint64_t>& told_at = catalogue_.use_of(cell).shared_writes;
  const uint64_t bytes = what.entry.bytes;
  if (what.entry.policy == Policy::kDrop) {
    if (how == How::kCopy || !catalogue_.replace(what.found, nullptr, Policy::kDrop)) return uint64_t{0};
    Catalogue::count(catalogue_.counters().evictions);
    return bytes;
  }
  const bool written = (catalogue_.standing(cell).flags & kWritten) != 0;
  if (what.file == 0 || written || told_at.load(std::memory_order_seq_cst) != shared_writes) {
    if (how == How::kFree || !directory_ || (how == How::kCopy && written)) return uint64_t{0};
    if (Status done = write(what); !done) {
      if (done.code() == Code::kStale) return uint64_t{0};
      failed_bytes_.store(bytes, std::memory_order_relaxed);
      failed_at_.store(os::boot_time(), std::memory_order_relaxed);
      return fail("writing", what.entry.key, std::move(done));
    }
    const uint64_t before = std::exchange(what.file, file_of(cell, life));
    told_at.store(shared_writes, std::memory_order_seq_cst);
    const bool stands = catalogue_.change_standing(cell, life,
                                                   [&](StandingValue& now) {
                                                     now.file = what.file;
                                                     now.flags &= static_cast<uint8_t>(~kReadBack);
                                                   }) &&
                        catalogue_.cell_value(cell).life == life &&
                        catalogue_.cell_value(cell).state == CellState::kStanding;
    TORCHSHM_POINT("spill.file_told");
    if (before != 0 && before != what.file) remove(before);
    if (!stands) {
      // Removed or replaced meanwhile, and its files with it, as far as they were known. Or just marked for that, by one who may die before
      // it happens: the name that stands again must not have a file that is not there.
      (void)catalogue_.change_standing(cell, life, [&](StandingValue& now) {
        if (now.file == what.file) now.file = 0;
      });
      TORCHSHM_POINT("spill.file_taken_back");
      remove(what.file);
      return uint64_t{0};
    }
    // Somebody has come while it was written: nothing would be given up, and by another name it may have been written to.
    if (how != How::kCopy && (!unused(what.entry) || catalogue_.header().shared_writes.load() != shared_writes))
      return uint64_t{0};
  }
  if (how == How::kCopy) return bytes;
  // For what does not fit into a cell with its key.
  const Member::Restraint beyond(true);
  const auto flags = static_cast<uint8_t>(kSpilled | (catalogue_.standing(cell).flags & kReadBack));
  const Status gone = catalogue_.succeed(
      what.found, what.entry.text.substr(0, 1), {},
      {what.entry.created, what.entry.expires, what.file, bytes, flags, what.entry.pid}, what.entry.policy);
  if (!gone) return uint64_t{0};
  Catalogue::count(catalogue_.counters().spills);
  Catalogue::count(catalogue_.counters().spilled_bytes, bytes);
  catalogue_.member().keep_warm(kMoving);
  return bytes;
}

Status Spill::back(const Entry& entry, bool alone) {
  if (!directory_)
    return Status(Code::kUnsupported, "'" + entry.key + "' lies in the store's spill directory " +
                                          catalogue_.directory() + ", which was removed, or not given to this process");
  const Claim claim(catalogue_, entry.cell);
  if (!claim && alone) return Status(Code::kBusy, "somebody else is at it");
  const auto still = [&]() -> std::optional<Found> {
    Found found;
    found.place.index = entry.slot;
    found.place.value = SlotValue::of(catalogue_.slot(entry.slot).value.load());
    if (found.place.value.state != SlotState::kNamed || found.place.value.cell != entry.cell ||
        found.place.value.life != entry.life)
      return std::nullopt;
    found.body = catalogue_.read_body(entry.cell);
    return found;
  };
  auto found = still();
  if (!found) return Status(Code::kStale, "the name has been replaced");
  const StandingValue known = catalogue_.standing(entry.cell);
  if (known.life != entry.life) return Status(Code::kStale, "the name has been replaced");
  const uint64_t file = known.file;
  auto reader = directory_->open(file, (known.flags & kReadBack) == 0);
  if (!reader) {
    if (!still()) return Status(Code::kStale, "the name has been replaced");
    const bool lost = reader.code() == Code::kMissing;
    return fail("reading back", entry.key,
                lost ? Status(Code::kCorrupt, "its file is gone from the spill directory " + directory_->path())
                     : std::move(reader.status()));
  }
  const SpillHead& head = reader->head();
  if (head.key != entry.key) {
    // The cell may have had its next value when it was asked for the file.
    if (!still()) return Status(Code::kStale, "the name has been replaced");
    return fail("reading back", entry.key, Status(Code::kCorrupt, "its file has another value"));
  }
  Member& member = catalogue_.member();
  uint64_t bytes = 0;
  Making making(member);
  for (const uint64_t length : head.lengths) {
    if (Status made = making.add(length); !made) return made;  // what it has so far is given up: others may need it
    bytes += length;
  }
  TORCHSHM_POINT("restore.room");
  if (Status read = reader->read(making.data()); !read) {
    if (!still()) return Status(Code::kStale, "the name has been replaced");  // and its file written anew
    return fail("reading back", entry.key, std::move(read));
  }
  TORCHSHM_POINT("restore.read");
  std::string text = head.text;
  const std::vector<uint32_t> blocks = making.blocks();
  if (Status named = rename_block(member, text, blocks); !named)
    return fail("reading back", entry.key, std::move(named));
  Status done =
      catalogue_.succeed(*found, text, blocks, {entry.created, entry.expires, file, bytes, kReadBack, entry.pid});
  if (!done) return done;
  Catalogue::count(catalogue_.counters().restores);
  Catalogue::count(catalogue_.counters().restored_bytes, bytes);
  catalogue_.member().keep_warm(kMoving);
  catalogue_.ring(entry.key);
  return {};
}

uint32_t Spill::sweep_discarded(bool all) {
  if (!directory_) return 0;
  (void)directory_->sweep_parts();
  return directory_->sweep_spares(all).left;
}

// A file is written by who has claimed the cell that it is named after, and found in a cell from before that claim ends until it is removed.
// Files that change hands during the scan could be missed twice. The claim is read before the cell: the other way round, both could have
// passed by. A file that is found to be nobody's could be written anew, by who spills the same value again: it goes under the claim that
// this takes.
std::optional<uint32_t> Spill::sweep() {
  if (!directory_) return 0;
  const auto files = directory_->list();
  if (files.empty()) return 0;
  // Of a free cell, or an earlier life: left by one who died as it told of the file.
  const auto file_at = [&](uint32_t cell) {
    const StandingValue has = catalogue_.standing(cell);
    const CellValue value = catalogue_.cell_value(cell);
    return value.state != CellState::kFree && has.life == value.life ? has.file : 0;
  };
  for (int attempt = 0; attempt < kQuietScans; ++attempt) {
    const uint64_t moves = catalogue_.header().moves.load(std::memory_order_seq_cst);
    TORCHSHM_POINT("spill.scanning");
    std::unordered_set<uint64_t> known;
    for (uint32_t cell = 0, used = catalogue_.cells_used(); cell < used; ++cell) {
      const uint64_t claim = catalogue_.use_of(cell).claim.load(std::memory_order_seq_cst);
      if (claim != 0 && !catalogue_.member().gone(claim)) known.insert(file_of(cell, catalogue_.cell_value(cell).life));
      if (const uint64_t file = file_at(cell); file != 0) known.insert(file);
    }
    if (catalogue_.header().moves.load(std::memory_order_seq_cst) != moves) continue;
    TORCHSHM_POINT("spill.scanned");
    uint32_t removed = directory_->sweep_parts();
    for (const SpillDirectory::File& file : files) {
      if (file.part || known.count(file.id) != 0) continue;
      const auto cell = static_cast<uint32_t>(file.id >> 32);
      if (cell < kCells) {
        const Claim claim(catalogue_, cell);
        if (!claim || file_at(cell) == file.id || catalogue_.header().moves.load(std::memory_order_seq_cst) != moves)
          continue;
        removed += directory_->remove(file.id) ? 1 : 0;
      } else {
        removed += directory_->remove(file.id) ? 1 : 0;
      }
      TORCHSHM_POINT("spill.swept");
    }
    return removed;
  }
  return std::nullopt;
}

}  // namespace torchshm::store
