// Words of shared memory whose every access Relacy schedules, and a record of what happened so far.
//
// Word<T> has the part of std::atomic's interface that the pool uses, over one rl::atomic. It differs from rl::atomic in three things:
// it takes std::memory_order; a mortal process may die before each of its writes; and every access enters the trace.
//
// The trace is what makes an exhaustive search possible. Threads are deterministic, so where a thread stands is given by which write
// each of its reads has read; and memory is given by the order of the writes to each word. Two interleavings that agree in both have
// led to the same state, however differently they were mixed, and only one of them needs to be followed further (search.h).
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <queue>
#include <set>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "pool/pair.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#include <relacy/relacy.hpp>
#pragma GCC diagnostic pop
// Relacy takes these names for itself.
#undef memory_order_relaxed
#undef memory_order_consume
#undef memory_order_acquire
#undef memory_order_release
#undef memory_order_acq_rel
#undef memory_order_seq_cst
#undef new
#undef delete
#undef malloc
#undef calloc
#undef realloc
#undef free
#undef assert
#undef errno

namespace torchshm::pool {
inline std::ostream& operator<<(std::ostream& out, const Pair& p) {
  return out << std::hex << p.hi << ':' << p.lo << std::dec;
}
}  // namespace torchshm::pool

namespace torchshm::model {

// Unwinds a process that is killed.
struct Killed {};

inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15 + b + 0x632be59bd9b4e019;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9;
  return x ^ x >> 32;
}

class Trace {
 public:
  static constexpr uint32_t kThreads = 4, kSetUp = kThreads;  // what before() writes is nobody's

  void restart() {
    const bool logs = keeps_log;
    *this = Trace{};
    keeps_log = logs;
    log.str("");
  }
  uint32_t thread() const { return threads_running ? rl::ctx().current_thread() : kSetUp; }
  uint32_t new_word(const char* name) {
    names_[words_] = name;
    return words_++;
  }

  void read(uint64_t write) { move_thread(mix(history_[thread()], write)); }
  // The name of a write that this thread makes now.
  uint64_t write(uint32_t word) {
    const uint64_t name = mix(history_[thread()], 0x10000 + word);
    move_thread(name);
    state_ -= mix(1000 + word, order_[word]);
    order_[word] = mix(order_[word], name);
    state_ += mix(1000 + word, order_[word]);
    return name;
  }
  unsigned choose(unsigned n) {
    const unsigned chosen = rl::rand(n);
    move_thread(mix(history_[thread()], 1 + chosen));
    return chosen;
  }
  uint64_t state() const { return state_; }

  // For the history of a violation.
  template <class T>
  void note(uint32_t word, const char* what, const T& value, std::memory_order order, std::source_location where) {
    if (!keeps_log || !threads_running) return;
    constexpr const char* orders[] = {"relaxed", "consume", "acquire", "release", "acq_rel", "seq_cst"};
    const auto nth =
        std::count_if(names_.begin(), names_.begin() + word, [&](const char* n) { return n == names_[word]; });
    const std::string file = where.file_name();
    log << "  process " << thread() << "  " << what << ' ' << names_[word] << '[' << nth << "] " << value << ' '
        << orders[static_cast<int>(order)] << "  " << file.substr(file.rfind('/') + 1) << ':' << where.line() << '\n';
  }

  bool keeps_log = false, threads_running = false;
  static inline std::ostringstream log;
  std::array<bool, kThreads + 1> mortal{};

 private:
  void move_thread(uint64_t history) {
    state_ -= mix(1 + thread(), history_[thread()]);
    history_[thread()] = history;
    state_ += mix(1 + thread(), history_[thread()]);
  }
  std::array<uint64_t, kThreads + 1> history_{};
  std::array<uint64_t, 128> order_{};
  std::array<const char*, 128> names_{};
  uint64_t state_ = 0;
  uint32_t words_ = 0;
};

inline Trace trace;

// Dies here or not. Before a write is enough: what a process only reads nobody else sees.
inline void may_die() {
  if (trace.mortal[trace.thread()] && trace.choose(2) == 1) throw Killed{};
}

