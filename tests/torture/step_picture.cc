#include "step_picture.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "os/lock.h"

namespace torchshm::torture {
namespace {

uint64_t file_blocks(int fd) {
  struct stat st {};
  (void)::fstat(fd, &st);
  return static_cast<uint64_t>(st.st_blocks);
}

os::Mapping anonymous(uint64_t size) {
  auto mapped = os::Mapping::map(os::Mapping::Kind::kAnonymous, -1, size);
  if (!mapped) {
    std::fprintf(stderr, "step: %s\n", mapped.status().what().c_str());
    std::exit(2);
  }
  return mapped.take();
}

}  // namespace

Picture::Picture(const pool::Arena& arena)
    : arena_(arena),
      control_(reinterpret_cast<const std::byte*>(&arena.header())),
      size_(arena.header().control_size),
      first_(anonymous(size_)),
      last_(anonymous(size_)) {
  (void)look(true);
  for (const Extent& e : extents_) std::memcpy(first_.data() + e.from, last_.data() + e.from, e.to - e.from);
}

void Picture::find_extents() {
  extents_.clear();
  const int fd = arena_.control_fd();
  for (off_t at = 0;;) {
    const off_t from = ::lseek(fd, at, SEEK_DATA);
    if (from < 0) return;
    at = ::lseek(fd, from, SEEK_HOLE);
    extents_.push_back({static_cast<uint64_t>(from), std::min(static_cast<uint64_t>(at), size_)});
  }
}

uint64_t Picture::locks() const {
  uint64_t mask = 0;
  for (uint32_t slot = 0; slot < 32; ++slot) {
    if (slot < arena_.slots_used() + 2 && os::locked_by_other(arena_.control_fd(), slot)) mask |= uint64_t{1} << slot;
  }
  return mask;
}

bool Picture::look(bool kernel) {
  bool changed = false;
  if (const uint64_t blocks = file_blocks(arena_.control_fd()); blocks != control_blocks_) {
    control_blocks_ = blocks;  // more zero pages: not a change by itself
    find_extents();
  }
  for (const Extent& e : extents_) {
    for (uint64_t page = e.from; page < e.to; page += os::kPageBytes) {
      if (std::memcmp(last_.data() + page, control_ + page, os::kPageBytes) == 0) continue;
      std::memcpy(last_.data() + page, control_ + page, os::kPageBytes);
      changed = true;
    }
  }
  if (kernel) {
    const uint64_t blocks = file_blocks(arena_.data_fd()), mask = locks();
    changed = changed || blocks != data_blocks_ || mask != locks_;
    data_blocks_ = blocks;
    locks_ = mask;
  }
  return changed;
}

uint64_t Picture::difference() const {
  uint64_t hash = 1469598103934665603U;
  const auto mix = [&](uint64_t value) { hash = (hash ^ value) * 1099511628211U; };
  mix(data_blocks_);
  mix(locks_);
  for (const Extent& e : extents_) {
    for (uint64_t at = e.from; at < e.to; at += 8) {
      if (std::memcmp(first_.data() + at, last_.data() + at, 8) != 0) mix(at);
    }
  }
  return hash;
}

}  // namespace torchshm::torture
