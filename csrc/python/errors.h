// A Status as a Python exception: the one place where the core's errors become torchshm.errors' classes.
#pragma once

#include "base/status.h"
#include "python/numpy_api.h"

namespace torchshm::python {

// Sets the exception. Always returns nullptr, so that callers can return it.
PyObject* raise(const Status& status);
// Sets torchshm.errors.<name>(message).
PyObject* raise_named(const char* name, const std::string& message);

}  // namespace torchshm::python
