// The two files of a pool, mapped: typed access to the control file, and the three faces of the data file.
//
// Shared: the files. Private: the mappings. Every index that comes from shared memory or from a handle is checked here or by the caller
// before it is used, so that a corrupt control file gives an error and not a wild pointer.
#pragma once

#include <optional>
#include <string>

#include "base/status.h"
#include "os/fd.h"
#include "os/mapping.h"
#include "os/memfd.h"
#include "pool/layout.h"
#include "pool/pages.h"

namespace torchshm::pool {

// numpy.memmap's modes.
enum class Mode : uint8_t { kReadWrite = 0, kRead = 1, kCopyOnWrite = 2 };

struct Limits {
  uint64_t limit = 0;  // bytes; 0: half of what the machine or the cgroup allows
  uint64_t warm = 0;   // bytes; 0: a quarter of the limit, with Pages::prefault all of it
  Pages pages = {};
};

class Arena {
 public:
  // How long the tables are.
  static constexpr uint32_t kLeaseSlots = kMaxLeases, kTicketSlots = kTickets, kPagesInChunk = kPagesPerChunk;

  static Result<Arena> create(uint64_t family, const Limits& limits);
  static Result<Arena> attach(os::Fd data, os::Fd control);
  // To look at, without joining: the control file mapped read-only, the data file not at all, so address() is null and nothing here may
  // be written. Takes a pool's memory files, and plain files that they were copied to: those are not sealed, and whoever cuts one short
  // meanwhile ends this process.
  static Result<Arena> inspect(os::Fd data, os::Fd control);

  // The same files under the same mappings, for a further lease of this process. REQUIRES: this outlives it, and no fork meanwhile.
  Result<Arena> alias() const;

  // What a control file's header says about its family, without attaching.
  static Result<uint64_t> family_of(int control_fd);

  Header& header() const { return *reinterpret_cast<Header*>(control_.data()); }
  // REQUIRES: slot < kMaxLeases
  Lease& lease(uint32_t slot) const { return reinterpret_cast<Lease*>(control_.data() + offsets_.leases)[slot]; }
  // REQUIRES: index < chunks()
  Chunk& chunk(uint32_t index) const { return reinterpret_cast<Chunk*>(control_.data() + offsets_.chunks)[index]; }
  // REQUIRES: index < kTickets
  Ticket& ticket(uint32_t index) const { return reinterpret_cast<Ticket*>(control_.data() + offsets_.tickets)[index]; }
  // REQUIRES: index < pages()
  Block& block(uint32_t index) const { return reinterpret_cast<Block*>(control_.data() + offsets_.blocks)[index]; }
  // 64 ledger bits of a lease. REQUIRES: slot < kMaxLeases, word < pages() / 64
  std::atomic<uint64_t>& ledger(uint32_t slot, uint64_t word) const {
    return reinterpret_cast<std::atomic<uint64_t>*>(control_.data() + offsets_.ledgers +
                                                    offsets_.ledger_stride * slot)[word];
  }

  uint32_t chunks() const { return chunks_; }
  uint32_t pages() const { return chunks_ * kPagesPerChunk; }
  uint32_t slots_used() const;
  uint32_t chunks_used() const;
  uint32_t tickets_used() const;

  // Byte range of a block in the data file, or nothing when its descriptor contradicts the file's size.
  struct Extent {
    uint64_t offset, length;
    // Else it shares a page with others, and can't be mapped under a face of its own.
    bool whole_pages() const { return offset % kPage == 0 && length % kPage == 0; }
  };
  std::optional<Extent> extent(uint32_t block) const;

  // Address of a data offset under a mode; null when that face can't be mapped here (no address space).
  std::byte* address(Mode mode, uint64_t offset) const;
  std::byte* data() const { return shared_.data(); }
  // The mode and offset of an address, if it lies in this pool.
  std::optional<std::pair<Mode, uint64_t>> locate(const void* p) const;

  // Whether inspect() was given copies: their holes and locks say nothing about the pool's memory and processes.
  bool is_copy() const { return is_copy_; }

  PageKind page_kind() const { return page_kind_; }

  int data_fd() const { return data_fd_.get(); }
  int control_fd() const { return control_fd_.get(); }
  uint64_t data_inode() const { return data_id_.inode; }
  // Whether control_fd() is still ours: a process may have closed all its descriptors and opened files of its own.
  bool owns_descriptors() const;
  // Makes a range of the shared face private to this process, or shared again.
  Status make_private(uint64_t offset, uint64_t length, bool on);
  // Whether fd is an open file description of the control file.
  bool is_control(int fd) const;

 private:
  Status map(uint64_t control_size, uint64_t data_size);
  Status remember_files();
  void keep_to_pages();
  Status keep_to_policy();
  Status validate(uint64_t control_size, uint64_t data_size);
  os::Fd data_fd_, control_fd_;
  os::Mapping control_, shared_, read_, copy_;
  Offsets offsets_{};
  uint32_t chunks_ = 0;
  bool is_copy_ = false;
  PageKind page_kind_ = PageKind::kAuto;
  os::FileId data_id_, control_id_;
};

}  // namespace torchshm::pool
