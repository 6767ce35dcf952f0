// A store's advisory lock as an object of torchshm._C; its other half is torchshm/_locks.py.
//
// Private to the process; what is shared is in store/lock.h. Thread safety: with the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string_view>

#include "store/lock.h"

namespace torchshm::python {

// REQUIRES: before a Store's method that gives one.
void add_lock(pybind11::module_& m);
std::unique_ptr<store::Lock> make_lock(std::shared_ptr<store::Catalogue> catalogue, std::string_view key);

}  // namespace torchshm::python
