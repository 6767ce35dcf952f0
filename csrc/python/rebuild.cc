#include "python/rebuild.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "os/mapping.h"
#include "pool/array_wire.h"
#include "python/block_ref.h"
#include "python/errors.h"
#include "python/family.h"
#include "python/numpy_api.h"

namespace torchshm::python {

static_assert(std::is_same_v<npy_intp, int64_t>, "the wire's dimensions are NumPy's");

PyArray_Descr* dtype_of(const ArrayWire& wire, PyObject* apart) {
  if (apart != nullptr && apart != Py_None) {
    if (!PyArray_DescrCheck(apart)) {
      PyErr_SetString(PyExc_TypeError, "torchshm._C.array: the second argument is a numpy.dtype");
      return nullptr;
    }
    auto* dtype = reinterpret_cast<PyArray_Descr*>(apart);
    if (!PyDataType_ISLEGACY(dtype) || PyDataType_REFCHK(dtype) || PyDataType_ELSIZE(dtype) != wire.item_size) {
      (void)raise(Status(Code::kInvalid, "the dtype does not fit the handle"));
      return nullptr;
    }
    Py_INCREF(dtype);
    return dtype;
  }
  const int num = wire.type_num;
  const bool numeric = (num >= NPY_BOOL && num <= NPY_CLONGDOUBLE) || num == NPY_HALF;
  const bool flexible = num == NPY_STRING || num == NPY_UNICODE || num == NPY_VOID;
  if (!numeric && !flexible) {
    (void)raise(Status(Code::kInvalid, "unknown dtype"));
    return nullptr;
  }
  PyArray_Descr* dtype = flexible ? PyArray_DescrNewFromType(num) : PyArray_DescrFromType(num);
  if (dtype == nullptr) return nullptr;
  if (num == NPY_UNICODE && wire.item_size % 4 != 0) {
    Py_DECREF(dtype);
    (void)raise(Status(Code::kInvalid, "the item size does not fit the dtype"));
    return nullptr;
  }
  if (flexible) {
    PyDataType_SET_ELSIZE(dtype, static_cast<npy_intp>(wire.item_size));
  } else if (PyDataType_ELSIZE(dtype) != wire.item_size) {
    Py_DECREF(dtype);
    (void)raise(Status(Code::kInvalid, "the item size does not fit the dtype"));
    return nullptr;
  }
  if (wire.swapped) {
    PyArray_Descr* swapped = PyArray_DescrNewByteorder(dtype, NPY_SWAP);
    Py_DECREF(dtype);
    dtype = swapped;
  }
  return dtype;
}

namespace {

// Steals dtype. New reference.
PyObject* array_over(PyTypeObject* subtype, PyArray_Descr* dtype, const ArrayWire& wire, pool::Member* member,
                     const pool::Member::View& view) {
  PyObject* base = make_block_ref(member, view, wire.mode);
  if (base == nullptr) {
    Py_DECREF(dtype);
    return nullptr;
  }
  const int flags = wire.writeable && wire.mode != pool::Mode::kRead ? NPY_ARRAY_WRITEABLE : 0;
  PyObject* made =
      PyArray_NewFromDescr(subtype, dtype, wire.ndim, const_cast<npy_intp*>(wire.shape.data()),
                           const_cast<npy_intp*>(wire.strides.data()), view.data + wire.offset, flags, nullptr);
  if (made == nullptr) {
    Py_DECREF(base);
    return nullptr;
  }
  // Steals base, also when it fails.
  if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(made), base) < 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

// An array of its own with the bytes that came along. Steals dtype. New reference.
PyObject* array_with(PyTypeObject* subtype, PyArray_Descr* dtype, const ArrayWire& wire, const char* payload,
                     npy_intp bytes) {
  const int fortran = wire.order == ArrayWire::Order::kFortran ? NPY_ARRAY_F_CONTIGUOUS : 0;
  PyObject* made = PyArray_NewFromDescr(subtype, dtype, wire.ndim, const_cast<npy_intp*>(wire.shape.data()), nullptr,
                                        nullptr, fortran, nullptr);
  if (made == nullptr) return nullptr;
  auto* array = reinterpret_cast<PyArrayObject*>(made);
  if (PyArray_NBYTES(array) != bytes) {
    Py_DECREF(made);
    return raise(Status(Code::kInvalid, "it does not carry all its bytes"));
  }
  std::memcpy(PyArray_DATA(array), payload, static_cast<size_t>(bytes));
  return made;
}

PyObject* rebuild(PyTypeObject*, PyObject* arguments, PyObject* keywords) {
  const Py_ssize_t n = PyTuple_GET_SIZE(arguments);
  if (n < 1 || n > 3 || !PyBytes_Check(PyTuple_GET_ITEM(arguments, 0)) ||
      (keywords != nullptr && PyDict_GET_SIZE(keywords) != 0)) {
    PyErr_SetString(PyExc_TypeError, "torchshm._C.array takes the bytes of a handle, and at most a dtype and a type");
    return nullptr;
  }
  PyObject* bytes_object = PyTuple_GET_ITEM(arguments, 0);
  auto decoded = pool::decode(PyBytes_AS_STRING(bytes_object), static_cast<size_t>(PyBytes_GET_SIZE(bytes_object)));
  if (!decoded) return raise(decoded.status());
  ArrayWire& wire = *decoded;
  PyTypeObject* subtype = &PyArray_Type;
  if (n == 3) {
    PyObject* given = PyTuple_GET_ITEM(arguments, 2);
    if (!PyType_Check(given) || !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(given), &PyArray_Type)) {
      PyErr_SetString(PyExc_TypeError, "torchshm._C.array: the third argument is a subtype of numpy.ndarray");
      return nullptr;
    }
    subtype = reinterpret_cast<PyTypeObject*>(given);
  }
  pool::Member* owner = wire.carries ? nullptr : member_of(wire.handle.pool_id);
  if (owner == nullptr && !wire.carries) return nullptr;
  if (owner != nullptr &&
      !pool::intact(PyBytes_AS_STRING(bytes_object), static_cast<size_t>(PyBytes_GET_SIZE(bytes_object)),
                    owner->arena().header().secret)) {
    return raise(Status(Code::kInvalid, "it is damaged"));
  }
  PyArray_Descr* dtype = dtype_of(wire, n > 1 ? PyTuple_GET_ITEM(arguments, 1) : nullptr);
  if (dtype == nullptr) return nullptr;
  if (wire.carries) {
    npy_intp bytes = wire.item_size;
    for (int i = 0; i < wire.ndim; ++i) bytes *= wire.shape[i];  // checked by decode()
    return array_with(subtype, dtype, wire, PyBytes_AS_STRING(bytes_object) + PyBytes_GET_SIZE(bytes_object) - bytes,
                      bytes);
  }
  Status status;
  PyObject* made = open_array(wire, subtype, dtype, owner, status);
  return status ? made : raise(status);
}

PyTypeObject make_type() {
  PyTypeObject type{};
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "torchshm._C.array";
  type.tp_doc =
      "array(wire, dtype=None, type=numpy.ndarray)\n--\n\nThe array that a handle in a pickle stands for. Called by "
      "pickle.";
  type.tp_basicsize = sizeof(PyObject);
  type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_new = rebuild;
  return type;
}

PyTypeObject type = make_type();

}  // namespace

