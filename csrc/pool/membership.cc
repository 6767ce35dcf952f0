#include "pool/membership.h"

#include <cstring>

#include "base/failpoint.h"
#include "os/lock.h"
#include "os/memfd.h"
#include "os/process.h"
#include "pool/slots.h"

namespace torchshm::pool {

namespace {

Result<os::Fd> open_life(const Arena& arena) {
  const auto closed = [] { return Status(Code::kUnsupported, "this process has closed the pool's descriptors"); };
  if (!arena.owns_descriptors()) return closed();
  auto life = os::reopen(arena.control_fd());
  if (life && !arena.is_control(life->get())) return closed();  // in between
  return life;
}

}  // namespace

Result<Membership> Membership::join(Arena& arena, bool unsigned_yet) {
  auto life = open_life(arena);
  if (!life) return std::move(life.status());
  Membership self;
  self.life_ = life.take();
  for (uint32_t slot = 0; slot < kMaxLeases; ++slot) {
    if (!looks_free(arena, slot)) continue;
    auto locked = os::try_lock(self.life_.get(), slot);
    if (!locked) return std::move(locked.status());
    if (!*locked) continue;
    TORCHSHM_POINT("join.locked");
    if (Status reserved = arena.reserve_slot(slot); !reserved) return reserved;
    self.slot_ = slot;
    self.incarnation_ = claim_slot(arena, slot);
    if (self.incarnation_ != 0) {
      arena.lease(slot).pid.store(0, std::memory_order_relaxed);
      TORCHSHM_POINT("join.unsigned");
      if (!unsigned_yet) self.sign(arena);
      TORCHSHM_POINT("join.signed");
      return self;
    }
    (void)os::unlock(self.life_.get(), slot);
  }
  return Status(Code::kNoSlot,
                "all " + std::to_string(kMaxLeases) + " leases of the pool are taken by living processes");
}

Result<Membership> Membership::succeed(Arena& arena, uint32_t from) {
  auto life = open_life(arena);
  if (!life) return std::move(life.status());
  Membership self;
  self.life_ = life.take();
  for (uint32_t slot = from; slot < kMaxLeases; ++slot) {
    const Lease& lease = arena.lease(slot);
    const uint64_t word = lease.word.load(std::memory_order_seq_cst);
    if (!is_dead(arena, kNobody, slot)) continue;
    auto locked = os::try_lock(self.life_.get(), slot);
    if (!locked) return std::move(locked.status());
    if (!*locked) continue;
    TORCHSHM_POINT("succeed.locked");
    // Locked first, announcements looked at second; a reaper does it the other way round, so one of the two sees the other.
    if (!being_reaped(arena, slot) && lease.word.load(std::memory_order_seq_cst) == word &&
        (word & 0xff) == kLeaseLive) {
      self.slot_ = slot;
      self.incarnation_ = word >> 8;
      return self;
    }
    (void)os::unlock(self.life_.get(), slot);
  }
  return Status(Code::kNoSlot,
                "all " + std::to_string(kMaxLeases) + " leases of the pool are taken by living processes");
}

void Membership::renew(Arena& arena) {
  Lease& lease = arena.lease(slot_);
  lease.reaping.store(0, std::memory_order_release);  // whom the dead one was taking back
  incarnation_ = arena.header().next_incarnation.fetch_add(1, std::memory_order_relaxed);  // unique is enough
  lease.pid.store(0, std::memory_order_relaxed);
  lease.word.store(lease_word(incarnation_), std::memory_order_seq_cst);
  arena.header().reaped.fetch_add(1, std::memory_order_relaxed);
  TORCHSHM_POINT("succeed.renewed");
  sign(arena);
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

bool Membership::dead(const Arena& arena, uint32_t me, uint32_t slot) { return is_dead(arena, me, slot); }

bool gone(const Arena& arena, uint32_t slot) {
  // The lock is looked at through the control file's own description, which never holds one.
  if (os::locked_by_other(arena.control_fd(), slot)) return false;
  // The kernel's lock orders all that the dead have written; ThreadSanitizer does not know that.
  TORCHSHM_TSAN_ACQUIRE(&arena.lease(slot));
  if (!arena.owns_descriptors()) return false;  // somebody else's file was asked
  // A living process may have closed all its descriptors (a daemonising one does); what it has mapped it can still see.
  const Lease& lease = arena.lease(slot);
  os::ProcessId id;
  id.pid = lease.pid.load(std::memory_order_relaxed);
  id.started = lease.started.load(std::memory_order_relaxed);
  id.namespace_ = lease.pid_namespace.load(std::memory_order_relaxed);
  return id.pid == 0 || !os::maps_file(id, arena.data_inode());
}

}  // namespace torchshm::pool
