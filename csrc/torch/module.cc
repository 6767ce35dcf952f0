// The module torchshm._torch: tensors and their storages in messages, and the switch of memory.h. The rest of it is torchshm/_tensors.py.
//
// Built for one version of torch, whose classes it uses as they are compiled.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <c10/core/CPUAllocator.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Storage.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

#include "torch/memory.h"

namespace torchshm::torch_room {
namespace {

using Way = pool::ModuleApi::Way;

// What a tensor is beyond its memory.
constexpr long kGrad = 1, kParameter = 2;

PyObject* tensors_module() {  // borrowed
  static PyObject* module = PyImport_ImportModule("torchshm._tensors");
  return module;
}

PyObject* leave_to_python(const char* function, PyObject* object) {
  PyObject* module = tensors_module();
  return module == nullptr ? nullptr : PyObject_CallMethod(module, function, "O", object);
}

// ---- named as of torchshm._tensors, which imports torch before this module: a receiver may have neither yet
// Types and not functions, since pickle writes types by name at once and asks a builtin function for its __reduce_ex__ first

PyTypeObject callable(const char* name, const char* doc, newfunc call) {
  PyTypeObject type{};
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = name;
  type.tp_doc = doc;
  type.tp_basicsize = sizeof(PyObject);
  type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_new = call;
  return type;
}

// ---- storages

PyObject* new_storage(PyTypeObject*, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  const char* wire = nullptr;
  Py_ssize_t length = 0;
  if (!PyArg_ParseTuple(arguments, "y#:storage", &wire, &length)) return nullptr;
  pool::ModuleApi::Received received{};
  if (!api().receive(wire, static_cast<size_t>(length), received)) return nullptr;
  c10::Storage made = make_storage(received.data, received.bytes);
  if (received.to_copy) {
    auto own = c10::Storage(c10::Storage::use_byte_size_t(), received.bytes, c10::GetCPUAllocator(), true);
    std::memcpy(own.mutable_data(), made.data(), received.bytes);
    made = std::move(own);
  }
  return THPStorage_Wrap(std::move(made));
  END_HANDLE_TH_ERRORS
}

PyTypeObject storage_type =
    callable("torchshm._tensors.storage",
             "storage(wire)\n--\n\nThe torch.UntypedStorage that a handle in a pickle stands for. Called by pickle.",
             new_storage);

// 1, 0, or -1 with an exception set: whether torch itself has put it in shared memory.
int shared_by_torch(PyObject* storage) {
  static PyObject* stock = [] {
    PyObject* base = PyObject_GetAttrString(reinterpret_cast<PyObject*>(&THPStorageType), "is_shared");
    return base;
  }();
  if (stock == nullptr) return -1;
  PyObject* answer = PyObject_CallOneArg(stock, storage);
  if (answer == nullptr) return -1;
  const int shared = PyObject_IsTrue(answer);
  Py_DECREF(answer);
  return shared;
}

PyObject* reduce_storage(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  if (!THPStorage_CheckExact(object)) return leave_to_python("reduce_other_storage", object);
  const c10::Storage storage = THPStorage_Unpack(object);
  c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
  if (!storage.device().is_cpu() || storage.nbytes() == 0) return leave_to_python("reduce_other_storage", object);
  const int shared = shared_by_torch(object);
  if (shared < 0) return nullptr;
  if (shared > 0) return leave_to_python("reduce_other_storage", object);
  pool::ModuleApi::Sent sent;
  const Way way = api().send(impl->mutable_data(), storage.nbytes(), !is_ours(impl->data_ptr()), sent);
  if (way == Way::kRaised) return nullptr;
  if (way == Way::kNot) return leave_to_python("reduce_other_storage", object);
  if (way == Way::kMoved) impl->set_data_ptr_noswap(over(sent.moved));
  if (way != Way::kCopied) impl->set_resizable(false);
  PyObject* wire = PyBytes_FromStringAndSize(sent.wire, static_cast<Py_ssize_t>(sent.length));
  if (wire == nullptr) return nullptr;
  PyObject* inner = PyTuple_Pack(1, wire);
  Py_DECREF(wire);
  if (inner == nullptr) return nullptr;
  PyObject* reduced = PyTuple_Pack(2, reinterpret_cast<PyObject*>(&storage_type), inner);
  Py_DECREF(inner);
  return reduced;
  END_HANDLE_TH_ERRORS
}

PyObject* blank(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  const Py_ssize_t bytes = PyNumber_AsSsize_t(object, PyExc_OverflowError);
  if (bytes == -1 && PyErr_Occurred() != nullptr) return nullptr;
  void* data = nullptr;
  if (bytes > 0) {
    Py_BEGIN_ALLOW_THREADS;
    data = api().allocate(nullptr, static_cast<uint64_t>(bytes));
    Py_END_ALLOW_THREADS;
  }
  if (data == nullptr) Py_RETURN_NONE;
  return THPStorage_Wrap(make_storage(data, static_cast<uint64_t>(bytes)));
  END_HANDLE_TH_ERRORS
}

// ---- tensors

// Nothing but sizes and strides over a storage of this process's memory.
bool usual(PyObject* object, const at::Tensor& tensor) {
  const c10::DispatchKeySet known({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                   c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return tensor.defined() && tensor.key_set().has(c10::DispatchKey::CPU) && (tensor.key_set() | known) == known &&
         tensor.layout() == at::kStrided && tensor.has_storage() && !(tensor.requires_grad() && !tensor.is_leaf()) &&
         reinterpret_cast<THPVariable*>(object)->backward_hooks == nullptr;
}

PyObject* tuple_of(at::IntArrayRef numbers) {
  PyObject* made = PyTuple_New(static_cast<Py_ssize_t>(numbers.size()));
  for (size_t i = 0; made != nullptr && i < numbers.size(); ++i) {
    PyObject* number = PyLong_FromLongLong(numbers[i]);
    if (number == nullptr) Py_CLEAR(made);
    if (number != nullptr) PyTuple_SET_ITEM(made, static_cast<Py_ssize_t>(i), number);
  }
  return made;
}

bool numbers_of(PyObject* tuple, c10::SmallVector<int64_t, 8>& to) {
  if (!PyTuple_Check(tuple)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    const long long number = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
    if (number < 0) return false;
    to.push_back(number);
  }
  return true;
}

PyObject* new_tensor(PyTypeObject*, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *storage_object = nullptr, *dtype = nullptr, *size_object = nullptr, *stride_object = nullptr;
  long long offset = 0;
  long flags = 0;
  if (!PyArg_ParseTuple(arguments, "OOLOOl:tensor", &storage_object, &dtype, &offset, &size_object, &stride_object,
                        &flags)) {
    return nullptr;
  }
  c10::SmallVector<int64_t, 8> size, stride;
  const bool contiguous = stride_object == Py_None;
  if (!THPStorage_Check(storage_object) || !THPDtype_Check(dtype) || offset < 0 || !numbers_of(size_object, size) ||
      !(contiguous || (numbers_of(stride_object, stride) && size.size() == stride.size()))) {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_TypeError, "torchshm._torch.tensor: not what a tensor is");
    return nullptr;
  }
  if (contiguous) {
    stride.resize(size.size());
    int64_t step = 1;
    for (size_t i = size.size(); i-- > 0;) {
      stride[i] = step;
      TORCH_CHECK(!__builtin_mul_overflow(step, std::max<int64_t>(size[i], 1), &step), "a tensor of too many elements");
    }
  }
  const c10::Storage& storage = THPStorage_Unpack(storage_object);
  const auto type = at::scalarTypeToTypeMeta(reinterpret_cast<THPDtype*>(dtype)->scalar_type);
  int64_t last = offset;
  bool empty = false;
  for (size_t i = 0; i < size.size(); ++i) {
    empty |= size[i] == 0;
    int64_t span = 0;
    TORCH_CHECK(!__builtin_mul_overflow(std::max<int64_t>(size[i], 1) - 1, stride[i], &span) &&
                    !__builtin_add_overflow(last, span, &last),
                "a tensor that is larger than its storage");
  }
  TORCH_CHECK(empty || static_cast<uint64_t>(last) < storage.nbytes() / type.itemsize(),
              "a tensor that is larger than its storage");
  auto impl =
      c10::make_intrusive<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), type);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, stride);
  at::Tensor made(std::move(impl));
  if ((flags & kParameter) == 0) {
    if ((flags & kGrad) != 0) made.set_requires_grad(true);
    return THPVariable_Wrap(std::move(made));
  }
  PyObject* plain = THPVariable_Wrap(std::move(made));
  if (plain == nullptr) return nullptr;
  PyObject* parameter =
      PyObject_CallFunctionObjArgs(ParameterClass, plain, (flags & kGrad) != 0 ? Py_True : Py_False, nullptr);
  Py_DECREF(plain);
  return parameter;
  END_HANDLE_TH_ERRORS
}

