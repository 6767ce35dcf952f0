#include "python/item_writer.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>

#include "base/copy.h"
#include "python/item_sink.h"

namespace torchshm::python {
namespace {

// Copying below this is quicker than giving the GIL away and getting it back.
constexpr uint64_t kCopyUnderGil = uint64_t{2} << 20;
constexpr uint64_t kFirstChunk = uint64_t{64} << 10, kLargeChunk = uint64_t{64} << 20;
constexpr uint64_t kFirstEntries = 4096;
constexpr Py_ssize_t kBetweenSignals = 1024;  // items

uint64_t times_forked = 0;

// Whether it is what pickling raises of an object that can't be pickled; what a signal's handler or an object's own method raised is not.
bool tells_of_pickling(PyObject* kind, PyObject* pickle) {
  for (PyObject* of : {PyExc_TypeError, PyExc_AttributeError, PyExc_RecursionError})
    if (PyErr_GivenExceptionMatches(kind, of) != 0) return true;
  PyObject* base = pickle == nullptr ? nullptr : PyObject_GetAttrString(pickle, "PickleError");
  const bool found = base != nullptr && PyErr_GivenExceptionMatches(kind, base) != 0;
  Py_XDECREF(base);
  return found;
}

// The exception there is, with the number of the item: a PicklingError of what pickling raised, the same of what the pool did.
void explain(Py_ssize_t index, bool pickling) {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) return;
  PyObject *kind = nullptr, *cause = nullptr, *trace = nullptr;
  PyErr_Fetch(&kind, &cause, &trace);
  PyErr_NormalizeException(&kind, &cause, &trace);
  PyObject* pickle = pickling ? PyImport_ImportModule("pickle") : nullptr;
  if (pickling && !tells_of_pickling(kind, pickle)) {
    PyErr_Clear();
    Py_XDECREF(pickle);
    PyErr_Restore(kind, cause, trace);
    return;
  }
  if (trace != nullptr) PyException_SetTraceback(cause, trace);
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

// Two new references to arrays over one new block; false with an exception set.
bool call_grow(const Writer& writer, uint64_t least, uint64_t wanted, PyObject*& to_write, PyObject*& to_read) {
  const uint64_t forks = Writer::forks();
  PyObject* made = PyObject_CallFunction(writer.grow, "KK", static_cast<unsigned long long>(least),
                                         static_cast<unsigned long long>(wanted));
  if (made == nullptr) return false;
  if (forks != Writer::forks()) {
    Py_DECREF(made);
    (void)raise_forked();
    return false;
  }
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

// A new pickler for the writer; false with an exception set.
bool renew_pickler(Writer& writer) {
  PyObject* made = PyObject_CallNoArgs(writer.make_pickler);
  if (made == nullptr) return false;
  if (!PyTuple_Check(made) || PyTuple_GET_SIZE(made) != 3 || sink_of(PyTuple_GET_ITEM(made, 0)) == nullptr) {
    Py_DECREF(made);
    PyErr_SetString(PyExc_TypeError, "a sink, dump and forget are expected");
    return false;
  }
  Py_XSETREF(writer.sink_object, Py_NewRef(PyTuple_GET_ITEM(made, 0)));
  Py_XSETREF(writer.dump, Py_NewRef(PyTuple_GET_ITEM(made, 1)));
  Py_XSETREF(writer.forget, Py_NewRef(PyTuple_GET_ITEM(made, 2)));
  Py_DECREF(made);
  return true;
}

}  // namespace

PyObject* raise_in_use() {
  PyErr_SetString(PyExc_RuntimeError,
                  "another thread, or a method that pickles an item, appends to this list or seals it");
  return nullptr;
}

PyObject* raise_forked() {
  PyErr_SetString(PyExc_RuntimeError, "the process was forked meanwhile, by what appends to this list");
  return nullptr;
}

Writer* begin_writing(Items& items) {
  Writer* writer = items.writer.get();
  if (writer == nullptr) {
    PyErr_SetString(PyExc_ValueError,
                    "this list is sealed: seal() was called, it was sent to another process, or it is a part of "
                    "another list; make a new one for more items");
    return nullptr;
  }
  if (writer->in_use()) {
    (void)raise_in_use();
    return nullptr;
  }
  if (writer->forked == Writer::forks()) {
    writer->busy = true;
    return writer;
  }
  // The parent goes on in that chunk and that index, and a thread of its may have been using that pickler.
  writer->used = writer->capacity;
  writer->entries_capacity = 0;
  writer->sealing = 0;
  const uint64_t forks = writer->forked = Writer::forks();
  writer->busy = true;
  const bool renewed = renew_pickler(*writer);
  if (forks != Writer::forks()) return nullptr;
  if (renewed) return writer;
  writer->busy = false;
  writer->forked = forks - 1;  // the next one tries again
  return nullptr;
}

namespace {

int append(Items& items, PyObject* item, const Py_buffer* key) {
  Writer* writer = begin_writing(items);
  if (writer == nullptr) return -1;
  const uint64_t forks = Writer::forks();
  // In a child that was forked in here the writer may have got others, or be gone.
  PyObject *sink_object = Py_NewRef(writer->sink_object), *forget = Py_NewRef(writer->forget);
  PyObject* dump = Py_NewRef(writer->dump);
  Sink& sink = *sink_of(sink_object);
  sink.clear();
  PyObject* done = PyObject_CallOneArg(dump, item);
  bool stands = done != nullptr;
  Py_XDECREF(done);
  if (stands && forks != Writer::forks()) {
    (void)raise_forked();
    stands = false;
  }
  if (stands) stands = put(items, *writer, sink, key);
  if (!stands) explain(items.count, done == nullptr);
  PyObject *kind = nullptr, *value = nullptr, *trace = nullptr;
  if (!stands) PyErr_Fetch(&kind, &value, &trace);
  PyObject* forgotten = PyObject_CallNoArgs(forget);
  if (forgotten == nullptr) PyErr_Clear();
  Py_XDECREF(forgotten);
  sink.clear();
  if (forks == Writer::forks()) writer->busy = false;
  Py_DECREF(sink_object);
  Py_DECREF(forget);
  Py_DECREF(dump);
  if (!stands) PyErr_Restore(kind, value, trace);
  return stands ? 0 : -1;
}

}  // namespace

PyObject* append_item(PyObject* self, PyObject* item) {
  if (append(items_of(self), item, nullptr) < 0) return nullptr;
  Py_RETURN_NONE;
}

PyObject* append_keyed_item(PyObject* self, PyObject* arguments) {
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

PyObject* extend_items(PyObject* self, PyObject* iterable) {
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

PyObject* start_writing(PyObject* self, PyObject* arguments) {
  PyObject *make_pickler = nullptr, *grow = nullptr;
  if (!PyArg_ParseTuple(arguments, "OO:_start", &make_pickler, &grow)) return nullptr;
  Items made;
  made.writer = std::make_unique<Writer>();
  made.writer->make_pickler = Py_NewRef(make_pickler);
  made.writer->grow = Py_NewRef(grow);
  if (!renew_pickler(*made.writer)) return nullptr;
  Items& items = items_of(self);
  if (items.writer != nullptr && items.writer->in_use()) return raise_in_use();
  items.swap(made);
  Py_RETURN_NONE;
}

uint64_t Writer::forks() { return times_forked; }

int Writer::count_forks() {
  if (pthread_atfork(nullptr, nullptr, [] { ++times_forked; }) == 0) return 0;
  PyErr_NoMemory();
  return -1;
}

}  // namespace torchshm::python
