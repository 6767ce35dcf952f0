// A queue between processes as an object of torchshm._C; its other half is torchshm/_queue.py.
//
// Private to the process: the object, and what a message that is being pickled has issued; what is shared is in pool/queue.h.
// Thread safety: with the GIL; waits and large copies leave it to others.
#pragma once

#include <pybind11/pybind11.h>

namespace torchshm::python {

void add_queue(pybind11::module_& m);

}  // namespace torchshm::python
