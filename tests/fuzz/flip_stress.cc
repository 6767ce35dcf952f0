// Words of the control file change while members work with them: what was checked must be what is used (time of check, time of use).
//
// usage: flip_stress SECONDS SEED. Rounds in child processes, each with a busy pool (sandbox.h), two members at work and a thread that
// changes words of the file, most of them for a moment only. A round that crashes or does not end within a minute of processor time is a
// finding. Prints the counts as JSON.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cinttypes>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "input.h"
#include "no_sleep.h"
#include "sandbox.h"

namespace torchshm::fuzz {
namespace {

using pool::Handle;
using pool::Member;
using pool::Mode;
using Clock = std::chrono::steady_clock;

struct Counts {
  std::atomic<uint64_t> flips{0}, operations{0};
};

void touch(const std::byte* at, uint64_t length) {
  unsigned sum = 0;
  for (uint64_t i = 0; i < length; i += 4096) sum += static_cast<unsigned>(at[i]);
  static std::atomic<unsigned> seen{0};
  seen.fetch_add(sum + static_cast<unsigned>(at[length - 1]), std::memory_order_relaxed);
}

void work(const Sandbox& box, uint64_t seed, const std::atomic<bool>& ended, Counts& counts) {
  std::mt19937_64 random(seed);
  struct Held {
    Member::View view;
    Mode mode;
  };
  std::vector<Held> held;
  std::vector<Handle> handles = box.handles();
  std::unique_ptr<Member> member;
  while (!ended.load(std::memory_order_relaxed)) {
    counts.operations.fetch_add(1, std::memory_order_relaxed);
    if (!member) {
      auto attached = box.attach();
      if (!attached) continue;
      member = attached.take();
    }
    const auto mode = static_cast<Mode>(random() % 3);
    switch (random() % 16) {
      case 0:
      case 1:
      case 2: {
        static constexpr uint64_t kSizes[] = {1, 4096, 5000, 16384, 100000, 524288, 1 << 20, 3 << 20};
        const uint64_t bytes = kSizes[random() % std::size(kSizes)];
        auto view = member->allocate(bytes, random() % 2 == 0);
        if (!view) break;
        std::memset(view->data, 7, bytes);
        held.push_back({*view, Mode::kReadWrite});
        break;
      }
      case 3:
      case 4:
      case 5: {
        auto view = member->redeem(handles[random() % handles.size()], mode, random() % 2 == 0);
        if (!view) break;
        touch(view->data, view->length);
        held.push_back({*view, mode});
        break;
      }
      case 6:
      case 7: {
        if (held.empty()) break;
        auto view = member->view(held[random() % held.size()].view.block, mode);
        if (!view) break;
        touch(view->data, view->length);
        if (mode == Mode::kCopyOnWrite) view->data[0] = std::byte{1};
        held.push_back({*view, mode});
        break;
      }
      case 8: {
        if (held.empty()) break;
        auto handle = member->issue(held[random() % held.size()].view.block);
        if (handle) handles[random() % handles.size()] = *handle;
        break;
      }
      case 9: {
        const std::byte* address = member->arena().address(mode, random() % Sandbox::kData);
        if (const auto found = address == nullptr ? std::nullopt : member->find(address))
          touch(address - found->offset, found->length);
        break;
      }
      case 10:
        (void)(random() % 4 == 0 ? member->trim(random()) : member->reap());
        break;
      case 11:
        if (random() % 8 == 0) (void)pool::summary(member->stats());
        break;
      case 12:
        if (random() % 16 != 0) break;
        member->prepare_fork();
        member->parent_after_fork();
        break;
      default: {
        if (held.empty()) break;
        Held& one = held[random() % held.size()];
        member->release(one.view.block, one.mode);
        one = held.back();
        held.pop_back();
      }
    }
  }
}

void flip(const Sandbox& box, uint64_t seed, const std::atomic<bool>& ended, Counts& counts) {
  std::mt19937_64 random(seed);
  const pool::Offsets at = pool::Offsets::of(Sandbox::kChunks);
  while (!ended.load(std::memory_order_relaxed)) {
    uint64_t offset = 0;
    switch (random() % 8) {
      case 0:
        offset = random() % 17 * 8;
        break;
      case 1:
        offset = at.leases + random() % 8 * sizeof(pool::Lease) + random() % 40 * 8;
        break;
      case 2:
      case 3:
        offset = at.chunks + random() % (Sandbox::kChunks * 2) * 8;
        break;
      case 4:
      case 5:
        offset = at.blocks + random() % (Sandbox::kChunks * 512) * sizeof(pool::Block) + random() % 3 * 8;
        if (random() % 2 == 0)
          offset =
              at.blocks + box.handles()[random() % box.handles().size()].block * sizeof(pool::Block) + random() % 3 * 8;
        break;
      case 6:
        offset = at.tickets + (random() % 8 * 1024 + random() % 16) * sizeof(pool::Ticket) + random() % 2 * 8;
        break;
      default:
        offset = at.ledgers + random() % 8 * at.ledger_stride + random() % (Sandbox::kChunks * 8) * 8;
    }
    auto* word = reinterpret_cast<std::atomic<uint64_t>*>(box.control() + offset);
    const uint64_t before = word->load(std::memory_order_relaxed);
    uint8_t bytes[10];
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    word->store(Input(bytes, sizeof bytes).value(before), std::memory_order_relaxed);
    counts.flips.fetch_add(1, std::memory_order_relaxed);
    for (uint64_t spin = random() % 4096; spin > 0; --spin) asm volatile("pause");
    // Most go back to what they were: a pool that is only garbage refuses everything.
    if (random() % 32 != 0) word->store(before, std::memory_order_relaxed);
  }
}

void round(uint64_t seed, int report) {
  const rlimit minute{60, 60};
  (void)::setrlimit(RLIMIT_CPU, &minute);
  Sandbox box;
  Counts counts;
  std::atomic<bool> ended{false};
  std::thread first([&] { work(box, seed * 3, ended, counts); });
  std::thread second([&] { work(box, seed * 3 + 1, ended, counts); });
  std::thread third([&] { flip(box, seed * 3 + 2, ended, counts); });
  for (const auto end = Clock::now() + std::chrono::milliseconds(500); Clock::now() < end;) ::usleep(20000);
  ended = true;
  first.join();
  second.join();
  third.join();
  const uint64_t numbers[2] = {counts.flips, counts.operations};
  (void)!::write(report, numbers, sizeof numbers);
  ::_exit(0);
}

}  // namespace
}  // namespace torchshm::fuzz

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SECONDS SEED\n", argv[0]);
    return 2;
  }
  const auto start = torchshm::fuzz::Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(torchshm::fuzz::Clock::now() - start).count(); };
  const double seconds = std::atof(argv[1]);
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  uint64_t rounds = 0, flips = 0, operations = 0, findings = 0;
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  do {
    const uint64_t this_seed = seed * 1000003 + rounds++;
    const pid_t pid = ::fork();
    if (pid == 0) torchshm::fuzz::round(this_seed, ends[1]);
    int status = 0;
    REQUIRE(::waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
      uint64_t numbers[2];
      REQUIRE(::read(ends[0], numbers, sizeof numbers) == sizeof numbers);
      flips += numbers[0];
      operations += numbers[1];
    } else {
      ++findings;
      std::fprintf(stderr, "round with seed %" PRIu64 ": status %d\n", this_seed, status);
    }
  } while (elapsed() < seconds && findings < 10);
  std::printf("{\"rounds\": %" PRIu64 ", \"flips\": %" PRIu64 ", \"operations\": %" PRIu64 ", \"findings\": %" PRIu64
              ", \"seconds\": %.1f}\n",
              rounds, flips, operations, findings, elapsed());
  return findings == 0 ? 0 : 1;
}
