#include "python/lock_binding.h"

#include "python/errors.h"

namespace py = pybind11;

namespace torchshm::python {
namespace {

bool try_acquire(store::Lock& lock, bool shared) {
  auto locked = lock.try_acquire(shared);
  if (!locked) fail(locked.status());
  return *locked;
}

// Whether it was held.
bool release(store::Lock& lock) {
  Status done = lock.release();
  if (!done && done.code() != Code::kMissing) fail(done);
  return done.ok();
}

}  // namespace

std::unique_ptr<store::Lock> make_lock(std::shared_ptr<store::Catalogue> catalogue, std::string_view key) {
  return std::make_unique<store::Lock>(std::move(catalogue), key);
}

void add_lock(py::module_& m) {
  py::class_<store::Lock>(m, "Lock")
      .def("try_acquire", &try_acquire)
      .def("release", &release)
      .def_property_readonly("held", &store::Lock::held)
      .def_property_readonly("left_to_parent", &store::Lock::left_to_parent)
      .def_property_readonly("bell", &store::Lock::bell);
}

}  // namespace torchshm::python
