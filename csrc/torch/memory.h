// torch's memory in the pool: the allocator that pooled() and Store.storage() switch on, and storages over blocks.
//
// Private to the process. Blocks are released by the addresses that storages hold, without the GIL and from any thread.
#pragma once

#include <c10/core/Storage.h>

#include "pool/module_api.h"

namespace torchshm::torch_room {

// The functions of _C. Set once, when the module is imported.
const pool::ModuleApi& api();
void set_api(const pool::ModuleApi* api);

// What this thread's allocations are taken from.
struct Target {
  bool on = false;
  void* member = nullptr;  // null: the process's own pool
};
// Switches; returns the one before. The first call that switches on installs the allocator, for good: without it a thread's allocations cost
// one comparison more.
Target switch_to(Target target);

// Memory of the pool, as storages hold it.
at::DataPtr over(void* data);
bool is_ours(const at::DataPtr& memory);
// As torch makes the storages that it shares: they can't be resized, for others look at them.
c10::Storage make_storage(void* data, uint64_t bytes);

}  // namespace torchshm::torch_room
