// The 32 bytes that travel in a message in the place of a block's payload.
//
// Shared: nothing; a handle is a value. It names a pool, a block, the generation it was made with, and one ticket. Whoever receives one
// trusts none of it: Member::redeem() checks every field against the pool.
#pragma once

#include <cstdint>
#include <cstring>

#include "pool/layout.h"

namespace torchshm::pool {

struct Handle {
  uint64_t pool_id = 0;
  uint64_t generation = 0;
  uint32_t block = 0;
  uint32_t ticket = 0;
  uint64_t nonce = 0;

  static constexpr size_t kBytes = 32;
  void write(void* to) const { std::memcpy(to, this, kBytes); }
  static Handle read(const void* from) {
    Handle handle;
    std::memcpy(&handle, from, kBytes);
    return handle;
  }
};

static_assert(sizeof(Handle) == Handle::kBytes);

}  // namespace torchshm::pool
