// Spilling and restoring a value of one block, in bytes per second of wall time, beside what plain calls reach on the same disk: the block
// in one pwrite() or pread() past the page cache, and through it with fdatasync(). Nothing of what is read is in the page cache before.
//
// TORCHSHM_BENCH_DIR says where (default /var/tmp). Disks vary: --benchmark_repetitions=9 --benchmark_enable_random_interleaving=true
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "store/spill_file.h"

namespace {

using torchshm::store::SpillDirectory;
using torchshm::store::SpillHead;

constexpr uint64_t kPool = 1;
constexpr uint64_t kFiles = 4;  // one after the other, as a store writes them

std::string place() {
  const char* named = std::getenv("TORCHSHM_BENCH_DIR");
  return (named != nullptr ? std::string(named) : std::string("/var/tmp")) + "/torchshm-bench-" +
         std::to_string(::getuid());
}

struct Block {
  explicit Block(uint64_t bytes) : bytes(bytes) {
    memory = static_cast<std::byte*>(
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
    for (uint64_t at = 0; at < bytes; at += 8) *reinterpret_cast<uint64_t*>(memory + at) = at * 0x9e3779b97f4a7c15;
  }
  ~Block() { ::munmap(memory, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  const uint64_t bytes;
  std::byte* memory;
};

struct Directory {
  std::unique_ptr<SpillDirectory> spill = SpillDirectory::make(place(), "bench", kPool, false, -1).take();
  Directory() { spill->read_past_cache(); }  // as the disk is, not memory
  ~Directory() {
    spill.reset();
    std::filesystem::remove_all(place());
  }
};

void BM_Spill(benchmark::State& state) {
  Directory directory;
  const Block block(static_cast<uint64_t>(state.range(0)));
  uint64_t id = 0;
  for (auto _ : state) {
    state.PauseTiming();
    (void)directory.spill->remove(id % kFiles);  // freeing the blocks of an older one is not what is measured
    state.ResumeTiming();
    const auto status = directory.spill->write({kPool, id++ % kFiles, "key", "text", {block.bytes}}, {block.memory});
    if (!status.ok()) state.SkipWithError(status.what().c_str());
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * state.range(0));
}

void BM_Restore(benchmark::State& state) {
  Directory directory;
  const Block block(static_cast<uint64_t>(state.range(0)));
  for (uint64_t id = 0; id < kFiles; ++id)
    (void)directory.spill->write({kPool, id, "key", "text", {block.bytes}}, {block.memory});
  uint64_t id = 0;
  for (auto _ : state) {
    auto reader = directory.spill->open(id++ % kFiles);
    if (!reader || !reader->read({block.memory}).ok()) state.SkipWithError("can't be read");
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * state.range(0));
}

int open_file(uint64_t id, int flags) {
  return ::open((place() + "/file-" + std::to_string(id % kFiles)).c_str(), flags | O_CLOEXEC, 0600);
}

void write_files(benchmark::State& state, bool direct) {
  Directory directory;
  const Block block(static_cast<uint64_t>(state.range(0)));
  uint64_t id = 0;
  for (auto _ : state) {
    state.PauseTiming();
    ::unlink((place() + "/file-" + std::to_string(id % kFiles)).c_str());
    state.ResumeTiming();
    const int fd = open_file(id++, O_CREAT | O_WRONLY | (direct ? O_DIRECT : 0));
    const bool good = ::fallocate(fd, 0, 0, state.range(0)) == 0 &&
                      ::pwrite(fd, block.memory, block.bytes, 0) == state.range(0) && (direct || ::fdatasync(fd) == 0);
    ::close(fd);
    if (!good) state.SkipWithError("can't be written");
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * state.range(0));
}

void read_files(benchmark::State& state, bool direct) {
  Directory directory;
  const Block block(static_cast<uint64_t>(state.range(0)));
  for (uint64_t id = 0; id < kFiles; ++id) {
    const int fd = open_file(id, O_CREAT | O_WRONLY | O_DIRECT);
    (void)!::fallocate(fd, 0, 0, state.range(0));
    if (::pwrite(fd, block.memory, block.bytes, 0) != state.range(0)) state.SkipWithError("can't be written");
    ::close(fd);
  }
  uint64_t id = 0;
  for (auto _ : state) {
    state.PauseTiming();
    const int fd = open_file(id++, O_RDONLY | (direct ? O_DIRECT : 0));
    (void)::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    state.ResumeTiming();
    if (::pread(fd, block.memory, block.bytes, 0) != state.range(0)) state.SkipWithError("can't be read");
    ::close(fd);
  }
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * state.range(0));
}

void BM_WriteDirect(benchmark::State& state) { write_files(state, true); }
void BM_WriteBuffered(benchmark::State& state) { write_files(state, false); }
void BM_ReadDirect(benchmark::State& state) { read_files(state, true); }
void BM_ReadBuffered(benchmark::State& state) { read_files(state, false); }

void sizes(benchmark::internal::Benchmark* of) {
  for (const int64_t kib : {64, 1024, 16384, 65536}) of->Arg(kib << 10);
  of->UseRealTime();
}

BENCHMARK(BM_Spill)->Apply(sizes);
BENCHMARK(BM_WriteDirect)->Apply(sizes);
BENCHMARK(BM_WriteBuffered)->Apply(sizes);
BENCHMARK(BM_Restore)->Apply(sizes);
BENCHMARK(BM_ReadDirect)->Apply(sizes);
BENCHMARK(BM_ReadBuffered)->Apply(sizes);

}  // namespace
