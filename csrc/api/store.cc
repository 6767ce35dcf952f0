// torchshm::Store over a catalogue, its pool and, after start(), its service.
#include "torchshm/store.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "api/values.h"
#include "base/copy.h"
#include "os/futex.h"
#include "os/mapping.h"
#include "pool/array_wire.h"
#include "service/address.h"
#include "service/client.h"
#include "service/server.h"
#include "store/catalogue.h"
#include "store/lock.h"

namespace torchshm {
namespace {

using pool::Member;

constexpr int kAttempts = 1000;             // a name that changes more often while it is looked for is an error
constexpr uint64_t kLook = 1'000'000'000;   // ns; a saver that dies after it has named the value rings no bell
constexpr uint64_t kNap = 50'000'000;       // ns; a holder or maker that dies rings no bell
constexpr std::align_val_t kAlignment{64};  // of private copies; as aligned as a block

static_assert(static_cast<int>(Mode::kReadWrite) == static_cast<int>(pool::Mode::kReadWrite) &&
              static_cast<int>(Mode::kRead) == static_cast<int>(pool::Mode::kRead) &&
              static_cast<int>(Mode::kCopyOnWrite) == static_cast<int>(pool::Mode::kCopyOnWrite));

pool::Mode mode_of(Mode mode) { return static_cast<pool::Mode>(mode); }

[[noreturn]] void fail(const Status& status) {
  const std::string why = "torchshm: " + status.what();
  switch (status.code()) {
    case Code::kFull:
      throw PoolFullError(why);
    case Code::kInvalid:
      throw std::invalid_argument(why);
    case Code::kExists:
      throw KeyExistsError(why);
    case Code::kMissing:
      throw StoreUnavailableError(why);
    default:
      throw Error(why);
  }
}

[[noreturn]] void fail_damaged(std::string_view key, const Status& status) {
  throw Error("torchshm: the entry of '" + std::string(key) + "' is damaged: " + status.what());
}

[[noreturn]] void fail_taken(std::string_view key) {
  throw KeyExistsError("torchshm: '" + std::string(key) +
                       "' is a name in this store already; save it under another one, or with overwrite");
}

[[noreturn]] void fail_kind(std::string_view key, const std::string& why) {
  throw TypeError("torchshm: '" + std::string(key) + "' can't be had in this form: " + why);
}

void check_key(std::string_view key) {
  if (key.empty() || key[0] == '\0')
    throw std::invalid_argument("torchshm: a key has at least one character, and does not begin with a zero byte");
}

uint64_t count_of(Nanoseconds time, const char* what) {
  if (time.count() < 0) throw std::invalid_argument(std::string("torchshm: ") + what + " is 0 or more");
  return static_cast<uint64_t>(time.count());
}

// By CLOCK_BOOTTIME.
uint64_t time_after(uint64_t timeout) {
  const uint64_t now = os::boot_time();
  return timeout > UINT64_MAX - now ? UINT64_MAX : now + timeout;
}

std::string seconds(uint64_t ns) { return std::to_string(static_cast<double>(ns) * 1e-9) + " s"; }

// Memory that is kept valid by its owner.
struct Memory {
  std::byte* data = nullptr;
  uint64_t length = 0;
  bool writeable = false;
  std::shared_ptr<void> owner;
};

Memory private_memory(uint64_t length) {
  auto* made = static_cast<std::byte*>(::operator new(length, kAlignment));
  return {made, length, true, std::shared_ptr<void>(made, [](void* p) { ::operator delete(p, kAlignment); })};
}

// Takes over one hold of the view's block.
std::shared_ptr<void> owner_of(Member* member, const Member::View& view, pool::Mode mode) {
  return {view.data, [member, block = view.block, mode](void*) { member->release(block, mode); }};
}

// kStale when the block has gone: the name was removed or replaced.
Result<Memory> open_block(Member* member, const store::Entry::Block& block, Mode wanted) {
  auto mode = mode_of(wanted);
  auto view = member->attach(block.block, block.generation, mode);
  const bool no_face = view.code() == Code::kUnsupported;
  if (no_face) {
    // No address space for that mode's mapping, or the block shares its pages with others.
    mode = pool::Mode::kReadWrite;
    view = member->attach(block.block, block.generation, mode);
  }
  if (!view) return std::move(view.status());
  Memory memory{view->data, view->length, wanted != Mode::kRead, owner_of(member, *view, mode)};
  if (!no_face || wanted == Mode::kRead) return memory;
  Memory own = private_memory(memory.length);
  copy_bytes(own.data, memory.data, memory.length);
  return own;
}

// The blocks of one value, each opened once: views that share memory share it afterwards.
class Opener {
 public:
  Opener(Member* member, const store::Entry& entry, Mode mode)
      : member_(member), entry_(entry), mode_(mode), opened_(entry.blocks.size()) {}

