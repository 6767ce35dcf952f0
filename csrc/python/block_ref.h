// The Python object behind every array that lies in the pool: it keeps a block held, and lets it go when it is collected.
//
// Survives everything: the member it points to is never destroyed before the process ends, so collecting one late in interpreter shutdown,
// or in another thread, is safe.
#pragma once

#include <optional>

#include "pool/members.h"
#include "python/numpy_api.h"

namespace torchshm::python {

// Takes over one hold of the view's block. New reference, or null with an exception set (the hold is released then).
PyObject* make_block_ref(pool::Member* member, const pool::Member::View& view, pool::Mode mode);
int add_block_ref_type(PyObject* module);
// The block that a reference keeps held in that member's pool; nothing for any other object.
std::optional<uint32_t> block_of(PyObject* ref, const pool::Member* member);

}  // namespace torchshm::python
