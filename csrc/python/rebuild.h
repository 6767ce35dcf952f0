// The other end of reduce.h: torchshm._C.array(wire[, dtype[, subtype]]) makes the ndarray that a wire describes, over the block itself.
#pragma once

#include "pool/array_wire.h"
#include "pool/member.h"
#include "python/numpy_api.h"

namespace torchshm::python {

using pool::ArrayWire;

// A type and not a function, since pickle writes types by name at once and asks a builtin function for its __reduce_ex__ first. Calling it
// gives a numpy.ndarray.
PyObject* array_type();
int add_array_type(PyObject* module);

// The dtype that a wire describes, or null with an exception set. New reference.
PyArray_Descr* dtype_of(const ArrayWire& wire, PyObject* apart);
// The array over its block. Steals dtype. Null with `status` set, or with an exception set and `status` ok.
PyObject* open_array(ArrayWire& wire, PyTypeObject* subtype, PyArray_Descr* dtype, pool::Member* owner, Status& status);

// torchshm.empty(shape, dtype): METH_VARARGS.
PyObject* empty(PyObject* module, PyObject* arguments);

}  // namespace torchshm::python
