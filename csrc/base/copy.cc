#include "base/copy.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace torchshm {
namespace {

// Arbitrary between 4 MiB, where it depends on what else is in the cache, and 8 MiB, where it is a clear gain.
constexpr size_t kStreamFrom = size_t{8} << 20;
constexpr size_t kStreamPart = size_t{64} << 10;  // parts of that much that are smaller are not worth the fence
constexpr size_t kLine = 64;

__attribute__((target("avx2"))) void stream_halves(std::byte* to, const std::byte* from, size_t lines) {
  for (size_t i = 0; i < lines; ++i, to += kLine, from += kLine) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
  }
  _mm_sfence();  // before the handle that makes the bytes visible
}

// Whole lines at once: 3 to 8 % quicker than halves at 64 MiB (Zen 5).
__attribute__((target("avx512f"))) void stream_lines(std::byte* to, const std::byte* from, size_t lines) {
  for (size_t i = 0; i < lines; ++i, to += kLine, from += kLine)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  _mm_sfence();
}

void plain(std::byte* to, const std::byte* from, size_t lines) { std::memcpy(to, from, lines * kLine); }

constexpr void (*kAll[])(std::byte*, const std::byte*, size_t) = {plain, stream_halves, stream_lines};

int best() {
  __builtin_cpu_init();
  const bool halves = __builtin_cpu_supports("avx2") != 0, lines = __builtin_cpu_supports("avx512f") != 0;
  return static_cast<int>(halves) + static_cast<int>(halves & lines);
}

const int kBest = best();

}  // namespace

int best_copy() { return kBest; }

void copy_bytes_by(int way, void* to, const void* from, size_t bytes) {
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
  std::memcpy(target, source, head);
  const size_t lines = (bytes - head) / kLine;
  kAll[way](target + head, source + head, lines);
  const size_t done = head + lines * kLine;
  std::memcpy(target + done, source + done, bytes - done);
}

void copy_bytes(void* to, const void* from, size_t bytes, size_t of) {
  if (std::max(bytes, of) < kStreamFrom || bytes < kStreamPart) {
    std::memcpy(to, from, bytes);
  } else {
    copy_bytes_by(kBest, to, from, bytes);
  }
}

}  // namespace torchshm
