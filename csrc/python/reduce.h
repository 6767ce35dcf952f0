// How an exact numpy.ndarray (or matrix, or recarray) is pickled: by handle when it lies in the pool, by one copy into the pool when it is
// large enough, and else as NumPy always did.
#pragma once

#include "pool/array_wire.h"
#include "pool/member.h"
#include "python/numpy_api.h"

namespace torchshm::python {

using pool::ArrayWire;

// Copying below this is quicker than giving the GIL away and getting it back; above, the program may change the array meanwhile.
constexpr npy_intp kCopyUnderGil = npy_intp{2} << 20;

// METH_O. A message never fails because of this: whatever the pool can't do, NumPy's own pickling does.
PyObject* reduce_ndarray(PyObject* module, PyObject* array);

// Counts what the pool could not carry, and warns once in the whole family.
void fall_back(pool::Member& member, const Status& status);

// For a name: the wire of an array that lies in that pool, by reference or by copy; its handle has a ticket. kNot for what a wire alone can't
// describe, kFailed with `status` set, kRaised with an exception set.
enum class Put { kDone, kNot, kFailed, kRaised };
Put put_array(PyArrayObject* array, pool::Member* member, ArrayWire& wire, Status& status);

}  // namespace torchshm::python
