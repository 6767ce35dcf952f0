// Members as threads over one mapping of the control file: what ThreadSanitizer can follow, which misses races through two mappings.
//
// Every operation, at a limit that is always reached; a member dies at any point, and others take back what it had. Handles pass through
// relaxed words, so that nothing but the pool itself orders a sender's writes before a receiver's reads, or a block's old bytes before
// its new ones. TORCHSHM_THREAD_STEPS sets how many steps each thread takes, TORCHSHM_SOAK_SEED which.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "base/failpoint.h"
#include "os/lock.h"
#include "processes.h"

#if defined(TORCHSHM_FAILPOINTS) && TORCHSHM_FAILPOINTS && defined(__cpp_exceptions)

namespace torchshm {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;

constexpr int kThreads = 4;
constexpr uint64_t kStride = 64;  // bytes between the words that are written and looked at

// A handle in transit. Torn, it is a handle that somebody forged.
struct Letter {
  std::atomic<uint64_t> place{0}, generation{0}, nonce{0};
  void put(const Handle& handle) {
    place.store(uint64_t{handle.block} << 32 | handle.ticket, std::memory_order_relaxed);
    generation.store(handle.generation, std::memory_order_relaxed);
    nonce.store(handle.nonce, std::memory_order_relaxed);
  }
  Handle get(uint64_t pool_id) const {
    const uint64_t at = place.load(std::memory_order_relaxed);
    return {pool_id, generation.load(std::memory_order_relaxed), static_cast<uint32_t>(at >> 32),
            static_cast<uint32_t>(at), nonce.load(std::memory_order_relaxed)};
  }
};

class Crowd {
 public:
  explicit Crowd(uint64_t seed) : seed_(seed) {}

  void run(uint64_t steps) {
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i)
      threads.emplace_back([this, i, steps] { work(seed_ * 1000 + static_cast<uint64_t>(i), steps); });
    for (std::thread& thread : threads) thread.join();
  }

  Member& first() { return *first_; }
  uint64_t deaths() const { return deaths_.load(); }
  uint64_t received() const { return received_.load(); }
  uint64_t wrong() const { return wrong_.load(); }

 private:
  struct Held {
    pool::Member::View view;
    Mode mode;
  };

  void fill(const Member::View& view, uint64_t seed) {
    for (uint64_t at = 0; at + 8 <= view.length; at += kStride) {
      const uint64_t word = seed ^ at;
      std::memcpy(view.data + at, &word, 8);
    }
  }
  void look(const Member::View& view) {
    uint64_t seed = 0;
    std::memcpy(&seed, view.data, 8);
    for (uint64_t at = 0; at + 8 <= view.length; at += kStride) {
      uint64_t word = 0;
      std::memcpy(&word, view.data + at, 8);
      if (word != (seed ^ at)) {
        wrong_.fetch_add(1);
        return;
      }
    }
  }

  // What the kernel does for a process: after all it has written, its lock goes. The pid would be this living process's.
  void bury() {
    pool::Arena& arena = first_->arena();
    for (uint32_t slot = 0; slot < arena.slots_used(); ++slot) {
      if ((arena.lease(slot).word.load() & 0xff) == pool::kLeaseLive &&
          !os::locked_by_other(arena.control_fd(), slot) && slot != first_->membership().slot())
        arena.lease(slot).pid.store(0);
    }
  }

  void work(uint64_t seed, uint64_t steps) {
    std::mt19937_64 random(seed);
    std::unique_ptr<Member> self;
    std::vector<Held> held;
    for (uint64_t i = 0; i < steps; ++i) {
      try {
        if (random() % 64 == 0) failpoint::die_after(1 + random() % 60);
        if (!self) {
          auto joined = Member::beside(*first_);
          if (!joined) continue;
          self = joined.take();
        }
        step(*self, held, random);
      } catch (const failpoint::Died&) {
        if (self) {
          TORCHSHM_TSAN_RELEASE(&first_->arena().lease(self->membership().slot()));  // "after all it has written"
          self.reset();
        }
        held.clear();
        bury();
        deaths_.fetch_add(1);
      }
    }
    failpoint::die_after(0);
    if (!self) return;
    for (const Held& h : held) self->release(h.view.block, h.mode);
    self.reset();
    bury();
  }

  void step(Member& self, std::vector<Held>& held, std::mt19937_64& random) {
    Letter& letter = letters_[random() % letters_.size()];
    switch (random() % 16) {
      case 0:
      case 1:
      case 2:
      case 3: {
        if (held.size() > 12) break;
        auto view = self.allocate((uint64_t{256} << (random() % 13)) + random() % 4096, random() % 4 == 0);
        if (!view) break;  // full is allowed
        fill(*view, random());
        held.push_back({*view, Mode::kReadWrite});
        break;
      }
      case 4:
      case 5:
      case 6: {
        if (held.empty()) break;
        auto handle = self.issue(held[random() % held.size()].view.block);
        if (handle) letter.put(*handle);
        break;
      }
      case 7:
      case 8:
      case 9: {
        if (held.size() > 12) break;
        const Mode mode = random() % 2 == 0 ? Mode::kReadWrite : Mode::kRead;
        auto view = self.redeem(letter.get(first_->pool_id()), mode, random() % 2 == 0);
        if (!view) break;  // gone, or torn
        received_.fetch_add(1, std::memory_order_relaxed);
        look(*view);
        held.push_back({*view, mode});
        break;
      }
      case 10:
      case 11:
      case 12:
      case 13: {
        if (held.empty()) break;
        const size_t i = random() % held.size();
        const Held h = held[i];
        look(h.view);
        held[i] = held.back();
        held.pop_back();
        self.release(h.view.block, h.mode);
        break;
      }
      case 14:
        if (random() % 8 == 0) (void)self.trim(random() % 2 == 0 ? 0 : uint64_t{4} << 20);
        if (random() % 16 == 0) first_->set_ticket_age(random() % 2 == 0 ? 0 : 300);
        break;
      default:
        (void)self.reap();
        if (!held.empty()) (void)self.find(held.back().view.data);
        break;
    }
  }

  uint64_t seed_;
  std::unique_ptr<Member> first_ = tests::fresh_pool(uint64_t{24} << 20);
  std::array<Letter, 32> letters_;
  std::atomic<uint64_t> deaths_{0}, received_{0}, wrong_{0};
};

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

TEST(Threads, MembersOverOneMappingRaceForEverythingAndDamageNothing) {
  Crowd crowd(from_environment("TORCHSHM_SOAK_SEED", 1));
  crowd.run(from_environment("TORCHSHM_THREAD_STEPS", 4000));
  EXPECT_EQ(crowd.wrong(), 0U);
  EXPECT_GT(crowd.deaths(), 0U);
  EXPECT_GT(crowd.received(), 0U);
  Member& first = crowd.first();
  while (first.reap() > 0) {
  }
  EXPECT_EQ(first.stats().leases.size(), 1U);
  first.set_ticket_age(0);
  auto all = first.allocate(uint64_t{22} << 20, false);  // takes every ticket back that is in the way
  EXPECT_TRUE(all.ok()) << all.status().what();
  if (all) first.release(all->block, Mode::kReadWrite);
  const auto stats = first.stats();
  EXPECT_LE(stats.blocks, stats.tickets);
  std::printf("%lu deaths, %lu received, %lu reaped, %lu tickets taken back\n", crowd.deaths(), crowd.received(),
              stats.reaped, stats.taken_back);
}

}  // namespace
}  // namespace torchshm

#endif