  // The bytes that the leaf touches, at its first element.
  Result<Memory> open(const api::Leaf& leaf) {
    if (!leaf.region) return Memory{nullptr, 0, mode_ != Mode::kRead, nullptr};
    Memory& whole = opened_[leaf.region->block];
    if (whole.owner == nullptr) {
      auto block = open_block(member_, entry_.blocks[leaf.region->block], mode_);
      if (!block) return std::move(block.status());
      whole = block.take();
    }
    const auto& array = leaf.array;
    const auto touched =
        pool::reach(static_cast<int>(array.shape.size()), array.shape.data(), array.strides.data(), leaf.item_size);
    const uint64_t start = leaf.region->offset;
    if (!touched || start > whole.length) return Status(Code::kCorrupt, "an array outside of its block");
    const auto room = static_cast<int64_t>(std::min(leaf.region->length, whole.length - start));
    if (leaf.offset > room || leaf.offset + touched->low < 0 || touched->high > room - leaf.offset)
      return Status(Code::kCorrupt, "an array that is larger than its block");
    return Memory{whole.data + start + leaf.offset, static_cast<uint64_t>(room - leaf.offset), whole.writeable,
                  whole.owner};
  }

  Result<Array> array(const api::Leaf& leaf) {
    auto memory = open(leaf);
    if (!memory) return std::move(memory.status());
    Array array = leaf.array;
    array.data = memory->data;
    array.owner = memory->owner;
    array.writeable = memory->writeable;
    return array;
  }

 private:
  Member* member_;
  const store::Entry& entry_;
  Mode mode_;
  std::vector<Memory> opened_;
};

// Into C order, without gaps.
std::byte* pack(std::byte* to, const std::byte* from, const int64_t* shape, const int64_t* strides, size_t dims,
                int64_t item) {
  if (dims == 0 || (dims == 1 && strides[0] == item)) {
    const auto bytes = static_cast<size_t>(dims == 0 ? item : item * shape[0]);
    std::memcpy(to, from, bytes);
    return to + bytes;
  }
  for (int64_t i = 0; i < shape[0]; ++i) to = pack(to, from + i * strides[0], shape + 1, strides + 1, dims - 1, item);
  return to;
}

}  // namespace

struct Store::Impl {
  std::string name;
  Member* member = nullptr;
  std::shared_ptr<store::Catalogue> catalogue;
  bool took_over = false;
  std::mutex ending;  // guards server's end
  std::shared_ptr<service::Server> server;

  std::shared_ptr<service::Server> service() {
    const std::lock_guard held(ending);
    return server;
  }

  bool made_room(const Status& status) { return status.code() == Code::kFull && catalogue->sweep() > 0; }

  // A block with `bytes` uninitialised bytes.
  Member::View allocate(uint64_t bytes, bool in_the_making) {
    auto view = member->allocate(bytes, true, in_the_making);
    if (!view && made_room(view.status())) view = member->allocate(bytes, true, in_the_making);
    if (!view) fail(view.status());
    return *view;
  }

  // What is to be saved: a range of a block, held, and the handle it goes by.
  struct Placed {
    pool::Handle handle;
    uint64_t offset = 0;
    std::shared_ptr<void> hold;
  };

  Placed place(const Member::View& view, uint64_t offset) {
    auto handle = member->issue(view.block);
    auto held = handle ? member->redeem(*handle, pool::Mode::kReadWrite) : Result<Member::View>(Status());
    if (!handle) fail(handle.status());
    if (!held) fail(held.status());
    return {*handle, offset, owner_of(member, *held, pool::Mode::kReadWrite)};
  }

