// The pool's own ledger, tickets, reaper, slots and taking of chunks under every interleaving, every death and C++'s memory model.
//
//   torchshm_relacy [--full] [--small] [--only NAME] [--history] [--list] [--json FILE]
//
// Each scenario is two or three processes, each a thread of Relacy's; one that is mortal may die before any of its writes, and its
// thread goes on as a reaper, which may die as well.
#include <chrono>
#include <cstdio>

#include "scenario.h"
#include "search.h"

namespace torchshm::model {
namespace {

// The sender dies, the receiver does not: one message is redeemed.
struct Send : Scenario<Send, 2> {
  void arrange() {
    live_at_first(0, 1);
    holds_at_first(kA, 0);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      if (receive(b, true)) drop(b, 0);
      return;
    }
    const bool killed = mortal(kA, [&] {
      Process a(pool, kA);
      send(a, 0);
      drop(a, 0);
    });
    if (killed) (void)Process(pool, kC).reaper.reap(kA);
  }
};

// The receiver dies; the sender drops its own hold meanwhile, and uses the block again when it is free.
struct Receive : Scenario<Receive, 2> {
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kB, 0);
    ticket_at_first(0, kB, 0);
    chunk_of(kB);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      drop(b, 0);
      (void)allocate(b, 0);
      return;
    }
    const bool killed = mortal(kA, [&] {
      Process a(pool, kA);
      if (receive(a, true)) drop(a, 0);
    });
    if (killed) (void)Process(pool, kC).reaper.reap(kA);
  }
};

// The receiver dies while another process issues a second ticket: the recount must not miss what it did.
struct Issue : Scenario<Issue, 2> {
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    holds_at_first(kB, 0);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      send(b, 0);
      drop(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA);
          drop(a, 0);
        }))
      (void)Process(pool, kC).reaper.reap(kA);
  }
};

// Two processes unpickle one message; one of them dies.
struct Twice : Scenario<Twice, 2> {
  void arrange() {
    live_at_first(0, 1);
    ticket_at_first(0, kC, 0);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      if (receive(b, false)) drop(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA);
          if (receive(a, false)) drop(a, 0);
        }))
      (void)Process(pool, kC).reaper.reap(kA);
  }
};

// A chunk that looks empty is taken away from a process that allocates in it, and dies.
struct Allocate : Scenario<Allocate, 2> {
  void arrange() { chunk_of(kA); }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB, true);
      pool::take_if_empty(pool, kB, 0);
      if (b.space.claim(0)) (void)allocate(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA, true);
          (void)allocate(a, 0);
        }))
      (void)Process(pool, kC, true).reaper.reap(kA);
  }
};

// The same, and it is the taker that dies; its reaper ends the taking.
struct Take : Scenario<Take, 2> {
  void arrange() { chunk_of(kB); }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB, true);
      if (allocate(b, 0)) drop(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA, true);
          pool::take_if_empty(pool, kA, 0);
          if (a.space.claim(0)) (void)allocate(a, 1);
        }))
      (void)Process(pool, kC, true).reaper.reap(kA);
  }
};

// A full pool takes a ticket back while it is being redeemed, by one who dies.
struct Retake : Scenario<Retake, 2> {
  void arrange() {
    live_at_first(0, 1);
    ticket_at_first(0, kC, 0);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      (void)b.tickets.take_back(0, false, ~uint64_t{0});
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA);
          if (receive(a, false)) drop(a, 0);
        }))
      (void)Process(pool, kC).reaper.reap(kA);
  }
};

// The taker back dies, too.
struct RetakeDies : Scenario<RetakeDies, 2> {
  void arrange() {
    live_at_first(0, 1);
    ticket_at_first(0, kC, 0);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      if (receive(b, false)) drop(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA);
          (void)a.tickets.take_back(0, false, ~uint64_t{0});
        }))
      (void)Process(pool, kC).reaper.reap(kA);
  }
};

// Somebody has died in the middle of something; two reap it at once, and one of them dies of it and is reaped as well.
template <int operation>
struct Reapers : Scenario<Reapers<operation>, 2> {
  using S = Scenario<Reapers<operation>, 2>;
  void arrange() {
    this->chunk_of(kA);
    if (operation != 0) this->live_at_first(0, operation == 1 ? 1 : 2);
    if (operation == 1 || operation == 2) this->ticket_at_first(0, kA, 0);
    if (operation >= 2) this->holds_at_first(kA, 0);
    if (operation == 3) this->holds_at_first(kB, 0);
    this->dies_in(kA, [&] {
      Process a(this->pool, kA, true);
      if (operation == 0) (void)this->allocate(a, 0);
      if (operation == 1) (void)this->receive(a, false);
      if (operation == 2) this->drop(a, 0);
      if (operation == 3) this->send(a, 0);
    });
  }
  void process(unsigned i) {
    if (i == 1) {
      (void)Process(this->pool, kC, true).reaper.reap(kA);
      return;
    }
    (void)this->mortal(kB, [&] { (void)Process(this->pool, kB, true).reaper.reap(kA); });
  }
};

