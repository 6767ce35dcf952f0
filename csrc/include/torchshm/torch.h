// at::Tensor in the store: what torchshm/store.h does for arrays, for torch, with no copy. Header-only; include it where torch is there.
//
//   torchshm::save(store, "weight", tensor);                       // Python: store.load("weight") is a torch.Tensor
//   at::Tensor weight = torchshm::load_tensor(store, "weight");    // the store's memory; a write stays private to this process
//
// Shared, private, deaths and threads: as torchshm/store.h. A tensor keeps the memory that it looks at held, and so do all its views.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "torchshm/store.h"

namespace torchshm {

/// Throws TypeError for quantised and other types that are no plain numbers.
inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kBool:
      return {DType::kBool, 8, 1};
    case at::kChar:
      return {DType::kInt, 8, 1};
    case at::kByte:
      return {DType::kUInt, 8, 1};
    case at::kShort:
      return {DType::kInt, 16, 1};
    case at::kUInt16:
      return {DType::kUInt, 16, 1};
    case at::kInt:
      return {DType::kInt, 32, 1};
    case at::kUInt32:
      return {DType::kUInt, 32, 1};
    case at::kLong:
      return {DType::kInt, 64, 1};
    case at::kUInt64:
      return {DType::kUInt, 64, 1};
    case at::kHalf:
      return {DType::kFloat, 16, 1};
    case at::kFloat:
      return {DType::kFloat, 32, 1};
    case at::kDouble:
      return {DType::kFloat, 64, 1};
    case at::kBFloat16:
      return {DType::kBFloat, 16, 1};
    case at::kComplexHalf:
      return {DType::kComplex, 32, 1};
    case at::kComplexFloat:
      return {DType::kComplex, 64, 1};
    case at::kComplexDouble:
      return {DType::kComplex, 128, 1};
    case at::kFloat8_e4m3fn:
      return {DType::kFloat8e4m3fn, 8, 1};
    case at::kFloat8_e4m3fnuz:
      return {DType::kFloat8e4m3fnuz, 8, 1};
    case at::kFloat8_e5m2:
      return {DType::kFloat8e5m2, 8, 1};
    case at::kFloat8_e5m2fnuz:
      return {DType::kFloat8e5m2fnuz, 8, 1};
    default:
      throw TypeError(std::string("torchshm: a tensor of ") + c10::toString(type) + " can't lie in a store");
  }
}

/// Throws TypeError for what torch has no type for.
inline at::ScalarType scalar_type_of(DType dtype) {
  for (const at::ScalarType type : {at::kFloat,         at::kDouble,         at::kHalf,
                                    at::kBFloat16,      at::kLong,           at::kInt,
                                    at::kShort,         at::kChar,           at::kByte,
                                    at::kBool,          at::kUInt16,         at::kUInt32,
                                    at::kUInt64,        at::kComplexHalf,    at::kComplexFloat,
                                    at::kComplexDouble, at::kFloat8_e4m3fn,  at::kFloat8_e4m3fnuz,
                                    at::kFloat8_e5m2,   at::kFloat8_e5m2fnuz}) {
    if (dtype_of(type) == dtype) return type;
  }
  throw TypeError("torchshm: torch has no dtype " + name_of(dtype));
}

/// A tensor over the Array's memory, which keeps its owner. Writing to it does what the Array's mode says: torch has no read-only tensors,
/// so TypeError for an Array that is read-only. Also for negative strides and those that are no multiple of the element's size.
inline at::Tensor to_tensor(const Array& array) {
  const auto options = at::TensorOptions().dtype(scalar_type_of(array.dtype));
  at::Tensor tensor;
  if (array.size() == 0) {
    tensor = at::empty(array.shape, options);
  } else {
    if (!array.writeable)
      throw TypeError("torchshm: torch has no read-only tensors: load the array with Mode::kCopyOnWrite");
    std::vector<int64_t> strides;
    for (const int64_t step : array.strides) {
      if (step < 0 || step % array.dtype.size() != 0)
        throw TypeError(
            "torchshm: torch has no negative strides, and none that are no multiple of the element's size: copy the "
            "array");
      strides.push_back(step / array.dtype.size());
    }
    tensor = at::from_blob(
        array.data, array.shape, strides, [owner = array.owner](void*) mutable { owner.reset(); }, options);
  }
  return array.requires_grad ? tensor.requires_grad_() : tensor;
}

/// An Array over the tensor's memory, which keeps the tensor. The values and requires_grad, no graph, as torch.save has it.
/// Throws TypeError for tensors on other devices, sparse, quantised and nested ones.
inline Array from_tensor(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu())
    throw TypeError("torchshm: a tensor on " + tensor.device().str() + " can't lie in a store: save tensor.cpu()");
  if (tensor.layout() != at::kStrided || tensor.is_quantized() || tensor.is_nested())
    throw TypeError("torchshm: only strided tensors can be saved from C++: save tensor.to_dense() or its parts");
  auto bare = std::make_shared<at::Tensor>(tensor.detach().resolve_conj().resolve_neg());
  Array array;
  array.dtype = dtype_of(bare->scalar_type());
  array.data = bare->data_ptr();
  array.shape = bare->sizes().vec();
  for (const int64_t step : bare->strides()) array.strides.push_back(step * array.dtype.size());
  array.kind = Array::Kind::kTensor;
  array.requires_grad = tensor.requires_grad();
  array.owner = std::move(bare);
  return array;
}

/// As Store::save(). Python's load() returns a torch.Tensor.
inline void save(const Store& store, std::string_view key, const at::Tensor& tensor, const SaveOptions& options = {}) {
  store.save(key, from_tensor(tensor), options);
}

/// As Store::load(), of an array or a tensor. The default mode is copy-on-write, since a tensor can't be read-only: a write stays private to
/// this process. Mode::kRead is a TypeError.
inline at::Tensor load_tensor(const Store& store, std::string_view key,
                              const LoadOptions& options = {Mode::kCopyOnWrite, Nanoseconds{0}}) {
  return to_tensor(store.load(key, options));
}

/// As Store::load_all(): the tensors of a state_dict by their names.
inline std::vector<std::pair<std::string, at::Tensor>> load_tensors(const Store& store, std::string_view key,
                                                                    const LoadOptions& options = {Mode::kCopyOnWrite,
                                                                                                  Nanoseconds{0}}) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, array] : store.load_all(key, options)) tensors.emplace_back(name, to_tensor(array));
  return tensors;
}

/// An uninitialised tensor in the store's memory, as Store::empty(): filled and then saved, it is not copied.
inline at::Tensor empty_tensor(const Store& store, at::IntArrayRef sizes, at::ScalarType type = at::kFloat) {
  return to_tensor(store.empty(dtype_of(type), sizes.vec()));
}

}  // namespace torchshm