  // Where it lies already; nothing when it has to be copied.
  std::optional<Placed> refer(const std::byte* low, uint64_t length) {
    const auto found = member->find(low);
    if (!found || found->exclusive || length > found->length - found->offset) return std::nullopt;
    if (found->mode == pool::Mode::kCopyOnWrite && member->modified(*found, low, low + length)) return std::nullopt;
    auto view = member->view(found->block, pool::Mode::kReadWrite);
    if (!view) return std::nullopt;
    const auto kept = owner_of(member, *view, pool::Mode::kReadWrite);
    return place(*view, found->offset);
  }

  template <class F>
  Placed copy(uint64_t length, F fill) {
    const Member::View view = allocate(length, true);
    const std::shared_ptr<void> made(view.data, [this, &view](void*) { member->release_made(view.block); });
    fill(view.data);
    return place(view, 0);
  }

  void save(std::string_view key, const Array& given, const char* face, const SaveOptions& options) {
    check_key(key);
    const store::SaveOptions how{options.overwrite, count_of(options.ttl, "ttl"), false};
    const api::TypeRow* row = api::row_of(given.dtype);
    if (row == nullptr) {
      (void)name_of(given.dtype);  // throws
      return;
    }
    const bool tensor = given.kind == Array::Kind::kTensor;
    if (tensor ? !row->torch_has : !row->numpy_has) {
      throw TypeError(std::string("torchshm: ") + (tensor ? "torch" : "NumPy") + " has no dtype " + row->name +
                      (tensor ? "" : ": save it as a tensor, with kind = Array::Kind::kTensor"));
    }
    if (given.shape.size() > pool::kMostDims || given.shape.size() != given.strides.size())
      throw std::invalid_argument("torchshm: an array has at most 64 dimensions, and one stride for each");
    Array array = given;
    const auto packed = contiguous_strides(array.dtype, array.shape);  // throws for an impossible shape
    const int64_t bytes = array.nbytes(), item = array.dtype.size();
    for (int64_t& step : array.strides) {
      const size_t i = static_cast<size_t>(&step - array.strides.data());
      if (bytes == 0 || array.shape[i] == 1) step = packed[i];
      if (tensor && (step < 0 || step % item != 0))
        throw TypeError("torchshm: torch has no negative strides, and none that are no multiple of the element's size");
    }
    // Before the copy.
    if (!options.overwrite && catalogue->contains(key)) fail_taken(key);
    if (bytes == 0) {
      name_it(key, api::describe(array, *row, std::nullopt, 0, face), {}, how);
      return;
    }
    const auto touched =
        pool::reach(static_cast<int>(array.shape.size()), array.shape.data(), array.strides.data(), item);
    if (!touched || array.data == nullptr)
      throw std::invalid_argument("torchshm: an array without memory, or with strides that do not fit its shape");
    const auto* first = static_cast<const std::byte*>(array.data);
    const auto* low = first + touched->low;
    const auto length = static_cast<uint64_t>(touched->high - touched->low);
    int64_t offset = -touched->low;  // of the first element
    std::optional<Placed> placed = refer(low, length);
    uint64_t region = length;
    if (!placed && touched->high - touched->low <= bytes) {
      placed = copy(length, [&](std::byte* to) { copy_bytes(to, low, length); });
    } else if (!placed) {
      region = static_cast<uint64_t>(bytes);
      placed = copy(region, [&](std::byte* to) {
        pack(to, first, array.shape.data(), array.strides.data(), array.shape.size(), item);
      });
      array.strides = packed;
      offset = 0;
    }
    std::string text;
    if (!tensor && face == nullptr && row->number >= 0) {
      text = wire_of(array, *row, *placed, offset);
    } else {
      text = api::describe(array, *row, api::Region{0, placed->offset, region}, offset, face);
    }
    name_it(key, text, {placed->handle.block}, how);
  }

