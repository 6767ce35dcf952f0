// torchshm._C.Store: a store's pool and catalogue, and the service when this process runs it. torchshm/_store.py builds on it.
//
// Private: the object; everything shared is behind the catalogue. One array is saved and loaded here without Python in between; of other values
// this knows a text, which _store.py writes and reads, and the blocks it speaks of.
// When this process dies: see store/catalogue.h. A forked child has the object as well, without the service.
#pragma once

#include <pybind11/pybind11.h>

namespace torchshm::python {

void add_store(pybind11::module_& module);

}  // namespace torchshm::python
