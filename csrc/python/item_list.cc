#include "python/item_list.h"

#include <cstring>

#include "pool/members.h"
#include "python/block_ref.h"
#include "python/errors.h"
#include "python/item_sink.h"
#include "python/item_table.h"
#include "python/item_writer.h"
#include "python/items.h"

namespace torchshm::python {
namespace {

PyObject *loads = nullptr, *with_buffers = nullptr, *select_name = nullptr;

// ---- reading

// What stands for an out-of-band buffer: a slice of the array that keeps the block.
PyObject* buffer_at(const Chunk& chunk, const BufferExtent& extent) {
  if (chunk.arrays == nullptr) {
    return PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(chunk.data + extent.offset),
                                         static_cast<Py_ssize_t>(extent.length));
  }
  npy_intp length = static_cast<npy_intp>(extent.length);
  const int flags = PyArray_FLAGS(reinterpret_cast<PyArrayObject*>(chunk.arrays)) & NPY_ARRAY_WRITEABLE;
  PyObject* made = PyArray_NewFromDescr(&PyArray_Type, PyArray_DescrFromType(NPY_UINT8), 1, &length, nullptr,
                                        chunk.array_data + extent.offset, flags | NPY_ARRAY_C_CONTIGUOUS, nullptr);
  if (made == nullptr) return nullptr;
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(made), Py_NewRef(chunk.arrays)) < 0) Py_CLEAR(made);
  return made;
}

PyObject* buffers_of(const Place& place, Py_ssize_t index) {
  const auto n = static_cast<Py_ssize_t>(place.record.buffers);
  PyObject* buffers = PyTuple_New(n);
  for (Py_ssize_t i = 0; buffers != nullptr && i < n; ++i) {
    const BufferExtent extent = place.record.extent(static_cast<uint64_t>(i));
    if (extent.offset > place.chunk.size || extent.length > place.chunk.size - extent.offset) {
      Py_DECREF(buffers);
      return raise_damaged(index);
    }
    PyObject* buffer = buffer_at(place.chunk, extent);
    if (buffer == nullptr) {
      Py_CLEAR(buffers);
    } else {
      PyTuple_SET_ITEM(buffers, i, buffer);
    }
  }
  return buffers;
}

// The text of an item for loads(): lives as long as the call. Takes half the time of a memoryview, or of bytes of 200.
struct ItemText {
  PyObject_HEAD PyObject* chunk;
  const std::byte* data;
  uint64_t length;
};

int get_text(PyObject* self, Py_buffer* view, int flags) {
  auto* text = reinterpret_cast<ItemText*>(self);
  return PyBuffer_FillInfo(view, self, const_cast<std::byte*>(text->data), static_cast<Py_ssize_t>(text->length), 1,
                           flags);
}

void dealloc_text(PyObject* self) {
  Py_DECREF(reinterpret_cast<ItemText*>(self)->chunk);
  PyObject_Free(self);
}

PyBufferProcs text_buffer = {get_text, nullptr};

PyTypeObject make_text_type() {
  PyTypeObject type{};
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "torchshm._C.ItemText";
  type.tp_basicsize = sizeof(ItemText);
  type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_dealloc = dealloc_text;
  type.tp_as_buffer = &text_buffer;
  return type;
}

PyTypeObject text_type = make_text_type();

PyObject* load(const Items& items, Py_ssize_t index) {
  const auto place = find_place(items, index);
  if (!place) return raise_damaged(index);
  ItemText* text = PyObject_New(ItemText, &text_type);
  if (text == nullptr) return nullptr;
  text->chunk = Py_NewRef(place->chunk.text);  // another thread may seal the list meanwhile
  text->data = place->record.text;
  text->length = place->record.text_bytes;
  // The first one is vectorcall's own.
  PyObject* arguments[3] = {nullptr, reinterpret_cast<PyObject*>(text), nullptr};
  constexpr size_t kOne = 1 | PY_VECTORCALL_ARGUMENTS_OFFSET;
  PyObject* made = nullptr;
  if (place->record.buffers == 0) {
    made = PyObject_Vectorcall(loads, arguments + 1, kOne, nullptr);
  } else if ((arguments[2] = buffers_of(*place, index)) != nullptr) {
    made = PyObject_Vectorcall(loads, arguments + 1, kOne, with_buffers);
    Py_DECREF(arguments[2]);
  }
  Py_DECREF(text);
  return made;
}