// A slot is given out again while a slow reaper may still be at it.
struct Reuse : Scenario<Reuse, 2> {
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    ticket_at_first(0, kA, 0);
    dies_in(kA, [&] {
      Process a(pool, kA);
      drop(a, 0);
    });
  }
  void process(unsigned i) {
    if (i == 0) {
      (void)Process(pool, kB).reaper.reap(kA);
      return;
    }
    (void)Process(pool, kC).reaper.reap(kA);
    if (!join(kA)) return;
    Process j(pool, kA);
    (void)receive(j, false);
  }
};

// The sender is killed, then the reaper is, then others take both back.
struct Nested : Scenario<Nested, 2> {
  static constexpr uint32_t kLiving = 4;
  void arrange() {
    live_at_first(0, 1);
    holds_at_first(kA, 0);
  }
  void process(unsigned i) {
    if (i == 1) {
      Process b(pool, kB);
      if (receive(b, true)) drop(b, 0);
      return;
    }
    if (!mortal(kA, [&] {
          Process a(pool, kA);
          send(a, 0);
          drop(a, 0);
        }))
      return;
    if (!mortal(kC, [&] { (void)Process(pool, kC).reaper.reap(kA); })) return;
    Process d(pool, kD);
    (void)d.reaper.reap(kA);
    (void)d.reaper.reap(kC);
  }
};

// A message is unpickled twice while its sender drops the block; the first receiver dies.
struct Three : Scenario<Three, 3> {
  static constexpr uint32_t kLiving = 4;
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kC, 0);
    ticket_at_first(0, kC, 0);
    chunk_of(kC);
  }
  void process(unsigned i) {
    if (i == 2) {
      Process c(pool, kC);
      drop(c, 0);
      (void)allocate(c, 0);
      return;
    }
    if (i == 1) {
      Process b(pool, kB);
      if (receive(b, false)) drop(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA);
          if (receive(a, false)) drop(a, 0);
        }))
      (void)Process(pool, kD).reaper.reap(kA);
  }
};

// The owner allocates, another takes the chunk and dies, a third finds it empty as well.
struct ThreeTake : Scenario<ThreeTake, 3> {
  static constexpr uint32_t kLiving = 4;
  void arrange() { chunk_of(kB); }
  void process(unsigned i) {
    if (i == 2) {
      Process c(pool, kC, true);
      pool::take_if_empty(pool, kC, 0);
      if (c.space.claim(0)) (void)allocate(c, 0);
      return;
    }
    if (i == 1) {
      Process b(pool, kB, true);
      if (allocate(b, 0)) drop(b, 0);
      return;
    }
    if (mortal(kA, [&] {
          Process a(pool, kA, true);
          pool::take_if_empty(pool, kA, 0);
          if (a.space.claim(0)) (void)allocate(a, 1);
        }))
      (void)Process(pool, kD, true).reaper.reap(kA);
  }
};

// Two live members work on a block while a third reaps one that died at work on it.
struct ThreeReap : Scenario<ThreeReap, 3> {
  static constexpr uint32_t kLiving = 4;
  void arrange() {
    live_at_first(0, 3);
    holds_at_first(kA, 0);
    holds_at_first(kB, 0);
    ticket_at_first(0, kA, 0);
    dies_in(kA, [&] {
      Process a(pool, kA);
      drop(a, 0);
    });
  }
  void process(unsigned i) {
    if (i == 2) {
      (void)Process(pool, kC).tickets.take_back(0, true, ~uint64_t{0});
      return;
    }
    if (i == 1) {
      Process b(pool, kB);
      drop(b, 0);
      return;
    }
    (void)Process(pool, kD).reaper.reap(kA);
  }
};

// The same, and the slow reaper dies of it; who takes it back ends its announcement.
struct ReuseDies : Scenario<ReuseDies, 2> {
  static constexpr uint32_t kLiving = 4;
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    ticket_at_first(0, kA, 0);
    pool.lease(kA).lock.store(0, std::memory_order_relaxed);
    holding[kA] = kNothing;
    died[kA] = true;
  }
  void process(unsigned i) {
    if (i == 0) {
      if (mortal(kB, [&] { (void)Process(pool, kB).reaper.reap(kA); })) (void)Process(pool, kC).reaper.reap(kB);
      return;
    }
    (void)Process(pool, kD).reaper.reap(kA);
    if (!join(kA)) return;
    Process j(pool, kA);
    (void)receive(j, false);
  }
};

