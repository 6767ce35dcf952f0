// What _C offers the other compiled modules of a process, such as _torch: the state of the core is there once, and lies in _C.
//
// A table of functions behind a pointer in a capsule (kModuleApi), since the modules know nothing of each other's symbols. Private to
// the process. Thread safety: allocate() and give_back() from any thread; send() and receive() with the GIL.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool/array_wire.h"

namespace torchshm::pool {

constexpr const char* kModuleApi = "torchshm._C.module_api";

struct ModuleApi {
  static constexpr uint32_t kVersion = 2;
  uint32_t version = kVersion;

  // Memory that this process holds once for writing. Null where the pool has none, or where there is no pool. member: whose pool; null: the
  // process's own.
  void* (*allocate)(void* member, uint64_t bytes);
  // One object less that looks at the block of an address. False where it lies in no pool.
  bool (*give_back)(void* data);

  enum class Way {
    kRaised,       // a Python exception is set
    kNot,          // it has to go another way
    kByReference,  // it lies in the pool
    kMoved,  // a copy of it lies in the pool at `moved`, held once; writes to that are seen by whoever receives it
    kCopied  // a copy of it is in the message, and what the sender has stays its own
  };
  struct Sent {
    char wire[kWireMost];
    size_t length;
    void* moved;
  };
  // Bytes that are written to by sender and receivers alike, as torch's storages are. borrowed: the memory is not torch's, and others may look
  // at it who are no tensors.
  Way (*send)(void* data, uint64_t bytes, bool borrowed, Sent& sent);

  struct Received {
    void* data;
    uint64_t bytes;
    bool
        to_copy;  // the mode that was asked for has no address space here: what is written to `data` would be seen by others
  };
  // False with an exception set. The block is held once.
  bool (*receive)(const char* wire, size_t length, Received& received);
};

}  // namespace torchshm::pool
