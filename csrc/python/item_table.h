// The hash table of a SharedDict, whose items are those of an ItemList with keys: keys to numbers of items.
//
// Shared: the table, once it is filled (item_record.h); it is never changed then. Private: nothing.
// Thread safety: with the GIL.
#pragma once

#include "python/items.h"

namespace torchshm::python {

// Methods of ItemList; torchshm/_C.pyi has their arguments.
PyObject* tabulate_items(PyObject* self, PyObject* slots);
PyObject* find_item(PyObject* self, PyObject* arguments);
PyObject* key_of_item(PyObject* self, PyObject* number);

}  // namespace torchshm::python
