// A Status as a Python exception: the one place where the core's errors become torchshm.errors' classes.
#pragma once

#include <string>

#include "base/status.h"
#include "python/numpy_api.h"

namespace torchshm::python {

// Sets the exception. Always returns nullptr, so that callers can return it.
PyObject* raise(const Status& status);
// Sets torchshm.errors.<name>(message).
PyObject* raise_named(const char* name, const std::string& message);

// For what pybind11 calls: the exception set, and thrown.
[[noreturn]] void fail(const Status& status);
// The same where no handle is spoken of: what is invalid there is a ValueError.
[[noreturn]] void fail_in_store(const Status& status);
// There is a name, and no store to be had under it.
[[noreturn]] void fail_unavailable(const Status& status);

// Names of processes are bytes, and in a damaged file anything. Null with an exception set when there is no memory.
PyObject* lenient_text(const std::string& text);

}  // namespace torchshm::python
