// A small pool whose control file is put back before each execution, with every kind of thing in it: living, dead and half-done leases, blocks
// of every size, runs, idle, orphaned and half-taken chunks, tickets out. Private to the fuzz targets; one process, one thread.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "os/memfd.h"
#include "pool/handle.h"
#include "pool/member.h"
#include "require.h"

namespace torchshm::fuzz {

class Sandbox {
 public:
  static constexpr uint64_t kLimit = uint64_t{12} << 20, kChunks = 24, kData = kChunks * pool::kChunk;

  Sandbox() {
    using pool::Mode;
    pool::Limits limits;
    limits.limit = kLimit;
    limits.warm = uint64_t{1} << 40;
    auto made = pool::Member::create(1, limits);
    REQUIRE(made.ok());
    first_ = made.take();
    pool::Arena& arena = first_->arena();
    base_ = reinterpret_cast<std::byte*>(&arena.header());
    total_ = arena.header().control_size;
    REQUIRE(arena.header().chunks == kChunks);

    // All of them first: whoever joins or grows the pool reaps the dead.
    auto dead = join(), other = join();
    auto life = pool::Membership::join(arena);
    REQUIRE(life.ok());
    REQUIRE(dead->membership().slot() == 1 && other->membership().slot() == 2 && life->slot() == 3);
    for (const uint64_t bytes : {uint64_t{100}, uint64_t{5000}, uint64_t{70000}, uint64_t{3} << 20}) {
      keep(*first_, bytes);
      keep(*dead, bytes == uint64_t{3} << 20 ? uint64_t{1} << 20 : bytes);
    }
    // Held by both, with a ticket.
    for (const size_t which : {size_t{0}, size_t{2}, size_t{6}}) {
      REQUIRE(dead->redeem(handles_[which], Mode::kReadWrite).ok());
      handles_.push_back(*first_->issue(handles_[0].block));
    }
    REQUIRE(other->allocate(9000, true).ok());
    // Slot 1 died while it dropped a block, slot 2 while it made one and worked with chunks; slot 3 lives, though nobody runs in it, works
    // on a block of slot 1's and is taking slot 2 back.
    abandon(std::move(dead));
    abandon(std::move(other));
    lives_.push_back(life.take());
    set_intent(1, pool::Op::kDrop, handles_[1]);
    set_intent(2, pool::Op::kAllocate, handles_[0]);
    set_intent(3, pool::Op::kAttach, handles_[3]);
    arena.lease(3).reaping.store(3);
    // Chunks in each half-way state, of slot 2 and of slot 3.
    uint32_t chunk = arena.chunks_used();
    for (const uint32_t owner : {2u, 3u}) {
      for (const auto state : {pool::ChunkState::kTrimming, pool::ChunkState::kBacking, pool::ChunkState::kTaking}) {
        if (chunk + 3 > arena.chunks()) break;
        set_chunk(chunk++, state, owner, 0);
      }
    }
    set_chunk(chunk++, pool::ChunkState::kSmall, pool::kNobody, 0);
    set_chunk(chunk++, pool::ChunkState::kIdle, 0, 0);
    arena.header().chunks_used.store(chunk);

    for (uint64_t page = 0; page < total_ / pool::kPage; ++page) {
      Page saved{page * pool::kPage, {}};
      std::memcpy(saved.bytes, base_ + saved.offset, pool::kPage);
      const auto* words = reinterpret_cast<const uint64_t*>(saved.bytes);
      if (std::any_of(words, words + pool::kPage / 8, [](uint64_t word) { return word != 0; })) pages_.push_back(saved);
    }
    restore();
  }

  // REQUIRES: nobody is attached but through the mappings of this object.
  void restore() {
    clear();
    for (const Page& page : pages_) std::memcpy(base_ + page.offset, page.bytes, pool::kPage);
  }
  void clear() { REQUIRE(::madvise(base_, total_, MADV_REMOVE) == 0); }

  std::byte* control() const { return base_; }
  uint64_t size() const { return total_; }
  const std::vector<pool::Handle>& handles() const { return handles_; }

  Result<std::unique_ptr<pool::Member>> attach() const {
    return pool::Member::attach(os::duplicate(first_->arena().data_fd()).take(),
                                os::duplicate(first_->arena().control_fd()).take());
  }
  Result<pool::Arena> arena() const {
    return pool::Arena::attach(os::duplicate(first_->arena().data_fd()).take(),
                               os::duplicate(first_->arena().control_fd()).take());
  }

 private:
  struct Page {
    uint64_t offset;
    std::byte bytes[pool::kPage];
  };

  std::unique_ptr<pool::Member> join() const {
    auto member = attach();
    REQUIRE(member.ok());
    return member.take();
  }
  void keep(pool::Member& member, uint64_t bytes) {
    auto block = member.allocate(bytes, bytes % 2 == 0);
    REQUIRE(block.ok());
    auto handle = member.issue(block->block);
    REQUIRE(handle.ok());
    handles_.push_back(*handle);
  }
  void abandon(std::unique_ptr<pool::Member> member) const { member->membership().abandon(member->arena()); }
  void set_intent(uint32_t slot, pool::Op op, const pool::Handle& handle) const {
    pool::Lease& lease = first_->arena().lease(slot);
    lease.intent_generation.store(handle.generation);
    lease.intent.store(static_cast<uint64_t>(op) << 32 | handle.block);
  }
  void set_chunk(uint32_t index, pool::ChunkState state, uint32_t owner, uint32_t head) const {
    REQUIRE(index < first_->arena().chunks());
    pool::ChunkValue value;
    value.state = state;
    value.owner = owner;
    value.committed = 16;
    value.head = head;
    pool::AtomicPair& pair = first_->arena().chunk(index).value;
    pool::Pair before = pair.load();
    REQUIRE(pair.exchange_if(before, value.pair()));
  }

  std::unique_ptr<pool::Member> first_;
  std::vector<pool::Membership> lives_;
  std::vector<pool::Handle> handles_;
  std::byte* base_ = nullptr;
  uint64_t total_ = 0;
  std::vector<Page> pages_;
};

}  // namespace torchshm::fuzz
