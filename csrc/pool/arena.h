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

// Where a pool lies in one ordinary file, beside other things. Bytes; multiples of 2 MiB, but for the size of the control region.
struct Regions {
  uint64_t control_at = 0, control_size = 0, data_at = 0, data_size = 0;
  // For a pool with that limit, its control region at `at`.
  static Regions of(uint64_t limit, uint64_t at);
};

// What the memory files of a pool are called, for who looks for them among a process's descriptors.
std::string control_file_name(uint64_t pool_id);
std::string data_file_name(uint64_t pool_id);

// After a restart of the machine: the processes that leases were signed by are none of those that have their numbers now.
// REQUIRES: nobody has joined the pool in these regions of the file.
Status forget_processes(const Regions& regions, int file);

class Arena {
 public:
  // How long the tables are.
  static constexpr uint32_t kLeaseSlots = kMaxLeases, kTicketSlots = kTickets, kPagesInChunk = kPagesPerChunk;

  static Result<Arena> create(uint64_t family, const Limits& limits);
  static Result<Arena> attach(os::Fd data, os::Fd control);
  // The same in regions of one file, which is as long as they need and reads as zero there. Only what is used of it has a place on the disk.
  // REQUIRES: limits.limit is set.
  static Result<Arena> create_in(os::Fd file, const Regions& regions, uint64_t family, const Limits& limits);
  static Result<Arena> attach_in(os::Fd file, const Regions& regions);
  // As inspect().
  static Result<Arena> inspect_in(os::Fd file, const Regions& regions);
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

  // Before anything at or above what was in use is touched: gives it a place in the file, or says that there is none (kFull). Nothing to do
  // for memory files, which get their pages when they are touched. One thread of a lease at a time.
  Status reserve_slot(uint32_t slot);
  Status reserve_chunks(uint32_t end) { return end <= chunks_reserved_ ? Status() : grow_chunks(end); }
  bool reserve_tickets(uint32_t end) { return end <= tickets_reserved_ || grow_tickets(end); }
  // Gives a range of the data pages, mapped here. REQUIRES: page boundaries.
  Status commit(uint64_t offset, uint64_t length, os::Backing backing);
  // All of it anew, for a file that was copied: copies have holes where there were zeros. REQUIRES: nobody is at work.
  Status reserve_all();
  // Whether the pool lies in an ordinary file. What is reserved there may look like a hole.
  bool in_file() const { return in_file_; }
  // Whether the pool's pages are a disk's, and the memory that they take can be had back.
  bool on_disk() const { return on_disk_; }
  // Where the two begin in their files.
  uint64_t data_at() const { return data_at_; }
  uint64_t control_at() const { return control_at_; }
  PageKind page_kind() const { return page_kind_; }

  // Bytes of memory that the control file takes; 0 where the system does not tell.
  uint64_t control_memory() const;
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
  Status grow_chunks(uint32_t end);
  bool grow_tickets(uint32_t end);
  Status reserve_control(uint64_t from, uint64_t to);
  static Result<Arena> over(os::Fd file, const Regions& regions);
  void write_header(uint64_t id, uint64_t secret, uint64_t family, const Limits& limits);
  Status remember_files();
  void keep_to_pages();
  Status keep_to_policy();
  Status validate(uint64_t control_size, uint64_t data_size);
  os::Fd data_fd_, control_fd_;
  os::Mapping control_, shared_, read_, copy_;
  Offsets offsets_{};
  uint32_t chunks_ = 0;
  bool is_copy_ = false;
  bool in_file_ = false, on_disk_ = false;
  uint64_t data_at_ = 0, control_at_ = 0;
  uint32_t chunks_reserved_ = UINT32_MAX, tickets_reserved_ = UINT32_MAX;  // all, but in a file
  PageKind page_kind_ = PageKind::kAuto;
  os::FileId data_id_, control_id_;
};

}  // namespace torchshm::pool
