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

// The first process dies in what it does as kA, and its thread goes on as the reaper; the others live.
class OneDies : public Scenario {
 protected:
  explicit OneDies(uint32_t living = 3, uint32_t reaper = kC, bool with_chunks = false)
      : Scenario(living), reaper_(reaper), with_chunks_(with_chunks) {}
  virtual void dies() = 0;
  virtual void lives(unsigned thread) = 0;

  void receive_and_drop(uint32_t slot, bool must_work) {
    Process p(pool, slot);
    if (receive(p, must_work)) drop(p, 0);
  }
  void drop_in(uint32_t slot) {
    Process p(pool, slot);
    drop(p, 0);
  }
  void send_and_drop(uint32_t slot) {
    Process p(pool, slot);
    send(p, 0);
    drop(p, 0);
  }
  void drop_and_allocate(uint32_t slot) {
    Process p(pool, slot);
    drop(p, 0);
    (void)allocate(p, 0);
  }
  void allocate_and_drop(uint32_t slot) {
    Process p(pool, slot, true);
    if (allocate(p, 0)) drop(p, 0);
  }
  void take_and_allocate(uint32_t slot, uint32_t block) {
    Process p(pool, slot, true);
    pool::take_if_empty(pool, slot, 0);
    if (p.space.claim(0)) (void)allocate(p, block);
  }
  void take_ticket_back(uint32_t slot) { (void)Process(pool, slot).tickets.take_back(0, false, ~uint64_t{0}); }

 private:
  void process(unsigned thread) final {
    if (thread != 0) return lives(thread);
    if (mortal(kA, [&] { dies(); })) (void)Process(pool, reaper_, with_chunks_).reaper.reap(kA);
  }
  uint32_t reaper_;
  bool with_chunks_;
};

// The sender dies, the receiver does not: one message is redeemed.
struct Send : OneDies {
  void arrange() override {
    live_at_first(0, 1);
    holds_at_first(kA, 0);
  }
  void dies() override { send_and_drop(kA); }
  void lives(unsigned) override { receive_and_drop(kB, true); }
};

// The receiver dies; the sender drops its own hold meanwhile, and uses the block again when it is free.
struct Receive : OneDies {
  void arrange() override {
    live_at_first(0, 2);
    holds_at_first(kB, 0);
    ticket_at_first(0, kB, 0);
    chunk_of(kB);
  }
  void dies() override { receive_and_drop(kA, true); }
  void lives(unsigned) override { drop_and_allocate(kB); }
};

// The receiver dies while another process issues a second ticket: the recount must not miss what it did.
struct Issue : OneDies {
  void arrange() override {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    holds_at_first(kB, 0);
  }
  void dies() override { drop_in(kA); }
  void lives(unsigned) override { send_and_drop(kB); }
};

// Two processes unpickle one message; one of them dies.
struct Twice : OneDies {
  void arrange() override {
    live_at_first(0, 1);
    ticket_at_first(0, kC, 0);
  }
  void dies() override { receive_and_drop(kA, false); }
  void lives(unsigned) override { receive_and_drop(kB, false); }
};

// A chunk that looks empty is taken away from a process that allocates in it, and dies.
struct Allocate : OneDies {
  Allocate() : OneDies(3, kC, true) {}
  void arrange() override { chunk_of(kA); }
  void dies() override {
    Process a(pool, kA, true);
    (void)allocate(a, 0);
  }
  void lives(unsigned) override { take_and_allocate(kB, 0); }
};

// The same, and it is the taker that dies; its reaper ends the taking.
struct Take : OneDies {
  Take() : OneDies(3, kC, true) {}
  void arrange() override { chunk_of(kB); }
  void dies() override { take_and_allocate(kA, 1); }
  void lives(unsigned) override { allocate_and_drop(kB); }
};

// A full pool takes a ticket back while it is being redeemed, by one who dies.
struct Retake : OneDies {
  void arrange() override {
    live_at_first(0, 1);
    ticket_at_first(0, kC, 0);
  }
  void dies() override { receive_and_drop(kA, false); }
  void lives(unsigned) override { take_ticket_back(kB); }
};

// The taker back dies, too.
struct RetakeDies : OneDies {
  void arrange() override {
    live_at_first(0, 1);
    ticket_at_first(0, kC, 0);
  }
  void dies() override { take_ticket_back(kA); }
  void lives(unsigned) override { receive_and_drop(kB, false); }
};

