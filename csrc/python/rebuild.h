// The other end of reduce.h: torchshm._C.array(wire[, dtype[, subtype]]) makes the ndarray that a wire describes, over the block itself.
#pragma once

#include "python/numpy_api.h"

namespace torchshm::python {

// A type and not a function, since pickle writes types by name at once and asks a builtin function for its __reduce_ex__ first. Calling it
// gives a numpy.ndarray.
PyObject* array_type();
int add_array_type(PyObject* module);

// torchshm.empty(shape, dtype): METH_VARARGS.
PyObject* empty(PyObject* module, PyObject* arguments);

}  // namespace torchshm::python
