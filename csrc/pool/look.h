// What the checkers of the shared files have in common: a look touches only pages that have memory, and what it finds wrong must stand.
//
// Shared: nothing is written. Private: all of it. When a process dies here: nothing has changed. Thread safety: each look is one thread's.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "os/memfd.h"
#include "pool/checker.h"
#include "pool/pair.h"

namespace torchshm::pool {

// ---- words in words

std::string hex(uint64_t value);
inline std::string number(uint64_t value) { return std::to_string(value); }
inline std::string words(Pair p) { return "(" + hex(p.lo) + ", " + hex(p.hi) + ")"; }

// ---- suspects

class Suspects {
 public:
  static constexpr size_t kMost = 128;  // of one look; of a file of garbage nobody reads more

  explicit Suspects(std::vector<Violation>& list) : list_(list) {}
  bool enough() const { return list_.size() >= kMost; }
  void add(int invariant, std::string what) {
    if (!enough()) list_.push_back({invariant, std::move(what)});
  }

 private:
  std::vector<Violation>& list_;
};

// ---- pages

// The parts of a file that have memory; the rest is zero.
class Memory {
 public:
  Memory() = default;
  Memory(int fd, uint64_t size, uint64_t base = 0) {
    for (os::Range r = os::next_data(fd, 0, size, base); r.begin < r.end && r.begin < size;
         r = os::next_data(fd, r.end, size, base)) {
      ranges_.push_back({r.begin, std::min(r.end, size)});
    }
  }

  const std::vector<os::Range>& ranges() const { return ranges_; }
  bool has(uint64_t offset) const {
    const auto r = at_or_after(offset);
    return r != ranges_.end() && r->begin <= offset;
  }

  // Calls f(index) for the entries of a table that have memory, as long as go_on() holds.
  template <class GoOn, class F>
  void each(uint64_t table, uint64_t size, uint64_t count, GoOn go_on, F f) const {
    uint64_t next = 0;
    for (auto r = at_or_after(table); r != ranges_.end() && r->begin < table + size * count; ++r) {
      const uint64_t begin = r->begin > table ? (r->begin - table) / size : 0;
      const uint64_t end = std::min(count, (r->end - table + size - 1) / size);
      for (next = std::max(next, begin); next < end && go_on(); ++next) f(static_cast<uint32_t>(next));
    }
  }

 private:
  std::vector<os::Range>::const_iterator at_or_after(uint64_t offset) const {
    return std::lower_bound(ranges_.begin(), ranges_.end(), offset,
                            [](const os::Range& r, uint64_t at) { return r.end <= at; });
  }
  std::vector<os::Range> ranges_;
};

// ---- several looks

// Milliseconds between looks, doubling. A janitor's thread may trim while all else rests, and be off the processor for a while.
constexpr int kLastWait = 64, kLastWaitAtRest = 512;

// Looks until nothing is wrong, or the same is for as long as that.
template <class Report, class Look>
Report insist(Look look, bool at_rest) {
  Report report = look();
  for (int wait = 1; !report.ok() && wait <= (at_rest ? kLastWaitAtRest : kLastWait); wait *= 2) {
    std::this_thread::sleep_for(std::chrono::milliseconds(wait));
    Report next = look();
    // The same words, or it is another story.
    std::erase_if(next.violations, [&](const Violation& v) {
      return std::none_of(report.violations.begin(), report.violations.end(),
                          [&](const Violation& old) { return old.invariant == v.invariant && old.what == v.what; });
    });
    report = std::move(next);
  }
  return report;
}

}  // namespace torchshm::pool
