// Values with blocks in memory of their own, to write to spill files and to compare with what is read.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernel.h"
#include "os/memfd.h"
#include "store/spill_file.h"

namespace torchshm::tests {

constexpr uint64_t kSpillPool = 0x0123456789abcdef;
constexpr uint64_t kSpillId = (uint64_t{5} << 32) | 2;

using Lengths = std::vector<uint64_t>;

// One piece of shared memory for all blocks, each on a page, or `skew` bytes behind one.
class Blocks {
 public:
  explicit Blocks(const Lengths& lengths, uint64_t skew = 0) : lengths_(lengths) {
    std::vector<uint64_t> offsets;
    for (const uint64_t length : lengths) {
      offsets.push_back(bytes_ + skew);
      bytes_ = (bytes_ + skew + length + 4095) / 4096 * 4096 + 4096;
    }
    void* at =
        bytes_ == 0 ? nullptr : ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(at, MAP_FAILED);
    memory_ = static_cast<std::byte*>(at);
    for (const uint64_t offset : offsets) into.push_back(memory_ + offset);
    from.assign(into.begin(), into.end());
  }
  ~Blocks() {
    if (memory_ != nullptr) ::munmap(memory_, bytes_);
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;

  // Bytes that say which block of which seed they are of, and where in it.
  Blocks& fill(uint64_t seed) {
    for (size_t i = 0; i < into.size(); ++i) {
      uint64_t state = seed * 0x9e3779b97f4a7c15 + i;
      for (uint64_t at = 0; at < lengths_[i]; ++at) {
        if (at % 8 == 0) state = state * 6364136223846793005 + 1442695040888963407;
        into[i][at] = static_cast<std::byte>(state >> (8 * (at % 8)));
      }
    }
    return *this;
  }

  bool same(const Blocks& other) const {
    if (lengths_ != other.lengths_) return false;
    for (size_t i = 0; i < into.size(); ++i) {
      if (lengths_[i] != 0 && std::memcmp(into[i], other.into[i], lengths_[i]) != 0) return false;
    }
    return true;
  }

  std::vector<std::byte*> into;
  std::vector<const std::byte*> from;

 private:
  const Lengths lengths_;
  uint64_t bytes_ = 0;
  std::byte* memory_ = nullptr;
};

inline store::SpillHead head_of(const Lengths& lengths, uint64_t id = kSpillId) {
  return {kSpillPool, id, "a/key", "{\"dtype\": \"<f4\"}", lengths};
}

inline std::unique_ptr<store::SpillDirectory> spill_to(const std::string& dir, uint64_t pool_id = kSpillPool,
                                                       bool persistent = false, int64_t group = -1) {
  auto made = store::SpillDirectory::make(dir, "test", pool_id, persistent, group);
  EXPECT_TRUE(made.ok()) << made.status().what();
  return made ? made.take() : nullptr;
}

// Files are left to the page cache, or go past it.
inline constexpr bool kBothWays[] = {false, true};

inline std::unique_ptr<store::SpillDirectory> spill_past_cache(const std::string& dir, bool past = true) {
  auto made = store::SpillDirectory::make(dir, "test", kSpillPool, false, -1, past);
  EXPECT_TRUE(made.ok()) << made.status().what();
  if (!made) return nullptr;
  EXPECT_EQ((*made)->synced(), past);
  if (past) (*made)->read_past_cache();
  return made.take();
}

// The code of opening and reading; kOk only when every byte is that of `expected`.
inline Code read(store::SpillDirectory& from, const Blocks& expected, const Lengths& lengths, uint64_t id = kSpillId) {
  auto reader = from.open(id);
  if (!reader) return reader.code();
  if (reader->head().lengths != lengths || reader->head().key != head_of(lengths).key ||
      reader->head().text != head_of(lengths).text)
    return Code::kInvalid;
  const Blocks blocks(lengths);
  const auto status = reader->read(blocks.into);
  if (!status.ok()) return status.code();
  return blocks.same(expected) ? Code::kOk : Code::kInvalid;
}

}  // namespace torchshm::tests
