#include "os/mapping.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <utility>

#include "base/failpoint.h"
#include "os/fd.h"
#include "os/futex.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace torchshm::os {
namespace {

constexpr uint64_t kAlign = uint64_t{2} << 20;  // of a huge page
constexpr uint64_t kSlow =
    5'000'000;  // ns for a huge page, of which it takes 0.15 ms: the system has to move memory for it
constexpr uint64_t kStep = 16 * kAlign;      // between two looks at the clock
constexpr uint64_t kPause = 10'000'000'000;  // ns, after a slow one or none

// linux/fs.h of kernel 6.7, which older headers lack.
struct PageRegion {
  uint64_t start, end, categories;
};
struct ScanArg {
  uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
  uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
constexpr uint64_t kIsFile = 1u << 2;
constexpr uint64_t kIsPresent = 1u << 3;
constexpr uint64_t kIsSwapped = 1u << 4;
const unsigned long kPagemapScan = _IOWR('f', 16, ScanArg);

enum class Answer { kNo, kYes, kUnknown };

Answer scan(int pagemap, uint64_t start, uint64_t end) {
  // Asked for: pages that are not the file's (so: written here), and present or swapped out.
  PageRegion region{};
  ScanArg arg{};
  arg.size = sizeof arg;
  arg.start = start;
  arg.end = end;
  arg.vec = reinterpret_cast<uint64_t>(&region);
  arg.vec_len = 1;
  arg.max_pages = 1;
  arg.category_inverted = kIsFile;
  arg.category_mask = kIsFile;
  arg.category_anyof_mask = kIsPresent | kIsSwapped;
  arg.return_mask = kIsFile;
  const int found = ::ioctl(pagemap, kPagemapScan, &arg);
  if (found < 0) return Answer::kUnknown;
  return found > 0 ? Answer::kYes : Answer::kNo;
}

Answer read_entries(int pagemap, uint64_t start, uint64_t end) {
  constexpr uint64_t kPresentBit = uint64_t{1} << 63, kSwappedBit = uint64_t{1} << 62, kFileBit = uint64_t{1} << 61;
  std::array<uint64_t, 512> entries{};
  for (uint64_t page = start / kPageBytes; page < end / kPageBytes;) {
    const uint64_t want = std::min<uint64_t>(entries.size(), end / kPageBytes - page);
    const ssize_t got =
        ::pread(pagemap, entries.data(), want * sizeof(uint64_t), static_cast<off_t>(page * sizeof(uint64_t)));
    if (got <= 0) return Answer::kUnknown;
    const uint64_t n = static_cast<uint64_t>(got) / sizeof(uint64_t);
    for (uint64_t i = 0; i < n; ++i) {
      if ((entries[i] & (kPresentBit | kSwappedBit)) != 0 && (entries[i] & kFileBit) == 0) return Answer::kYes;
    }
    page += n;
  }
  return Answer::kNo;
}

// The kernel refuses to take pages from locked memory (mlockall).
int advise_unlocked(std::byte* at, uint64_t length, int advice) {
  if (::madvise(at, length, advice) == 0) return 0;
  if (errno != EINVAL || ::munlock(at, length) != 0) return -1;
  return ::madvise(at, length, advice);
}

}  // namespace

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      at_(other.at_),
      reserved_(std::exchange(other.reserved_, nullptr)),
      reserved_size_(std::exchange(other.reserved_size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    unmap();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    at_ = other.at_;
    reserved_ = std::exchange(other.reserved_, nullptr);
    reserved_size_ = std::exchange(other.reserved_size_, 0);
  }
  return *this;
}

Mapping::~Mapping() { unmap(); }

void Mapping::unmap() {
  if (reserved_ != nullptr) ::munmap(reserved_, reserved_size_);
  data_ = reserved_ = nullptr;
}

Result<Mapping> Mapping::map(Kind kind, int fd, uint64_t size, uint64_t at_in_file, bool huge) {
  int error = TORCHSHM_INJECT("os.mmap");
  void* reserved = MAP_FAILED;
  const uint64_t reserved_size = size + kAlign;
  if (error == 0) {
    reserved = ::mmap(nullptr, reserved_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    error = errno;
  }
  if (reserved == MAP_FAILED)
    return Status(Code::kUnsupported, "mmap: no address space for " + std::to_string(size) + " bytes", error);
  auto address = (reinterpret_cast<uintptr_t>(reserved) + kAlign - 1) & ~(kAlign - 1);
  int prot = PROT_READ | PROT_WRITE;
  int flags = MAP_FIXED | MAP_NORESERVE;
  switch (kind) {
    case Kind::kShared:
      flags |= MAP_SHARED;
      break;
    case Kind::kReadOnly:
      flags |= MAP_SHARED;
      prot = PROT_READ;
      break;
    case Kind::kPrivate:
      flags |= MAP_PRIVATE;
      break;
    case Kind::kAnonymous:
      flags |= MAP_PRIVATE | MAP_ANONYMOUS;
      fd = -1;
      break;
  }
  error = TORCHSHM_INJECT("os.map_file");
  void* at = MAP_FAILED;
  if (error == 0) {
    at = ::mmap(reinterpret_cast<void*>(address), size, prot, flags, fd, static_cast<off_t>(at_in_file));
    error = errno;
  }
  if (at == MAP_FAILED) {
    ::munmap(reserved, reserved_size);
    return Status(Code::kUnsupported, "mmap: " + std::to_string(size) + " bytes of a memory file refused", error);
  }
  ::madvise(at, size, MADV_DONTDUMP);
  if (kind != Kind::kAnonymous && huge) ::madvise(at, size, MADV_HUGEPAGE);
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(at);
  mapping.size_ = size;
  mapping.at_ = at_in_file;
  mapping.reserved_ = static_cast<std::byte*>(reserved);
  mapping.reserved_size_ = reserved_size;
  return mapping;
}

void Mapping::use_small_pages() {
  if (valid()) ::madvise(data_, size_, MADV_NOHUGEPAGE);
}

Mapping Mapping::alias() const {
  Mapping mapping;
  mapping.data_ = data_;
  mapping.size_ = size_;
  mapping.at_ = at_;
  return mapping;
}

Status Mapping::remap(Kind kind, int fd, uint64_t offset, uint64_t length) {
  const int flags = MAP_FIXED | MAP_NORESERVE | (kind == Kind::kPrivate ? MAP_PRIVATE : MAP_SHARED);
  int error = TORCHSHM_INJECT("os.remap");
  if (error == 0 &&
      ::mmap(data_ + offset, length, PROT_READ | PROT_WRITE, flags, fd, static_cast<off_t>(at_ + offset)) == MAP_FAILED)
    error = errno;
  if (error != 0) return Status::system("mmap", "remap", error);
  ::madvise(data_ + offset, length, MADV_DONTDUMP);
  return {};
}

namespace {

// Makes what of the range can lie in huge pages. The setting for memory files is "never" nearly everywhere, but what is asked for by
// MADV_COLLAPSE (Linux 6.1) is given: the first small page becomes a huge one, which takes a third of the time of 512 small ones.
void commit_huge(std::byte* at, uint64_t length) {
  static std::atomic<uint64_t> not_before{0};
  const auto start = reinterpret_cast<uintptr_t>(at), first = (start + kAlign - 1) & ~(kAlign - 1),
             end = (start + length) & ~(kAlign - 1);
  if (first >= end || boot_time() < not_before.load(std::memory_order_relaxed)) return;
  for (uintptr_t step = first; step < end; step += kStep) {
    const uint64_t bytes = std::min(kStep, end - step);
    std::byte* const huge = at + (step - start);
    const uint64_t begun = boot_time();
    for (uint64_t offset = 0; offset < bytes; offset += kAlign) {
      if (::madvise(huge + offset, kPageBytes, MADV_POPULATE_WRITE) != 0) return;
    }
    const bool made = TORCHSHM_INJECT("os.collapse") == 0 && ::madvise(huge, bytes, MADV_COLLAPSE) == 0;
    const uint64_t now = boot_time();
    if (!made || now - begun > bytes / kAlign * kSlow) {
      not_before.store(now + kPause, std::memory_order_relaxed);
      return;
    }
  }
}

}  // namespace

Status commit(std::byte* at, uint64_t length, Backing backing) {
  int error = TORCHSHM_INJECT("os.commit");
  if (error != 0)
    return Status::system("madvise POPULATE_WRITE", std::to_string(length) + " bytes of shared memory", error);
  if (backing == Backing::kAuto) commit_huge(at, length);
  int rc = 0;
  do {
    rc = ::madvise(at, length, MADV_POPULATE_WRITE);
  } while (rc != 0 && (errno == EINTR || errno == EAGAIN));
  if (rc == 0) return {};
  if (backing == Backing::kReserved) {
    // Touching them in place of that would be SIGBUS where there is none.
    if (errno == EINVAL) return Status(Code::kUnsupported, "reserved huge pages need Linux 5.14", errno);
    return Status(Code::kFull, "no reserved huge page is free", errno);
  }
  if (errno != EINVAL) return Status(Code::kFull, "madvise POPULATE_WRITE: the system has no pages left", errno);
  // An older kernel. Nothing but the memory of the machine or cgroup, looked at before, can make a memory file's page fault fail.
  for (uint64_t offset = 0; offset < length; offset += kPageBytes) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(at + offset), 0, __ATOMIC_RELAXED);
  }
  return {};
}

