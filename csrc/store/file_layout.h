// What lies where in the file of a persistent store: a superblock, and the three files of a store in memory, each as one region.
//
// Shared: everything declared here, and all of it outlives every process. tests/cpp/store_file_test.cc pins the bytes; kFileVersion counts
// changes of the superblock, and the tables have versions of their own.
//
//   file:  Superblock | catalogue | control | data        every region begins at a multiple of 2 MiB
//
// When a process dies here: `ready` says whether the file was finished. Everything else is what a death leaves in memory files.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pool/layout.h"
#include "store/layout.h"

namespace torchshm::store {

constexpr uint64_t kFileMagic = 0x454c494653485254;  // "TRHSFILE"
constexpr uint32_t kFileVersion = 1;

constexpr uint32_t kOpen = 0;   // somebody may have changed it since it was last written out
constexpr uint32_t kClean = 1;  // written out, and not changed since

struct alignas(64) Superblock {
  uint64_t magic;
  uint32_t version;        // kFileVersion
  uint32_t pool_version;   // pool::kVersion
  uint32_t store_version;  // store::kVersion
  uint32_t pool_hash;      // pool::kLayoutHash
  uint32_t store_hash;     // store::kLayoutHash
  std::atomic<uint32_t> ready;
  uint64_t size;  // of the file
  uint64_t catalogue_at, catalogue_size, control_at, control_size, data_at, data_size;
  uint64_t pool_id;
  std::atomic<uint32_t> state;
  uint32_t reserved;
  uint64_t boot[2];  // of the machine, when it was last started
  int64_t
      clock;  // the file's time - CLOCK_BOOTTIME, in ns, in that boot. The file's time is CLOCK_REALTIME as it was at a boot's first start
  uint64_t synced;  // CLOCK_REALTIME of the last sync(), ns; 0: none
};

static_assert(sizeof(Superblock) == 192);

constexpr uint64_t kCatalogueAt = pool::kChunk;
constexpr uint64_t kControlAt = kCatalogueAt + (offsets::kTotal + pool::kChunk - 1) / pool::kChunk * pool::kChunk;

}  // namespace torchshm::store
