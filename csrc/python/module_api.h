// The functions of pool/module_api.h, in a capsule for the modules beside this one.
#pragma once

#include "pool/module_api.h"
#include "python/numpy_api.h"

namespace torchshm::python {

int add_module_api(PyObject* module);

}  // namespace torchshm::python