void populate(std::byte* at, uint64_t length, bool to_write) {
  if (TORCHSHM_INJECT("os.populate") == 0)
    (void)::madvise(at, length, to_write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
}

Status punch(std::byte* at, uint64_t length) {
  int error = TORCHSHM_INJECT("os.punch");
  if (error == 0 && advise_unlocked(at, length, MADV_REMOVE) != 0) error = errno;
  if (error != 0) return Status::system("madvise REMOVE", std::to_string(length), error);
  return {};
}

bool absent(std::byte* at, uint64_t length) {
  std::array<unsigned char, 512> there{};
  for (uint64_t done = 0; done < length;) {
    const uint64_t step = std::min(length - done, there.size() * kPageBytes),
                   pages = (step + kPageBytes - 1) / kPageBytes;
    if (::mincore(at + done, step, there.data()) != 0) return false;
    if (std::any_of(there.data(), there.data() + pages, [](unsigned char page) { return (page & 1) != 0; }))
      return false;
    done += step;
  }
  return true;
}

Status drop_private(std::byte* at, uint64_t length) {
  int error = TORCHSHM_INJECT("os.drop_private");
  if (error == 0 && advise_unlocked(at, length, MADV_DONTNEED) != 0) error = errno;
  if (error != 0) return Status::system("madvise DONTNEED", std::to_string(length), error);
  return {};
}

bool privately_modified(const std::byte* at, uint64_t length) {
  const uint64_t start = reinterpret_cast<uint64_t>(at) & ~(kPageBytes - 1);
  const uint64_t end = (reinterpret_cast<uint64_t>(at) + length + kPageBytes - 1) & ~(kPageBytes - 1);
  // Opened each time: a descriptor kept over fork would show the parent's pages.
  if (TORCHSHM_INJECT("os.pagemap") != 0) return true;
  Fd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap.valid()) return true;
  Answer answer = scan(pagemap.get(), start, end);
  if (answer == Answer::kUnknown) answer = read_entries(pagemap.get(), start, end);
  return answer != Answer::kNo;
}

uint64_t page_faults() {
  rusage usage{};
  if (TORCHSHM_INJECT("os.getrusage") != 0 || ::getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return static_cast<uint64_t>(usage.ru_minflt) + static_cast<uint64_t>(usage.ru_majflt);
}

uint64_t* fork_detector() {
  if (TORCHSHM_INJECT("os.fork_detector") != 0) return nullptr;
  void* page = ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return nullptr;
  if (::madvise(page, kPageBytes, MADV_WIPEONFORK) != 0) {
    ::munmap(page, kPageBytes);
    return nullptr;
  }
  auto* word = static_cast<uint64_t*>(page);
  *word = 1;
  return word;
}

void drop_fork_detector(uint64_t* word) {
  if (word != nullptr) ::munmap(word, kPageBytes);
}

}  // namespace torchshm::os
