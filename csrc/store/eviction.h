// What makes room when a store is full: who goes first, and how many.
//
// Shared: nothing of its own; values go by Spill::out(). Private: a list of what was found to be next, which is made anew when it is used up.
// When a process dies here: see spill.h. In a forked child the list may be locked for good; it is then made for each call.
// Thread safety: all functions, from any thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "store/catalogue.h"
#include "store/spill.h"

namespace torchshm::store {

class Eviction {
 public:
  Eviction(Catalogue& catalogue, Spill& spill) : catalogue_(catalogue), spill_(spill) {}
  uint64_t make_room(uint64_t bytes);
  uint64_t write_ahead();

 private:
  struct Name {
    uint32_t cell = 0, life = 0;
    uint64_t used = 0, bytes = 0;
  };
  // What goes together: one name, or those whose blocks share a chunk of the pool, since a chunk is free when all of it is.
  struct Unit {
    uint32_t rank = 0;
    uint64_t used = 0, bytes = 0;
    uint32_t first = 0, chunks = 0;  // neighbouring ones that one name has for itself; or none
    std::vector<Name> names;
  };
  struct List {
    std::vector<Unit> units;
    size_t next = 0;
    uint64_t good_for = 0;  // bytes; then the order is looked at again
    uint64_t policies = 0;  // Header::policies at that time
  };
  // Which values may have files written, after some could not be.
  class Writable {
   public:
    bool operator()(uint64_t bytes) const { return bytes <= most_; }
    bool none() const { return most_ == 0; }
    void failed(const Status& status, uint64_t bytes);

   private:
    uint64_t most_ = ~uint64_t{0};
  };
  bool stale(const List& list) const;
  // Best ones first.
  std::vector<Unit> gather() const;
  // Of those that are next soon, neighbours in whose place so many bytes fit come first: others would leave room that is scattered, which is
  // given back to the system and asked for again elsewhere. Returns how many of them come first. Each fourth time none: those that fit
  // nowhere go too.
  size_t fit(List& list, uint64_t bytes);
  uint64_t take(List& list, uint64_t bytes);

  Catalogue& catalogue_;
  Spill& spill_;
  std::atomic<uint32_t> turn_{0};
  // When there was nothing to write: the clock, and the time. Of the one thread that writes ahead.
  uint64_t nothing_at_ = 0, nothing_since_ = 0;
  Writable ahead_;  // and since when that thread knows it
  uint64_t ahead_since_ = 0;
  std::mutex mutex_;
  List list_;
};

}  // namespace torchshm::store
