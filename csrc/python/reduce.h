// How an exact numpy.ndarray (or matrix, or recarray) is pickled: by handle when it lies in the pool, by one copy into the pool when it is
// large enough, and else as NumPy always did.
#pragma once

#include "python/numpy_api.h"

namespace torchshm::python {

// METH_O. A message never fails because of this: whatever the pool can't do, NumPy's own pickling does.
PyObject* reduce_ndarray(PyObject* module, PyObject* array);

}  // namespace torchshm::python
