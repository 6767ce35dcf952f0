#include "python/item_list.h"

#include <pthread.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "base/copy.h"
#include "python/errors.h"
#include "python/item_record.h"
#include "python/item_sink.h"

namespace torchshm::python {
namespace {

// Copying below this is quicker than giving the GIL away and getting it back.
constexpr uint64_t kCopyUnderGil = uint64_t{2} << 20;
constexpr uint64_t kFirstChunk = uint64_t{64} << 10, kLargeChunk = uint64_t{64} << 20;
constexpr uint64_t kFirstEntries = 4096;
constexpr Py_ssize_t kBetweenSignals = 1024;  // items

uint64_t forks = 0;  // of this process and its ancestors; only the child's is ever compared

PyObject *loads = nullptr, *with_buffers = nullptr, *select_name = nullptr;

struct Chunk {
  PyObject* text = nullptr;  // an array of uint8 over the block
  PyObject* arrays =
      nullptr;  // the same bytes in the mode of the items' arrays; null while the list is open: these are copies then
  const std::byte* data = nullptr;
  std::byte* array_data = nullptr;
  uint64_t size = 0;
};

// Of a list that can be appended to.
struct Writer {
  PyObject* sink_object = nullptr;
  PyObject* dump = nullptr;
  PyObject* forget = nullptr;  // the pickler's clear_memo
  PyObject* grow = nullptr;    // (least, wanted) -> two arrays over one new block, one to write and one to read
  PyObject* chunk = nullptr;   // the last chunk, to write
  std::byte* at = nullptr;
  uint64_t used = 0, capacity = 0, total = 0;  // bytes; total is that of all chunks
  PyObject* index = nullptr;                   // to write
  uint64_t* entries = nullptr;
  uint64_t entries_capacity = 0;
  uint64_t forked = 0;  // `forks` when the last chunk was made: a child does not write where its parent does
  bool busy = false;

  ~Writer() {
    for (PyObject* object : {sink_object, dump, forget, grow, chunk, index}) Py_XDECREF(object);
  }
};

struct Items {
  std::vector<Chunk> chunks;
  PyObject* index = nullptr;  // an array of uint64, to read
  const std::byte* entries = nullptr;
  Py_ssize_t stride = 0;  // bytes
  Py_ssize_t count = 0;
  std::unique_ptr<Writer> writer;  // null: sealed