PyTypeObject tensor_type = callable(
    "torchshm._tensors.tensor",
    "tensor(storage, dtype, offset, size, stride, flags)\n--\n\nThe torch.Tensor over a storage. Called by pickle.",
    new_tensor);

PyObject* reduce_tensor(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  if (!THPVariable_CheckExact(object)) return leave_to_python("reduce_other", object);
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!usual(object, tensor) || tensor.storage().nbytes() == 0) return leave_to_python("reduce_other", object);
  const bool parameter = Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(ParameterClass);
  const long flags = (tensor.requires_grad() ? kGrad : 0) | (parameter ? kParameter : 0);
  PyObject* storage = THPStorage_Wrap(tensor.storage());
  auto* dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(tensor.scalar_type()));
  PyObject* size = tuple_of(tensor.sizes());
  PyObject* stride = tensor.is_contiguous() ? Py_NewRef(Py_None) : tuple_of(tensor.strides());
  PyObject* reduced = nullptr;
  if (storage != nullptr && size != nullptr && stride != nullptr) {
    reduced = Py_BuildValue("O(OOLOOl)", &tensor_type, storage, dtype, static_cast<long long>(tensor.storage_offset()),
                            size, stride, flags);
  }
  Py_XDECREF(storage);
  Py_XDECREF(size);
  Py_XDECREF(stride);
  return reduced;
  END_HANDLE_TH_ERRORS
}

