// Appending to an ItemList: pickles an item and writes its record and its entry.
//
// Private: the writer. Shared: the block that it writes to, which nobody else reads before the list is sent, but for forked children; they
// know of what was complete at the fork, and write to chunks of their own.
// Thread safety: with the GIL, which a large copy gives away; `busy` keeps others from appending meanwhile, not from reading.
#pragma once

#include "python/items.h"

namespace torchshm::python {

// Methods of ItemList; torchshm/_C.pyi has their arguments.
PyObject* start_writing(PyObject* self, PyObject* arguments);
PyObject* append_item(PyObject* self, PyObject* item);
PyObject* append_keyed_item(PyObject* self, PyObject* arguments);
PyObject* extend_items(PyObject* self, PyObject* iterable);

// Takes the writer for this thread, until its `busy` is false again; null with an exception set.
Writer* begin_writing(Items& items);
PyObject* raise_in_use();
PyObject* raise_forked();

}  // namespace torchshm::python
