#include "pool/membership.h"

#include <cstring>

#include "base/failpoint.h"
#include "os/lock.h"
#include "os/memfd.h"
#include "os/process.h"

namespace torchshm::pool {
namespace {

bool being_reaped(const Arena& arena, uint32_t slot) {
  const uint32_t slots = arena.slots_used();
  for (uint32_t other = 0; other < slots; ++other) {
    if (arena.lease(other).reaping.load(std::memory_order_seq_cst) == slot + 1) return true;
  }
  return false;
}

void raise_to(std::atomic<uint32_t>& mark, uint32_t value) {
  uint32_t seen = mark.load(std::memory_order_relaxed);
  while (seen < value && !mark.compare_exchange_weak(seen, value, std::memory_order_seq_cst)) {
  }
}

}  // namespace

Result<Membership> Membership::join(Arena& arena, bool unsigned_yet) {
  auto life = os::reopen(arena.control_fd());
  if (!life) return std::move(life.status());
  if (!arena.is_control(life->get()))
    return Status(Code::kUnsupported, "this process has closed the pool's descriptors");
  Membership self;
  self.life_ = life.take();
  for (uint32_t slot = 0; slot < kMaxLeases; ++slot) {
    Lease& lease = arena.lease(slot);
    if (lease.word.load(std::memory_order_acquire) != kLeaseFree || being_reaped(arena, slot)) continue;
    auto locked = os::try_lock(self.life_.get(), slot);
    if (!locked) return std::move(locked.status());
    if (!*locked) continue;
    TORCHSHM_POINT("join.locked");
    self.slot_ = slot;
    self.incarnation_ = arena.header().next_incarnation.fetch_add(1, std::memory_order_relaxed);  // unique is enough
    TORCHSHM_POINT("join.numbered");
    raise_to(arena.header().slots_used, slot + 1);
    TORCHSHM_POINT("join.in_sight");
    uint64_t expected = kLeaseFree;
    if (lease.word.compare_exchange_strong(expected, lease_word(self.incarnation_), std::memory_order_seq_cst)) {
      TORCHSHM_POINT("join.claimed");
      // A reaper that was half-way when the slot became free has either been seen above or sees the new word now.
      if (!being_reaped(arena, slot)) {
        lease.pid.store(0, std::memory_order_relaxed);
        TORCHSHM_POINT("join.unsigned");
        if (!unsigned_yet) self.sign(arena);
        TORCHSHM_POINT("join.signed");
        return self;
      }
      lease.word.store(kLeaseFree, std::memory_order_release);
      TORCHSHM_POINT("join.put_back");
    }
    (void)os::unlock(self.life_.get(), slot);
  }
  return Status(Code::kNoSlot,
                "all " + std::to_string(kMaxLeases) + " leases of the pool are taken by living processes");
}

void Membership::sign(Arena& arena) const {
  const os::ProcessId id = os::self();
  const std::string name = os::self_name();
  uint64_t words[2] = {0, 0};
  std::memcpy(words, name.data(), std::min(name.size(), sizeof words - 1));
  Lease& lease = arena.lease(slot_);
  // Relaxed: for messages, and for the second look at a lease whose lock is already gone.
  lease.pid.store(id.pid, std::memory_order_relaxed);
  TORCHSHM_POINT("sign.pid");
  lease.started.store(id.started, std::memory_order_relaxed);
  TORCHSHM_POINT("sign.started");
  lease.pid_namespace.store(id.namespace_, std::memory_order_relaxed);
  TORCHSHM_POINT("sign.namespace");
  lease.name[0].store(words[0], std::memory_order_relaxed);
  TORCHSHM_POINT("sign.half_named");
  lease.name[1].store(words[1], std::memory_order_relaxed);
}

void Membership::abandon(Arena& arena) {
  arena.lease(slot_).pid.store(0, std::memory_order_relaxed);
  life_.reset();
}

bool Membership::dead(const Arena& arena, uint32_t me, uint32_t slot) {
  const Lease& lease = arena.lease(slot);
  const uint64_t word = lease.word.load(std::memory_order_seq_cst);
  if (slot == me || (word & 0xff) != kLeaseLive) return false;
  // The lock is looked at through the control file's own description, which never holds one.
  if (os::locked_by_other(arena.control_fd(), slot)) return false;
  if (!arena.owns_descriptors()) return false;  // somebody else's file was asked
  // A living process may have closed all its descriptors (a daemonising one does); what it has mapped it can still see.
  os::ProcessId id;
  id.pid = lease.pid.load(std::memory_order_relaxed);
  id.started = lease.started.load(std::memory_order_relaxed);
  id.namespace_ = lease.pid_namespace.load(std::memory_order_relaxed);
  if (id.pid != 0 && os::maps_file(id, arena.data_inode())) return false;
  // The slot may have changed hands between the two looks.
  return lease.word.load(std::memory_order_seq_cst) == word;
}

}  // namespace torchshm::pool
