#include "python/module_api.h"

#include <cstring>

#include "base/copy.h"
#include "os/mapping.h"
#include "python/errors.h"
#include "python/family.h"
#include "python/numpy_memory.h"
#include "python/reduce.h"

namespace torchshm::python {
namespace {

using pool::Mode;
using Way = pool::ModuleApi::Way;

// The mode in which receivers see memory that lies in the pool; nothing where they must not see it.
std::optional<Mode> mode_by_reference(pool::Member& owner, const pool::Member::Found& found, const std::byte* data,
                                      uint64_t bytes) {
  if (found.exclusive || found.offset + bytes > found.length) return std::nullopt;
  const Scope& now = scope();
  Mode mode = found.mode;
  if (mode == Mode::kReadWrite && owner.is_private(found.block)) return std::nullopt;
  if (mode == Mode::kCopyOnWrite && owner.modified(found, data, data + bytes)) return std::nullopt;
  if (now.sharing) {
    if (now.mode == Mode::kReadWrite && mode != Mode::kReadWrite) return std::nullopt;
    mode = now.mode;
  }
  if (mode == Mode::kRead) mode = Mode::kCopyOnWrite;  // a tensor can't be read-only
  if (mode == Mode::kCopyOnWrite) {
    const auto extent = owner.arena().extent(found.block);
    if (!extent || !extent->whole_pages()) return std::nullopt;
  }
  return mode;
}

void write(pool::Member& owner, const pool::Handle& handle, Mode mode, uint64_t offset, uint64_t bytes,
           pool::ModuleApi::Sent& sent) {
  ArrayWire wire;
  wire.handle = handle;
  wire.mode = mode;
  wire.type_num = NPY_UINT8;
  wire.item_size = 1;
  wire.offset = offset;
  wire.ndim = 1;
  wire.shape[0] = static_cast<int64_t>(bytes);
  sent.length = pool::encode(wire, sent.wire, owner.arena().header().secret);
  if (scope().sharing) scope().issued.push_back(handle);
}

Way refuse(const Status& status) {
  if (scope().sharing) {
    (void)raise(status);
    return Way::kRaised;
  }
  fall_back(*member(), status);
  return Way::kNot;
}

Way send(void* memory, uint64_t bytes, bool borrowed, pool::ModuleApi::Sent& sent) {
  const auto* data = static_cast<const std::byte*>(memory);
  Scope& now = scope();
  pool::Member* target = member();
  if (target == nullptr || bytes == 0 || now.inline_depth > 0) return Way::kNot;
  pool::Member* owner = target->arena().locate(data) ? target : now.sharing ? nullptr : former_member(data);
  if (owner != nullptr) {
    const auto found = owner->find(data);
    auto mode = found ? mode_by_reference(*owner, *found, data, bytes) : std::nullopt;
    if (mode == Mode::kReadWrite && now.batch.on &&
        !now.batch.refer(*owner, *found, bytes, borrowed ? Batch::Kind::kBorrowed : Batch::Kind::kStorage)) {
      mode.reset();
    }
    if (mode) {
      auto handle = issue(*owner, found->block);
      if (!handle) return refuse(handle.status());
      write(*owner, *handle, *mode, found->offset, bytes, sent);
      return Way::kByReference;
    }
  }
  Result<pool::Member::View> block = Status();
  Py_BEGIN_ALLOW_THREADS;  // may commit and map fresh pages
  block = target->allocate(bytes, now.sharing || bytes >= 4 * os::kPageBytes);
  if (block && bytes >= uint64_t{kCopyUnderGil}) torchshm::copy_bytes(block->data, data, bytes);
  Py_END_ALLOW_THREADS;
  if (!block) return refuse(block.status());
  if (bytes < uint64_t{kCopyUnderGil}) std::memcpy(block->data, data, bytes);
  auto handle = issue(*target, block->block);
  if (!handle) {
    target->release(block->block, Mode::kReadWrite);
    return refuse(handle.status());
  }
  const Mode mode = !now.sharing ? Mode::kReadWrite : now.mode == Mode::kRead ? Mode::kCopyOnWrite : now.mode;
  write(*target, *handle, mode, 0, bytes, sent);
  if (!now.sharing) {
    sent.moved = block->data;
    return Way::kMoved;
  }
  target->release(block->block, Mode::kReadWrite);  // from here on the ticket keeps it
  return Way::kCopied;
}

bool receive(const char* bytes, size_t length, pool::ModuleApi::Received& received) {
  auto wire = pool::decode(bytes, length);
  if (!wire) {
    (void)raise(wire.status());
    return false;
  }
  if (wire->carries || wire->dtype_apart || wire->ndim != 1 || wire->item_size != 1 || wire->type_num != NPY_UINT8 ||
      wire->order != ArrayWire::Order::kC) {
    (void)raise(Status(Code::kInvalid, "it is no storage"));
    return false;
  }
  pool::Member* owner = member_of(wire->handle.pool_id);
  if (owner == nullptr) return false;
  if (!pool::intact(bytes, length, owner->arena().header().secret)) {
    (void)raise(Status(Code::kInvalid, "it is damaged"));
    return false;
  }
  auto opened = pool::open(*owner, *wire);
  if (!opened) {
    (void)raise(opened.status());
    return false;
  }
  received.data = opened->view.data + wire->offset;
  received.bytes = static_cast<uint64_t>(wire->shape[0]);
  received.to_copy = opened->mode != wire->mode;
  return true;
}

const pool::ModuleApi table{pool::ModuleApi::kVersion, take_block, give_block_back, send, receive};

}  // namespace

int add_module_api(PyObject* module) {
  PyObject* capsule = PyCapsule_New(const_cast<pool::ModuleApi*>(&table), pool::kModuleApi, nullptr);
  if (capsule == nullptr) return -1;
  const int added = PyModule_AddObjectRef(module, "module_api", capsule);
  Py_DECREF(capsule);
  return added;
}

}  // namespace torchshm::python
