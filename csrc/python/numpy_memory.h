// NumPy's allocation handler (NEP 49) that puts array data in the pool: what torchshm.pooled() switches on.
//
// NumPy keeps the current handler in a context variable: new threads do not have it, asyncio tasks made inside the block do.
// Zero-filled memory comes from the ordinary allocator: NumPy asks for it when it makes object arrays, and those must not be shared.
// When the pool is full, arrays land in ordinary memory, and travel as they would have.
#pragma once

#include "pool/member.h"
#include "python/numpy_api.h"

namespace torchshm::python {

// Switches to the process's pool, or to a given one; returns the handler before, a new reference.
PyObject* enter_pooled(PyObject* module, PyObject*);
PyObject* allocate_in(pool::Member* pool);
// Switches back to the given handler.
PyObject* leave_pooled(PyObject* module, PyObject* handler);

}  // namespace torchshm::python
