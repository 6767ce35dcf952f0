#include "api/opener.h"

#include <algorithm>
#include <new>

#include "base/copy.h"
#include "pool/array_wire.h"

namespace torchshm::api {

using pool::Member;

std::shared_ptr<void> owner_of(Member* member, const Member::View& view, pool::Mode mode) {
  return {view.data, [member, block = view.block, mode](void*) { member->release(block, mode); }};
}

namespace {

constexpr std::align_val_t kAlignment{64};  // of private copies; as aligned as a block

static_assert(static_cast<int>(Mode::kReadWrite) == static_cast<int>(pool::Mode::kReadWrite) &&
              static_cast<int>(Mode::kRead) == static_cast<int>(pool::Mode::kRead) &&
              static_cast<int>(Mode::kCopyOnWrite) == static_cast<int>(pool::Mode::kCopyOnWrite));

pool::Mode mode_of(Mode mode) { return static_cast<pool::Mode>(mode); }

Memory private_memory(uint64_t length) {
  auto* made = static_cast<std::byte*>(::operator new(length, kAlignment));
  return {made, length, true, std::shared_ptr<void>(made, [](void* p) { ::operator delete(p, kAlignment); })};
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

}  // namespace

Result<Memory> Opener::open(const Leaf& leaf) {
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

Result<Array> Opener::array(const Leaf& leaf) {
  auto memory = open(leaf);
  if (!memory) return std::move(memory.status());
  Array array = leaf.array;
  array.data = memory->data;
  array.owner = memory->owner;
  array.writeable = memory->writeable;
  return array;
}

}  // namespace torchshm::api
