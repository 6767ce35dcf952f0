#include "python/reduce.h"

#include <algorithm>
#include <cstring>

#include "base/copy.h"
#include "os/mapping.h"
#include "pool/array_wire.h"
#include "python/errors.h"
#include "python/family.h"
#include "python/numpy_api.h"
#include "python/rebuild.h"

namespace torchshm::python {
namespace {

// Larger ones travel inside the pickle only where min_bytes says so, and then as NumPy sends them. Arbitrary.
constexpr npy_intp kCarriedMost = npy_intp{64} << 10;

PyObject* as_numpy_does(PyObject* array) {
  static PyObject* name = PyUnicode_InternFromString("__reduce__");
  return PyObject_CallMethodNoArgs(array, name);
}

// Shape and dtype. What type_num, item size and byte order do not say completely is pickled beside the wire.
void describe(PyArrayObject* array, ArrayWire& wire) {
  wire.ndim = PyArray_NDIM(array);
  std::copy_n(PyArray_DIMS(array), wire.ndim, wire.shape.begin());
  PyArray_Descr* dtype = PyArray_DESCR(array);
  const int num = dtype->type_num;
  wire.type_num = num;
  wire.item_size = PyArray_ITEMSIZE(array);
  wire.swapped = !PyArray_ISNBO(dtype->byteorder);
  const bool numeric = (num >= NPY_BOOL && num <= NPY_CLONGDOUBLE) || num == NPY_HALF;
  const bool flexible = num == NPY_STRING || num == NPY_UNICODE ||
                        (num == NPY_VOID && !PyDataType_HASFIELDS(dtype) && !PyDataType_HASSUBARRAY(dtype) &&
                         dtype->typeobj == &PyVoidArrType_Type);
  // NULL or None: which of them differs between versions of NumPy.
  PyObject* metadata = PyDataType_METADATA(dtype);
  const bool plain = metadata == nullptr || metadata == Py_None;
  wire.dtype_apart = !(numeric || flexible) || !plain;
}

// Objects live in one process only, and new-style dtypes may keep data elsewhere.
bool can_be_pooled(PyArrayObject* array) {
  PyArray_Descr* dtype = PyArray_DESCR(array);
  return PyDataType_ISLEGACY(dtype) && !PyDataType_REFCHK(dtype) && PyArray_NDIM(array) <= pool::kMostDims;
}

// The reduce value: (torchshm._C.array, (wire[, dtype[, type]])). `carried` bytes go behind the wire.
PyObject* message(PyObject* array, pool::Member* owner, const ArrayWire& wire, npy_intp carried = 0) {
  if (scope().sharing && !wire.carries) scope().issued.push_back(wire.handle);
  char buffer[pool::kWireMost];
  const size_t length = pool::encode(wire, buffer, wire.carries ? 0 : owner->arena().header().secret);
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(length) + carried);
  if (bytes == nullptr) return nullptr;
  std::memcpy(PyBytes_AS_STRING(bytes), buffer, length);
  if (carried != 0) {
    std::memcpy(PyBytes_AS_STRING(bytes) + length, PyArray_DATA(reinterpret_cast<PyArrayObject*>(array)),
                static_cast<size_t>(carried));
  }
  PyObject* arguments = nullptr;
  if (!PyArray_CheckExact(array)) {
    arguments = PyTuple_Pack(
        3, bytes, reinterpret_cast<PyObject*>(PyArray_DESCR(reinterpret_cast<PyArrayObject*>(array))), Py_TYPE(array));
  } else if (wire.dtype_apart) {
    arguments =
        PyTuple_Pack(2, bytes, reinterpret_cast<PyObject*>(PyArray_DESCR(reinterpret_cast<PyArrayObject*>(array))));
  } else {
    arguments = PyTuple_Pack(1, bytes);
  }
  Py_DECREF(bytes);
  if (arguments == nullptr) return nullptr;
  PyObject* reduced = PyTuple_Pack(2, array_type(), arguments);
  Py_DECREF(arguments);
  return reduced;
}

struct Source {
  PyArrayObject* array;
  pool::Member* member;
  npy_intp bytes;
};

// The array lies in a block: nothing is copied. Empty when it does not, or when the bytes that others see are not the array's.
std::optional<Status> by_reference(const Source& source, ArrayWire& wire, bool naming = false) {
  PyArrayObject* array = source.array;
  const auto* first = reinterpret_cast<const std::byte*>(PyArray_DATA(array));
  const auto found = source.member->find(first);
  // What came in a message is the program's own, as it is after stock pickling: a later write here must not reach the next receiver.
  if (!found || (found->exclusive && !naming)) return std::nullopt;
  const auto touched = pool::reach(PyArray_NDIM(array), PyArray_DIMS(array), PyArray_STRIDES(array), wire.item_size);
  if (!touched || static_cast<int64_t>(found->offset) + touched->low < 0 ||
      static_cast<int64_t>(found->offset) + touched->high > static_cast<int64_t>(found->length)) {
    return std::nullopt;
  }
  const std::byte *low = first + touched->low, *high = first + touched->high;
  if (naming ? !source.member->can_be_named(*found, low, high)
             : found->mode == pool::Mode::kCopyOnWrite && source.member->modified(*found, low, high)) {
    return std::nullopt;
  }
  Scope& now = scope();
  if (now.batch.on && found->mode == pool::Mode::kReadWrite) {
    // As it is delivered without a pool: contiguous and writeable.
    const bool plain = PyArray_ISONESEGMENT(array) && PyArray_ISWRITEABLE(array);
    if (!plain || static_cast<uint64_t>(source.bytes) < settings().min_bytes ||
        !now.batch.refer(*source.member, *found, static_cast<uint64_t>(source.bytes), Batch::Kind::kArray)) {
      return std::nullopt;
    }
  }
  // Others may rely on nobody writing there.
  if (now.sharing && now.mode == pool::Mode::kReadWrite && found->mode != pool::Mode::kReadWrite) return std::nullopt;
  wire.mode = now.sharing ? now.mode : found->mode;
  if (wire.mode == pool::Mode::kCopyOnWrite && found->mode != pool::Mode::kCopyOnWrite) {
    const auto extent = source.member->arena().extent(found->block);
    if (!extent || !extent->whole_pages()) return std::nullopt;
  }
  wire.writeable = (PyArray_FLAGS(array) & NPY_ARRAY_WRITEABLE) != 0;
  if (now.sharing) wire.writeable = now.mode != pool::Mode::kRead;
  wire.offset = found->offset;
  wire.order = PyArray_IS_C_CONTIGUOUS(array) ? ArrayWire::Order::kC : ArrayWire::Order::kStrided;
  if (wire.order == ArrayWire::Order::kStrided) std::copy_n(PyArray_STRIDES(array), wire.ndim, wire.strides.begin());
  auto handle = issue(*source.member, found->block);
  if (!handle) return std::move(handle.status());
  wire.handle = *handle;
  return Status();
}

// -1 with an exception set, 0 when it is done.
int fill(PyArrayObject* array, std::byte* to, npy_intp bytes, bool contiguous) {
  if (!contiguous) {
    // In one pass, in C order, byte order kept. CopyInto lets go of the GIL by itself.
    PyArray_Descr* dtype = PyArray_DESCR(array);
    Py_INCREF(dtype);
    PyObject* target = PyArray_NewFromDescr(&PyArray_Type, dtype, PyArray_NDIM(array), PyArray_DIMS(array), nullptr, to,
                                            NPY_ARRAY_CARRAY, nullptr);
    if (target == nullptr) return -1;
    const int copied = PyArray_CopyInto(reinterpret_cast<PyArrayObject*>(target), array);
    Py_DECREF(target);
    return copied;
  }
  const void* from = PyArray_DATA(array);
  if (bytes < kCopyUnderGil) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  } else {
    Py_BEGIN_ALLOW_THREADS;
    torchshm::copy_bytes(to, from, static_cast<size_t>(bytes));
    Py_END_ALLOW_THREADS;
  }
  return 0;
}

