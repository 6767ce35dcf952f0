// _C.StoreFile: reading a persistent store's file (store/store_file.h).
//
// Arrays keep what they look at mapped. When a process dies here: nothing is shared but the file's lock, which goes with it.
#pragma once

#include <pybind11/pybind11.h>

namespace torchshm::python {

void add_store_file(pybind11::module_& m);

}  // namespace torchshm::python