PyObject* subscript(PyObject* self, PyObject* key) {
  if (PyLong_Check(key) || PyArray_IsScalar(key, Integer)) {
    const Py_ssize_t asked = PyNumber_AsSsize_t(key, PyExc_IndexError);
    if (asked == -1 && PyErr_Occurred() != nullptr) return nullptr;
    const Items& items = items_of(self);
    const Py_ssize_t index = asked < 0 ? asked + items.count : asked;
    if (index < 0 || index >= items.count) return raise_out_of_range();
    return load(items, index);
  }
  return PyObject_CallMethodOneArg(self, select_name, key);
}

Py_ssize_t length(PyObject* self) { return items_of(self).count; }

// ---- sealing

// (chunks, arrays, index, bytes used of the last chunk); the second and the last are None for a list without. Also while a thread appends:
// what is counted is complete.
PyObject* parts(PyObject* self, PyObject*) {
  const Items& items = items_of(self);
  const auto n = static_cast<Py_ssize_t>(items.chunks.size());
  const bool open = n != 0 && items.chunks[0].arrays == nullptr;
  PyObject *chunks = PyTuple_New(n), *arrays = open ? Py_NewRef(Py_None) : PyTuple_New(n);
  PyObject* made = nullptr;
  if (chunks != nullptr && arrays != nullptr) {
    for (Py_ssize_t i = 0; i < n; ++i) {
      const Chunk& chunk = items.chunks[static_cast<size_t>(i)];
      PyTuple_SET_ITEM(chunks, i, Py_NewRef(chunk.text));
      if (!open) PyTuple_SET_ITEM(arrays, i, Py_NewRef(chunk.arrays));
    }
    PyObject* index = items.index == nullptr ? Py_None : items.index;
    made = items.writer == nullptr
               ? Py_BuildValue("OOOO", chunks, arrays, index, Py_None)
               : Py_BuildValue("OOOK", chunks, arrays, index, static_cast<unsigned long long>(items.writer->used));
  }
  Py_XDECREF(chunks);
  Py_XDECREF(arrays);
  return made;
}

bool fits(PyObject* arrays, Py_ssize_t i, PyObject* text) {
  PyObject* array = PyTuple_GET_ITEM(arrays, i);
  return is_array(array, NPY_UINT8) && PyArray_SIZE(array_of(array)) == PyArray_SIZE(array_of(text));
}

// (chunks, arrays or None, index): the list is these from here on, and sealed.
PyObject* seal_as(PyObject* self, PyObject* arguments) {
  PyObject *chunks = nullptr, *arrays = nullptr, *index = nullptr;
  if (!PyArg_ParseTuple(arguments, "O!OO:_seal_as", &PyTuple_Type, &chunks, &arrays, &index)) return nullptr;
  const Py_ssize_t n = PyTuple_GET_SIZE(chunks);
  bool good =
      is_array(index, NPY_UINT64) && (arrays == Py_None || (PyTuple_Check(arrays) && PyTuple_GET_SIZE(arrays) == n));
  for (Py_ssize_t i = 0; good && i < n; ++i) {
    PyObject* chunk = PyTuple_GET_ITEM(chunks, i);
    good = is_array(chunk, NPY_UINT8) && (arrays == Py_None || fits(arrays, i, chunk));
  }
  if (!good) {
    PyErr_SetString(PyExc_TypeError, "a list is made of chunks, arrays of uint8, and an index, an array of uint64");
    return nullptr;
  }
  Items& items = items_of(self);
  if (items.writer != nullptr && items.writer->busy && items.writer->in_use()) return raise_in_use();
  Items made;
  for (Py_ssize_t i = 0; i < n; ++i) {
    made.chunks.push_back(
        chunk_over(PyTuple_GET_ITEM(chunks, i), arrays == Py_None ? nullptr : PyTuple_GET_ITEM(arrays, i)));
  }
  made.index = Py_NewRef(index);
  made.entries = static_cast<const std::byte*>(PyArray_DATA(array_of(index)));
  made.count = PyArray_SIZE(array_of(index));
  made.stride = PyArray_STRIDE(array_of(index), 0);
  items.swap(made);
  Py_RETURN_NONE;
}

