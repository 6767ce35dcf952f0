// What a pickler gives of one object: its text, in pieces, and its out-of-band buffers.
//
// Private to the process; with the GIL. The pickler has it as its file and, by keep(), as its buffer_callback.
#pragma once

#include <vector>

#include "python/numpy_api.h"

namespace torchshm::python {

struct Sink {
  std::vector<PyObject*> pieces;   // bytes
  std::vector<Py_buffer> buffers;  // contiguous, 1 KiB or more each
  uint64_t text_bytes = 0;

  void clear();
  ~Sink() { clear(); }
};

// The sink of an ItemSink; null with an exception set for any other object.
Sink* sink_of(PyObject* object);
int add_item_sink_type(PyObject* module);

}  // namespace torchshm::python
