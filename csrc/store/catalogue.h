// The catalogue of a store: names for what lies in its pool. Saving, loading and removing need no service.
//
// Shared: the catalogue file (store/layout.h). Private: where this process looks for a free cell next.
// A name appears, gets another value and goes in one exchange of its slot in the index; nobody waits for anybody. What a value keeps
// alive it keeps by tickets of the pool that belong to its cell.
// When a process dies here: a cell that it was working on says so by its owner; sweep(), by anyone, looks whether the index names the cell
// and keeps it or takes it back.
// Thread safety: all functions, from any thread and, after a fork, in the child.
#pragma once

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
  uint64_t ttl = 0;                             // ns from now; 0: the store's default, none for a bound name
  bool bound = false;                           // the name goes when this process dies
  std::optional<Policy> policy = std::nullopt;  // default: the store's; a bound name stays in memory
};

struct Settings {
  uint64_t default_ttl = 0;  // ns; 0: none
  uint64_t place = 0;        // where the store's name counts; 0: nowhere
  Policy policy = Policy::kKeep;
  uint64_t patience = 0;  // ns
};

class Eviction;
class Spill;
class SpillDirectory;

class Catalogue : public pool::RoomMaker, public std::enable_shared_from_this<Catalogue> {
 public:
  static Result<std::unique_ptr<Catalogue>> create(pool::Member& member, const std::string& name,
                                                   const Settings& settings);
  // What its memory file is called, for who looks for it among a process's descriptors.
  static std::string file_name(const std::string& store);
  // Of a catalogue that belongs to `member`'s pool.
  static Result<std::unique_ptr<Catalogue>> attach(pool::Member& member, os::Fd fd);
  ~Catalogue() override;
  // From here on what does not fit into memory goes there. Before other threads use this.
  void use(std::unique_ptr<SpillDirectory> directory);
  // The name of that directory, for who serves the store next; empty: none.
  std::string directory() const;
  int directory_fd() const;  // -1: this process has none
  void leave_directory();    // at the end of the program: the last one removes it
  void set_directory(const std::string& path);

  // The same in a persistent store's file, which it keeps.
  static Result<std::unique_ptr<Catalogue>> create_in(pool::Member& member, std::shared_ptr<Backing> backing,
                                                      const std::string& name, const Settings& settings);
  static Result<std::unique_ptr<Catalogue>> attach_in(pool::Member& member, std::shared_ptr<Backing> backing);
  std::string name() const;
  // After Backing::finish() or begin_boot().
  void follow_clock() { clock_ = backing_->clock(); }
  // As pool::Arena::reserve_all().
  Status reserve_all();
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
  // find() by one who is going to use the value: counted, and noted for who chooses what goes to disk. Where it says spilled, restore() first.
  Result<Entry> load(std::string_view key);
  // Brings a spilled value back; ok where there is no such value. kBusy: another process is at it (not asked where `alone` is false); kFull:
  // there is no room now; look again in a moment. Other errors name key and file.
  Status restore(std::string_view key, bool alone = true);
  // Holds what an entry found, to be written to by everybody: from here on no file has it. kStale: it was removed or replaced; kBusy: somebody
  // is just writing it out; load it again. Who writes it out may be stopped: not asked where `alone` is false, the value then gets another
  // cell. REQUIRES: of load().
  class Writing {
   public:
    Writing(Writing&&) noexcept;
    Writing& operator=(Writing&&) = delete;
    ~Writing();

   private:
    friend class Catalogue;
    explicit Writing(Catalogue& catalogue) : catalogue_(&catalogue) {}
    Catalogue* catalogue_;
    std::vector<uint32_t> blocks_;
  };
  Result<Writing> hold_for_writing(const Entry& entry, bool alone = true);
  // False when there is no such name.
  bool set_policy(std::string_view key, Policy policy);
  bool contains(std::string_view key);
  // True when this call has removed it. Who holds its blocks keeps them.
  bool remove(std::string_view key);
  // The names that begin with `prefix`, sorted; those that come or go meanwhile may be among them or not. A name that begins with a zero byte
  // is a program's mark and not data: it is shown to a prefix that does so too, and size() does not count it.
  std::vector<std::string> keys(std::string_view prefix);
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
  // Removes files that no cell has any more; nothing where values moved all the while. For one process at a time, the service.
  std::optional<uint32_t> sweep_files();
  // Gives back the room of those that values were done with.
  uint32_t sweep_discarded(bool all);

  // RoomMaker: gives up what has expired, and then what nobody holds, as its policy says.
  uint64_t make_room(uint64_t bytes) override;
  std::string advice() const override;
  // When memory fills: writes files of what will have to go next, so that it goes at once. Returns the bytes written. For the service.
  uint64_t write_ahead();
  // Why room could not be made, for messages; empty when nothing went wrong.
  std::string trouble() const;

