#include "python/block_ref.h"

namespace torchshm::python {
namespace {

struct BlockRef {
  PyObject_HEAD pool::Member* member;
  std::byte* data;
  uint64_t length;
  uint32_t block;
  pool::Mode mode;
};

void dealloc(PyObject* self) {
  auto* ref = reinterpret_cast<BlockRef*>(self);
  ref->member->release(ref->block, ref->mode);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
}

PyObject* repr(PyObject* self) {
  auto* ref = reinterpret_cast<BlockRef*>(self);
  return PyUnicode_FromFormat("<torchshm block %u, %llu bytes>", ref->block,
                              static_cast<unsigned long long>(ref->length));
}

PyTypeObject block_ref_type() {
  PyTypeObject type{};
  type.ob_base = {PyObject_HEAD_INIT(nullptr) 0};
  type.tp_name = "torchshm._C.BlockRef";
  type.tp_doc = "Keeps a block of the pool held. Found as the base of arrays that lie in the pool.";
  type.tp_basicsize = sizeof(BlockRef);
  type.tp_flags = Py_TPFLAGS_DEFAULT;
  type.tp_dealloc = dealloc;
  type.tp_repr = repr;
  return type;
}

PyTypeObject type = block_ref_type();

}  // namespace

PyObject* make_block_ref(pool::Member* member, const pool::Member::View& view, pool::Mode mode) {
  auto* ref = PyObject_New(BlockRef, &type);
  if (ref == nullptr) {
    member->release(view.block, mode);
    return nullptr;
  }
  ref->member = member;
  ref->data = view.data;
  ref->length = view.length;
  ref->block = view.block;
  ref->mode = mode;
  return reinterpret_cast<PyObject*>(ref);
}

std::optional<uint32_t> block_of(PyObject* object, const pool::Member* member) {
  auto* ref = reinterpret_cast<BlockRef*>(object);
  if (Py_TYPE(object) != &type || ref->member != member) return std::nullopt;
  return ref->block;
}

int add_block_ref_type(PyObject* module) {
  if (PyType_Ready(&type) < 0) return -1;
  return PyModule_AddObjectRef(module, "BlockRef", reinterpret_cast<PyObject*>(&type));
}

}  // namespace torchshm::python
