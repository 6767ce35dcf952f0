// The catalogue of a store: names for what lies in its pool. Saving, loading and removing need no service.
//
// Shared: the catalogue file (store/layout.h). Private: where this process looks for a free cell next.
// A name appears, gets another value and goes in one exchange of its slot in the index; nobody waits for anybody. What a value keeps
// alive it keeps by tickets of the pool that belong to its cell.
// When a process dies here: a cell that it was working on says so by its owner; sweep(), by anyone, looks whether the index names the cell
// and keeps it or takes it back.
// Thread safety: all functions, from any thread and, after a fork, in the child.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "os/fd.h"
#include "os/mapping.h"
#include "os/memfd.h"
#include "pool/member.h"
#include "store/backing.h"
#include "store/entry.h"
#include "store/index.h"
#include "store/layout.h"

namespace torchshm::store {

struct Key;

struct SaveOptions {
  bool overwrite = false;
  uint64_t ttl = 0;    // ns from now; 0: the store's default, none for a bound name
  bool bound = false;  // the name goes when this process dies
};

class Catalogue {
 public:
  static Result<std::unique_ptr<Catalogue>> create(pool::Member& member, const std::string& name, uint64_t default_ttl,
                                                   uint64_t place = 0);
  // Of a catalogue that belongs to `member`'s pool.
  static Result<std::unique_ptr<Catalogue>> attach(pool::Member& member, os::Fd fd);

  // The same in a persistent store's file, which it keeps.
  static Result<std::unique_ptr<Catalogue>> create_in(pool::Member& member, std::shared_ptr<Backing> backing,
                                                      const std::string& name, uint64_t default_ttl, uint64_t place);
  static Result<std::unique_ptr<Catalogue>> attach_in(pool::Member& member, std::shared_ptr<Backing> backing);
  std::string name() const;
  // After Backing::finish() or begin_boot().
  void follow_clock() { clock_ = backing_->clock(); }
  // Of a store whose file nobody else has.
  void rename(const std::string& name, uint64_t place);
  // The file of a persistent store; null for one in memory.
  Backing* backing() const { return backing_.get(); }

  // Whose it is and how old, if the file is a catalogue of that name.
  struct Stamp {
    uint64_t pool_id, created;  // created: CLOCK_REALTIME, ns
    uint64_t place;
  };
  static std::optional<Stamp> stamp_of(int fd, const std::string& name);

  // Names `text` and `blocks`, which this process holds. kExists when there is such a name and options.overwrite is not set; kFull when
  // there is no room. All of it is seen by others, or nothing.
  Status save(std::string_view key, std::string_view text, const std::vector<uint32_t>& blocks,
              const SaveOptions& options = {});
  // kMissing when there is no such name.
  Result<Entry> find(std::string_view key);
  bool contains(std::string_view key);
  // True when this call has removed it. Who holds its blocks keeps them.
  bool remove(std::string_view key);
  // Calls visit for each name that begins with `prefix`, in no order; names that come or go meanwhile may be among them or not. A name that
  // begins with a zero byte is a program's mark and not data: each() shows it to a prefix that does so too, and size() does not count it.
  void each(std::string_view prefix, const std::function<void(Entry)>& visit);
  uint64_t size();

  // Sleeps until a name that shares this one's bell is saved, for `ns` at most. Take the ticket before you look for the name.
  uint32_t bell(std::string_view key);
  // False when interrupted by a signal.
  bool wait(std::string_view key, uint32_t bell, uint64_t ns);
  void ring(std::string_view key);

  // What a name's expiry is compared with: CLOCK_BOOTTIME, and in a persistent store what goes on from it over boots. ns.
  uint64_t now() const;

  // The hash by which names share slots, bells and locks: the same in every process.
  static uint64_t hash(std::string_view name);

  // Finishes what the dead have left half done, and removes what has expired. Returns how many cells came back.
  uint32_t sweep();

  pool::Member& member() { return member_; }
  Header& header() const { return *reinterpret_cast<Header*>(file_.data()); }
  int fd() const { return fd_.get(); }
  // A new open file description of the catalogue file. kUnsupported when this process has closed its descriptors.
  Result<os::Fd> reopen() const;
  // Whether fd is one.
  bool is_file(int fd) const;
  Slot& slot(uint32_t index) const { return reinterpret_cast<Slot*>(file_.data() + offsets::kSlotsAt)[index]; }
  CellWord& word(uint32_t cell) const { return reinterpret_cast<CellWord*>(file_.data() + offsets::kWordsAt)[cell]; }
  uint32_t cells_used() const;
  uint32_t levels() const;

 private:
  Catalogue(pool::Member& member, os::Fd fd, os::FileId id, os::Mapping file);
  static Result<std::unique_ptr<Catalogue>> over(pool::Member& member, os::Fd fd, uint64_t at);
  void write_header(const std::string& name, uint64_t default_ttl, uint64_t place);
  Status validate() const;
  // Before anything at or above the marks is touched: gives it a place in the file. Nothing to do for memory files.
  Status reserve(uint64_t from, uint64_t to);
  Status reserve_cells(uint32_t end);
  Status reserve_level(uint32_t level);
  // Before a change.
  void touch() {
    if (backing_) backing_->touch();
  }
  Body read_body(uint32_t cell) const;
  void write_body(uint32_t cell, const Body& body);
  CellValue cell_value(uint32_t cell) const { return CellValue::of(word(cell).value.load()); }
  bool change_cell(uint32_t cell, CellValue& found, CellState state, uint64_t owner);
  bool change_slot(Place& place, SlotState state, uint32_t cell, uint32_t life);

  // A free cell, now in the making; with its word.
  std::optional<std::pair<uint32_t, CellValue>> claim_cell(Status& full);
  Status fill(uint32_t cell, const Key& key, std::string_view text, const std::vector<uint32_t>& blocks,
              const SaveOptions& options);
  Status publish(uint32_t cell, uint32_t life, const Key& key, bool overwrite);
  std::optional<Place> claim_slot(uint32_t cell, uint32_t life, const Key& key, Status& full);
  void release_cell(uint32_t cell);

  // The slot in `state` that has this key, other than `except`.
  std::optional<Found> search(const Key& key, SlotState state, uint32_t except = kSlots);
  // The name, when it has not expired.
  std::optional<Found> look(const Key& key);
  bool same_key(const Body& body, const Key& key);
  // Takes a name out of the index, or puts another cell in its place. False when it was not the same any more.
  bool replace(const Found& found, const SlotValue* successor);
  void let_go(uint32_t cell, uint32_t life);
  std::optional<Place> referring(uint32_t cell, uint32_t life, uint64_t hash) const;
  void finish(uint32_t cell, CellValue found);
  std::optional<Entry> entry_of(const Body& body);

  pool::Member& member_;
  os::Fd fd_;
  os::FileId id_;
  os::Mapping file_;
  std::shared_ptr<Backing> backing_;
  int64_t clock_ = 0;  // added to CLOCK_BOOTTIME
  std::atomic<uint32_t> cells_reserved_{0};
  std::atomic<uint32_t> cursor_{0};
};

}  // namespace torchshm::store