// A fresh block with the array's bytes, as NumPy's own pickle would deliver them: C or Fortran contiguous, writeable.
// 1: done; 0: the pool can't (status says why); -1: a Python exception is set.
int by_copy(const Source& source, ArrayWire& wire, Status& status) {
  const Scope& now = scope();
  PyArrayObject* array = source.array;
  // Above 16 KiB whole pages cost at most a quarter, and such a block can be seen copy-on-write later.
  const bool whole_pages = now.sharing || source.bytes >= 4 * static_cast<npy_intp>(os::kPageBytes);
  Result<pool::Member::View> block = Status();
  if (source.bytes >= kCopyUnderGil) {
    Py_BEGIN_ALLOW_THREADS;  // may commit and map fresh pages
    block = source.member->allocate(static_cast<uint64_t>(source.bytes), whole_pages, true);
    Py_END_ALLOW_THREADS;
  } else {
    block = source.member->allocate(static_cast<uint64_t>(source.bytes), whole_pages, true);
  }
  if (!block) {
    status = std::move(block.status());
    return 0;
  }
  const bool c_order = PyArray_IS_C_CONTIGUOUS(array), fortran = !c_order && PyArray_IS_F_CONTIGUOUS(array);
  wire.mode = now.sharing ? now.mode : pool::Mode::kReadWrite;
  wire.writeable = wire.mode != pool::Mode::kRead;
  wire.exclusive = !now.sharing;
  wire.offset = 0;
  wire.order = fortran ? ArrayWire::Order::kFortran : ArrayWire::Order::kC;
  const int copied = fill(array, block->data, source.bytes, c_order || fortran);
  auto handle = copied == 0 ? issue(*source.member, block->block) : Result<pool::Handle>(Status(Code::kInvalid, ""));
  source.member->release_made(block->block);  // from here on the ticket keeps it
  if (copied != 0) return -1;
  if (!handle) {
    status = std::move(handle.status());
    return 0;
  }
  wire.handle = *handle;
  return 1;
}