  void clear() {
    std::vector<Chunk> old;
    old.swap(chunks);
    for (const Chunk& chunk : old) {
      Py_DECREF(chunk.text);
      Py_XDECREF(chunk.arrays);
    }
    count = 0;
    Py_CLEAR(index);
    writer.reset();
  }
  ~Items() { clear(); }
};

struct ItemList {
  PyObject_HEAD Items* items;
};

Items& items_of(PyObject* self) { return *reinterpret_cast<ItemList*>(self)->items; }

PyObject* damaged(Py_ssize_t index) {
  return raise_named("TorchshmError", "item " + std::to_string(index) +
                                          " of this list can't be read: somebody has written to its memory");
}

// ---- reading

struct Place {
  const Chunk* chunk;
  Record record;
};

std::optional<Place> find_place(const Items& items, Py_ssize_t i) {
  uint64_t entry = 0;
  std::memcpy(&entry, items.entries + i * items.stride, sizeof entry);
  const uint64_t chunk = entry >> kOffsetBits;
  if (chunk >= items.chunks.size()) return std::nullopt;
  const Chunk& found = items.chunks[chunk];
  const auto record = record_at(found.data, found.size, entry & (kMostChunk - 1));
  if (!record) return std::nullopt;
  return Place{&found, *record};
}

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
    if (extent.offset > place.chunk->size || extent.length > place.chunk->size - extent.offset) {
      Py_DECREF(buffers);
      return damaged(index);
    }
    PyObject* buffer = buffer_at(*place.chunk, extent);
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
  if (!place) return damaged(index);
  ItemText* text = PyObject_New(ItemText, &text_type);
  if (text == nullptr) return nullptr;
  text->chunk = Py_NewRef(place->chunk->text);  // another thread may seal the list meanwhile
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

PyObject* out_of_range() {
  PyErr_SetString(PyExc_IndexError, "SharedList index out of range");
  return nullptr;
}

PyObject* subscript(PyObject* self, PyObject* key) {
  if (PyLong_Check(key) || PyArray_IsScalar(key, Integer)) {
    const Py_ssize_t asked = PyNumber_AsSsize_t(key, PyExc_IndexError);
    if (asked == -1 && PyErr_Occurred() != nullptr) return nullptr;
    const Items& items = items_of(self);
    const Py_ssize_t index = asked < 0 ? asked + items.count : asked;
    if (index < 0 || index >= items.count) return out_of_range();
    return load(items, index);
  }
  return PyObject_CallMethodOneArg(self, select_name, key);
}

Py_ssize_t length(PyObject* self) { return items_of(self).count; }

// ---- appending

// The exception there is, with the number of the item: a PicklingError of what pickling raised, the same of what the pool did.
void explain(Py_ssize_t index, bool pickling) {
  if (!PyErr_ExceptionMatches(PyExc_Exception) || (pickling && PyErr_ExceptionMatches(PyExc_MemoryError))) return;
  PyObject *kind = nullptr, *cause = nullptr, *trace = nullptr;
  PyErr_Fetch(&kind, &cause, &trace);
  PyErr_NormalizeException(&kind, &cause, &trace);
  if (trace != nullptr) PyException_SetTraceback(cause, trace);
  PyObject* pickle = pickling ? PyImport_ImportModule("pickle") : nullptr;
  PyObject* error = pickle == nullptr ? Py_NewRef(kind) : PyObject_GetAttrString(pickle, "PicklingError");
  Py_XDECREF(pickle);
  if (error != nullptr) {
    PyErr_Format(error, pickling ? "item %zd can't be pickled: %S" : "item %zd: %S", index, cause);
    Py_DECREF(error);
    PyObject *new_kind = nullptr, *new_value = nullptr, *new_trace = nullptr;
    PyErr_Fetch(&new_kind, &new_value, &new_trace);
    PyErr_NormalizeException(&new_kind, &new_value, &new_trace);
    PyException_SetCause(new_value, Py_NewRef(cause));
    PyErr_Restore(new_kind, new_value, new_trace);
  }
  Py_XDECREF(kind);
  Py_XDECREF(cause);
  Py_XDECREF(trace);
}

bool is_array(PyObject* object, int type_num) {
  if (!PyArray_Check(object)) return false;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  return PyArray_NDIM(array) == 1 && PyArray_DESCR(array)->type_num == type_num && PyArray_ISNOTSWAPPED(array) &&
         (type_num != NPY_UINT8 || PyArray_IS_C_CONTIGUOUS(array));
}

PyArrayObject* array_of(PyObject* object) { return reinterpret_cast<PyArrayObject*>(object); }

// Two new references to arrays over one new block; false with an exception set.
bool call_grow(const Writer& writer, uint64_t least, uint64_t wanted, PyObject*& to_write, PyObject*& to_read) {
  PyObject* made = PyObject_CallFunction(writer.grow, "KK", static_cast<unsigned long long>(least),
                                         static_cast<unsigned long long>(wanted));
  if (made == nullptr) return false;
  if (!PyTuple_Check(made) || PyTuple_GET_SIZE(made) != 2 || !is_array(PyTuple_GET_ITEM(made, 0), NPY_UINT8) ||
      !is_array(PyTuple_GET_ITEM(made, 1), NPY_UINT8) ||
      static_cast<uint64_t>(PyArray_SIZE(array_of(PyTuple_GET_ITEM(made, 0)))) < least ||
      PyArray_SIZE(array_of(PyTuple_GET_ITEM(made, 0))) != PyArray_SIZE(array_of(PyTuple_GET_ITEM(made, 1))) ||
      !PyArray_ISWRITEABLE(array_of(PyTuple_GET_ITEM(made, 0)))) {
    Py_DECREF(made);
    PyErr_SetString(PyExc_TypeError, "grow() returns two arrays of uint8 over as many bytes as asked for");
    return false;
  }
  to_write = Py_NewRef(PyTuple_GET_ITEM(made, 0));
  to_read = Py_NewRef(PyTuple_GET_ITEM(made, 1));
  Py_DECREF(made);
  return true;
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

bool more_chunks(Items& items, Writer& writer, uint64_t need) {
  // In proportion, so that a list of any length has few chunks. Arbitrary.
  const uint64_t step = std::max(kFirstChunk, std::min(writer.total / 2, std::max(kLargeChunk, writer.total / 8)));
  PyObject *to_write = nullptr, *to_read = nullptr;
  if (!call_grow(writer, need, std::max(need, step), to_write, to_read)) return false;
  items.chunks.push_back(chunk_over(to_read, nullptr));
  Py_DECREF(to_read);
  Py_XSETREF(writer.chunk, to_write);
  writer.at = static_cast<std::byte*>(PyArray_DATA(array_of(to_write)));
  writer.capacity = std::min(items.chunks.back().size, kMostChunk);
  writer.total += writer.capacity;
  writer.used = 0;
  return true;
}

bool more_entries(Items& items, Writer& writer) {
  const uint64_t least = (static_cast<uint64_t>(items.count) + 1) * sizeof(uint64_t);
  const uint64_t wanted = std::max(kFirstEntries, 2 * static_cast<uint64_t>(items.count)) * sizeof(uint64_t);
  PyObject *to_write = nullptr, *to_read = nullptr;
  if (!call_grow(writer, least, wanted, to_write, to_read)) return false;
  auto* entries = static_cast<uint64_t*>(PyArray_DATA(array_of(to_write)));
  if (items.count != 0) std::memcpy(entries, writer.entries, static_cast<size_t>(items.count) * sizeof(uint64_t));
  writer.entries = entries;
  writer.entries_capacity = static_cast<uint64_t>(PyArray_SIZE(array_of(to_write))) / sizeof(uint64_t);
  items.entries = reinterpret_cast<const std::byte*>(entries);
  items.stride = sizeof(uint64_t);
  Py_XSETREF(writer.index, to_write);
  Py_XSETREF(items.index, to_read);
  return true;
}

void copy(std::byte* to, const void* from, uint64_t bytes) {
  if (bytes < kCopyUnderGil) {
    std::memcpy(to, from, bytes);
  } else {
    Py_BEGIN_ALLOW_THREADS;
    copy_bytes(to, from, bytes);
    Py_END_ALLOW_THREADS;
  }
}

// The record of what is in the sink, and its entry.
bool put(Items& items, Writer& writer, const Sink& sink, const Py_buffer* key) {
  const uint64_t key_bytes = key == nullptr ? 0 : static_cast<uint64_t>(key->len) + sizeof(uint32_t);
  const uint64_t text_bytes = sink.text_bytes + key_bytes;
  uint64_t need = sizeof(uint64_t) + text_bytes;
  if (!sink.buffers.empty()) need = aligned(need, kRecordAlignment) + sink.buffers.size() * sizeof(BufferExtent);
  // Where the buffers begin depends on where the record does: at most so much is lost by it.
  for (const Py_buffer& buffer : sink.buffers)
    need = aligned(need, kBufferAlignment) + static_cast<uint64_t>(buffer.len);
  if (!sink.buffers.empty()) need += kBufferAlignment;
  if (need >= kMostChunk) {
    PyErr_SetString(PyExc_OverflowError, "it has more than a TiB");
    return false;
  }
  if (writer.forked != forks) {
    writer.used = writer.capacity;  // the parent goes on in that chunk and that index
    writer.entries_capacity = 0;
    writer.forked = forks;
  }
  const uint64_t begin = aligned(writer.used, kRecordAlignment);
  const bool fits = begin <= writer.capacity && need <= writer.capacity - begin;
  if (!fits && !more_chunks(items, writer, need)) return false;
  if (static_cast<uint64_t>(items.count) >= writer.entries_capacity && !more_entries(items, writer)) return false;

  const uint64_t offset = fits ? begin : 0;
  uint64_t at = offset;
  const uint64_t header = text_bytes << kBuffersBits | sink.buffers.size();
  std::memcpy(writer.at + at, &header, sizeof header);
  at += sizeof header;
  for (PyObject* piece : sink.pieces) {
    const auto bytes = static_cast<uint64_t>(PyBytes_GET_SIZE(piece));
    copy(writer.at + at, PyBytes_AS_STRING(piece), bytes);
    at += bytes;
  }
  if (key != nullptr) {
    const auto bytes = static_cast<uint32_t>(key->len);
    std::memcpy(writer.at + at, key->buf, bytes);
    std::memcpy(writer.at + at + bytes, &bytes, sizeof bytes);
    at += key_bytes;
  }
  if (!sink.buffers.empty()) {
    uint64_t extents = aligned(at, kRecordAlignment);
    at = extents + sink.buffers.size() * sizeof(BufferExtent);
    for (const Py_buffer& buffer : sink.buffers) {
      const BufferExtent extent{aligned(at, kBufferAlignment), static_cast<uint64_t>(buffer.len)};
      std::memcpy(writer.at + extents, &extent, sizeof extent);
      extents += sizeof extent;
      copy(writer.at + extent.offset, buffer.buf, extent.length);
      at = extent.offset + extent.length;
    }
  }
  writer.used = at;
  writer.entries[items.count] = (items.chunks.size() - 1) << kOffsetBits | offset;
  ++items.count;
  return true;
}

// Takes the writer for one thread; null with an exception set.
Writer* begin(Items& items) {
  Writer* writer = items.writer.get();
  if (writer == nullptr) {
    PyErr_SetString(PyExc_ValueError,
                    "this list is sealed: seal() was called, it was sent to another process, or it is a part of "
                    "another list; make a new one for more items");
    return nullptr;
  }
  if (writer->busy && writer->forked == forks) {
    PyErr_SetString(PyExc_RuntimeError, "another thread, or a method that pickles an item, appends to this list");
    return nullptr;
  }
  writer->busy = true;
  return writer;
}

int append(Items& items, PyObject* item, const Py_buffer* key) {
  Writer* writer = begin(items);
  if (writer == nullptr) return -1;
  Sink& sink = *sink_of(writer->sink_object);
  sink.clear();
  PyObject* done = PyObject_CallOneArg(writer->dump, item);
  bool stands = done != nullptr;
  Py_XDECREF(done);
  if (stands) {
    stands = put(items, *writer, sink, key);
  }
  if (!stands) explain(items.count, done == nullptr);
  PyObject *kind = nullptr, *value = nullptr, *trace = nullptr;
  if (!stands) PyErr_Fetch(&kind, &value, &trace);
  PyObject* forgotten = PyObject_CallNoArgs(writer->forget);
  if (forgotten == nullptr) PyErr_Clear();
  Py_XDECREF(forgotten);
  sink.clear();
  writer->busy = false;
  if (!stands) PyErr_Restore(kind, value, trace);
  return stands ? 0 : -1;
}

PyObject* append_method(PyObject* self, PyObject* item) {
  if (append(items_of(self), item, nullptr) < 0) return nullptr;
  Py_RETURN_NONE;
}

PyObject* append_keyed(PyObject* self, PyObject* arguments) {
  PyObject* item = nullptr;
  Py_buffer key;
  if (!PyArg_ParseTuple(arguments, "y*O:_append_keyed", &key, &item)) return nullptr;
  int done = -1;
  if (key.len > static_cast<Py_ssize_t>(UINT32_MAX)) {
    PyErr_SetString(PyExc_OverflowError, "a key has at most 4 GiB");
  } else {
    done = append(items_of(self), item, &key);
  }
  PyBuffer_Release(&key);
  if (done < 0) return nullptr;
  Py_RETURN_NONE;
}

PyObject* extend(PyObject* self, PyObject* iterable) {
  Items& items = items_of(self);
  PyObject* iterator = PyObject_GetIter(iterable);
  if (iterator == nullptr) return nullptr;
  int done = 0;
  while (done == 0) {
    PyObject* item = PyIter_Next(iterator);
    if (item == nullptr) break;
    done = append(items, item, nullptr);
    Py_DECREF(item);
    if (done == 0 && items.count % kBetweenSignals == 0) done = PyErr_CheckSignals();
  }
  Py_DECREF(iterator);
  if (PyErr_Occurred() != nullptr) return nullptr;
  Py_RETURN_NONE;
}

// ---- what the Python half needs

PyObject* start(PyObject* self, PyObject* arguments) {
  PyObject *sink = nullptr, *dump = nullptr, *forget = nullptr, *grow = nullptr;
  if (!PyArg_ParseTuple(arguments, "OOOO:_start", &sink, &dump, &forget, &grow)) return nullptr;
  if (sink_of(sink) == nullptr) return nullptr;
  Items& items = items_of(self);
  items.clear();
  items.writer = std::make_unique<Writer>();
  items.writer->sink_object = Py_NewRef(sink);
  items.writer->dump = Py_NewRef(dump);
  items.writer->forget = Py_NewRef(forget);
  items.writer->grow = Py_NewRef(grow);
  items.writer->forked = forks;
  Py_RETURN_NONE;
}

// (chunks, arrays, index, bytes used of the last chunk); the second and the last are None for a list without.
PyObject* parts(PyObject* self, PyObject*) {
  const Items& items = items_of(self);
  if (items.writer != nullptr && items.writer->busy && items.writer->forked == forks) {
    PyErr_SetString(PyExc_RuntimeError, "another thread appends to this list");
    return nullptr;
  }
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
  Items made;
  for (Py_ssize_t i = 0; i < n; ++i) {
    made.chunks.push_back(
        chunk_over(PyTuple_GET_ITEM(chunks, i), arrays == Py_None ? nullptr : PyTuple_GET_ITEM(arrays, i)));
  }
  made.index = Py_NewRef(index);
  made.entries = static_cast<const std::byte*>(PyArray_DATA(array_of(index)));
  made.count = PyArray_SIZE(array_of(index));
  made.stride = PyArray_STRIDE(array_of(index), 0);
  // Destroyed with `made`: what goes may run Python.
  Items& items = items_of(self);
  std::swap(items.chunks, made.chunks);
  std::swap(items.index, made.index);
  std::swap(items.writer, made.writer);
  items.entries = made.entries;
  items.stride = made.stride;
  items.count = made.count;
  Py_RETURN_NONE;
}

PyObject* is_sealed(PyObject* self, void*) { return PyBool_FromLong(items_of(self).writer == nullptr ? 1 : 0); }

// ---- keys

// An array of slots, a power of two of them; null with an exception set.
uint64_t* slots_of(PyObject* object, uint64_t& mask) {
  const auto size = is_array(object, NPY_UINT64) ? static_cast<uint64_t>(PyArray_SIZE(array_of(object))) : 0;
  if (size == 0 || (size & (size - 1)) != 0 || !PyArray_IS_C_CONTIGUOUS(array_of(object))) {
    PyErr_SetString(PyExc_TypeError, "slots are a power of two of uint64");
    return nullptr;
  }
  mask = size - 1;
  return static_cast<uint64_t*>(PyArray_DATA(array_of(object)));
}

// The slot of a key, or the empty one where it belongs; nothing in a damaged table.
std::optional<uint64_t> find_slot(const Items& items, const uint64_t* slots, uint64_t mask, const Key& key,
                                  uint64_t hash) {
  for (uint64_t step = 0; step <= mask; ++step) {
    const uint64_t at = (hash + step) & mask;
    const uint64_t slot = slots[at];
    if (slot == 0) return at;
    if ((slot ^ hash) >> kOffsetBits != 0) continue;
    const uint64_t item = (slot & (kMostChunk - 1)) - 1;
    if (item >= static_cast<uint64_t>(items.count)) return std::nullopt;
    const auto place = find_place(items, static_cast<Py_ssize_t>(item));
    const auto found = place ? key_of(place->record) : std::nullopt;
    if (!found) return std::nullopt;
    if (found->length == key.length && std::memcmp(found->data, key.data, key.length) == 0) return at;
  }
  return std::nullopt;
}

// Fills the slots, and lets the last item of each key stand where the first one stood.
PyObject* tabulate(PyObject* self, PyObject* slots_object) {
  Items& items = items_of(self);
  uint64_t mask = 0;
  uint64_t* slots = slots_of(slots_object, mask);
  if (slots == nullptr) return nullptr;
  Writer* writer = begin(items);
  if (writer == nullptr) return nullptr;
  writer->busy = false;
  if (writer->forked != forks) {
    PyErr_SetString(PyExc_RuntimeError, "the process was forked meanwhile");
    return nullptr;
  }
  const Py_ssize_t count = items.count;
  Py_ssize_t kept = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const auto place = find_place(items, i);
    const auto key = place ? key_of(place->record) : std::nullopt;
    if (!key) return damaged(i);
    const uint64_t hash = stable_hash(key->data, key->length);
    const auto at = find_slot(items, slots, mask, *key, hash);
    if (!at) {
      PyErr_SetString(PyExc_ValueError, "too few slots");
      return nullptr;
    }
    const uint64_t before = (slots[*at] & (kMostChunk - 1));
    const Py_ssize_t to = before == 0 ? kept++ : static_cast<Py_ssize_t>(before - 1);
    writer->entries[to] = writer->entries[i];
    slots[*at] = slot_of(hash, static_cast<uint64_t>(to));
  }
  items.count = kept;
  Py_RETURN_NONE;
}

// The number of the item with that key; -1 for none.
PyObject* find(PyObject* self, PyObject* arguments) {
  PyObject* slots_object = nullptr;
  Py_buffer key;
  if (!PyArg_ParseTuple(arguments, "Oy*:_find", &slots_object, &key)) return nullptr;
  const Items& items = items_of(self);
  uint64_t mask = 0;
  const uint64_t* slots = slots_of(slots_object, mask);
  PyObject* made = nullptr;
  if (slots != nullptr) {
    const Key wanted{static_cast<const std::byte*>(key.buf), static_cast<uint64_t>(key.len)};
    const auto at = find_slot(items, slots, mask, wanted, stable_hash(key.buf, wanted.length));
    made = at ? PyLong_FromSsize_t(static_cast<Py_ssize_t>(slots[*at] & (kMostChunk - 1)) - 1) : damaged(-1);
  }
  PyBuffer_Release(&key);
  return made;
}

PyObject* key_at(PyObject* self, PyObject* number) {
  const Items& items = items_of(self);
  const Py_ssize_t i = PyNumber_AsSsize_t(number, PyExc_IndexError);
  if (i == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (i < 0 || i >= items.count) return out_of_range();
  const auto place = find_place(items, i);
  const auto key = place ? key_of(place->record) : std::nullopt;
  if (!key) return damaged(i);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key->data), static_cast<Py_ssize_t>(key->length));
}

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
    {"append", append_method, METH_O, "append(item)\n--\n\nPickle an item at the end of the list."},
    {"_append_keyed", append_keyed, METH_VARARGS, "_append_keyed(key, item)\n--\n\n"},
    {"_extend", extend, METH_O, "_extend(iterable)\n--\n\n"},
    {"_start", start, METH_VARARGS, "_start(sink, dump, forget, grow)\n--\n\n"},
    {"_parts", parts, METH_NOARGS, "_parts()\n--\n\n"},
    {"_seal_as", seal_as, METH_VARARGS, "_seal_as(chunks, arrays, index)\n--\n\n"},
    {"_tabulate", tabulate, METH_O, "_tabulate(slots)\n--\n\n"},
    {"_find", find, METH_VARARGS, "_find(slots, key)\n--\n\n"},
    {"_key", key_at, METH_O, "_key(number)\n--\n\n"},
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

int add_item_list_types(PyObject* module) {
  PyObject* pickle = PyImport_ImportModule("pickle");
  if (pickle == nullptr) return -1;
  loads = PyObject_GetAttrString(pickle, "loads");
  Py_DECREF(pickle);
  with_buffers = Py_BuildValue("(s)", "buffers");
  select_name = PyUnicode_InternFromString("_select");
  if (loads == nullptr || with_buffers == nullptr || select_name == nullptr) return -1;
  if (pthread_atfork(nullptr, nullptr, [] { ++forks; }) != 0) {
    PyErr_NoMemory();
    return -1;
  }
  if (add_item_sink_type(module) < 0 || PyType_Ready(&text_type) < 0 || PyType_Ready(&type) < 0) return -1;
  return PyModule_AddObjectRef(module, "ItemList", reinterpret_cast<PyObject*>(&type));
}

}  // namespace torchshm::python