// seal_with(): what `make` makes of the parts is the list from here on. Nothing can be appended meanwhile; of threads that seal at the same
// time the first one to end counts.
PyObject* seal_with(PyObject* self, PyObject* make) {
  Items& items = items_of(self);
  if (items.writer == nullptr) Py_RETURN_NONE;
  if (items.writer->forked != Writer::forks() || items.writer->sealing == 0) {
    Writer* taken = begin_writing(items);
    if (taken == nullptr) return nullptr;
    taken->busy = false;
  }
  ++items.writer->sealing;
  const uint64_t forks = Writer::forks();
  PyObject *given = parts(self, nullptr), *made = nullptr;
  if (given != nullptr) made = PyObject_CallOneArg(make, given);
  Py_XDECREF(given);
  PyObject* done = nullptr;
  if (forks != Writer::forks()) {
    if (made != nullptr) (void)raise_forked();
  } else if (items.writer == nullptr) {
    if (made != nullptr) done = Py_NewRef(Py_None);
  } else {
    --items.writer->sealing;
    if (made != nullptr) done = seal_as(self, made);
  }
  Py_XDECREF(made);
  return done;
}

PyObject* is_sealed(PyObject* self, void*) { return PyBool_FromLong(items_of(self).writer == nullptr ? 1 : 0); }

// ---- chunks in other modes

// alias(array, mode): the bytes of an array of uint8 in a pool, in another mode. No message is made, as share() does: it may be called while
// something is pickled.
PyObject* alias(PyObject*, PyObject* arguments) {
  PyObject* object = nullptr;
  int mode = 0;
  if (!PyArg_ParseTuple(arguments, "Oi:alias", &object, &mode)) return nullptr;
  if (!is_array(object, NPY_UINT8) || mode < 0 || mode > static_cast<int>(pool::Mode::kCopyOnWrite)) {
    PyErr_SetString(PyExc_TypeError, "alias() takes an array of uint8 and a mode");
    return nullptr;
  }
  PyArrayObject* array = array_of(object);
  npy_intp length = PyArray_SIZE(array);
  pool::Member* owner = pool::find_address(PyArray_DATA(array));
  const auto found = owner == nullptr ? std::nullopt : owner->find(PyArray_DATA(array));
  if (!found || static_cast<uint64_t>(length) > found->length - found->offset) {
    PyErr_SetString(PyExc_ValueError, "the array does not lie in a pool");
    return nullptr;
  }
  const auto wanted = static_cast<pool::Mode>(mode);
  auto view = owner->view(found->block, wanted);
  if (!view) return raise(view.status());
  PyObject* base = make_block_ref(owner, *view, wanted);
  if (base == nullptr) return nullptr;
  const int flags = NPY_ARRAY_C_CONTIGUOUS | (wanted == pool::Mode::kRead ? 0 : NPY_ARRAY_WRITEABLE);
  PyObject* made = PyArray_NewFromDescr(&PyArray_Type, PyArray_DescrFromType(NPY_UINT8), 1, &length, nullptr,
                                        view->data + found->offset, flags, nullptr);
  if (made == nullptr) {
    Py_DECREF(base);
    return nullptr;
  }
  // Steals base, also when it fails.
  if (PyArray_SetBaseObject(array_of(made), base) < 0) Py_CLEAR(made);
  return made;
}

PyMethodDef functions[] = {
    {"alias", alias, METH_VARARGS, "alias(array, mode)\n--\n\nThe bytes of an array in a pool, in another mode."},
    {nullptr, nullptr, 0, nullptr},
};

// ---- the type

PyObject* create(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* made = type->tp_alloc(type, 0);
  if (made != nullptr) reinterpret_cast<ItemList*>(made)->items = new Items();
  return made;
}

void dealloc(PyObject* self) {
  delete reinterpret_cast<ItemList*>(self)->items;
  Py_TYPE(self)->tp_free(self);
}

