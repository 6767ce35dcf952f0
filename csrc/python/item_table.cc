#include "python/item_table.h"

#include <cstring>

#include "python/item_writer.h"

namespace torchshm::python {
namespace {

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

}  // namespace

// Fills the slots, and lets the last item of each key stand where the first one stood.
PyObject* tabulate_items(PyObject* self, PyObject* slots_object) {
  Items& items = items_of(self);
  uint64_t mask = 0;
  uint64_t* slots = slots_of(slots_object, mask);
  if (slots == nullptr) return nullptr;
  Writer* writer = begin_writing(items);
  if (writer == nullptr) return nullptr;
  writer->busy = false;
  const Py_ssize_t count = items.count;
  if (writer->entries_capacity < static_cast<uint64_t>(count)) return raise_forked();
  Py_ssize_t kept = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const auto place = find_place(items, i);
    const auto key = place ? key_of(place->record) : std::nullopt;
    if (!key) return raise_damaged(i);
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
PyObject* find_item(PyObject* self, PyObject* arguments) {
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
    made = at ? PyLong_FromSsize_t(static_cast<Py_ssize_t>(slots[*at] & (kMostChunk - 1)) - 1) : raise_damaged(-1);
  }
  PyBuffer_Release(&key);
  return made;
}

PyObject* key_of_item(PyObject* self, PyObject* number) {
  const Items& items = items_of(self);
  const Py_ssize_t i = PyNumber_AsSsize_t(number, PyExc_IndexError);
  if (i == -1 && PyErr_Occurred() != nullptr) return nullptr;
  if (i < 0 || i >= items.count) return raise_out_of_range();
  const auto place = find_place(items, i);
  const auto key = place ? key_of(place->record) : std::nullopt;
  if (!key) return raise_damaged(i);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(key->data), static_cast<Py_ssize_t>(key->length));
}

}  // namespace torchshm::python
