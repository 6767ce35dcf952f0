#include "python/numpy_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "os/mapping.h"
#include "python/family.h"

namespace torchshm::python {
namespace {

// context: the pool, or null for the process's own.
void* take(void* context, size_t size) {
  void* data = take_block(context, size);
  return data != nullptr ? data : std::malloc(size);
}

void* take_zeroed(void*, size_t count, size_t size) { return std::calloc(count, size); }

void give_back(void*, void* data, size_t) {
  if (data != nullptr && !give_block_back(data)) std::free(data);
}

void* resize(void* context, void* data, size_t size) {
  pool::Member* owner = data == nullptr ? nullptr : pool::find_address(data);
  if (owner == nullptr) return std::realloc(data, size);
  const auto found = owner->find(data);
  if (!found) return nullptr;
  if (size <= found->length && size >= found->length / 2) return data;
  void* moved = take(context, size);
  if (moved == nullptr) return nullptr;
  std::memcpy(moved, data, std::min<size_t>(size, found->length));
  owner->release(found->block, pool::Mode::kReadWrite);
  return moved;
}

// For good: arrays made with it refer to it. One for each pool.
PyDataMem_Handler& handler_for(pool::Member* pool) {
  static std::map<pool::Member*, PyDataMem_Handler> handlers;
  return handlers.try_emplace(pool, PyDataMem_Handler{"torchshm", 1, {pool, take, take_zeroed, resize, give_back}})
      .first->second;
}

}  // namespace

void* take_block(void* pool, uint64_t bytes) {
  pool::Member* owner = pool != nullptr ? static_cast<pool::Member*>(pool) : member();
  if (owner == nullptr) return nullptr;
  auto block = owner->allocate(bytes, bytes >= 4 * os::kPageBytes);
  return block ? block->data : nullptr;
}

bool give_block_back(void* data) {
  pool::Member* owner = pool::find_address(data);
  if (owner == nullptr) return false;
  if (const auto found = owner->find(data)) owner->release(found->block, found->mode);
  return true;
}

PyObject* enter_pooled(PyObject*, PyObject*) { return allocate_in(nullptr); }

PyObject* allocate_in(pool::Member* pool) {
  PyObject* capsule = PyCapsule_New(&handler_for(pool), "mem_handler", nullptr);
  if (capsule == nullptr) return nullptr;
  PyObject* before = PyDataMem_SetHandler(capsule);
  Py_DECREF(capsule);
  return before;
}

PyObject* leave_pooled(PyObject*, PyObject* before) {
  PyObject* ours = PyDataMem_SetHandler(before);
  if (ours == nullptr) return nullptr;
  Py_DECREF(ours);
  Py_RETURN_NONE;
}

}  // namespace torchshm::python
