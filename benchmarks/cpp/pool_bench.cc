// Allocation + release of a warm block: nanoseconds, one thread; and operations per core when eight processes do it at once.
#include <benchmark/benchmark.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>

#include "os/memfd.h"
#include "pool/member.h"

namespace {

using torchshm::pool::Limits;
using torchshm::pool::Member;
using torchshm::pool::Mode;

std::unique_ptr<Member> fresh() {
  Limits limits;
  limits.limit = uint64_t{1} << 30;
  return Member::create(1, limits).take();
}

void BM_AllocRelease(benchmark::State& state) {
  static Member* member = fresh().release();
  const auto bytes = static_cast<uint64_t>(state.range(0));
  for (auto _ : state) {
    auto block = member->allocate(bytes, false);
    benchmark::DoNotOptimize(block->data);
    member->release(block->block, Mode::kReadWrite);
  }
}
BENCHMARK(BM_AllocRelease)->Arg(4096)->Arg(65536)->Arg(262144)->Arg(1 << 20)->Arg(4 << 20);

// What the same costs in private memory.
void BM_MallocFree(benchmark::State& state) {
  for (auto _ : state) {
    void* p = std::malloc(static_cast<size_t>(state.range(0)));
    benchmark::DoNotOptimize(p);
    std::free(p);
  }
}
BENCHMARK(BM_MallocFree)->Arg(4096)->Arg(65536)->Arg(262144)->Arg(1 << 20)->Arg(4 << 20);

void BM_IssueRedeem(benchmark::State& state) {
  static Member* member = fresh().release();
  auto block = member->allocate(65536, false);
  for (auto _ : state) {
    auto handle = member->issue(block->block);
    auto view = member->redeem(*handle, Mode::kReadWrite);
    member->release(view->block, Mode::kReadWrite);
  }
}
BENCHMARK(BM_IssueRedeem);

// Processes allocate for a fixed time; reported: operations per second of CPU, all together. Against one process it shows what they
// cost each other, whatever the number of cores.
void BM_AllocReleaseProcesses(benchmark::State& state) {
  const auto processes = static_cast<int>(state.range(0));
  auto* shared = static_cast<std::atomic<uint64_t>*>(
      ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  static Member* member = fresh().release();
  double operations = 0, seconds = 0;
  for (auto _ : state) {
    shared[0] = 0;
    shared[1] = 0;
    for (int i = 0; i < processes; ++i) {
      if (::fork() == 0) {
        auto self = Member::attach(torchshm::os::duplicate(member->arena().data_fd()).take(),
                                   torchshm::os::duplicate(member->arena().control_fd()).take())
                        .take();
        uint64_t done = 0;
        timespec begin{}, now{};
        ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
        const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(400);
        while (std::chrono::steady_clock::now() < end) {
          for (int k = 0; k < 1000; ++k, ++done) {
            auto block = self->allocate(65536, false);
            benchmark::DoNotOptimize(block->data);
            self->release(block->block, Mode::kReadWrite);
          }
        }
        ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
        shared[0] += done;
        shared[1] += static_cast<uint64_t>((now.tv_sec - begin.tv_sec) * 1000000000 + now.tv_nsec - begin.tv_nsec);
        ::_exit(0);
      }
    }
    while (::wait(nullptr) > 0) {
    }
    operations += static_cast<double>(shared[0].load());
    seconds += static_cast<double>(shared[1].load()) / 1e9;
  }
  state.counters["operations_per_cpu_second"] = operations / seconds;
  state.counters["ns_per_operation"] = 1e9 * seconds / operations;
  state.SetItemsProcessed(static_cast<int64_t>(operations));
  ::munmap(shared, 4096);
}
BENCHMARK(BM_AllocReleaseProcesses)->Arg(1)->Arg(8)->Iterations(3)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
