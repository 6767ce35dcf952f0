// Array and Blob, and their way to DLPack and back.
#include <limits>

#include "api/dlpack_abi.h"
#include "api/dtypes.h"
#include "pool/array_wire.h"
#include "torchshm/store.h"

namespace torchshm {
namespace {

using api::row_of;

bool contiguous(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, int64_t item) {
  int64_t step = item;
  for (size_t i = shape.size(); i-- > 0; step *= shape[i]) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1 && strides[i] != step) return false;
  }
  return true;
}

Array import(const DLTensor& tensor) {
  if (tensor.device.device_type != api::kCpu)
    throw TypeError("torchshm: a DLPack tensor on device type " + std::to_string(tensor.device.device_type) +
                    " can't be used here: bring it to the CPU (type 1)");
  if (tensor.ndim < 0 || tensor.ndim > pool::kMostDims)
    throw TypeError("torchshm: a DLPack tensor with " + std::to_string(tensor.ndim) + " dimensions");
  (void)name_of(tensor.dtype);  // throws for what is not known
  Array array;
  array.dtype = tensor.dtype;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides == nullptr) {
    array.strides = contiguous_strides(array.dtype, array.shape);
  } else {
    for (int i = 0; i < tensor.ndim; ++i) array.strides.push_back(tensor.strides[i] * array.dtype.size());
  }
  array.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  return array;
}

template <class Managed>
std::shared_ptr<void> own(Managed* tensor) {
  return {tensor, [](Managed* t) {
            if (t->deleter != nullptr) t->deleter(t);
          }};
}

// A managed tensor with all that its pointers lead to.
template <class Managed>
struct Exported {
  Managed managed{};
  std::vector<int64_t> shape, strides;
  std::shared_ptr<void> owner;
};

template <class Managed>
Managed* export_as(const Array& array) {
  (void)name_of(array.dtype);
  auto exported = std::make_unique<Exported<Managed>>();
  exported->shape = array.shape;
  for (const int64_t step : array.strides) {
    if (step % array.dtype.size() != 0)
      throw TypeError("torchshm: DLPack has no strides that are no multiple of the element's size: copy the array");
    exported->strides.push_back(step / array.dtype.size());
  }
  if (exported->strides.size() != exported->shape.size())
    throw std::invalid_argument("torchshm: an array has one stride for each dimension");
  exported->owner = array.owner;
  DLTensor& tensor = exported->managed.dl_tensor;
  tensor.data = array.data;
  tensor.device = {api::kCpu, 0};
  tensor.ndim = static_cast<int32_t>(array.shape.size());
  tensor.dtype = array.dtype;
  tensor.shape = exported->shape.data();
  tensor.strides = exported->strides.data();
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = [](Managed* self) { delete static_cast<Exported<Managed>*>(self->manager_ctx); };
  return &exported.release()->managed;
}

}  // namespace

std::string name_of(DType dtype) {
  const api::TypeRow* row = row_of(dtype);
  if (row == nullptr)
    throw TypeError("torchshm: no dtype of DLPack's code " + std::to_string(dtype.code) + " with " +
                    std::to_string(dtype.bits) + " bits and " + std::to_string(dtype.lanes) + " lanes is known here");
  return row->name;
}

std::byte* Blob::mutable_data() const {
  if (!writeable_)
    throw TypeError("torchshm: these bytes are read-only: load them with Mode::kCopyOnWrite or Mode::kReadWrite");
  return data_;
}

bool Array::is_contiguous() const { return contiguous(shape, strides, dtype.size()); }

void Array::check(DType wanted, bool to_write) const {
  if (wanted != dtype)
    throw TypeError("torchshm: this is an array of " + name_of(dtype) + " and not of " + name_of(wanted));
  if (to_write && !writeable)
    throw TypeError(
        "torchshm: this array is read-only: look at it as const, or load it with Mode::kCopyOnWrite or "
        "Mode::kReadWrite");
}

std::vector<int64_t> contiguous_strides(DType dtype, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = dtype.size();
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    if (shape[i] < 0 || __builtin_mul_overflow(step, shape[i] == 0 ? 1 : shape[i], &step))
      throw std::invalid_argument("torchshm: a shape with a negative size, or of more bytes than fit 64 bits");
  }
  return strides;
}

Array from_dlpack(DLManagedTensor* tensor) {
  Array array = import(tensor->dl_tensor);
  array.owner = own(tensor);
  return array;
}

Array from_dlpack(DLManagedTensorVersioned* tensor) {
  if (tensor->version.major != api::kMajor)
    throw TypeError("torchshm: a tensor of DLPack's major version " + std::to_string(tensor->version.major) +
                    "; only " + std::to_string(api::kMajor) + " is known here");
  Array array = import(tensor->dl_tensor);
  array.writeable = (tensor->flags & api::kReadOnly) == 0;
  array.owner = own(tensor);
  return array;
}

DLManagedTensor* to_dlpack(const Array& array) {
  if (!array.writeable)
    throw TypeError(
        "torchshm: DLPack's unversioned tensor can't say that this array is read-only: load it with "
        "Mode::kCopyOnWrite, or use to_dlpack_versioned()");
  return export_as<DLManagedTensor>(array);
}

DLManagedTensorVersioned* to_dlpack_versioned(const Array& array) {
  auto* tensor = export_as<DLManagedTensorVersioned>(array);
  tensor->version = {api::kMajor, api::kMinor};
  tensor->flags = array.writeable ? 0 : api::kReadOnly;
  return tensor;
}

}  // namespace torchshm
