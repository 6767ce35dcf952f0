#include "base/copy.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace torchshm {
namespace {

// Arbitrary between 4 MiB, where it depends on what else is in the cache, and 8 MiB, where it is a clear gain.
constexpr size_t kStreamFrom = size_t{8} << 20;
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

using Stream = void (*)(std::byte*, const std::byte*, size_t);

Stream best() {
  static constexpr Stream all[] = {plain, stream_halves, stream_lines};
  const bool halves = __builtin_cpu_supports("avx2") != 0, lines = __builtin_cpu_supports("avx512f") != 0;
  return all[static_cast<int>(halves) + static_cast<int>(halves & lines)];
}

}  // namespace

void copy_bytes(void* to, const void* from, size_t bytes) {
  static const Stream stream_copy = best();
  if (bytes < kStreamFrom) {
    std::memcpy(to, from, bytes);
    return;
  }
  auto* target = static_cast<std::byte*>(to);
  const auto* source = static_cast<const std::byte*>(from);
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
  std::memcpy(target, source, head);
  const size_t lines = (bytes - head) / kLine;
  stream_copy(target + head, source + head, lines);
  const size_t done = head + lines * kLine;
  std::memcpy(target + done, source + done, bytes - done);
}

}  // namespace torchshm
