#include "python/item_sink.h"

#include <new>

#include "python/item_record.h"

namespace torchshm::python {
namespace {

// Smaller ones stay in the pickle: an array over a buffer costs more than copying so much. Arbitrary between 0.5 and 4 KiB.
constexpr Py_ssize_t kInBandBelow = 1024;

struct ItemSink {
  PyObject_HEAD Sink sink;
};

PyObject* create(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* made = type->tp_alloc(type, 0);
  if (made != nullptr) new (&reinterpret_cast<ItemSink*>(made)->sink) Sink();
  return made;
}

void dealloc(PyObject* self) {
  reinterpret_cast<ItemSink*>(self)->sink.~Sink();
  Py_TYPE(self)->tp_free(self);
}

// Bytes are kept as they are; what else comes is memory that the pickler lends for the length of the call.
PyObject* write(PyObject* self, PyObject* piece) {
  Sink& sink = reinterpret_cast<ItemSink*>(self)->sink;
  PyObject* bytes = PyBytes_CheckExact(piece) ? Py_NewRef(piece) : PyBytes_FromObject(piece);
  if (bytes == nullptr) return nullptr;
  sink.pieces.push_back(bytes);
  sink.text_bytes += static_cast<uint64_t>(PyBytes_GET_SIZE(bytes));
  Py_RETURN_NONE;
}

// True: the pickler puts it into the text.
PyObject* keep(PyObject* self, PyObject* buffer) {
  Sink& sink = reinterpret_cast<ItemSink*>(self)->sink;
  Py_buffer view;
  if (PyObject_GetBuffer(buffer, &view, PyBUF_ANY_CONTIGUOUS) < 0) {
    PyErr_Clear();  // the pickler says what is wrong with it
    Py_RETURN_TRUE;
  }
  if (view.len < kInBandBelow || sink.buffers.size() == kMostBuffers) {
    PyBuffer_Release(&view);
    Py_RETURN_TRUE;
  }
  sink.buffers.push_back(view);
  Py_RETURN_FALSE;
}

PyMethodDef methods[] = {
    {"write", write, METH_O, "write(piece)\n--\n\nTakes a piece of the pickle."},
    {"keep", keep, METH_O, "keep(buffer)\n--\n\nTakes an out-of-band buffer, unless it is small."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject make_type() {
  PyTypeObject type{};
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "torchshm._C.ItemSink";
  type.tp_doc = "ItemSink()\n--\n\nThe file that the pickler of a list writes to.";
  type.tp_basicsize = sizeof(ItemSink);
  type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_new = create;
  type.tp_dealloc = dealloc;
  type.tp_methods = methods;
  return type;
}

PyTypeObject type = make_type();

}  // namespace

void Sink::clear() {
  for (PyObject* piece : pieces) Py_DECREF(piece);
  pieces.clear();
  text_bytes = 0;
  if (buffers.empty()) return;
  std::vector<Py_buffer> old;  // letting go may run Python, which may come back here
  old.swap(buffers);
  for (Py_buffer& view : old) PyBuffer_Release(&view);
}

Sink* sink_of(PyObject* object) {
  if (Py_TYPE(object) == &type) return &reinterpret_cast<ItemSink*>(object)->sink;
  PyErr_SetString(PyExc_TypeError, "an ItemSink is expected");
  return nullptr;
}

int add_item_sink_type(PyObject* module) {
  if (PyType_Ready(&type) < 0) return -1;
  return PyModule_AddObjectRef(module, "ItemSink", reinterpret_cast<PyObject*>(&type));
}

}  // namespace torchshm::python