// A small array's bytes in the message. NumPy's own way takes twice as long, most of it for the dtype.
PyObject* inside_the_pickle(const Source& source, ArrayWire& wire) {
  auto* object = reinterpret_cast<PyObject*>(source.array);
  const bool c_order = PyArray_IS_C_CONTIGUOUS(source.array);
  if (source.bytes > kCarriedMost || (!c_order && !PyArray_IS_F_CONTIGUOUS(source.array))) return as_numpy_does(object);
  wire.carries = true;
  wire.order = c_order ? ArrayWire::Order::kC : ArrayWire::Order::kFortran;
  return message(object, nullptr, wire, source.bytes);
}

}  // namespace

void fall_back(pool::Member& member, const Status& status) {
  member.count_fallback();
  // A DataLoader with many workers is one program.
  if (member.arena().header().warned.exchange(1, std::memory_order_relaxed) != 0) return;
  const std::string text =
      "torchshm: an array was pickled the ordinary way, which is slower, since the pool has " + status.what();
  PyObject* readable = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
  if (readable == nullptr || PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "%U", readable) < 0)
    PyErr_WriteUnraisable(nullptr);
  Py_XDECREF(readable);
}

PyObject* reduce_ndarray(PyObject*, PyObject* object) {
  if (!PyArray_Check(object)) {
    PyErr_Format(PyExc_TypeError, "expected a numpy.ndarray, not %.200s", Py_TYPE(object)->tp_name);
    return nullptr;
  }
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  const Scope& now = scope();
  const Source source{array, member(), PyArray_NBYTES(array)};
  if (source.member == nullptr || source.bytes == 0 || now.inline_depth > 0 || !can_be_pooled(array))
    return as_numpy_does(object);

  ArrayWire wire;
  describe(array, wire);

  Status status;
  const Source before{array, now.sharing ? nullptr : former_member(PyArray_DATA(array)), source.bytes};
  auto referred = by_reference(source, wire);
  const bool former = !referred && before.member != nullptr && (referred = by_reference(before, wire));
  if (referred) {
    if (referred->ok()) return message(object, former ? before.member : source.member, wire);
    status = std::move(*referred);
  } else {
    if (!now.sharing && static_cast<uint64_t>(source.bytes) < settings().min_bytes)
      return inside_the_pickle(source, wire);
    const int copied = by_copy(source, wire, status);
    if (copied < 0) return nullptr;
    if (copied > 0) return message(object, source.member, wire);
  }
  if (now.sharing) return raise(status);
  fall_back(*source.member, status);
  return as_numpy_does(object);
}

Put put_array(PyArrayObject* array, pool::Member* member, ArrayWire& wire, Status& status) {
  const Source source{array, member, PyArray_NBYTES(array)};
  if (source.bytes == 0 || !can_be_pooled(array)) return Put::kNot;
  describe(array, wire);
  if (wire.dtype_apart) return Put::kNot;
  Scope& now = scope();
  const bool sharing = now.sharing;
  const pool::Mode mode = now.mode;
  now.sharing = true;
  now.mode = pool::Mode::kRead;
  int done = 1;
  if (auto referred = by_reference(source, wire, true)) {
    status = std::move(*referred);
    done = status ? 1 : 0;
  } else {
    done = by_copy(source, wire, status);
  }
  now.sharing = sharing;
  now.mode = mode;
  return done > 0 ? Put::kDone : done == 0 ? Put::kFailed : Put::kRaised;
}

}  // namespace torchshm::python