  std::string wire_of(const Array& array, const api::TypeRow& row, const Placed& placed, int64_t offset) {
    pool::ArrayWire wire;
    wire.handle = placed.handle;
    wire.mode = pool::Mode::kRead;
    wire.writeable = false;
    wire.type_num = row.number;
    wire.item_size = row.dtype.size();
    wire.offset = placed.offset + static_cast<uint64_t>(offset);
    wire.ndim = static_cast<int>(array.shape.size());
    std::copy(array.shape.begin(), array.shape.end(), wire.shape.begin());
    std::copy(array.strides.begin(), array.strides.end(), wire.strides.begin());
    wire.order = array.is_contiguous() ? pool::ArrayWire::Order::kC : pool::ArrayWire::Order::kStrided;
    char bytes[1 + pool::kWireMost] = {'A'};
    return {bytes, 1 + pool::encode(wire, bytes + 1, member->arena().header().secret)};
  }

  void name_it(std::string_view key, const std::string& text, const std::vector<uint32_t>& blocks,
               const store::SaveOptions& how) {
    Status saved = catalogue->save(key, text, blocks, how);
    if (made_room(saved)) saved = catalogue->save(key, text, blocks, how);
    if (saved.code() == Code::kExists) fail_taken(key);
    if (!saved) fail(saved);
  }

  // What the name stands for, once it is there.
  store::Entry find(std::string_view key, uint64_t timeout) {
    const uint64_t until = time_after(timeout);
    for (;;) {
      const uint32_t bell = catalogue->bell(key);
      auto entry = catalogue->find(key);
      if (entry) return entry.take();
      if (entry.code() != Code::kMissing) fail(entry.status());
      if (timeout == 0) throw KeyError("torchshm: the store " + name + " has no name '" + std::string(key) + "'");
      const uint64_t at = os::boot_time();
      if (at >= until)
        throw TimeoutError("torchshm: nobody has saved '" + std::string(key) + "' within " + seconds(timeout));
      (void)catalogue->wait(key, bell, std::min(until - at, kLook));
    }
  }

  // Puts up the mark of the process that makes a name. False when somebody else has.
  bool mark(const std::string& name) {
    const store::SaveOptions bound{false, 0, true};
    Status saved = catalogue->save(name, "", {}, bound);
    if (made_room(saved)) saved = catalogue->save(name, "", {}, bound);
    if (!saved && saved.code() != Code::kExists) fail(saved);
    return saved.ok();
  }

  void wait_for_maker(std::string_view key, const std::string& mark, uint32_t bell, uint64_t timeout, uint64_t until) {
    auto at_work = catalogue->find(mark);
    if (!at_work) return;
    if (at_work->owner != 0 && member->gone(at_work->owner)) {
      (void)catalogue->sweep();  // the service would do it soon, if there is one
      return;
    }
    const uint64_t now = os::boot_time();
    if (now >= until)
      throw TimeoutError("torchshm: another process has not made '" + std::string(key) + "' within " +
                         seconds(timeout));
    (void)catalogue->wait(key, bell, std::min(until - now, kNap));
  }

  // Calls open(entry, value) until it does not find that the name has been removed or replaced meanwhile.
  template <class F>
  auto load(std::string_view key, const LoadOptions& options, F open) {
    check_key(key);
    if (options.mode > Mode::kCopyOnWrite) throw std::invalid_argument("torchshm: unknown mode");
    const uint64_t timeout = count_of(options.timeout, "a timeout");
    for (int attempt = 0;; ++attempt) {
      const store::Entry entry = find(key, timeout);
      auto value = api::parse(entry, *member);
      if (!value) fail_damaged(key, value.status());
      if (value->kind == 'P')
        fail_kind(key, "it is an object that Python has pickled; save the arrays in it by themselves");
      if (value->kind != 'A' && value->kind != 'J') fail_kind(key, "made by another version of torchshm");
      auto opened = open(entry, *value);
      if (opened) return opened.take();
      if (opened.code() == Code::kCorrupt) fail_damaged(key, opened.status());
      if (opened.code() != Code::kStale || attempt == kAttempts) fail(opened.status());
    }
  }

  // The value's only leaf. Throws when it has none or others.
  static const api::Leaf& only_leaf(std::string_view key, const api::Value& value) {
    if (value.kind == 'A') return value.leaves[0];
    const auto index = api::leaf_at(value, value.tree);
    if (!index) fail_kind(key, "it is a list, tuple, dict or plain value; load_all() returns the arrays in one");
    return value.leaves[*index];
  }

