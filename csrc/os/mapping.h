// Mappings of memory files, and what the kernel can tell or do about their pages.
//
// Private to the process: the addresses, the page tables, and in a kPrivate mapping the pages that were written. Undone by the kernel
// when the process dies. Not copied into core dumps.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace torchshm::os {

constexpr uint64_t kPageBytes = 4096;

class Mapping {
 public:
  enum class Kind : uint8_t {
    kShared,    // reads and writes everyone's pages
    kReadOnly,  // reads everyone's pages; a write is SIGSEGV
    kPrivate,   // reads everyone's pages; a written page becomes this process's own copy
    kAnonymous  // zero pages of this process alone, not reserved
  };

  Mapping() = default;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  // fd is ignored for kAnonymous. Aligned to 2 MiB, so that huge pages can be used where the system allows them.
  // at: where in the file it begins. REQUIRES: a page boundary.
  // huge: false for a sparse table in a disk's file, of which the kernel would read 2 MiB around every page that is touched.
  static Result<Mapping> map(Kind kind, int fd, uint64_t size, uint64_t at = 0, bool huge = true);

  // Makes a range of a kShared mapping private to this process (kPrivate), or kShared again; what was written privately is dropped then.
  // REQUIRES: page boundaries; fd is the mapped file's.
  Status remap(Kind kind, int fd, uint64_t offset, uint64_t length);

  // No huge pages in it, whatever the system prefers; best effort.
  void use_small_pages();

  // The same range once more, which this one goes on owning. REQUIRES: this outlives it.
  Mapping alias() const;

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  bool valid() const { return data_ != nullptr; }
  // Offset of p in this mapping; size() or more when p lies outside.
  uint64_t offset_of(const void* p) const {
    return data_ == nullptr ? size_ : static_cast<uint64_t>(static_cast<const std::byte*>(p) - data_);
  }
  bool contains(const void* p) const { return offset_of(p) < size_; }

 private:
  void unmap();
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
  uint64_t at_ = 0;  // in the file
  std::byte* reserved_ = nullptr;
  uint64_t reserved_size_ = 0;
};

// What follows works on addresses and not on descriptors: a program may close those and open files of its own under the same numbers.

// Backs a range of a kShared mapping with pages, mapped here, so that a later touch can't fail. Best where MADV_POPULATE_WRITE is known
// (Linux 5.14); before that pages are touched one by one. Whole 2 MiB become huge pages where the system has them (Linux 6.1).
// REQUIRES: page boundaries; for kReserved those of huge pages.
enum class Backing : uint8_t {
  kAuto,
  kSmall,    // pages of 4 KiB only
  kReserved  // reserved huge pages: kFull when there are not enough
};
Status commit(std::byte* at, uint64_t length, Backing backing = Backing::kAuto);

// Maps existing pages of a kShared mapping in one step instead of one fault each. Best effort. to_write: for a file on a disk, whose pages
// are told apart by whether they are written to; of a memory file each is writable once it is mapped, and mapping to read is half the work.
void populate(std::byte* at, uint64_t length, bool to_write);

// Gives the pages of a range of a kShared mapping back to the system; they read as zero afterwards. A part of a huge page that the kernel
// or another process has pinned, be it for an instant, is cleared but stays, without a word: see absent().
Status punch(std::byte* at, uint64_t length);

// Whether no page of a range of a kShared mapping of a memory file is there.
bool absent(std::byte* at, uint64_t length);

// Forgets what a kPrivate mapping has written in the range.
Status drop_private(std::byte* at, uint64_t length);

// Whether this process has written to any page of the range of a kPrivate mapping (PAGEMAP_SCAN, else /proc/self/pagemap). Says true
// when the kernel does not tell.
bool privately_modified(const std::byte* at, uint64_t length);

// Page faults of this process so far, of all its threads. When it has not moved, no page has been written for the first time.
uint64_t page_faults();

// A word that reads 1 in this process and 0 in every child made by any kind of fork (MADV_WIPEONFORK); null where the kernel has none.
uint64_t* fork_detector();
void drop_fork_detector(uint64_t* word);

}  // namespace torchshm::os
