// NumPy's allocation handler (NEP 49) that puts array data in the pool: what torchshm.pooled() switches on.
//
// NumPy keeps the current handler in a context variable: new threads do not have it, asyncio tasks made inside the block do.
// Zero-filled memory comes from the ordinary allocator: NumPy asks for it when it makes object arrays, and those must not be shared.
// When the pool is full, arrays land in ordinary memory, and travel as they would have.
#pragma once

#include "pool/member.h"
#include "python/numpy_api.h"

namespace torchshm::python {

// Memory of a pool, held once for writing; null where it has none, or where there is no pool. pool: a pool::Member; null: the process's own.
// Neither needs the GIL.
void* take_block(void* pool, uint64_t bytes);
// One object less that looks at the block of an address. False where it lies in no pool.
bool give_block_back(void* data);

// Switches to the process's pool, or to a given one; returns the handler before, a new reference.
PyObject* enter_pooled(PyObject* module, PyObject*);
PyObject* allocate_in(pool::Member* pool);
// Switches back to the given handler.
PyObject* leave_pooled(PyObject* module, PyObject* handler);

}  // namespace torchshm::python