PyObject* open_array(ArrayWire& wire, PyTypeObject* subtype, PyArray_Descr* dtype, pool::Member* owner,
                     Status& status) {
  auto opened = pool::open(*owner, wire);
  if (!opened) {
    Py_DECREF(dtype);
    status = std::move(opened.status());
    return nullptr;
  }
  // No address space for the mode's own mapping (ulimit -v): through the one there is, read-only by flag, or as a copy.
  const bool no_face = opened->mode != wire.mode;
  if (!no_face) return array_over(subtype, dtype, wire, owner, opened->view);
  wire.writeable = false;
  const bool copy = wire.mode == pool::Mode::kCopyOnWrite;
  wire.mode = pool::Mode::kReadWrite;
  PyObject* shared = array_over(subtype, dtype, wire, owner, opened->view);
  if (shared == nullptr || !copy) return shared;
  PyObject* own = PyArray_NewCopy(reinterpret_cast<PyArrayObject*>(shared), NPY_KEEPORDER);
  Py_DECREF(shared);
  return own;
}

PyObject* array_type() { return reinterpret_cast<PyObject*>(&type); }

int add_array_type(PyObject* module) {
  if (PyType_Ready(&type) < 0) return -1;
  return PyModule_AddObjectRef(module, "array", array_type());
}

PyObject* empty(PyObject*, PyObject* arguments) {
  PyArray_Dims shape = {nullptr, 0};
  PyArray_Descr* dtype = nullptr;
  if (!PyArg_ParseTuple(arguments, "O&O&:empty", PyArray_IntpConverter, &shape, PyArray_DescrConverter, &dtype)) {
    PyDimMem_FREE(shape.ptr);
    return nullptr;
  }
  ArrayWire wire;
  PyObject* made = nullptr;
  int64_t bytes = PyDataType_ELSIZE(dtype);
  bool fits = shape.len <= pool::kMostDims;
  for (int i = 0; fits && i < shape.len; ++i) {
    fits = shape.ptr[i] >= 0 && !__builtin_mul_overflow(bytes, static_cast<int64_t>(shape.ptr[i]), &bytes);
  }
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "torchshm.empty: negative dimensions, or more bytes than fit 64 bits");
  } else if (!PyDataType_ISLEGACY(dtype) || PyDataType_REFCHK(dtype)) {
    PyErr_Format(PyExc_TypeError, "torchshm.empty: dtype %R holds Python objects, which can't lie in shared memory",
                 dtype);
  } else if (PyDataType_ELSIZE(dtype) == 0) {
    PyErr_Format(PyExc_TypeError, "torchshm.empty: give dtype %R a size, as in 'S10'", dtype);
  } else if (PyDataType_HASSUBARRAY(dtype)) {
    PyErr_Format(PyExc_TypeError, "torchshm.empty: put the sub-array dimensions of %R into the shape", dtype);
  } else {
    wire.ndim = shape.len;
    std::copy_n(shape.ptr, shape.len, wire.shape.begin());
    npy_intp step = PyDataType_ELSIZE(dtype);
    for (int i = shape.len - 1; i >= 0; --i) {
      wire.strides[i] = step;
      step *= std::max<npy_intp>(shape.ptr[i], 1);
    }
    Result<pool::Member::View> view = Status();
    Py_BEGIN_ALLOW_THREADS;
    view = member()->allocate(static_cast<uint64_t>(bytes), bytes >= 4 * static_cast<int64_t>(os::kPageBytes));
    Py_END_ALLOW_THREADS;
    if (view) {
      Py_INCREF(dtype);
      made = array_over(&PyArray_Type, dtype, wire, member(), *view);
    } else {
      (void)raise(view.status());
    }
  }
  PyDimMem_FREE(shape.ptr);
  Py_DECREF(dtype);
  return made;
}

}  // namespace torchshm::python
