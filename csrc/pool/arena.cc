#include "pool/arena.h"

#include <algorithm>
#include <bit>
#include <fstream>

#include "base/failpoint.h"
#include "os/huge_pages.h"
#include "os/memfd.h"
#include "os/memory.h"
#include "pool/mark.h"

namespace torchshm::pool {
namespace {

// Address space, not memory: large runs need contiguous chunks, and holes between them cost nothing.
constexpr uint64_t kReserveFactors[] = {4, 2, 1};
constexpr uint32_t kTicketAge = 300;                // five minutes: longer than any queue is meant to hold a message
constexpr uint64_t kMaxChunks = uint64_t{1} << 22;  // 8 TiB; page indices fit 32 bits

Result<uint64_t> random_id() {
  std::ifstream random("/dev/urandom", std::ios::binary);
  uint64_t id = 0;
  if (TORCHSHM_INJECT("create.random") != 0 || !random.read(reinterpret_cast<char*>(&id), sizeof id) || id == 0)
    return Status(Code::kUnsupported, "/dev/urandom can't be read");
  return id;
}

std::string hex(uint64_t value) {
  static const char* digits = "0123456789abcdef";
  std::string text(16, '0');
  for (int i = 15; i >= 0; --i, value >>= 4) text[static_cast<size_t>(i)] = digits[value & 15];
  return text;
}

}  // namespace

Status Arena::map(uint64_t control_size, uint64_t data_size) {
  auto control = os::Mapping::map(os::Mapping::Kind::kShared, control_fd_.get(), control_size);
  if (!control) return std::move(control.status());
  auto data = os::Mapping::map(os::Mapping::Kind::kShared, data_fd_.get(), data_size);
  if (!data) return std::move(data.status());
  control_ = control.take();
  shared_ = data.take();
  // The other faces are optional: a private mapping of this size may be refused (vm.overcommit_memory=2, RLIMIT_AS).
  if (auto read = os::Mapping::map(os::Mapping::Kind::kReadOnly, data_fd_.get(), data_size)) read_ = read.take();
  // A private copy of a reserved huge page needs another one, and there being none is SIGBUS at a write: callers copy instead.
  if (os::in_huge_pages(data_fd_.get())) {
    page_kind_ = PageKind::kReserved;
  } else if (auto copy = os::Mapping::map(os::Mapping::Kind::kPrivate, data_fd_.get(), data_size)) {
    copy_ = copy.take();
  }
  return remember_files();
}

// For hugetlbfs the kernel keeps a policy with the mapping and not with the file.
Status Arena::keep_to_policy() {
  os::Numa numa;
  // Relaxed: written before the pool is ready.
  const uint32_t policy = header().numa_policy.load(std::memory_order_relaxed);
  if (page_kind_ != PageKind::kReserved || policy == 0 || policy > static_cast<uint32_t>(os::Numa::Policy::kPreferred))
    return {};
  numa.policy = static_cast<os::Numa::Policy>(policy);
  for (uint64_t mask = header().numa_nodes.load(std::memory_order_relaxed); mask != 0; mask &= mask - 1)
    numa.nodes.push_back(static_cast<uint32_t>(std::countr_zero(mask)));
  return os::set_policy(shared_.data(), shared_.size(), numa);
}

// Of the file they are seen already.
void Arena::keep_to_pages() {
  // Relaxed: written before the pool is ready.
  if (header().pages.load(std::memory_order_relaxed) != static_cast<uint32_t>(PageKind::kSmall)) return;
  page_kind_ = PageKind::kSmall;
  for (os::Mapping* face : {&shared_, &read_, &copy_}) face->use_small_pages();
}

Status Arena::remember_files() {
  auto id = os::file_id(data_fd_.get());
  if (!id) return std::move(id.status());
  data_id_ = *id;
  id = os::file_id(control_fd_.get());
  if (!id) return std::move(id.status());
  control_id_ = *id;
  return {};
}

Result<Arena> Arena::create(uint64_t family, const Limits& limits) {
  const bool reserved = limits.pages.kind == PageKind::kReserved;
  const uint64_t most = os::memory_allowed() / 2;
  auto chosen = reserved ? reserved_limit(limits.limit, most) : limits.limit != 0 ? limits.limit : most;
  if (!chosen) return std::move(chosen.status());
  const uint64_t limit = std::max<uint64_t>(*chosen, kChunk);
  auto id = random_id();
  if (!id) return std::move(id.status());
  auto secret = random_id();
  if (!secret) return std::move(secret.status());
  // No file is larger, whatever the limit says: nothing below can overflow.
  const uint64_t size = std::min(limit, kMaxChunks * kChunk);
  Status last;
  for (const uint64_t factor : kReserveFactors) {
    const uint64_t chunks = std::clamp<uint64_t>((size * factor + kChunk - 1) / kChunk, 16, kMaxChunks);
    Arena arena;
    arena.offsets_ = Offsets::of(chunks);
    arena.chunks_ = static_cast<uint32_t>(chunks);
    auto control = os::create_memfd("torchshm-" + hex(*id) + "-control", arena.offsets_.total);
    if (!control) {
      last = std::move(control.status());
      continue;
    }
    auto data = os::create_memfd("torchshm-" + hex(*id) + "-data", chunks * kChunk, reserved);
    if (!data) {
      last = std::move(data.status());
      continue;
    }
    arena.control_fd_ = control.take();
    arena.data_fd_ = data.take();
    last = arena.map(arena.offsets_.total, chunks * kChunk);
    if (!last) continue;
    last = os::set_policy(arena.shared_.data(), chunks * kChunk, limits.pages.numa);
    if (!last) return last;
    Header& header = arena.header();
    header.magic = kMagic;
    header.version = kVersion;
    header.layout_hash = kLayoutHash;
    header.pool_id = *id;
    header.secret = *secret;
    header.family = family;
    header.chunks = chunks;
    header.data_size = chunks * kChunk;
    header.control_size = arena.offsets_.total;
    header.limit.store(limit, std::memory_order_relaxed);
    header.warm.store(limits.warm != 0        ? limits.warm
                      : limits.pages.prefault ? limit
                                              : limit / 4,
                      std::memory_order_relaxed);
    header.pages.store(static_cast<uint32_t>(limits.pages.kind), std::memory_order_relaxed);
    arena.keep_to_pages();
    header.numa_policy.store(static_cast<uint32_t>(limits.pages.numa.policy), std::memory_order_relaxed);
    uint64_t nodes = 0;
    for (const uint32_t node : limits.pages.numa.nodes) nodes |= node < 64 ? uint64_t{1} << node : 0;
    header.numa_nodes.store(nodes, std::memory_order_relaxed);
    header.ticket_age.store(kTicketAge, std::memory_order_relaxed);
    header.next_incarnation.store(1, std::memory_order_relaxed);
    TORCHSHM_POINT("create.before_ready");
    header.ready.store(1, std::memory_order_release);  // publishes the header to whoever attaches
    return arena;
  }
  return last;
}

Result<Arena> Arena::attach(os::Fd data, os::Fd control) {
  auto control_size = os::check_memfd(control.get());
  if (!control_size) return std::move(control_size.status());
  auto data_size = os::check_memfd(data.get());
  if (!data_size) return std::move(data_size.status());
  if (*control_size < sizeof(Header)) return Status(Code::kInvalid, "the control file is too short for a pool");
  Arena arena;
  arena.control_fd_ = std::move(control);
  arena.data_fd_ = std::move(data);
  Status mapped = arena.map(*control_size, *data_size);
  if (!mapped) return mapped;
  Status valid = arena.validate(*control_size, *data_size);
  if (!valid) return valid;
  arena.keep_to_pages();
  // Where it is forbidden here, pages that this process adds lie where they may.
  (void)arena.keep_to_policy();
  return arena;
}

Status Arena::validate(uint64_t control_size, uint64_t data_size) {
  // Copy once, then validate: another process may write the header meanwhile.
  const Header& seen = header();
  const bool ready = seen.ready.load(std::memory_order_acquire) == 1;
  const uint64_t magic = seen.magic, chunks = seen.chunks;
  const uint32_t version = seen.version, hash = seen.layout_hash;
  if (magic != kMagic) return Status(Code::kInvalid, "not a torchshm control file");
  if (version != kVersion || hash != kLayoutHash) {
    return Status(Code::kInvalid, "the pool was made by another version of torchshm (layout " +
                                      std::to_string(version) + "); use the same version in every process");
  }
  if (!ready) return Status(Code::kInvalid, "the pool's creator has not finished making it");
  if (chunks < 1 || chunks > kMaxChunks || chunks * kChunk != data_size || Offsets::of(chunks).total != control_size) {
    return Status(Code::kCorrupt, "the pool's header contradicts the size of its files");
  }
  chunks_ = static_cast<uint32_t>(chunks);
  offsets_ = Offsets::of(chunks);
  return {};
}

Result<Arena> Arena::inspect(os::Fd data, os::Fd control) {
  const bool is_copy = !os::check_memfd(control.get()) || !os::check_memfd(data.get());
  auto control_size = os::file_size(control.get());
  if (!control_size) return std::move(control_size.status());
  auto data_size = os::file_size(data.get());
  if (!data_size) return std::move(data_size.status());
  if (*control_size < sizeof(Header)) return Status(Code::kInvalid, "the control file is too short for a pool");
  auto mapped = os::Mapping::map(os::Mapping::Kind::kReadOnly, control.get(), *control_size);
  if (!mapped) return std::move(mapped.status());
  Arena arena;
  arena.control_fd_ = std::move(control);
  arena.data_fd_ = std::move(data);
  arena.control_ = mapped.take();
  arena.is_copy_ = is_copy;
  if (os::in_huge_pages(arena.data_fd_.get())) arena.page_kind_ = PageKind::kReserved;
  Status valid = arena.validate(*control_size, *data_size);
  if (valid) valid = arena.remember_files();
  if (!valid) return valid;
  return arena;
}

Result<Arena> Arena::alias() const {
  auto data = os::duplicate(data_fd_.get()), control = os::duplicate(control_fd_.get());
  if (!data) return std::move(data.status());
  if (!control) return std::move(control.status());
  Arena arena;
  arena.data_fd_ = data.take();
  arena.control_fd_ = control.take();
  arena.control_ = control_.alias();
  arena.shared_ = shared_.alias();
  arena.read_ = read_.alias();
  arena.copy_ = copy_.alias();
  arena.offsets_ = offsets_;
  arena.chunks_ = chunks_;
  arena.is_copy_ = is_copy_;
  arena.page_kind_ = page_kind_;
  arena.data_id_ = data_id_;
  arena.control_id_ = control_id_;
  return arena;
}

Result<uint64_t> Arena::family_of(int control_fd) {
  auto size = os::check_memfd(control_fd);
  if (!size) return std::move(size.status());
  if (*size < sizeof(Header)) return Status(Code::kInvalid, "the control file is too short for a pool");
  auto mapped = os::Mapping::map(os::Mapping::Kind::kReadOnly, control_fd, sizeof(Header));
  if (!mapped) return std::move(mapped.status());
  return reinterpret_cast<const Header*>(mapped->data())->family;
}

Status Arena::make_private(uint64_t offset, uint64_t length, bool on) {
  const auto id = os::file_id(data_fd_.get());
  if (!id.ok() || *id != data_id_) return Status(Code::kUnsupported, "this process has closed the pool's descriptors");
  if (page_kind_ == PageKind::kReserved && on)
    return Status(Code::kUnsupported, "reserved huge pages are not made private");
  return shared_.remap(on ? os::Mapping::Kind::kPrivate : os::Mapping::Kind::kShared, data_fd_.get(), offset, length);
}

bool Arena::is_control(int fd) const {
  const auto id = os::file_id(fd);
  return id.ok() && *id == control_id_;
}

bool Arena::owns_descriptors() const { return is_control(control_fd_.get()); }

uint32_t Arena::slots_used() const { return marked(header().slots_used, kMaxLeases); }
uint32_t Arena::chunks_used() const { return marked(header().chunks_used, chunks_); }
uint32_t Arena::tickets_used() const { return marked(header().tickets_used, kTickets); }

std::optional<Arena::Extent> Arena::extent(uint32_t index) const {
  if (index >= pages()) return std::nullopt;
  const Block& descriptor = block(index);
  const BlockValue value = BlockValue::of(descriptor.value.load());
  // Relaxed: a large block's length is ordered by the load of its value.
  const uint64_t granules = value.granules != 0 ? value.granules : descriptor.granules.load(std::memory_order_relaxed);
  const uint64_t length = granules * kGranule;
  const uint64_t offset = index * kPage + value.first * kGranule;
  const uint64_t size = uint64_t{chunks_} * kChunk;
  if (length == 0 || length > size || offset > size - length) return std::nullopt;
  return Extent{offset, length};
}

std::byte* Arena::address(Mode mode, uint64_t offset) const {
  const os::Mapping& face = mode == Mode::kReadWrite ? shared_ : mode == Mode::kRead ? read_ : copy_;
  return face.valid() ? face.data() + offset : nullptr;
}

std::optional<std::pair<Mode, uint64_t>> Arena::locate(const void* p) const {
  if (shared_.contains(p)) return std::make_pair(Mode::kReadWrite, shared_.offset_of(p));
  if (copy_.contains(p)) return std::make_pair(Mode::kCopyOnWrite, copy_.offset_of(p));
  if (read_.contains(p)) return std::make_pair(Mode::kRead, read_.offset_of(p));
  return std::nullopt;
}

}  // namespace torchshm::pool
