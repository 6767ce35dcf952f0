// The private half of an ItemList: where its chunks lie in this process, and what appends to it.
//
// Private to the process; with the GIL. item_list.h says what of it is shared.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "python/item_record.h"
#include "python/numpy_api.h"

namespace torchshm::python {

struct Chunk {
  PyObject* text = nullptr;  // an array of uint8 over the block
  // The same bytes in the mode of the items' arrays. Null while the list is open: these are copies then, since a page that this process
  // has written to no longer shows what is appended to it.
  PyObject* arrays = nullptr;
  const std::byte* data = nullptr;
  std::byte* array_data = nullptr;
  uint64_t size = 0;
};

// Of a list that can be appended to.
struct Writer {
  PyObject* make_pickler = nullptr;  // () -> (sink, dump, forget)
  PyObject* sink_object = nullptr;
  PyObject* dump = nullptr;
  PyObject* forget = nullptr;  // the pickler's clear_memo
  PyObject* grow = nullptr;    // (least, wanted) -> two arrays over one new block, one to write and one to read
  PyObject* chunk = nullptr;   // the last chunk, to write
  std::byte* at = nullptr;
  uint64_t used = 0, capacity = 0;  // bytes of the last chunk
  uint64_t total = 0;               // of all chunks
  PyObject* index = nullptr;        // to write
  uint64_t* entries = nullptr;
  uint64_t entries_capacity = 0;
  uint64_t forked = forks();  // of the process that the rest is of: a child does not write where its parent does
  bool busy = false;          // a thread appends
  int sealing = 0;            // threads

  Writer() = default;
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  ~Writer() {
    for (PyObject* object : {make_pickler, sink_object, dump, forget, grow, chunk, index}) Py_XDECREF(object);
  }

  // How often this process and its ancestors were forked, as far as the children are concerned.
  static uint64_t forks();
  static int count_forks();  // once; -1 with an exception set
  bool in_use() const { return (busy || sealing != 0) && forked == forks(); }
};

struct Items {
  std::vector<Chunk> chunks;
  PyObject* index = nullptr;  // an array of uint64, to read
  const std::byte* entries = nullptr;
  Py_ssize_t stride = 0;  // bytes
  Py_ssize_t count = 0;
  std::unique_ptr<Writer> writer;  // null: sealed

  Items() = default;
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items() {
    for (const Chunk& chunk : chunks) {
      Py_DECREF(chunk.text);
      Py_XDECREF(chunk.arrays);
    }
    Py_XDECREF(index);
  }
  // What was there goes with `other`.
  void swap(Items& other) {
    std::swap(chunks, other.chunks);
    std::swap(index, other.index);
    std::swap(entries, other.entries);
    std::swap(stride, other.stride);
    std::swap(count, other.count);
    std::swap(writer, other.writer);
  }
};

struct ItemList {
  PyObject_HEAD Items* items;
};

inline Items& items_of(PyObject* self) { return *reinterpret_cast<ItemList*>(self)->items; }

struct Place {
  Chunk chunk;
  Record record;
};
// Nothing where the memory is damaged. REQUIRES: the index is in range.
std::optional<Place> find_place(const Items& items, Py_ssize_t index);

// One dimension of uint8, contiguous, or of uint64.
bool is_array(PyObject* object, int type_num);
inline PyArrayObject* array_of(PyObject* object) { return reinterpret_cast<PyArrayObject*>(object); }
// New references to both; arrays may be null.
Chunk chunk_over(PyObject* text, PyObject* arrays);

// Set an exception and return null.
PyObject* raise_damaged(Py_ssize_t index);
PyObject* raise_out_of_range();

}  // namespace torchshm::python
