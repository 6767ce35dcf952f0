// What torchshm._C tells of pools and stores that this process need not have joined: where a store's files are, and whether what must hold
// in them does.
//
// Private to the process: the mappings, for the time of a call. Nothing shared is written, so that nothing is left when this process dies
// here. Thread safety: with the GIL, which is released while the files are checked.
#pragma once

#include <pybind11/pybind11.h>

namespace torchshm::python {

void add_check(pybind11::module_& module);

}  // namespace torchshm::python
