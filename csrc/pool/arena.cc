#include "pool/arena.h"

#include <algorithm>
#include <bit>
#include <fstream>

#include "base/failpoint.h"
#include "base/hex.h"
#include "os/directory.h"
#include "os/huge_pages.h"
#include "os/mapped_file.h"
#include "os/memfd.h"
#include "os/memory.h"
#include "pool/mark.h"

namespace torchshm::pool {
namespace {

// Address space, not memory: large runs need contiguous chunks, and holes between them cost nothing.
constexpr uint64_t kReserveFactors[] = {4, 2, 1};
constexpr uint32_t kTicketAge = 300;                // five minutes: longer than any queue is meant to hold a message
constexpr uint64_t kFileReserveFactor = 2;          // a lease's ledger takes its place on the disk, 64 bytes a chunk
constexpr uint32_t kTicketStep = 4096;              // tickets that get their place at once: 64 KiB
constexpr uint64_t kMaxChunks = uint64_t{1} << 22;  // 8 TiB; page indices fit 32 bits

Result<uint64_t> random_id() {
  std::ifstream random("/dev/urandom", std::ios::binary);
  uint64_t id = 0;
  if (TORCHSHM_INJECT("create.random") != 0 || !random.read(reinterpret_cast<char*>(&id), sizeof id) || id == 0)
    return Status(Code::kUnsupported, "/dev/urandom can't be read");
  return id;
}

}  // namespace

std::string control_file_name(uint64_t pool_id) { return "torchshm-" + hex16(pool_id) + "-control"; }
std::string data_file_name(uint64_t pool_id) { return "torchshm-" + hex16(pool_id) + "-data"; }

Status Arena::map(uint64_t control_size, uint64_t data_size) {
  auto control = os::Mapping::map(os::Mapping::Kind::kShared, control_fd_.get(), control_size, control_at_, !in_file_);
  if (!control) return std::move(control.status());
  auto data = os::Mapping::map(os::Mapping::Kind::kShared, data_fd_.get(), data_size, data_at_);
  if (!data) return std::move(data.status());
  control_ = control.take();
  shared_ = data.take();
  // The other faces are optional: a private mapping of this size may be refused (vm.overcommit_memory=2, RLIMIT_AS).
  if (auto read = os::Mapping::map(os::Mapping::Kind::kReadOnly, data_fd_.get(), data_size, data_at_))
    read_ = read.take();
  // A private copy of a reserved huge page needs another one, and there being none is SIGBUS at a write: callers copy instead.
  if (!in_file_ && os::in_huge_pages(data_fd_.get())) {
    page_kind_ = PageKind::kReserved;
  } else if (auto copy = os::Mapping::map(os::Mapping::Kind::kPrivate, data_fd_.get(), data_size, data_at_)) {
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
    auto control = os::create_memfd(control_file_name(*id), arena.offsets_.total);
    if (!control) {
      last = std::move(control.status());
      continue;
    }
    auto data = os::create_memfd(data_file_name(*id), chunks * kChunk, reserved);
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
    arena.write_header(*id, *secret, family, {limit, limits.warm, limits.pages});
    return arena;
  }
  return last;
}

void Arena::write_header(uint64_t id, uint64_t secret, uint64_t family, const Limits& limits) {
  Header& made = header();
  made.magic = kMagic;
  made.version = kVersion;
  made.layout_hash = kLayoutHash;
  made.pool_id = id;
  made.secret = secret;
  made.family = family;
  made.chunks = chunks_;
  made.data_size = chunks_ * kChunk;
  made.control_size = offsets_.total;
  const Pages& pages = limits.pages;
  made.limit.store(limits.limit, std::memory_order_relaxed);
  made.warm.store(limits.warm != 0 ? limits.warm
                  : pages.prefault ? limits.limit
                                   : limits.limit / 4,
                  std::memory_order_relaxed);
  made.pages.store(static_cast<uint32_t>(pages.kind), std::memory_order_relaxed);
  keep_to_pages();
  made.numa_policy.store(static_cast<uint32_t>(pages.numa.policy), std::memory_order_relaxed);
  uint64_t nodes = 0;
  for (const uint32_t node : pages.numa.nodes) nodes |= node < 64 ? uint64_t{1} << node : 0;
  made.numa_nodes.store(nodes, std::memory_order_relaxed);
  made.ticket_age.store(kTicketAge, std::memory_order_relaxed);
  made.next_incarnation.store(1, std::memory_order_relaxed);
  TORCHSHM_POINT("create.before_ready");
  made.ready.store(1, std::memory_order_release);  // publishes the header to whoever attaches
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

// ---- in a file

Regions Regions::of(uint64_t limit, uint64_t at) {
  const uint64_t size = std::min(limit, kMaxChunks * kChunk);
  const uint64_t chunks = std::clamp<uint64_t>((size * kFileReserveFactor + kChunk - 1) / kChunk, 16, kMaxChunks);
  Regions regions;
  regions.control_at = at;
  regions.control_size = Offsets::of(chunks).total;
  regions.data_at = (at + regions.control_size + kChunk - 1) / kChunk * kChunk;
  regions.data_size = chunks * kChunk;
  return regions;
}

Result<Arena> Arena::over(os::Fd file, const Regions& regions) {
  if (regions.control_size < sizeof(Header) || regions.data_size < kChunk)
    return Status(Code::kInvalid, "the file is too short for a pool");
  auto facts = os::file_facts(file.get());
  if (!facts) return std::move(facts.status());
  auto second = os::duplicate(file.get());
  if (!second) return std::move(second.status());
  Arena arena;
  arena.control_fd_ = std::move(file);
  arena.data_fd_ = second.take();
  arena.in_file_ = true;
  arena.on_disk_ = facts->system != os::FileSystem::kMemory;
  arena.control_at_ = regions.control_at;
  arena.data_at_ = regions.data_at;
  return arena;
}

Result<Arena> Arena::create_in(os::Fd file, const Regions& regions, uint64_t family, const Limits& limits) {
  auto id = random_id();
  if (!id) return std::move(id.status());
  auto secret = random_id();
  if (!secret) return std::move(secret.status());
  auto arena = over(std::move(file), regions);
  if (!arena) return arena;
  arena->chunks_ = static_cast<uint32_t>(regions.data_size / kChunk);
  arena->offsets_ = Offsets::of(arena->chunks_);
  if (Status mapped = arena->map(regions.control_size, regions.data_size); !mapped) return mapped;
  // Whoever joins looks at every lease, and at chunks one beyond those in use.
  if (Status reserved = arena->reserve_control(0, arena->offsets_.tickets); !reserved) return reserved;
  arena->chunks_reserved_ = arena->tickets_reserved_ = 0;
  arena->write_header(*id, *secret, family, {std::max<uint64_t>(limits.limit, kChunk), limits.warm});
  return arena;
}

Result<Arena> Arena::attach_in(os::Fd file, const Regions& regions) {
  auto arena = over(std::move(file), regions);
  if (!arena) return arena;
  if (Status mapped = arena->map(regions.control_size, regions.data_size); !mapped) return mapped;
  if (Status valid = arena->validate(regions.control_size, regions.data_size); !valid) return valid;
  // What is below the marks has its place: that comes first.
  arena->chunks_reserved_ = arena->chunks_used();
  arena->tickets_reserved_ = arena->tickets_used();
  return arena;
}

Result<Arena> Arena::inspect_in(os::Fd file, const Regions& regions) {
  auto arena = over(std::move(file), regions);
  if (!arena) return arena;
  auto mapped = os::Mapping::map(os::Mapping::Kind::kReadOnly, arena->control_fd(), regions.control_size,
                                 regions.control_at, false);
  if (!mapped) return std::move(mapped.status());
  arena->control_ = mapped.take();
  Status valid = arena->validate(regions.control_size, regions.data_size);
  if (valid) valid = arena->remember_files();
  if (!valid) return valid;
  return arena;
}

Status forget_processes(const Regions& regions, int file) {
  auto fd = os::duplicate(file);
  if (!fd) return std::move(fd.status());
  auto arena = Arena::attach_in(fd.take(), regions);
  if (!arena) return std::move(arena.status());
  for (uint32_t slot = 0, used = arena->slots_used(); slot < used; ++slot)
    arena->lease(slot).pid.store(0, std::memory_order_relaxed);
  return {};
}

// Through the mapping where this process has closed its descriptors: it may have files of its own under the numbers.
Status Arena::reserve_control(uint64_t from, uint64_t to) {
  if (!in_file_) return {};
  from = from / kPage * kPage;
  to = std::min((to + kPage - 1) / kPage * kPage, control_.size());
  Status done(Code::kUnsupported, "");
  if (owns_descriptors()) done = os::reserve(control_fd(), control_at_ + from, to - from);
  if (done.code() == Code::kUnsupported) done = os::reserve_mapped(control_.data() + from, to - from);
  TORCHSHM_POINT("reserve.control");
  if (done.code() == Code::kFull)
    return Status(Code::kFull, "the file system of " + os::path_of(control_fd()) + " is full", done.error());
  return done;
}

Status Arena::reserve_slot(uint32_t slot) {
  // From the first slot that was never used: a recount looks at every ledger below the mark.
  const uint32_t from = slots_used();
  if (!in_file_ || slot < from) return {};
  return reserve_control(offsets_.ledgers + offsets_.ledger_stride * from,
                         offsets_.ledgers + offsets_.ledger_stride * (uint64_t{slot} + 1));
}

Status Arena::grow_chunks(uint32_t end) {
  const uint64_t size = sizeof(Block) * kPagesPerChunk;
  Status done = reserve_control(offsets_.blocks + size * chunks_reserved_, offsets_.blocks + size * end);
  if (done) chunks_reserved_ = end;
  return done;
}

bool Arena::grow_tickets(uint32_t end) {
  const uint32_t most = std::min((end + kTicketStep - 1) / kTicketStep * kTicketStep, kTickets);
  const bool done =
      reserve_control(offsets_.tickets + sizeof(Ticket) * tickets_reserved_, offsets_.tickets + sizeof(Ticket) * most)
          .ok();
  if (done) tickets_reserved_ = most;
  return done;
}

Status Arena::reserve_all() {
  if (!in_file_) return {};
  const auto table = [&](uint64_t from, uint64_t to) {
    return os::reserve_holes(control_fd(), control_at_, from / kPage * kPage,
                             std::min((to + kPage - 1) / kPage * kPage, control_.size()));
  };
  Status done = table(0, offsets_.tickets);
  if (done) done = table(offsets_.tickets, offsets_.tickets + sizeof(Ticket) * uint64_t{tickets_used()});
  if (done) done = table(offsets_.blocks, offsets_.blocks + sizeof(Block) * kPagesPerChunk * uint64_t{chunks_used()});
  if (done) done = table(offsets_.ledgers, offsets_.ledgers + offsets_.ledger_stride * slots_used());
  // Neighbouring ranges in one call.
  uint64_t start = 0, end = 0;
  for (uint32_t i = 0, used = chunks_used(); i <= used && done; ++i) {
    const uint64_t at = uint64_t{i} * kChunk;
    const uint64_t pages = i < used ? std::min(ChunkValue::of(chunk(i).value.load()).committed, kPagesPerChunk) : 0;
    if (end != at || pages == 0) {
      if (end != start) done = os::reserve_holes(data_fd(), data_at_, start, end);
      start = at;
    }
    end = at + pages * kPage;
  }
  if (done.code() == Code::kFull)
    return Status(Code::kFull, "the file system of " + os::path_of(data_fd()) + " is full", done.error());
  return done.code() == Code::kUnsupported ? Status() : std::move(done);
}

Status Arena::commit(uint64_t offset, uint64_t length, os::Backing backing) {
  if (!in_file_) return os::commit(shared_.data() + offset, length, backing);
  Status done(Code::kUnsupported, "");
  if (owns_descriptors()) done = os::reserve(data_fd(), data_at_ + offset, length);
  TORCHSHM_POINT("reserve.data");
  // Then this process's page table in one step, as for memory files; of a file system in memory, huge pages.
  if (done || done.code() == Code::kUnsupported)
    done = on_disk_ ? os::reserve_mapped(shared_.data() + offset, length)
                    : os::commit(shared_.data() + offset, length, backing);
  if (done.code() == Code::kFull)
    return Status(Code::kFull, "the file system of " + os::path_of(data_fd()) + " is full", done.error());
  return done;
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
  arena.in_file_ = in_file_;
  arena.on_disk_ = on_disk_;
  arena.data_at_ = data_at_;
  arena.control_at_ = control_at_;
  arena.chunks_reserved_ = chunks_reserved_;
  arena.tickets_reserved_ = tickets_reserved_;
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

uint64_t Arena::control_memory() const { return in_file_ ? 0 : os::memory_of(control_fd(), control_id_); }

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