// Somebody has died in the middle of something; two reap it at once, and one of them dies of it and is reaped as well.
template <int operation>
struct Reapers : Scenario {
  void arrange() override {
    chunk_of(kA);
    if (operation != 0) live_at_first(0, operation == 1 ? 1 : 2);
    if (operation == 1 || operation == 2) ticket_at_first(0, kA, 0);
    if (operation >= 2) holds_at_first(kA, 0);
    if (operation == 3) holds_at_first(kB, 0);
    dies_in(kA, [&] {
      Process a(pool, kA, true);
      if (operation == 0) (void)allocate(a, 0);
      if (operation == 1) (void)receive(a, false);
      if (operation == 2) drop(a, 0);
      if (operation == 3) send(a, 0);
    });
  }
  void process(unsigned i) override {
    if (i == 1) {
      (void)Process(pool, kC, true).reaper.reap(kA);
      return;
    }
    (void)mortal(kB, [&] { (void)Process(pool, kB, true).reaper.reap(kA); });
  }
};

// The slot of a dead process is given out again, and its new owner receives the message that the dead one had sent.
class SlotAgain : public Scenario {
 protected:
  using Scenario::Scenario;
  void dead_with_a_ticket() {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    ticket_at_first(0, kA, 0);
    pool.lease(kA).lock.store(0, std::memory_order_relaxed);
    holding[kA] = kNothing;
    died[kA] = true;
  }
  void reap_and_join(uint32_t reaper) {
    (void)Process(pool, reaper).reaper.reap(kA);
    if (!join(kA)) return;
    Process j(pool, kA);
    (void)receive(j, false);
  }
};

// While a slow reaper may still be at it.
struct Reuse : SlotAgain {
  void arrange() override {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    ticket_at_first(0, kA, 0);
    dies_in(kA, [&] {
      Process a(pool, kA);
      drop(a, 0);
    });
  }
  void process(unsigned i) override {
    if (i == 0) {
      (void)Process(pool, kB).reaper.reap(kA);
      return;
    }
    reap_and_join(kC);
  }
};

