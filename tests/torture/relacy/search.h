// An exhaustive search of Relacy's that goes no way twice.
//
// Relacy's full search follows every interleaving, also those that differ only in the order of accesses that have nothing to do with
// each other; beyond a dozen accesses for each of two threads that is out of reach. This one asks the trace, before each scheduling
// choice, whether it has stood in the same state before, and if so lets the iteration run out without making choices. What remains
// unvisited leads only to states whose future has been seen. With a bound on switches the rest of the bound is part of the state.
#pragma once

#include "words.h"

namespace torchshm::model {

// Open addressing; 64 bits of a state's hash stand for it.
class Visited {
 public:
  // False when it was there already.
  bool insert(uint64_t state) {
    if (state == 0) state = 1;
    if (2 * ++size_ > slots_.size()) grow();
    if (put(slots_, state)) return true;
    --size_;
    return false;
  }
  uint64_t size() const { return size_; }

 private:
  static bool put(std::vector<uint64_t>& slots, uint64_t state) {
    for (uint64_t i = state & (slots.size() - 1);; i = (i + 1) & (slots.size() - 1)) {
      if (slots[i] == state) return false;
      if (slots[i] == 0) {
        slots[i] = state;
        return true;
      }
    }
  }
  void grow() {
    std::vector<uint64_t> larger(slots_.size() * 2);
    for (const uint64_t s : slots_) {
      if (s != 0) (void)put(larger, s);
    }
    slots_.swap(larger);
  }
  std::vector<uint64_t> slots_ = std::vector<uint64_t>(1 << 16);
  uint64_t size_ = 0;
};

struct Search {
  static constexpr unsigned kUnbounded = ~0U;
  bool every_interleaving = false;  // no state is recognised: Relacy's own full search
  unsigned switches = kUnbounded;   // away from a thread that could go on
  uint64_t iterations_at_most = ~0ULL;
  // Out.
  Visited* visited = nullptr;
  bool seen_before = false;  // this iteration only runs out
  bool replaying = false;    // the second run of a failure, with its history
  uint64_t cut_short = 0;
};

inline Search search;

template <rl::thread_id_t n>
class Once : public rl::tree_search_scheduler<Once<n>, rl::tree_search_scheduler_thread_info<n>, n> {
 public:
  using Base = rl::tree_search_scheduler<Once<n>, rl::tree_search_scheduler_thread_info<n>, n>;
  using Info = typename Base::thread_info_t;
  using Base::Base;

  rl::thread_id_t iteration_begin_impl() {
    search.seen_before = false;
    left_ = search.switches;
    return Base::iteration_begin_impl();
  }
  bool iteration_end_impl() {
    if (search.seen_before) ++search.cut_short;
    const bool done = Base::iteration_end_impl();
    return done || this->iter_ >= search.iterations_at_most;
  }
  rl::thread_id_t schedule_impl(rl::unpark_reason& reason, unsigned yield) {
    Info& t = *this->thread_;
    if (!search.seen_before && !search.every_interleaving && this->running_threads_count > 1 &&
        this->stree_depth_ == this->stree_.size() && !search.replaying) {
      uint64_t state = trace.state();
      if (search.switches != Search::kUnbounded)
        state = mix(state, left_ * 64 + t.index_ * 2 + (t.state_ == rl::thread_state_running ? 1 : 0));
      if (!search.visited->insert(state)) search.seen_before = true;
    }
    if (search.seen_before) {
      reason = rl::unpark_reason_normal;
      return t.state_ == rl::thread_state_running ? t.index_ : this->running_threads[0];
    }
    return Base::schedule_impl(reason, yield);
  }
  unsigned rand_impl(unsigned limit, rl::sched_type type) {
    return search.seen_before ? 0 : Base::rand_impl(limit, type);
  }
  bool can_switch(Info&) { return left_ != 0; }
  void on_switch(Info& t) {
    if (t.state_ == rl::thread_state_running && left_ != Search::kUnbounded) --left_;
  }
  double iteration_count_approx() { return 1; }

 private:
  unsigned left_ = 0;
};

struct Outcome {
  bool ok = false;
  uint64_t iterations = 0, states = 0;
  std::string what;     // of the violation
  std::string history;  // of the interleaving that led there
};

template <class Test>
Outcome run(bool with_history) {
  constexpr auto n = Test::params::thread_count;
  Visited visited;
  search.visited = &visited;
  search.cut_short = 0;
  search.replaying = false;
  std::ostringstream out, state;
  rl::test_params params;
  params.search_type = rl::sched_full;
  params.execution_depth_limit = 100000;
  params.output_stream = &out;
  params.progress_stream = &out;
  Outcome outcome;
  const rl::test_result_e result = rl::run_test<Test, Once<n>>(params, state, false);
  outcome.ok = result == rl::test_result_success;
  outcome.iterations = params.stop_iteration;
  outcome.states = visited.size();
  if (!outcome.ok) {
    outcome.what = rl::test_result_str(result);
    if (with_history) {
      search.replaying = true;
      params.initial_state = state.str();
      params.collect_history = true;
      out.str("");
      trace.keeps_log = true;
      std::ostringstream again;
      (void)rl::run_test<Test, Once<n>>(params, again, true);
      trace.keeps_log = false;
      outcome.what += out.str().substr(0, out.str().find('\n'));
      outcome.history = Trace::log.str();
    }
  }
  return outcome;
}

}  // namespace torchshm::model
