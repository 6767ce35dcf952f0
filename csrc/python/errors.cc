#include "python/errors.h"

#include <pybind11/pybind11.h>

namespace torchshm::python {

PyObject* lenient_text(const std::string& text) {
  return PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace");
}

PyObject* raise_named(const char* name, const std::string& message) {
  PyObject* errors = PyImport_ImportModule("torchshm.errors");
  PyObject* type = errors == nullptr ? nullptr : PyObject_GetAttrString(errors, name);
  PyObject* text = type == nullptr ? nullptr : lenient_text(message);
  if (text != nullptr) PyErr_SetObject(type, text);
  Py_XDECREF(text);
  Py_XDECREF(type);
  Py_XDECREF(errors);
  return nullptr;
}

PyObject* raise(const Status& status) {
  switch (status.code()) {
    case Code::kFull:
      return raise_named("PoolFullError", status.what());
    case Code::kStale:
      return raise_named(
          "StaleHandleError",
          status.what() + ". A message can be unpickled once; again only while somebody still uses what it carried");
    case Code::kForeign:
      return raise_named(
          "StoreUnavailableError",
          "this array lies in the shared-memory pool of another family of processes. Only processes that were started "
          "by "
          "one another through multiprocessing, after torchshm.register(), share a pool. To hand it to an unrelated "
          "process use a store: torchshm.start(name) in one and torchshm.connect(name) in the other; or pickle inside "
          "`with torchshm.inline():`");
    case Code::kInvalid:
      return raise_named("StaleHandleError", "not a valid torchshm handle: " + status.what());
    case Code::kExists:
      return raise_named("KeyExistsError", status.what());
    case Code::kMissing:
      return raise_named("StoreUnavailableError", status.what());
    default:
      return raise_named("TorchshmError", status.what());
  }
}

void fail(const Status& status) {
  (void)raise(status);
  throw pybind11::error_already_set();
}

void fail_in_store(const Status& status) {
  if (status.code() != Code::kInvalid) fail(status);
  PyErr_SetString(PyExc_ValueError, ("torchshm: " + status.what()).c_str());
  throw pybind11::error_already_set();
}

void fail_unavailable(const Status& status) {
  if (status.code() != Code::kInvalid) fail(status);
  (void)raise_named("StoreUnavailableError", status.what());
  throw pybind11::error_already_set();
}

}  // namespace torchshm::python