// The slow reaper has only just joined, in a slot that was never used before: a joiner must look at it as well.
struct Late : Scenario<Late, 2> {
  static constexpr uint32_t kLiving = 2;
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    ticket_at_first(0, kA, 0);
    pool.lease(kA).lock.store(0, std::memory_order_relaxed);
    holding[kA] = kNothing;
    died[kA] = true;
  }
  void process(unsigned i) {
    if (i == 0) {
      if (join(kC)) (void)Process(pool, kC).reaper.reap(kA);
      return;
    }
    (void)Process(pool, kB).reaper.reap(kA);
    if (!join(kA)) return;
    Process j(pool, kA);
    (void)receive(j, false);
  }
};

// AtomicPair as it is: two halves that change together, and are read one by one.
struct Halves : Scenario<Halves, 2> {
  // A half knows the number of its pair's change; who has acquired one half of a change does not find the other half as it was before.
  struct Half {
    Halves& pair;
    Word<uint64_t> word;
    uint64_t load(std::memory_order order) const {
      uint64_t found = word.load(order);
      if (found >> 32 < pair.seen) found = word.now();
      if (order == std::memory_order_acquire) pair.seen = std::max(pair.seen, found >> 32);
      return found & 0xffffffff;
    }
  };
  uint64_t seen = 0, changes = 0;
  Half lo{*this, Word<uint64_t>("lo")}, hi{*this, Word<uint64_t>("hi")};
  rl::var<uint32_t> published;
  void arrange() { published($) = 0; }
  void exchange(pool::Pair to) {
    const Alone alone;
    ++changes;
    (void)lo.word.exchange(changes << 32 | to.lo, std::memory_order_acq_rel);
    (void)hi.word.exchange(changes << 32 | to.hi, std::memory_order_acq_rel);
  }
  void process(unsigned i) {
    if (i == 0) {
      exchange({1, 1});
      published($) = 1;
      exchange({1, 2});
      exchange({0, 3});
      return;
    }
    const pool::Pair found = pool::load_halves(lo, hi);
    const bool one = found == pool::Pair{0, 0} || found == pool::Pair{1, 1} || found == pool::Pair{1, 2} ||
                     found == pool::Pair{0, 3};
    RL_ASSERT(one && "halves of two values");
    if (found.hi >= 2) (void)static_cast<uint32_t>(published($));
  }
};

// The same program under Relacy's own search and under the one that recognises states: both end in the same set of states.
struct Small : Scenario<Small, 2> {
  static inline std::set<uint64_t> ends;
  void arrange() {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    holds_at_first(kB, 0);
  }
  void process(unsigned i) {
    if (i == 0) (void)mortal(kA, [&] { Process(pool, kA).ledger.begin(pool::Op::kDrop, 0, 1); });
    if (i == 0 && died[kA]) (void)pool::is_dead(pool, kB, kA);
    if (i == 1) (void)Process(pool, kB).ledger.count_up(0, 1);
    if (i == 1) (void)pool.lease(kA).intent.load(std::memory_order_acquire);
  }
  void after() {
    trace.threads_running = false;
    if (!search.seen_before) ends.insert(trace.state());
    rl::ctx().*PlainNew::counter() -= 1;
  }
};

template <class T>
Outcome explore(bool history) {
  return run<T>(history);
}

struct Entry {
  const char* name;
  Outcome (*explore)(bool);
  unsigned short_switches, full_switches;  // where kUnbounded: every interleaving
  const char* what;
};

