// ItemList and ItemSink of torchshm._C: what is hot of torchshm.data.SharedList, whose other half is torchshm/data/_list.py.
//
// Private to the process: these objects. Shared: the bytes that they read and write (item_record.h), which the arrays given to them hold.
// A reader that dies leaves nothing; a writer that dies takes a list with it that nobody else knew of.
// Thread safety: with the GIL. Any number of threads may read while one appends; a second that appends gets an error.
#pragma once

#include "python/numpy_api.h"

namespace torchshm::python {

int add_item_list_types(PyObject* module);

}  // namespace torchshm::python