inline rl::memory_order relacy(std::memory_order order) {
  switch (order) {
    case std::memory_order_relaxed:
      return rl::mo_relaxed;
    case std::memory_order_consume:
    case std::memory_order_acquire:
      return rl::mo_acquire;
    case std::memory_order_release:
      return rl::mo_release;
    case std::memory_order_acq_rel:
      return rl::mo_acq_rel;
    default:
      return rl::mo_seq_cst;
  }
}

using std::memory_order;
using std::source_location;

// Others may come in first; from then on, and until this goes, nobody.
struct Alone {
  Alone() {
    rl::ctx().sched();
    rl::ctx().disable_preemption();
  }
  ~Alone() { rl::ctx().enable_preemption(); }
};

template <class T>
class Word {
 public:
  static constexpr memory_order kDefault = std::memory_order_seq_cst;

  explicit Word(const char* name) : word_(trace.new_word(name)) { store(T{}, std::memory_order_relaxed); }

  T load(memory_order order = kDefault, source_location where = source_location::current()) const {
    const Written found = memory_.load(relacy(order), $);
    trace.read(found.by);
    trace.note(word_, found == latest_ ? "reads" : "reads an old", found.value, order, where);
    return found.value;
  }
  void store(T value, memory_order order = kDefault, source_location where = source_location::current()) {
    may_die();
    const Alone alone;
    latest_ = {value, trace.write(word_)};
    memory_.store(latest_, relacy(order), $);
    trace.note(word_, "writes", value, order, where);
  }
  T exchange(T value, memory_order order = kDefault, source_location where = source_location::current()) {
    return change([&](T) { return value; }, order, where);
  }
  T fetch_add(T n, memory_order order = kDefault, source_location where = source_location::current()) {
    return change([&](T v) { return static_cast<T>(v + n); }, order, where);
  }
  T fetch_or(T bits, memory_order order = kDefault, source_location where = source_location::current()) {
    return change([&](T v) { return static_cast<T>(v | bits); }, order, where);
  }
  T fetch_and(T bits, memory_order order = kDefault, source_location where = source_location::current()) {
    return change([&](T v) { return static_cast<T>(v & bits); }, order, where);
  }
  bool compare_exchange_strong(T& expected, T desired, memory_order order = kDefault,
                               source_location where = source_location::current()) {
    may_die();
    const Alone alone;
    const Written before = latest_;
    trace.read(before.by);
    if (before.value == expected) {
      latest_ = {desired, trace.write(word_)};
      (void)memory_.exchange(latest_, relacy(order), $);
      trace.note(word_, "exchanges", desired, order, where);
      return true;
    }
    Written other{expected, 0};  // no write has this name
    (void)memory_.compare_exchange_strong(other, other, relacy(order), $);
    trace.note(word_, "fails to exchange", before.value, order, where);
    expected = before.value;
    return false;
  }
  // A failure without a reason only repeats the loop that it is in.
  bool compare_exchange_weak(T& expected, T desired, memory_order order = kDefault,
                             source_location where = source_location::current()) {
    return compare_exchange_strong(expected, desired, order, where);
  }

  // The latest value; for invariants, which look without being there.
  T now() const { return latest_.value; }

 private:
  struct Written {
    T value{};
    uint64_t by = 0;
    bool operator==(const Written&) const = default;
    friend std::ostream& operator<<(std::ostream& out, const Written& w) { return out << w.value; }
  };
  template <class F>
  T change(F f, memory_order order, source_location where) {
    may_die();
    const Alone alone;
    const Written before = latest_;
    trace.read(before.by);
    latest_ = {f(before.value), trace.write(word_)};
    (void)memory_.exchange(latest_, relacy(order), $);
    trace.note(word_, "changes", latest_.value, order, where);
    return before.value;
  }
  mutable rl::atomic<Written> memory_;
  Written latest_;
  uint32_t word_;
};

// AtomicPair as one word.
class PairWord {
 public:
  explicit PairWord(const char* name) : word_(name) {}
  pool::Pair load(source_location where = source_location::current()) const {
    return word_.load(std::memory_order_acquire, where);
  }
  bool exchange_if(pool::Pair& expected, pool::Pair desired, source_location where = source_location::current()) {
    return word_.compare_exchange_strong(expected, desired, std::memory_order_seq_cst, where);
  }
  void set(pool::Pair value) { word_.store(value, std::memory_order_relaxed); }
  pool::Pair now() const { return word_.now(); }

 private:
  Word<pool::Pair> word_;
};

}  // namespace torchshm::model