PyMethodDef methods[] = {
    {"append", append_item, METH_O, "append(item)\n--\n\nPickle an item at the end of the list."},
    {"_append_keyed", append_keyed_item, METH_VARARGS, "_append_keyed(key, item)\n--\n\n"},
    {"_extend", extend_items, METH_O, "_extend(iterable)\n--\n\n"},
    {"_start", start_writing, METH_VARARGS, "_start(make_pickler, grow)\n--\n\n"},
    {"_parts", parts, METH_NOARGS, "_parts()\n--\n\n"},
    {"_seal_as", seal_as, METH_VARARGS, "_seal_as(chunks, arrays, index)\n--\n\n"},
    {"_seal_with", seal_with, METH_O, "_seal_with(make)\n--\n\n"},
    {"_tabulate", tabulate_items, METH_O, "_tabulate(slots)\n--\n\n"},
    {"_find", find_item, METH_VARARGS, "_find(slots, key)\n--\n\n"},
    {"_key", key_of_item, METH_O, "_key(number)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef properties[] = {
    {"sealed", is_sealed, nullptr, "Whether nothing can be appended any more.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMappingMethods mapping = {length, subscript, nullptr};
PySequenceMethods sequence = {length, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

PyTypeObject make_type() {
  PyTypeObject type{};
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "torchshm._C.ItemList";
  type.tp_doc = "Pickled items in blocks of the pool. torchshm.data.SharedList is made of it.";
  type.tp_basicsize = sizeof(ItemList);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE;
  type.tp_new = create;
  type.tp_dealloc = dealloc;
  type.tp_methods = methods;
  type.tp_getset = properties;
  type.tp_as_mapping = &mapping;
  type.tp_as_sequence = &sequence;
  return type;
}

PyTypeObject type = make_type();

}  // namespace

bool is_array(PyObject* object, int type_num) {
  if (!PyArray_Check(object)) return false;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  return PyArray_NDIM(array) == 1 && PyArray_DESCR(array)->type_num == type_num && PyArray_ISNOTSWAPPED(array) &&
         (type_num != NPY_UINT8 || PyArray_IS_C_CONTIGUOUS(array));
}

Chunk chunk_over(PyObject* text, PyObject* arrays) {
  Chunk chunk;
  chunk.text = Py_NewRef(text);
  chunk.arrays = Py_XNewRef(arrays);
  chunk.data = static_cast<const std::byte*>(PyArray_DATA(array_of(text)));
  chunk.array_data = arrays == nullptr ? nullptr : static_cast<std::byte*>(PyArray_DATA(array_of(arrays)));
  chunk.size = static_cast<uint64_t>(PyArray_SIZE(array_of(text)));
  return chunk;
}

std::optional<Place> find_place(const Items& items, Py_ssize_t i) {
  uint64_t entry = 0;
  std::memcpy(&entry, items.entries + i * items.stride, sizeof entry);
  const uint64_t chunk = entry >> kOffsetBits;
  if (chunk >= items.chunks.size()) return std::nullopt;
  const Chunk& found = items.chunks[chunk];
  const auto record = record_at(found.data, found.size, entry & (kMostChunk - 1));
  if (!record) return std::nullopt;
  return Place{found, *record};
}

PyObject* raise_damaged(Py_ssize_t index) {
  return raise_named("TorchshmError", "item " + std::to_string(index) +
                                          " of this list can't be read: somebody has written to its memory");
}

PyObject* raise_out_of_range() {
  PyErr_SetString(PyExc_IndexError, "SharedList index out of range");
  return nullptr;
}

int add_item_list_types(PyObject* module) {
  PyObject* pickle = PyImport_ImportModule("pickle");
  if (pickle == nullptr) return -1;
  loads = PyObject_GetAttrString(pickle, "loads");
  Py_DECREF(pickle);
  with_buffers = Py_BuildValue("(s)", "buffers");
  select_name = PyUnicode_InternFromString("_select");
  if (loads == nullptr || with_buffers == nullptr || select_name == nullptr) return -1;
  if (Writer::count_forks() < 0 || PyModule_AddFunctions(module, functions) < 0 || add_item_sink_type(module) < 0 ||
      PyType_Ready(&text_type) < 0 || PyType_Ready(&type) < 0)
    return -1;
  return PyModule_AddObjectRef(module, "ItemList", reinterpret_cast<PyObject*>(&type));
}

}  // namespace torchshm::python