  struct Totals {
    uint64_t loads = 0, restores = 0, restored_bytes = 0, spills = 0, spilled_bytes = 0, written = 0, written_bytes = 0;
    uint64_t evictions = 0, spill_errors = 0, room_waits = 0;
    uint64_t names_on_disk = 0, bytes_on_disk = 0;  // that are not in memory
  };
  Totals totals() const;
  void count_wait();

  pool::Member& member() { return member_; }
  Header& header() const { return *reinterpret_cast<Header*>(file_.data()); }
  int fd() const { return fd_.get(); }
  // A new open file description of the catalogue file. kUnsupported when this process has closed its descriptors.
  Result<os::Fd> reopen() const;
  // Whether fd is one.
  bool is_file(int fd) const;
  Slot& slot(uint32_t index) const { return reinterpret_cast<Slot*>(file_.data() + offsets::kSlotsAt)[index]; }
  CellWord& word(uint32_t cell) const { return reinterpret_cast<CellWord*>(file_.data() + offsets::kWordsAt)[cell]; }
  Use& use_of(uint32_t cell) const { return reinterpret_cast<Use*>(file_.data() + offsets::kUsesAt)[cell]; }
  uint32_t cells_used() const;
  uint32_t levels() const;

 private:
  friend class Eviction;
  friend class Spill;
  Catalogue(pool::Member& member, os::Fd fd, os::FileId id, os::Mapping file);
  static Result<std::unique_ptr<Catalogue>> over(pool::Member& member, os::Fd fd, uint64_t at);
  void write_header(const std::string& name, const Settings& settings);
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
  // What a value that moves between memory and disk takes along.
  struct Origin {
    uint64_t created = 0, expires = 0, file = 0, bytes = 0;
    uint8_t flags = 0;
    uint32_t pid = 0;
  };
  Status fill(uint32_t cell, const Key& key, std::string_view text, const std::vector<uint32_t>& blocks,
              const SaveOptions& options, const Origin* origin);
  Status publish(uint32_t cell, uint32_t life, const Key& key, bool overwrite);
  std::optional<Place> claim_slot(uint32_t cell, uint32_t life, const Key& key, Status& full);
  void release_cell(uint32_t cell);
  // Puts another cell in the place of what was found, if that is still there. kStale when it is not.
  // With `only`: and has that policy still.
  Status succeed(const Found& found, std::string_view text, const std::vector<uint32_t>& blocks, const Origin& origin,
                 std::optional<Policy> only = std::nullopt);
  void forget_file(uint32_t cell, uint32_t life, uint64_t hash);
  void begin_standing(uint32_t cell, const StandingValue& value);
  StandingValue standing(uint32_t cell) const { return StandingValue::of(use_of(cell).standing.load()); }
  // change(StandingValue&) to what is there now. False when the cell has begun another life.
  template <class F>
  bool change_standing(uint32_t cell, uint32_t life, F change) {
    pool::AtomicPair& word = use_of(cell).standing;
    pool::Pair found = word.load();
    for (;;) {
      StandingValue next = StandingValue::of(found);
      if (next.life != life) return false;
      change(next);
      if (word.exchange_if(found, next.pair())) return true;
    }
  }
  // The key of a body, also where it lies in a block; nothing when that has gone.
  std::optional<std::string> key_of(const Body& body);
  Counters& counters() const;
  static void count(std::atomic<uint64_t>& counter, uint64_t by = 1);

  // The slot in `state` that has this key, other than `except`.
  std::optional<Found> search(const Key& key, SlotState state, uint32_t except = kSlots);
  // The name, when it has not expired.
  std::optional<Found> look(const Key& key);
  bool same_key(const Body& body, const Key& key);
  template <class Visit>
  void each_named(Visit visit);
  // Takes a name out of the index, or puts another cell in its place. False when it was not the same any more.
  // With `only`: nor when it has another policy by now. REQUIRES then: `found` is from before the policy was read.
  bool replace(const Found& found, const SlotValue* successor, std::optional<Policy> only = std::nullopt);
  void let_go(uint32_t cell, uint32_t life);
  std::optional<Place> referring(uint32_t cell, uint32_t life, uint64_t hash) const;
  void finish(uint32_t cell, CellValue found);
  std::optional<Entry> entry_of(const Found& found);
  std::optional<Entry> entry_apart(const Body& body);

  pool::Member& member_;
  os::Fd fd_;
  os::FileId id_;
  os::Mapping file_;
  std::shared_ptr<Backing> backing_;
  int64_t clock_ = 0;  // added to CLOCK_BOOTTIME
  std::atomic<uint32_t> cells_reserved_{0};
  std::atomic<uint32_t> cursor_{0};
  std::unique_ptr<Spill> spill_;
  std::unique_ptr<Eviction> eviction_;
};

}  // namespace torchshm::store