// The sender is killed, then the reaper is, then others take both back.
struct Nested : Scenario {
  Nested() : Scenario(4) {}
  void arrange() override {
    live_at_first(0, 1);
    holds_at_first(kA, 0);
  }
  void process(unsigned i) override {
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
struct Three : OneDies {
  Three() : OneDies(4, kD) {}
  void arrange() override {
    live_at_first(0, 2);
    holds_at_first(kC, 0);
    ticket_at_first(0, kC, 0);
    chunk_of(kC);
  }
  void dies() override { receive_and_drop(kA, false); }
  void lives(unsigned thread) override {
    if (thread == 1) return receive_and_drop(kB, false);
    drop_and_allocate(kC);
  }
};

// The owner allocates, another takes the chunk and dies, a third finds it empty as well.
struct ThreeTake : OneDies {
  ThreeTake() : OneDies(4, kD, true) {}
  void arrange() override { chunk_of(kB); }
  void dies() override { take_and_allocate(kA, 1); }
  void lives(unsigned thread) override {
    if (thread == 1) return allocate_and_drop(kB);
    take_and_allocate(kC, 0);
  }
};

// Two live members work on a block while a third reaps one that died at work on it.
struct ThreeReap : Scenario {
  ThreeReap() : Scenario(4) {}
  void arrange() override {
    live_at_first(0, 3);
    holds_at_first(kA, 0);
    holds_at_first(kB, 0);
    ticket_at_first(0, kA, 0);
    dies_in(kA, [&] {
      Process a(pool, kA);
      drop(a, 0);
    });
  }
  void process(unsigned i) override {
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

// The same, and the slow reaper dies; who takes it back ends its announcement, which a joiner looks at after that one's own.
struct ReuseDies : SlotAgain {
  ReuseDies() : SlotAgain(4) {}
  void arrange() override { dead_with_a_ticket(); }
  void process(unsigned i) override {
    if (i == 0) {
      if (mortal(kD, [&] { (void)Process(pool, kD).reaper.reap(kA); })) (void)Process(pool, kB).reaper.reap(kD);
      return;
    }
    reap_and_join(kC);
  }
};

// The slow reaper has only just joined, in a slot that was never used before: a joiner must look at it as well.
struct Late : SlotAgain {
  Late() : SlotAgain(2) {}
  void arrange() override { dead_with_a_ticket(); }
  void process(unsigned i) override {
    if (i == 0) {
      if (join(kC)) (void)Process(pool, kC).reaper.reap(kA);
      return;
    }
    reap_and_join(kB);
  }
};

// AtomicPair as it is: two halves that change together, and are read one by one.
struct Halves : Scenario {
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
  void arrange() override { published($) = 0; }
  void exchange(pool::Pair to) {
    const Alone alone;
    ++changes;
    (void)lo.word.exchange(changes << 32 | to.lo, std::memory_order_acq_rel);
    (void)hi.word.exchange(changes << 32 | to.hi, std::memory_order_acq_rel);
  }
  void process(unsigned i) override {
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
struct Small : Scenario {
  static inline std::set<uint64_t> ends;
  void arrange() override {
    live_at_first(0, 2);
    holds_at_first(kA, 0);
    holds_at_first(kB, 0);
  }
  void process(unsigned i) override {
    if (i == 0) (void)mortal(kA, [&] { Process(pool, kA).ledger.begin(pool::Op::kDrop, 0, 1); });
    if (i == 0 && died[kA]) (void)pool::is_dead(pool, kB, kA);
    if (i == 1) (void)Process(pool, kB).ledger.count_up(0, 1);
    if (i == 1) (void)pool.lease(kA).intent.load(std::memory_order_acquire);
  }
  void end() override { ends.insert(trace.state()); }
};

template <int threads, class T>
Outcome explore(bool history) {
  static_assert(sizeof(T) <= Test<threads>::kRoom);
  Test<threads>::make = [](void* where) -> Scenario* { return ::new (where) T(); };
  return run<Test<threads>>(history);
}

struct Entry {
  const char* name;
  Outcome (*explore)(bool);
  unsigned short_switches, full_switches;  // where kUnbounded: every interleaving
  const char* what;
};

constexpr unsigned kAll = Search::kUnbounded;
constexpr Entry kScenarios[] = {
    {"halves", explore<2, Halves>, kAll, kAll, "a pair is read while it changes"},
    {"send", explore<2, Send>, kAll, kAll, "the sender dies, the receiver redeems and drops"},
    {"receive", explore<2, Receive>, kAll, kAll, "the receiver dies, the sender drops and uses the block again"},
    {"issue", explore<2, Issue>, kAll, kAll, "one dies in drop, the other issues and drops"},
    {"twice", explore<2, Twice>, 3, kAll, "two receive one message, one of them dies"},
    {"allocate", explore<2, Allocate>, kAll, kAll, "the owner dies in allocate, another takes its chunk"},
    {"take", explore<2, Take>, 3, kAll, "the taker of a chunk dies, its owner allocates"},
    {"retake", explore<2, Retake>, kAll, kAll, "the receiver dies, its ticket is taken back"},
    {"retake_dies", explore<2, RetakeDies>, kAll, kAll, "who takes a ticket back dies, the receiver does not"},
    {"reapers_allocate", explore<2, Reapers<0>>, 3, kAll, "died in allocate; two reap, one dies"},
    {"reapers_receive", explore<2, Reapers<1>>, 3, kAll, "died in receive; two reap, one dies"},
    {"reapers_drop", explore<2, Reapers<2>>, 4, kAll, "died in drop; two reap, one dies"},
    {"reapers_issue", explore<2, Reapers<3>>, 4, kAll, "died in issue and drop; two reap, one dies"},
    {"reuse", explore<2, Reuse>, kAll, kAll, "the slot is given out again beside a slow reaper"},
    {"reuse_dies", explore<2, ReuseDies>, kAll, kAll, "the same, and the slow reaper dies"},
    {"late", explore<2, Late>, kAll, kAll, "the slow reaper has only just joined"},
    {"nested", explore<2, Nested>, 2, 4, "the sender dies, its reaper dies, another reaps both"},
    {"three", explore<3, Three>, 1, 2, "two receive one message, the sender drops and allocates"},
    {"three_take", explore<3, ThreeTake>, 1, 2, "owner, taker who dies, second taker"},
    {"three_reap", explore<3, ThreeReap>, 2, 4, "reaper, another holder, a ticket taken back"},
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
    const Outcome plain = explore<2, Small>(false);
    std::set<uint64_t> all;
    all.swap(Small::ends);
    search.every_interleaving = false;
    const Outcome once = explore<2, Small>(false);
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
