// DLPack's structs as any other library lays them out (https://dmlc.github.io/dlpack/latest/c_api.html, version 1). Not installed: a program
// brings the header that it has, and these are incomplete types to torchshm/store.h.
//
// Values only; nothing is shared between processes.
#pragma once

#include <cstdint>

#include "torchshm/store.h"

struct DLDevice {
  int32_t device_type;  // kCpu
  int32_t device_id;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  torchshm::DType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C-contiguous
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

namespace torchshm::api {

constexpr int32_t kCpu = 1;
constexpr uint32_t kMajor = 1, kMinor = 0;
constexpr uint64_t kReadOnly = 1;

static_assert(sizeof(DLTensor) == 48 && sizeof(DLManagedTensor) == 64 && sizeof(DLManagedTensorVersioned) == 80);

}  // namespace torchshm::api