  // Finds the arrays in a node; false when the tree is damaged.
  static bool collect(const api::Value& value, const api::Json& node, const std::string& path,
                      std::vector<std::pair<std::string, size_t>>& found) {
    const auto below = [&](const std::string& part) { return path.empty() ? part : path + '.' + part; };
    using Kind = api::Json::Kind;
    if (node.is(Kind::kArray)) {
      for (size_t i = 0; i < node.items.size(); ++i) {
        if (!collect(value, node.items[i], below(std::to_string(i)), found)) return false;
      }
      return true;
    }
    if (node.find("x") != nullptr) {
      const auto index = api::leaf_at(value, node);
      if (index) found.emplace_back(path, *index);
      return index.has_value();
    }
    if (const api::Json* tuple = node.find("t")) return collect(value, *tuple, path, found);
    const api::Json* pairs = node.find("d") != nullptr ? node.find("d") : node.find("o");
    if (pairs == nullptr) return true;  // a plain value
    for (const api::Json& pair : pairs->items) {
      if (pair.items.size() != 2) return false;
      const api::Json& name = pair.items[0];
      if (name.is(Kind::kString) || name.is(Kind::kInteger)) {
        const std::string part = name.is(Kind::kString) ? name.text : std::to_string(name.integer);
        if (!collect(value, pair.items[1], below(part), found)) return false;
      }
    }
    return true;
  }
};

Store::Store(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Store Store::start(const std::string& name, const StartOptions& options) {
  if (Status named = service::check_name(name); !named) fail(named);
  service::ServerOptions how;
  how.name = name;
  how.limits.limit = options.limit;
  how.ttl = count_of(options.ttl, "ttl");
  how.mode = options.mode;
  how.group = options.group ? static_cast<int64_t>(*options.group) : -1;
  auto server = service::Server::start(how);
  if (server.code() == Code::kInvalid) throw Error("torchshm: " + server.status().what());
  if (!server) fail(server.status());
  auto impl = std::make_shared<Impl>();
  impl->name = name;
  impl->server = server.take();
  impl->member = &impl->server->member();
  impl->catalogue = impl->server->share_catalogue();
  impl->took_over = impl->server->took_over();
  return Store(std::move(impl));
}

Store Store::connect(const std::string& name, Nanoseconds timeout) {
  if (Status named = service::check_name(name); !named) fail(named);
  auto client = service::connect(name, count_of(timeout, "a timeout"), [] { return true; });
  if (client.code() == Code::kMissing || client.code() == Code::kInvalid)
    throw StoreUnavailableError("torchshm: no store named " + name + ": " + client.status().what() +
                                ". Start one with torchshm::Store::start(), or `torchshmd --name " + name +
                                "`, as the same user");
  if (!client) fail(client.status());
  auto impl = std::make_shared<Impl>();
  impl->name = name;
  impl->member = client->member;
  impl->catalogue = client->catalogue;
  return Store(std::move(impl));
}

void Store::save(std::string_view key, const Array& array, const SaveOptions& options) const {
  impl_->save(key, array, nullptr, options);
}

void Store::save_blob(std::string_view key, Bytes bytes, const SaveOptions& options) const {
  impl_->save(key, torchshm::array(bytes.data(), {static_cast<int64_t>(bytes.size())}), "memoryview", options);
}

Array Store::load(std::string_view key, const LoadOptions& options) const {
  return impl_->load(key, options, [&](const store::Entry& entry, const api::Value& value) {
    const api::Leaf& leaf = Impl::only_leaf(key, value);
    if (!leaf.unfit.empty()) fail_kind(key, leaf.unfit);
    return Opener(impl_->member, entry, options.mode).array(leaf);
  });
}

Blob Store::load_blob(std::string_view key, const LoadOptions& options) const {
  return impl_->load(key, options, [&](const store::Entry& entry, const api::Value& value) -> Result<Blob> {
    if (const api::Json* carried = value.tree.find("b"); carried != nullptr && value.kind == 'J') {
      auto bytes = api::decode_base64(carried->text);
      if (!bytes) fail_damaged(key, bytes.status());
      const auto own = std::make_shared<std::string>(bytes.take());
      return Blob(reinterpret_cast<std::byte*>(own->data()), own->size(), options.mode != Mode::kRead, own);
    }
    const api::Leaf& leaf = Impl::only_leaf(key, value);
    Array shaped = leaf.array;
    if (leaf.item_size == 0 && !leaf.unfit.empty()) fail_kind(key, leaf.unfit);
    int64_t size = leaf.item_size, step = leaf.item_size;
    for (size_t i = shaped.shape.size(); i-- > 0; step *= shaped.shape[i]) {
      size *= shaped.shape[i];
      if (leaf.region && shaped.shape[i] != 1 && shaped.strides[i] != step)
        fail_kind(key, "its bytes do not lie one after the other; load() has its strides");
    }
    auto memory = Opener(impl_->member, entry, options.mode).open(leaf);
    if (!memory) return std::move(memory.status());
    return Blob(memory->data, static_cast<size_t>(size), memory->writeable, memory->owner);
  });
}

std::vector<std::pair<std::string, Array>> Store::load_all(std::string_view key, const LoadOptions& options) const {
  using Arrays = std::vector<std::pair<std::string, Array>>;
  return impl_->load(key, options, [&](const store::Entry& entry, const api::Value& value) -> Result<Arrays> {
    std::vector<std::pair<std::string, size_t>> found;
    if (value.kind == 'A') {
      found.emplace_back("", 0);
    } else if (!Impl::collect(value, value.tree, "", found)) {
      fail_damaged(key, Status(Code::kInvalid, "an array that is not there"));
    }
    Opener opener(impl_->member, entry, options.mode);
    Arrays arrays;
    for (const auto& [path, index] : found) {
      const api::Leaf& leaf = value.leaves[index];
      if (!leaf.unfit.empty()) fail_kind(key, path + ": " + leaf.unfit);
      auto array = opener.array(leaf);
      if (!array) return std::move(array.status());
      arrays.emplace_back(path, array.take());
    }
    return arrays;
  });
}

Array Store::get_or_create(std::string_view key, const std::function<Array()>& make, const MakeOptions& options) const {
  check_key(key);
  const uint64_t timeout = count_of(options.timeout, "a timeout"), until = time_after(timeout);
  (void)count_of(options.ttl, "ttl");
  store::Catalogue& catalogue = *impl_->catalogue;
  const std::string mark = std::string(1, '\0').append(key);  // Python puts up the same
  for (;;) {
    const uint32_t bell = catalogue.bell(key);
    try {
      return load(key, {options.mode, Nanoseconds{0}});
    } catch (const KeyError&) {
    }
    if (!impl_->mark(mark)) {
      impl_->wait_for_maker(key, mark, bell, timeout, until);
      continue;
    }
    const std::shared_ptr<void> marked(&catalogue, [&](void*) {
      (void)catalogue.remove(mark);
      catalogue.ring(key);
    });
    if (catalogue.contains(key)) continue;  // it may have come before the mark
    const Array made = make();
    try {
      save(key, made, {false, options.ttl});
    } catch (const KeyExistsError&) {
      // Saved by somebody else, without asking: theirs it is.
    }
  }
}

struct Lock::Impl {
  store::Lock lock;
};

Lock::Lock(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Lock::Lock(Lock&& from) noexcept = default;
Lock& Lock::operator=(Lock&& from) noexcept = default;
Lock::~Lock() = default;

bool Lock::held() const { return impl_ != nullptr && impl_->lock.held(); }

void Lock::release() {
  if (impl_ != nullptr && impl_->lock.left_to_parent())
    throw Error(
        "torchshm: the lock is held by the process that this one was forked from, so it can't be released here");
  if (Status done = impl_ == nullptr ? Status(Code::kMissing, "the lock is not held") : impl_->lock.release(); !done)
    throw Error("torchshm: " + done.what());
}

Lock Store::lock(std::string_view key, bool shared, Nanoseconds timeout) const {
  if (!key.empty()) check_key(key);
  const uint64_t most = count_of(timeout, "a timeout"), until = time_after(most);
  store::Catalogue& catalogue = *impl_->catalogue;
  Lock made(std::unique_ptr<Lock::Impl>(new Lock::Impl{store::Lock(impl_->catalogue, key)}));
  store::Lock& lock = made.impl_->lock;
  for (;;) {
    const uint32_t bell = catalogue.bell(lock.bell());
    const auto taken = lock.try_acquire(shared);
    if (!taken) fail(taken.status());
    if (*taken) return made;
    const uint64_t now = os::boot_time();
    if (now >= until)
      throw TimeoutError("torchshm: somebody else has held the lock of " +
                         (key.empty() ? "the store " + name() : "'" + std::string(key) + "'") + " for " +
                         seconds(most));
    (void)catalogue.wait(lock.bell(), bell, std::min(until - now, kNap));
  }
}

Array Store::empty(DType dtype, const std::vector<int64_t>& shape) const {
  (void)name_of(dtype);  // throws for what is not known
  Array array;
  array.dtype = dtype;
  array.shape = shape;
  array.strides = contiguous_strides(dtype, shape);
  if (array.nbytes() == 0) return array;
  const Member::View view = impl_->allocate(static_cast<uint64_t>(array.nbytes()), false);
  array.data = view.data;
  array.owner = owner_of(impl_->member, view, pool::Mode::kReadWrite);
  return array;
}

bool Store::contains(std::string_view key) const {
  check_key(key);
  return impl_->catalogue->contains(key);
}

bool Store::remove(std::string_view key) const {
  check_key(key);
  return impl_->catalogue->remove(key);
}

std::vector<std::string> Store::keys(std::string_view prefix) const {
  std::vector<std::string> found;
  impl_->catalogue->each(prefix, [&](store::Entry entry) { found.push_back(std::move(entry.key)); });
  std::sort(found.begin(), found.end());
  return found;
}

uint64_t Store::size() const { return impl_->catalogue->size(); }

KeyInfo Store::info(std::string_view key) const {
  check_key(key);
  const store::Entry entry = impl_->find(key, 0);
  KeyInfo info;
  const char kind = entry.text.empty() ? '\0' : entry.text[0];
  info.kind = kind == 'A' ? "array" : kind == 'J' ? "values" : kind == 'P' ? "object" : "unknown";
  for (const auto& block : entry.blocks) {
    if (const auto extent = impl_->member->arena().extent(block.block)) info.bytes += extent->length;
  }
  info.blocks = entry.blocks.size();
  info.created = std::chrono::system_clock::time_point(
      std::chrono::duration_cast<std::chrono::system_clock::duration>(Nanoseconds(entry.created)));
  if (entry.expires != 0)
    info.expires_in = Nanoseconds(static_cast<int64_t>(entry.expires) - static_cast<int64_t>(os::boot_time()));
  info.pid = entry.pid;
  return info;
}

StoreInfo Store::info() const {
  const store::Header& header = impl_->catalogue->header();
  const pool::Stats stats = impl_->member->stats();
  StoreInfo info;
  info.name = impl_->name;
  info.names = impl_->catalogue->size();
  info.live_bytes = stats.live;
  info.committed_bytes = stats.committed;
  info.limit_bytes = stats.limit;
  // Figures: no order between them is meant.
  info.saved = header.saved.load(std::memory_order_relaxed);
  info.removed = header.removed.load(std::memory_order_relaxed);
  info.expired = header.expired.load(std::memory_order_relaxed);
  info.service_pid = header.serving.load(std::memory_order_relaxed);
  return info;
}

std::string Store::name() const { return impl_->name; }
bool Store::serving() const { return impl_->service() != nullptr; }
bool Store::took_over() const { return impl_->took_over; }

bool Store::wait_for_stop(Nanoseconds timeout) const {
  const auto server = impl_->service();
  if (server == nullptr) return true;
  const uint64_t milliseconds = count_of(timeout, "a timeout") / 1'000'000;
  return server->wait(static_cast<int>(std::min<uint64_t>(milliseconds, INT32_MAX)));
}

void Store::stop() const {
  std::shared_ptr<service::Server> ended;
  {
    const std::lock_guard held(impl_->ending);
    ended.swap(impl_->server);
  }
}

}  // namespace torchshm
