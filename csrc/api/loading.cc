// Store::load() and its like: what a name stands for, found, read and opened.
#include <algorithm>
#include <optional>
#include <thread>

#include "api/store_impl.h"
#include "os/futex.h"

namespace torchshm {

using api::check_key;
using api::count_of;
using api::fail;
using api::fail_damaged;
using api::fail_kind;
using api::seconds;
using api::time_after;

namespace {

constexpr int kAttempts = 1000;                 // a name that changes more often while it is looked for is an error
constexpr uint64_t kBusyMost = 10'000'000'000;  // ns for another process to write a value out or bring it back
constexpr uint64_t kStopped = 2'000'000'000;    // ns after which the value is brought back here as well
constexpr uint64_t kLook = 1'000'000'000;       // ns; a saver that dies after it has named the value rings no bell

// Calls open(entry, value) until it does not find that the name has been removed or replaced meanwhile.
template <class Impl, class F>
auto load_by(Impl& impl, std::string_view key, const LoadOptions& options, F open) {
  check_key(key);
  if (options.mode > Mode::kCopyOnWrite) throw std::invalid_argument("torchshm: unknown mode");
  const uint64_t timeout = count_of(options.timeout, "a timeout");
  const uint64_t begun = os::boot_time();
  for (int attempt = 0;; ++attempt) {
    const store::Entry entry = impl.find(key, timeout);
    std::optional<store::Catalogue::Writing> writing;
    if (options.mode == Mode::kReadWrite) {
      auto held = impl.catalogue->hold_for_writing(entry, os::boot_time() - begun < kStopped);
      if (!held && held.code() == Code::kBusy && attempt < kAttempts) std::this_thread::sleep_for(kRoomNap);
      if (!held && (held.code() == Code::kBusy || held.code() == Code::kStale) && attempt < kAttempts) continue;
      if (!held) fail(held.status());
      writing.emplace(std::move(*held));
    }
    auto value = api::parse(entry, *impl.member);
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
const api::Leaf& only_leaf(std::string_view key, const api::Value& value) {
  if (value.kind == 'A') return value.leaves[0];
  const auto index = api::leaf_at(value, value.tree);
  if (!index) fail_kind(key, "it is a list, tuple, dict or plain value; load_all() returns the arrays in one");
  return value.leaves[*index];
}

// Finds the arrays in a node; false when the tree is damaged.
bool collect(const api::Value& value, const api::Json& node, const std::string& path,
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

}  // namespace

void Store::Impl::restore(std::string_view key) {
  const uint64_t begun = os::boot_time();
  const uint64_t patience = std::max(catalogue->header().patience.load(std::memory_order_relaxed), kBusyMost);
  for (;;) {
    const Status back = catalogue->restore(key, os::boot_time() - begun < kStopped);
    if (back) return;
    const bool later = (back.code() == Code::kFull && !back.too_large()) || back.code() == Code::kBusy;
    if (!later || os::boot_time() - begun > patience) fail(back);
    std::this_thread::sleep_for(kRoomNap);
  }
}

store::Entry Store::Impl::find(std::string_view key, uint64_t timeout) {
  const uint64_t until = time_after(timeout);
  for (;;) {
    const uint32_t bell = catalogue->bell(key);
    auto entry = catalogue->load(key);
    if (entry && entry->spilled) {
      restore(key);
      continue;
    }
    if (entry) return entry.take();
    if (entry.code() != Code::kMissing) fail(entry.status());
    if (timeout == 0) throw KeyError("torchshm: the store " + name + " has no name '" + std::string(key) + "'");
    const uint64_t at = os::boot_time();
    if (at >= until)
      throw TimeoutError("torchshm: nobody has saved '" + std::string(key) + "' within " + seconds(timeout));
    (void)catalogue->wait(key, bell, std::min(until - at, kLook));
  }
}

Array Store::load(std::string_view key, const LoadOptions& options) const {
  return load_by(*impl_, key, options, [&](const store::Entry& entry, const api::Value& value) {
    const api::Leaf& leaf = only_leaf(key, value);
    if (!leaf.unfit.empty()) fail_kind(key, leaf.unfit);
    return api::Opener(impl_->member, entry, options.mode).array(leaf);
  });
}

Blob Store::load_blob(std::string_view key, const LoadOptions& options) const {
  return load_by(*impl_, key, options, [&](const store::Entry& entry, const api::Value& value) -> Result<Blob> {
    if (const api::Json* carried = value.tree.find("b"); carried != nullptr && value.kind == 'J') {
      auto bytes = api::decode_base64(carried->text);
      if (!bytes) fail_damaged(key, bytes.status());
      const auto own = std::make_shared<std::string>(bytes.take());
      return Blob(reinterpret_cast<std::byte*>(own->data()), own->size(), options.mode != Mode::kRead, own);
    }
    const api::Leaf& leaf = only_leaf(key, value);
    Array shaped = leaf.array;
    if (leaf.item_size == 0 && !leaf.unfit.empty()) fail_kind(key, leaf.unfit);
    int64_t size = leaf.item_size, step = leaf.item_size;
    for (size_t i = shaped.shape.size(); i-- > 0; step *= shaped.shape[i]) {
      size *= shaped.shape[i];
      if (leaf.region && shaped.shape[i] != 1 && shaped.strides[i] != step)
        fail_kind(key, "its bytes do not lie one after the other; load() has its strides");
    }
    auto memory = api::Opener(impl_->member, entry, options.mode).open(leaf);
    if (!memory) return std::move(memory.status());
    return Blob(memory->data, static_cast<size_t>(size), memory->writeable, memory->owner);
  });
}

std::vector<std::pair<std::string, Array>> Store::load_all(std::string_view key, const LoadOptions& options) const {
  using Arrays = std::vector<std::pair<std::string, Array>>;
  return load_by(*impl_, key, options, [&](const store::Entry& entry, const api::Value& value) -> Result<Arrays> {
    std::vector<std::pair<std::string, size_t>> found;
    if (value.kind == 'A') {
      found.emplace_back("", 0);
    } else if (!collect(value, value.tree, "", found)) {
      fail_damaged(key, Status(Code::kInvalid, "an array that is not there"));
    }
    api::Opener opener(impl_->member, entry, options.mode);
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

}  // namespace torchshm