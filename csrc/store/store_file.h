// A persistent store's file, read with no service: names and values as they are in it.
//
// Shared: the file, which nobody changes meanwhile: it is held locked as a whole (flock), shared with other readers, which keeps services
// out. Private: read-only mappings. No lease, and nothing is written: a read-only mount will do.
// When a process dies here: its lock goes. Whoever cuts the file short in spite of the lock ends this process by SIGBUS.
// Every number in the file is bounded before it is followed. Thread safety: all functions, from any thread and after a fork.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"
#include "os/fd.h"
#include "os/mapping.h"
#include "pool/arena.h"
#include "store/entry.h"
#include "store/index.h"

namespace torchshm::store {

class StoreFile {
 public:
  // Takes no longer for more names. kMissing when it is in use; kCorrupt when it is cut short, or the machine went down while it was in
  // use, unless `any_state`.
  static Result<std::unique_ptr<StoreFile>> open(const std::string& path, bool any_state = false);

  // kMissing when there is no such name.
  Result<Entry> find(std::string_view key) const;
  // Calls visit for each name that begins with `prefix`, in no order.
  void each(std::string_view prefix, const std::function<void(Entry)>& visit) const;
  uint64_t size() const;

  // The bytes of a block. kStale when it is not that block.
  struct Bytes {
    const std::byte* data;
    uint64_t length;
  };
  Result<Bytes> block(uint32_t block, uint64_t generation) const;
  // The same to write to, for this process alone; the block begins at `offset` of it.
  struct Copy {
    os::Mapping pages;
    uint64_t offset, length;
  };
  Result<Copy> copy(uint32_t block, uint64_t generation) const;

  const Header& header() const { return *reinterpret_cast<const Header*>(catalogue_.data()); }
  const pool::Arena& arena() const { return *arena_; }
  std::string name() const;
  uint64_t file_bytes() const { return bytes_; }
  bool trusted() const { return trusted_; }  // it has all that was acknowledged
  uint64_t data_used() const;                // bytes of the data region that chunks have ever been taken in
  uint64_t now() const;                      // what an entry's expiry is compared with, ns

 private:
  StoreFile() = default;
  std::optional<Found> look(const Key& key) const;
  std::optional<Entry> entry_of(const Body& body) const;
  bool shown(const Body& body) const;
  uint32_t levels() const;
  os::Fd fd_;
  os::Mapping catalogue_, data_;
  std::optional<pool::Arena> arena_;
  int64_t clock_ = 0;
  uint64_t data_at_ = 0, bytes_ = 0;
  bool trusted_ = false;
};

}  // namespace torchshm::store