constexpr unsigned kAll = Search::kUnbounded;
constexpr Entry kScenarios[] = {
    {"halves", explore<Halves>, kAll, kAll, "a pair is read while it changes"},
    {"send", explore<Send>, kAll, kAll, "the sender dies, the receiver redeems and drops"},
    {"receive", explore<Receive>, kAll, kAll, "the receiver dies, the sender drops and uses the block again"},
    {"issue", explore<Issue>, kAll, kAll, "one dies in drop, the other issues and drops"},
    {"twice", explore<Twice>, 3, kAll, "two receive one message, one of them dies"},
    {"allocate", explore<Allocate>, kAll, kAll, "the owner dies in allocate, another takes its chunk"},
    {"take", explore<Take>, 3, kAll, "the taker of a chunk dies, its owner allocates"},
    {"retake", explore<Retake>, kAll, kAll, "the receiver dies, its ticket is taken back"},
    {"retake_dies", explore<RetakeDies>, kAll, kAll, "who takes a ticket back dies, the receiver does not"},
    {"reapers_allocate", explore<Reapers<0>>, 3, kAll, "died in allocate; two reap, one dies"},
    {"reapers_receive", explore<Reapers<1>>, 3, kAll, "died in receive; two reap, one dies"},
    {"reapers_drop", explore<Reapers<2>>, 4, kAll, "died in drop; two reap, one dies"},
    {"reapers_issue", explore<Reapers<3>>, 4, kAll, "died in issue and drop; two reap, one dies"},
    {"reuse", explore<Reuse>, kAll, kAll, "the slot is given out again beside a slow reaper"},
    {"reuse_dies", explore<ReuseDies>, kAll, kAll, "the same, and the slow reaper dies"},
    {"late", explore<Late>, kAll, kAll, "the slow reaper has only just joined"},
    {"nested", explore<Nested>, 2, 4, "the sender dies, its reaper dies, another reaps both"},
    {"three", explore<Three>, 1, 3, "two receive one message, the sender drops and allocates"},
    {"three_take", explore<ThreeTake>, 1, 3, "owner, taker who dies, second taker"},
    {"three_reap", explore<ThreeReap>, 2, 4, "reaper, another holder, a ticket taken back"},
};

}  // namespace
}  // namespace torchshm::model

int main(int argc, char** argv) {
  using namespace torchshm::model;
  bool full = false, history = true, quiet = false, small = false;
  unsigned switches = 0;
  std::string only, json;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--full")
      full = true;
    else if (arg == "--quiet")
      quiet = true, history = false;
    else if (arg == "--small")
      small = true;
    else if (arg == "--only" && i + 1 < argc)
      only = argv[++i];
    else if (arg == "--switches" && i + 1 < argc)
      switches = static_cast<unsigned>(std::atoi(argv[++i]));
    else if (arg == "--json" && i + 1 < argc)
      json = argv[++i];
    else {
      std::fprintf(stderr, "usage: %s [--full] [--small] [--only NAME] [--switches N] [--quiet] [--json FILE]\n",
                   argv[0]);
      return 2;
    }
  }
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); };
  const auto begun = Clock::now();
  std::string figures, violations;
  const auto failed = [&](const std::string& what) {
    violations += std::string(violations.empty() ? "" : ", ") + '"' + what + '"';
  };

  if (only.empty()) {
    search.every_interleaving = true;
    const Outcome plain = run<Small>(false);
    std::set<uint64_t> all;
    all.swap(Small::ends);
    search.every_interleaving = false;
    const Outcome once = run<Small>(false);
    const bool same = plain.ok && once.ok && all == Small::ends;
    if (!quiet || !same)
      std::printf("%s: %lu interleavings and the %lu that are followed end in the same %lu states\n",
                  same ? "search" : "SEARCH IS WRONG", static_cast<unsigned long>(plain.iterations),
                  static_cast<unsigned long>(once.iterations), static_cast<unsigned long>(all.size()));
    if (!same) failed("the reduced search loses states");
  }
  for (const Entry& e : kScenarios) {
    if (!only.empty() && only != e.name) continue;
    if (small && e.short_switches != kAll) continue;
    search.switches = switches != 0 ? switches : full ? e.full_switches : e.short_switches;
    const auto start = Clock::now();
    const Outcome o = e.explore(history);
    const double seconds = since(start);
    const std::string bound = search.switches == kAll ? "all" : "<= " + std::to_string(search.switches) + " switches";
    if (!quiet)
      std::printf("%-17s %9lu interleavings %9lu states %7.1f s  %-13s %s\n", e.name,
                  static_cast<unsigned long>(o.iterations), static_cast<unsigned long>(o.states), seconds,
                  bound.c_str(), e.what);
    if (!o.ok) {
      std::printf("VIOLATION in %s after %lu interleavings: %s\n%s", e.name, static_cast<unsigned long>(o.iterations),
                  o.what.c_str(), o.history.c_str());
      failed(std::string(e.name) + ": " + o.what.substr(0, o.what.find('"')));
      if (quiet) return 1;
    }
    std::fflush(stdout);
    char text[200];
    std::snprintf(text, sizeof text, "%s\"%s\": \"%lu interleavings, %lu states, %.1f s, %s\"",
                  figures.empty() ? "" : ", ", e.name, static_cast<unsigned long>(o.iterations),
                  static_cast<unsigned long>(o.states), seconds, bound.c_str());
    figures += text;
  }
  if (!json.empty()) {
    std::ofstream(json) << "{\"name\": \"relacy\", \"seed\": null, \"full\": " << (full ? "true" : "false")
                        << ", \"seconds\": " << since(begun) << ", \"figures\": {" << figures << "}, \"violations\": ["
                        << violations << "]}\n";
  }
  return violations.empty() ? 0 : 1;
}
