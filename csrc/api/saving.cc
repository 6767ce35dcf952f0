// Store::save() and what goes before it: where a value lies, or is copied to, and the text that says what it is.
#include <algorithm>
#include <cstring>
#include <thread>

#include "api/store_impl.h"
#include "base/copy.h"
#include "os/futex.h"
#include "pool/array_wire.h"

namespace torchshm {

using api::check_key;
using api::count_of;
using api::fail;
using api::fail_taken;
using api::owner_of;
using api::time_after;
using pool::Member;

namespace {

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

Member::View Store::Impl::allocate(uint64_t bytes, bool in_the_making) {
  auto view = member->allocate(bytes, true, in_the_making);
  if (view.code() == Code::kFull) catalogue->count_wait();
  const uint64_t until = time_after(catalogue->header().patience.load(std::memory_order_relaxed));
  while (view.code() == Code::kFull && !view.status().too_large() && os::boot_time() < until) {
    std::this_thread::sleep_for(kRoomNap);
    view = member->allocate(bytes, true, in_the_making);
  }
  if (!view) fail(view.status());
  return *view;
}

Store::Impl::Placed Store::Impl::place(const Member::View& view, uint64_t offset) {
  auto handle = member->issue(view.block);
  auto held = handle ? member->redeem(*handle, pool::Mode::kReadWrite) : Result<Member::View>(Status());
  if (!handle) fail(handle.status());
  if (!held) fail(held.status());
  return {*handle, offset, owner_of(member, *held, pool::Mode::kReadWrite)};
}

std::optional<Store::Impl::Placed> Store::Impl::refer(const std::byte* low, uint64_t length) {
  const auto found = member->find(low);
  if (!found || found->exclusive || length > found->length - found->offset) return std::nullopt;
  if (found->mode == pool::Mode::kCopyOnWrite && member->modified(*found, low, low + length)) return std::nullopt;
  auto view = member->view(found->block, pool::Mode::kReadWrite);
  if (!view) return std::nullopt;
  const auto kept = owner_of(member, *view, pool::Mode::kReadWrite);
  return place(*view, found->offset);
}

template <class F>
Store::Impl::Placed Store::Impl::copy(uint64_t length, F fill) {
  const Member::View view = allocate(length, true);
  const std::shared_ptr<void> made(view.data, [this, &view](void*) { member->release_made(view.block); });
  fill(view.data);
  return place(view, 0);
}

void Store::Impl::save(std::string_view key, const Array& given, const char* face, const SaveOptions& options) {
  check_key(key);
  store::SaveOptions how{options.overwrite, count_of(options.ttl, "ttl"), false};
  if (options.policy) how.policy = static_cast<store::Policy>(*options.policy);
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

std::string Store::Impl::wire_of(const Array& array, const api::TypeRow& row, const Placed& placed, int64_t offset) {
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

void Store::Impl::name_it(std::string_view key, const std::string& text, const std::vector<uint32_t>& blocks,
                          const store::SaveOptions& how) {
  Status saved = catalogue->save(key, text, blocks, how);
  if (saved.code() == Code::kExists) fail_taken(key);
  if (!saved) fail(saved);
}

void Store::save(std::string_view key, const Array& array, const SaveOptions& options) const {
  impl_->save(key, array, nullptr, options);
}

void Store::save_blob(std::string_view key, Bytes bytes, const SaveOptions& options) const {
  impl_->save(key, torchshm::array(bytes.data(), {static_cast<int64_t>(bytes.size())}), "memoryview", options);
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

}  // namespace torchshm
