// Python.h and NumPy's C API, included the same way everywhere in this room. module.cc loads the API table.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL torchshm_numpy_api
#ifndef TORCHSHM_LOADS_NUMPY_API
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>
