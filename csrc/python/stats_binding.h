// A pool's figures for Python.
//
// With the GIL. When the process dies here: nothing is shared.
#pragma once

#include <pybind11/pybind11.h>

#include "pool/stats.h"

namespace torchshm::python {

// [{pid, name, held_blocks, held_bytes, allocations, fallbacks, grown_bytes}], one for each lease.
pybind11::list describe_processes(const pool::Stats& stats);
// What torchshm.stats() returns.
pybind11::dict describe(const pool::Stats& stats);

}  // namespace torchshm::python
