// memcpy for buffers that are larger than the caches.
//
// Large copies go past the caches with non-temporal stores: the lines of the target need not be read first, and what the processes have in
// their caches stays there. Measured against glibc's memcpy (AMD Zen 5, 32 MiB of L3 usable, paired medians): 8 MiB 0.56x, 38.5 MB 0.70x,
// 64 MiB 0.78x; at 1 MiB it would be 1.5x. glibc does the same from three quarters of what sysconf(_SC_LEVEL3_CACHE_SIZE) says, which in a
// virtual machine is the host's.
//
// Private memory or shared; a process that dies here leaves a part of the bytes written, in a block that nobody else has seen.
#pragma once

#include <cstddef>

namespace torchshm {

// REQUIRES: the ranges do not overlap.
// `of`: bytes of all that is copied in one go, of which this is a part: the columns of a table leave the caches as one large array does
// (columns of 1 MiB out of 64 MiB, two processes at once: 1.5x of memcpy's speed).
void copy_bytes(void* to, const void* from, size_t bytes, size_t of = 0);

// The ways to copy what is large: 0, memcpy; 1, with AVX2; 2, with AVX-512. This processor has those up to best_copy().
int best_copy();
// REQUIRES: bytes >= 64, way <= best_copy()
void copy_bytes_by(int way, void* to, const void* from, size_t bytes);

}  // namespace torchshm