// ---- the switch

PyObject* switch_memory(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  int on = 0;
  unsigned long long member = 0;
  if (!PyArg_ParseTuple(arguments, "(pK):switch_memory", &on, &member)) return nullptr;
  const Target before = switch_to({on != 0, reinterpret_cast<void*>(static_cast<uintptr_t>(member))});
  return Py_BuildValue("(OK)", before.on ? Py_True : Py_False,
                       static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(before.member)));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"reduce_tensor", reduce_tensor, METH_O, "reduce_tensor(tensor)\n--\n\nThe reduce value of a tensor."},
    {"reduce_storage", reduce_storage, METH_O,
     "reduce_storage(storage)\n--\n\nThe reduce value of a torch.UntypedStorage, which moves into the pool."},
    {"blank", blank, METH_O,
     "blank(bytes)\n--\n\nA torch.UntypedStorage of uninitialised memory in the pool; None where it has no room."},
    {"switch_memory", switch_memory, METH_VARARGS,
     "switch_memory((on, member))\n--\n\nWhether this thread's tensors are made in the pool, and in which; returns how "
     "it was."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "torchshm._torch", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

int fill(PyObject* module) {
  // By name and not by import: PyCapsule_Import would look for it as attributes of modules.
  PyObject* core = PyImport_ImportModule("torchshm._C");
  if (core == nullptr) return -1;
  PyObject* capsule = PyObject_GetAttrString(core, "module_api");
  Py_DECREF(core);
  if (capsule == nullptr) return -1;
  const auto* functions = static_cast<const pool::ModuleApi*>(PyCapsule_GetPointer(capsule, pool::kModuleApi));
  Py_DECREF(capsule);
  if (functions == nullptr) return -1;
  if (functions->version != pool::ModuleApi::kVersion) {
    PyErr_SetString(PyExc_ImportError, "torchshm._torch and torchshm._C are of different builds");
    return -1;
  }
  set_api(functions);
  for (PyTypeObject* type : {&storage_type, &tensor_type}) {
    if (PyType_Ready(type) < 0 ||
        PyModule_AddObjectRef(module, std::strrchr(type->tp_name, '.') + 1, reinterpret_cast<PyObject*>(type)) < 0) {
      return -1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace torchshm::torch_room

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__torch() {
  PyObject* module = PyModule_Create(&torchshm::torch_room::definition);
  if (module != nullptr && torchshm::torch_room::fill(module) < 0) Py_CLEAR(module);
  return module;
}
