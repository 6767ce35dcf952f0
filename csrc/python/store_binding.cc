#include "python/numpy_api.h"
// NumPy's header first.
#include "python/store_binding.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "base/copy.h"
#include "os/futex.h"
#include "os/mapping.h"
#include "pool/array_wire.h"
#include "python/block_ref.h"
#include "python/errors.h"
#include "python/lock_binding.h"
#include "python/numpy_memory.h"
#include "python/rebuild.h"
#include "python/reduce.h"
#include "python/stats_binding.h"
#include "python/without_gil.h"
#include "service/address.h"
#include "service/client.h"
#include "service/server.h"
#include "store/catalogue.h"

namespace py = pybind11;

namespace torchshm::python {
namespace {

using pool::Mode;

constexpr char kArray = 'A';              // the text of one array: this, and its wire
constexpr uint64_t kSlice = 100'000'000;  // ns slept at a time: a signal may come just before the sleep
constexpr uint64_t kCopyUnderGil = uint64_t{1} << 20;
constexpr std::chrono::microseconds kShortRest{200}, kLongRest{20'000};
constexpr uint64_t kBusyMost = 10'000'000'000;     // ns for another process to write a value out or bring it back
constexpr uint64_t kStopped = 2'000'000'000;       // ns after which the value is brought back here as well
constexpr uint64_t kBusyLook = 5'000'000;          // ns
constexpr uint64_t kSlowDisk = uint64_t{8} << 20;  // bytes a second
constexpr uint64_t kForEver = uint64_t{1} << 62;
constexpr int kAttempts = 1000;  // a name that changes more often while it is looked for is an error

// Without the GIL.
bool no_signal() {
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() == 0;
}

PyObject* text_of(const std::string& key) {
  return PyUnicode_DecodeUTF8(key.data(), static_cast<Py_ssize_t>(key.size()), "surrogateescape");
}

[[noreturn]] void fail_missing(std::string_view key) {
  py::object name = py::reinterpret_steal<py::object>(text_of(std::string(key)));
  PyErr_SetObject(PyExc_KeyError, name.ptr());
  throw py::error_already_set();
}

[[noreturn]] void fail_save(const Status& status, std::string_view key) {
  if (status.code() != Code::kExists) fail_in_store(status);
  (void)raise_named(
      "KeyExistsError",
      std::string(key) + " is a name in this store already; save it under another one, or with overwrite=True");
  throw py::error_already_set();
}

Mode mode_of(int mode) {
  if (mode < 0 || mode > static_cast<int>(Mode::kCopyOnWrite)) throw py::value_error("unknown mode");
  return static_cast<Mode>(mode);
}

// Nothing for -1: the store's.
std::optional<store::Policy> policy_of(int policy) {
  if (policy < 0) return std::nullopt;
  if (policy > static_cast<int>(store::Policy::kPin)) throw py::value_error("unknown policy");
  return static_cast<store::Policy>(policy);
}

const char* pages_of(const pool::Arena& arena) {
  switch (arena.page_kind()) {
    case pool::PageKind::kSmall:
      return "4KiB";
    case pool::PageKind::kReserved:
      return "2MiB";
    default:
      return "auto";
  }
}

py::dict as_dict(const service::Reply& reply) {
  py::dict row;
  row["pid"] = reply.pid;
  row["pool_id"] = reply.pool_id;
  row["clients"] = reply.clients;
  row["started"] = static_cast<double>(reply.started) * 1e-9;
  return row;
}

class Store {
 public:
  Store(pool::Member* member, std::shared_ptr<store::Catalogue> catalogue, std::unique_ptr<service::Server> server)
      : member_(member), catalogue_(std::move(catalogue)), server_(std::move(server)) {}
  ~Store() { stop(); }
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  static std::unique_ptr<Store> start(const std::string& name, uint64_t limit, uint64_t ttl, uint32_t mode,
                                      int64_t group, const std::string& spill, bool spill_sync, int policy,
                                      int64_t patience, const std::string& file, const std::string& hugepages,
                                      bool prefault, const std::string& numa) {
    auto pages = pool::parse_pages(hugepages, prefault, numa);
    if (!pages) fail_in_store(pages.status());
    service::ServerOptions options;
    options.name = name;
    options.file = file;
    options.limits.limit = limit;
    options.limits.pages = pages.take();
    options.ttl = ttl;
    options.mode = mode;
    options.group = group;
    options.spill = spill;
    options.spill_sync = spill_sync;
    options.policy = policy_of(policy);
    options.patience = patience;
    Result<std::unique_ptr<service::Server>> server = Status();
    {
      const WithoutGil release;
      server = service::Server::start(options);
    }
    if (!server) fail_in_store(server.status());
    pool::Member* member = &(*server)->member();
    auto catalogue = (*server)->share_catalogue();
    return std::make_unique<Store>(member, std::move(catalogue), server.take());
  }

  static std::unique_ptr<Store> connect(const std::string& name, uint64_t nanoseconds) {
    if (Status named = service::check_name(name); !named) fail_in_store(named);
    Result<service::Client> client = Status();
    {
      const WithoutGil release;
      client = service::connect(name, nanoseconds, no_signal);
    }
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (!client) {
      fail_unavailable(client.status());
    }
    return std::make_unique<Store>(client->member, client->catalogue, nullptr);
  }

  // ---- one array

  // False when a wire alone can't describe it.
  bool save_array(std::string_view key, py::handle object, bool overwrite, uint64_t ttl, bool bound, int policy,
                  int64_t patience) {
    if (!PyArray_CheckExact(object.ptr())) return false;
    // Before the copy.
    if (!overwrite && catalogue_->contains(key)) fail_save(Status(Code::kExists, ""), key);
    Status status;
    auto* array = reinterpret_cast<PyArrayObject*>(object.ptr());
    Put put = Put::kFailed;
    const store::SaveOptions how{overwrite, ttl, bound, policy_of(policy)};
    // Placed and named, or nothing is held.
    const auto try_save = [&]() -> Status {
      ArrayWire wire;
      put = put_array(array, member_, wire, status = Status());
      if (put == Put::kFailed) return std::move(status);
      if (put != Put::kDone) return {};
      char text[1 + pool::kWireMost] = {kArray};
      const size_t length = 1 + pool::encode(wire, text + 1, member_->arena().header().secret);
      // The name takes its own ticket from a hold.
      auto view = member_->redeem(wire.handle, Mode::kReadWrite);
      if (!view) return std::move(view.status());
      Status named = catalogue_->save(key, {text, length}, {view->block}, how);
      member_->release(view->block, Mode::kReadWrite);
      return named;
    };
    const auto try_without_files = [&]() -> Status {
      const pool::Member::Restraint no_files;  // with the GIL
      return try_save();
    };
    status = patiently(patience, [&]() -> Status {
      Status done = try_without_files();
      // As much as its block takes: a little more would be another chunk. A long key has a block of its own, from what is left over.
      const auto bytes = std::max<uint64_t>(static_cast<uint64_t>(PyArray_NBYTES(array)), key.size());
      for (uint64_t enough = bytes; done.code() == Code::kFull && !done.too_large() && make_room(enough); enough *= 2)
        done = try_without_files();
      return done.code() == Code::kFull && !done.too_large() ? try_save() : std::move(done);
    });
    if (put == Put::kNot) return false;
    if (put == Put::kRaised) throw py::error_already_set();
    if (!status) fail_save(status, key);
    return true;
  }

  // An array, or (text, blocks) of what else the name stands for.
  py::object load(std::string_view key, int mode) {
    const Mode wanted = mode_of(mode);
    Status status;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      auto entry = catalogue_->load(key);
      if (!entry) {
        if (entry.code() == Code::kMissing) fail_missing(key);
        fail_in_store(entry.status());
      }
      if (entry->spilled) {
        restore(key);
        continue;
      }
      std::optional<store::Catalogue::Writing> writing;
      if (wanted == Mode::kReadWrite) {
        auto held = hold_for_writing(*entry);
        if (!held) continue;
        writing.emplace(std::move(*held));
      }
      const std::string& text = entry->text;
      if (text.empty() || text[0] != kArray) return as_text(*entry, wanted == Mode::kReadWrite);
      auto wire = pool::decode(text.data() + 1, text.size() - 1);
      if (!wire) fail_damaged(key, wire.status());
      const uint64_t secret = member_->arena().header().secret;
      if (wire->carries || wire->dtype_apart || wire->handle.pool_id != member_->pool_id() ||
          !pool::intact(text.data() + 1, text.size() - 1, secret)) {
        fail_damaged(key, Status(Code::kInvalid, "it is no array of this store"));
      }
      refuse_private(wire->handle.block, wanted, key);
      wire->mode = wanted;
      wire->writeable = wanted != Mode::kRead;
      wire->exclusive = false;
      PyArray_Descr* dtype = dtype_of(*wire, nullptr);
      if (dtype == nullptr) throw py::error_already_set();
      status = Status();
      PyObject* array = open_array(*wire, &PyArray_Type, dtype, member_, status);
      if (array != nullptr) return py::reinterpret_steal<py::object>(array);
      if (status) throw py::error_already_set();
      if (status.code() != Code::kStale) fail_in_store(status);
      // Removed or replaced meanwhile: look again.
    }
    fail_in_store(status);
  }

  // ---- other values: a text, and blocks

  // A name for `text` and for the blocks that `refs` hold.
  void save(std::string_view key, std::string_view text, const py::list& refs, bool overwrite, uint64_t ttl, bool bound,
            int policy) {
    std::vector<uint32_t> blocks;
    blocks.reserve(refs.size());
    for (const py::handle ref : refs) {
      const auto block = block_of(ref.ptr(), member_);
      if (!block) throw py::type_error("a block of this store's pool is expected");
      blocks.push_back(*block);
    }
    const store::SaveOptions how{overwrite, ttl, bound, policy_of(policy)};
    Status status;
    {
      const pool::Member::Restraint no_files;  // with the GIL
      status = catalogue_->save(key, text, blocks, how);
    }
    if (status.code() == Code::kFull) {
      const WithoutGil release;
      status = catalogue_->save(key, text, blocks, how);
    }
    if (!status) fail_save(explained(std::move(status)), key);
  }

  // The block of this store that a range of memory lies in: (reference, block, offset). None when it has to be copied.
  py::object refer(uintptr_t address, uint64_t length) {
    const auto* first = reinterpret_cast<const std::byte*>(address);
    const auto found = member_->find(first);
    if (!found || length > found->length - found->offset) return py::none();
    if (!member_->can_be_named(*found, first, first + length)) return py::none();
    auto view = member_->view(found->block, Mode::kReadWrite);
    if (!view) return py::none();
    PyObject* ref = make_block_ref(member_, *view, Mode::kReadWrite);
    if (ref == nullptr) throw py::error_already_set();
    return py::make_tuple(py::reinterpret_steal<py::object>(ref), found->block, found->offset);
  }

  // Uninitialised bytes in a block of their own, which is the array's base.
  py::object blank(uint64_t length) {
    Result<pool::Member::View> view = Status();
    {
      const WithoutGil release;
      view = member_->allocate(length, true);
    }
    if (!view) fail_in_store(explained(std::move(view.status())));
    return bytes_over(*view, length, Mode::kReadWrite, true);
  }

  // The whole block, as bytes.
  py::object open(uint32_t block, uint64_t generation, int mode) {
    const Mode wanted = mode_of(mode);
    refuse_private(block, wanted, "it");
    auto view = member_->attach(block, generation, wanted);
    if (view.code() == Code::kUnsupported) {
      // No address space for that mode's mapping, or the block shares its pages with others: by flag, or as a copy.
      view = member_->attach(block, generation, Mode::kReadWrite);
      if (!view) fail_in_store(view.status());
      py::object shared = bytes_over(*view, view->length, Mode::kReadWrite, false);
      if (wanted == Mode::kRead) return shared;
      PyObject* own = PyArray_NewCopy(reinterpret_cast<PyArrayObject*>(shared.ptr()), NPY_KEEPORDER);
      if (own == nullptr) throw py::error_already_set();
      return py::reinterpret_steal<py::object>(own);
    }
    if (!view) fail_in_store(view.status());
    return bytes_over(*view, view->length, wanted, wanted != Mode::kRead);
  }

  // ---- names

  py::dict find(std::string_view key) {
    auto entry = catalogue_->find(key);
    if (!entry) {
      if (entry.code() == Code::kMissing) fail_missing(key);
      fail_in_store(entry.status());
    }
    uint64_t bytes = 0;
    for (const auto& block : entry->blocks) {
      if (const auto extent = member_->arena().extent(block.block)) bytes += extent->length;
    }
    py::dict row;
    row["text"] = py::bytes(entry->text);
    row["bytes"] = entry->spilled ? entry->bytes : bytes;
    row["where"] = entry->spilled ? "disk" : "memory";
    row["policy"] = static_cast<int>(entry->policy);
    row["blocks"] = entry->blocks.size();
    row["created"] = static_cast<double>(entry->created) * 1e-9;
    if (entry->expires == 0) {
      row["expires_in"] = py::none();
    } else {
      row["expires_in"] = (static_cast<double>(entry->expires) - static_cast<double>(catalogue_->now())) * 1e-9;
    }
    row["pid"] = entry->pid;
    row["cell"] = entry->cell;
    row["life"] = entry->life;
    row["bound"] = entry->owner != 0;
    row["abandoned"] = entry->owner != 0 && member_->gone(entry->owner);
    return row;
  }

  // Brings a spilled value back, if it is one.
  void restore(std::string_view key) {
    const uint64_t begun = os::boot_time();
    // Whoever is at it may be stopped; or its disk is slow.
    auto found = catalogue_->find(key);
    const uint64_t stopped = kStopped + (found ? found->bytes / kSlowDisk * 1'000'000'000 : 0);
    Status back = patiently(-1, [&]() -> Status {
      const WithoutGil release;
      for (;;) {
        const uint32_t seen = catalogue_->bell(key);
        Status done = catalogue_->restore(key, os::boot_time() - begun < stopped);
        // It is rung when the value is there; a look in between costs little.
        if (done.code() != Code::kBusy || !catalogue_->wait(key, seen, kBusyLook) || os::boot_time() - begun > kSlice)
          return done;
      }
    });
    if (!back) fail_in_store(back);
  }

  bool set_policy(std::string_view key, int policy) {
    return catalogue_->set_policy(key, policy_of(policy).value_or(store::Policy::kKeep));
  }
  // Seconds that saving and loading wait for room.
  double patience() const {
    return static_cast<double>(catalogue_->header().patience.load(std::memory_order_relaxed)) * 1e-9;
  }
  uint64_t limit() const { return member_->arena().header().limit.load(std::memory_order_relaxed); }
  void set_limit(uint64_t bytes) { member_->arena().header().limit.store(bytes, std::memory_order_relaxed); }
  uint64_t trim(uint64_t keep) {
    const WithoutGil release;
    return member_->trim(keep);
  }
  // Sleeps a moment in which others may make room. Raises what a signal's handler raises.
  void wait_for_room(int attempt) {
    if (attempt == 0) catalogue_->count_wait();
    rest(attempt);
  }
  void leave() {
    const WithoutGil release;
    server_.reset();
    catalogue_->leave_directory();
  }
  uint32_t sweep_files() {
    const WithoutGil release;
    return catalogue_->sweep_files().value_or(0);
  }

  bool contains(std::string_view key) { return catalogue_->contains(key); }
  bool remove(std::string_view key) {
    if (catalogue_->directory_fd() < 0) return catalogue_->remove(key);
    const WithoutGil release;  // its file may go with it
    return catalogue_->remove(key);
  }

  py::list keys(std::string_view prefix) {
    std::vector<std::string> found;
    {
      const WithoutGil release;
      found = catalogue_->keys(prefix);
    }
    py::list names;
    for (const std::string& key : found) {
      PyObject* name = text_of(key);
      if (name == nullptr) throw py::error_already_set();
      names.append(py::reinterpret_steal<py::object>(name));
    }
    return names;
  }

  uint64_t size() {
    const WithoutGil release;
    return catalogue_->size();
  }

  // Where the file of a persistent store is; None for one in memory.
  py::object file() const {
    const store::Backing* backing = catalogue_->backing();
    if (backing == nullptr) return py::none();
    return py::reinterpret_steal<py::object>(text_of(backing->where()));
  }

  // Everything to the disk.
  void sync() {
    store::Backing* backing = catalogue_->backing();
    if (backing == nullptr)
      fail_in_store(Status(Code::kUnsupported, "the store " + name() +
                                                   " lies in memory, which no sync() keeps: torchshm.start(name, "
                                                   "file=path) makes one that lasts"));
    Status done;
    {
      const WithoutGil release;
      done = backing->sync(store::kOpen);
    }
    if (!done) fail_in_store(done);
  }

  uint32_t sweep() {
    const WithoutGil release;
    return catalogue_->sweep();
  }

  // ---- waiting

  std::unique_ptr<store::Lock> lock(std::string_view key) { return make_lock(catalogue_, key); }
  uint32_t bell(std::string_view key) { return catalogue_->bell(key); }
  void ring(std::string_view key) { catalogue_->ring(key); }

  // Returns when the bell may have been rung, or when the time is up. Raises what a signal's handler raises.
  void wait(std::string_view key, uint32_t seen, uint64_t nanoseconds) {
    const uint64_t now = os::boot_time();
    const uint64_t until = nanoseconds > UINT64_MAX - now ? UINT64_MAX : now + nanoseconds;
    const std::string name(key);
    for (;;) {
      bool rung = false;
      const uint64_t at = os::boot_time();
      if (at >= until) return;
      {
        const WithoutGil release;
        (void)catalogue_->wait(name, seen, std::min(kSlice, until - at));
        rung = catalogue_->bell(name) != seen;
      }
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (rung) return;
    }
  }

  // ---- the store

  py::dict info() {
    const store::Header& header = catalogue_->header();
    pool::Stats stats;
    uint64_t names = 0;
    store::Catalogue::Totals totals;
    {
      const WithoutGil release;
      stats = member_->stats();
      names = catalogue_->size();
      totals = catalogue_->totals();
    }
    py::dict row;
    row["name"] = name();
    row["names"] = names;
    row["created"] = static_cast<double>(header.created) * 1e-9;
    row["service_pid"] = header.serving.load(std::memory_order_relaxed);
    const uint64_t ttl = header.default_ttl.load(std::memory_order_relaxed);
    if (ttl == 0) {
      row["ttl"] = py::none();
    } else {
      row["ttl"] = static_cast<double>(ttl) * 1e-9;
    }
    row["saved"] = header.saved.load(std::memory_order_relaxed);
    row["removed"] = header.removed.load(std::memory_order_relaxed);
    row["expired"] = header.expired.load(std::memory_order_relaxed);
    row["pool_id"] = member_->pool_id();
    row["live_bytes"] = stats.live;
    row["committed_bytes"] = stats.committed;
    row["limit_bytes"] = stats.limit;
    row["blocks"] = stats.blocks;
    row["leases"] = stats.leases.size();
    row["warm_bytes"] = stats.warm;
    row["control_bytes"] = stats.control;
    row["spill_directory"] = catalogue_->directory();
    row["policy"] = static_cast<int>(header.policy.load(std::memory_order_relaxed));
    row["spilled_names"] = totals.names_on_disk;
    row["spilled_bytes"] = totals.bytes_on_disk;
    row["loads"] = totals.loads;
    row["restores"] = totals.restores;
    row["restored_bytes"] = totals.restored_bytes;
    row["spills"] = totals.spills;
    row["spilled_total_bytes"] = totals.spilled_bytes;
    row["written"] = totals.written;
    row["written_bytes"] = totals.written_bytes;
    row["evictions"] = totals.evictions;
    row["spill_errors"] = totals.spill_errors;
    row["room_waits"] = totals.room_waits;
    row["tickets"] = stats.tickets;
    row["ticket_bytes"] = stats.ticket_bytes;
    row["pages"] = pages_of(member_->arena());
    row["processes"] = describe_processes(stats);
    return row;
  }

  std::string name() const {
    const store::Header& header = catalogue_->header();
    return {header.name, ::strnlen(header.name, sizeof header.name)};
  }

  py::object allocate_here() {
    PyObject* before = allocate_in(member_);
    if (before == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(before);
  }

  uint64_t pool_id() const { return member_->pool_id(); }
  uintptr_t member_address() const { return reinterpret_cast<uintptr_t>(member_); }
  bool serving() const { return server_ != nullptr; }
  bool took_over() const { return server_ != nullptr && server_->took_over(); }

  // Whether somebody has asked the service to end, within that time.
  bool wait_stop(int milliseconds) {
    if (server_ == nullptr) return true;
    const WithoutGil release;
    return server_->wait(milliseconds);
  }

  // Ends the service, if it is here. Names and data stay, for whoever has the store.
  void stop() {
    if (server_ == nullptr) return;
    const WithoutGil release;
    server_.reset();
  }

 private:
  bool make_room(uint64_t bytes) {
    const WithoutGil release;
    return catalogue_->make_room(bytes) > 0;
  }

  // Why nothing could go to disk, where that is why there is no room.
  Status explained(Status status) const {
    const std::string why = status.code() == Code::kFull ? catalogue_->trouble() : "";
    return why.empty() ? std::move(status) : Status(Code::kFull, status.what() + ". " + why);
  }

  // A moment, longer each time.
  void rest(int attempt) {
    {
      const WithoutGil release;
      // Not the same for all: those who want the same memory must not go on meeting one another.
      thread_local std::minstd_rand random(std::random_device{}());
      const auto most = std::min(kShortRest * (2 << std::min(attempt, 8)), kLongRest);
      std::this_thread::sleep_for(most / 4 + most * static_cast<int>(random() % 1024) / 1024);
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

  // Tries again where there is no room, or another process is at it, with nothing held meanwhile. patience: ns; -1: the store's.
  template <class F>
  Status patiently(int64_t patience, F attempt) {
    uint64_t until = 0;
    for (int attempts = 0;; ++attempts) {
      Status status = attempt();
      if ((status.code() != Code::kFull && status.code() != Code::kBusy) || status.too_large()) return status;
      const uint64_t now = os::boot_time();
      if (attempts == 0) {
        catalogue_->count_wait();
        const uint64_t set = catalogue_->header().patience.load(std::memory_order_relaxed);
        const uint64_t most = patience < 0 ? set : static_cast<uint64_t>(patience);
        until = now + std::min(most, kForEver);
      }
      // Not for want of room: as long as it takes, since who is at it is alive, and is not waited for when it stands still.
      if (status.code() == Code::kBusy) until = std::max(until, now + kBusyMost);
      if (now >= until) return explained(std::move(status));
      rest(attempts);
    }
  }

  // kStale: look for the name again.
  Result<store::Catalogue::Writing> hold_for_writing(const store::Entry& entry) {
    std::optional<store::Catalogue::Writing> writing;
    const uint64_t begun = os::boot_time();
    Status status = patiently(-1, [&]() -> Status {
      // Whoever writes it out may be stopped.
      const WithoutGil release;
      auto held = catalogue_->hold_for_writing(entry, os::boot_time() - begun < kStopped);
      if (!held) return std::move(held.status());
      writing.emplace(held.take());
      return {};
    });
    if (writing) return std::move(*writing);
    if (status.code() != Code::kStale) fail_in_store(status);
    return status;
  }

  // What is written here to a block that is private here reaches nobody, against what the mode says.
  void refuse_private(uint32_t block, Mode wanted, std::string_view key) {
    if (wanted != Mode::kReadWrite || !member_->is_private(block)) return;
    fail_in_store(Status(Code::kUnsupported,
                         std::string(key) +
                             " can't be loaded to be written for all: this process still has the array that it "
                             "received in a message and saved, which is its own; delete that first"));
  }

  [[noreturn]] static void fail_damaged(std::string_view key, const Status& status) {
    fail_in_store(Status(Code::kCorrupt, "the entry of " + std::string(key) + " is damaged: " + status.what()));
  }

  // hold: until the tuple goes, so that what is about to be written to does not go to disk meanwhile.
  py::object as_text(const store::Entry& entry, bool hold) {
    py::list blocks, held;
    for (const auto& block : entry.blocks) {
      blocks.append(py::make_tuple(block.block, block.generation));
      if (!hold) continue;
      if (auto view = member_->attach(block.block, block.generation, Mode::kReadWrite)) {
        PyObject* ref = make_block_ref(member_, *view, Mode::kReadWrite);
        if (ref == nullptr) throw py::error_already_set();
        held.append(py::reinterpret_steal<py::object>(ref));
      }
    }
    if (!hold) return py::make_tuple(py::bytes(entry.text), blocks);
    return py::make_tuple(py::bytes(entry.text), blocks, held);
  }

  // Takes over the view's hold.
  py::object bytes_over(const pool::Member::View& view, uint64_t length, Mode mode, bool writeable) {
    PyObject* base = make_block_ref(member_, view, mode);
    if (base == nullptr) throw py::error_already_set();
    npy_intp shape = static_cast<npy_intp>(length);
    PyObject* made = PyArray_New(&PyArray_Type, 1, &shape, NPY_UINT8, nullptr, view.data, 0,
                                 writeable ? NPY_ARRAY_WRITEABLE : 0, nullptr);
    if (made == nullptr) {
      Py_DECREF(base);
      throw py::error_already_set();
    }
    py::object array = py::reinterpret_steal<py::object>(made);
    if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(made), base) < 0) throw py::error_already_set();
    return array;
  }

  pool::Member* member_;
  std::shared_ptr<store::Catalogue> catalogue_;
  std::unique_ptr<service::Server> server_;
};

// Bytes from anywhere, to `offset` of a blank array; a part of `of` bytes that are copied in one go.
void copy_into(py::handle array, uint64_t offset, uintptr_t from, uint64_t length, uint64_t of) {
  if (!PyArray_CheckExact(array.ptr())) throw py::type_error("an array is expected");
  auto* to = reinterpret_cast<PyArrayObject*>(array.ptr());
  const auto room = static_cast<uint64_t>(PyArray_NBYTES(to));
  if (!PyArray_IS_C_CONTIGUOUS(to) || !PyArray_ISWRITEABLE(to) || offset > room || length > room - offset)
    throw py::value_error("more bytes than fit");
  auto* at = static_cast<std::byte*>(PyArray_DATA(to)) + offset;
  const auto* bytes = reinterpret_cast<const std::byte*>(from);
  if (length < kCopyUnderGil) {
    torchshm::copy_bytes(at, bytes, length, of);
    return;
  }
  const WithoutGil release;
  torchshm::copy_bytes(at, bytes, length, of);
}

py::object answer_of(const std::string& name, service::Ask what) {
  if (Status named = service::check_name(name); !named) fail_in_store(named);
  Result<service::Reply> reply = Status();
  {
    const WithoutGil release;
    reply = service::ask(name, what);
  }
  if (reply) return as_dict(*reply);
  fail_unavailable(reply.status());
}

}  // namespace

void add_store(py::module_& m) {
  add_lock(m);
  py::class_<Store>(m, "Store")
      .def_static("start", &Store::start, py::arg("name"), py::arg("limit") = 0, py::arg("ttl") = 0,
                  py::arg("mode") = 0600, py::arg("group") = -1, py::arg("spill") = "", py::arg("spill_sync") = true,
                  py::arg("policy") = -1, py::arg("patience") = -1, py::arg("file") = "", py::arg("hugepages") = "",
                  py::arg("prefault") = false, py::arg("numa") = "")
      .def_static("connect", &Store::connect, py::arg("name"), py::arg("timeout"))
      .def("save_array", &Store::save_array)
      .def("load", &Store::load)
      .def("save", &Store::save)
      .def("refer", &Store::refer)
      .def("blank", &Store::blank)
      .def("open", &Store::open)
      .def("find", &Store::find)
      .def("restore", &Store::restore)
      .def("set_policy", &Store::set_policy)
      .def("wait_for_room", &Store::wait_for_room)
      .def("sweep_files", &Store::sweep_files)
      .def("leave", &Store::leave)
      .def_property_readonly("patience", &Store::patience)
      .def_property_readonly("limit", &Store::limit)
      .def("set_limit", &Store::set_limit)
      .def("trim", &Store::trim)
      .def("contains", &Store::contains)
      .def("remove", &Store::remove)
      .def("keys", &Store::keys)
      .def("size", &Store::size)
      .def("sweep", &Store::sweep)
      .def("sync", &Store::sync)
      .def("lock", &Store::lock)
      .def("bell", &Store::bell)
      .def("ring", &Store::ring)
      .def("wait", &Store::wait)
      .def("info", &Store::info)
      .def("allocate_here", &Store::allocate_here)
      .def("wait_stop", &Store::wait_stop)
      .def("stop", &Store::stop)
      .def_property_readonly("name", &Store::name)
      .def_property_readonly("file", &Store::file)
      .def_property_readonly("pool_id", &Store::pool_id)
      .def_property_readonly("member_address", &Store::member_address)
      .def_property_readonly("serving", &Store::serving)
      .def_property_readonly("took_over", &Store::took_over);
  m.def("copy_into", &copy_into, py::arg("array"), py::arg("offset"), py::arg("address"), py::arg("length"),
        py::arg("of") = 0);
  m.def(
      "store_status", [](const std::string& name) { return answer_of(name, service::Ask::kInfo); }, py::arg("name"));
  m.def(
      "store_stop", [](const std::string& name) { return answer_of(name, service::Ask::kStop); }, py::arg("name"));
}

}  // namespace torchshm::python
