#include "torch/memory.h"

#include <c10/core/CPUAllocator.h>

#include <mutex>

namespace torchshm::torch_room {
namespace {

const pool::ModuleApi* functions = nullptr;
thread_local Target current;

void release(void* data) { (void)api().give_back(data); }

// Before torch's own, to which it leaves whatever the pool does not take.
class Allocator final : public c10::Allocator {
 public:
  explicit Allocator(c10::Allocator* before) : before_(before), release_before_(before->raw_deleter()) {}

  at::DataPtr allocate(size_t bytes) override {
    if (current.on && bytes > 0) {
      if (void* data = api().allocate(current.member, bytes); data != nullptr) return over(data);
    }
    return before_->allocate(bytes);
  }
  bool is_simple_data_ptr(const at::DataPtr& data) const override { return data.get() == data.get_context(); }
  // Of raw_allocate(): it may have been either's.
  at::DeleterFnPtr raw_deleter() const override { return release_before_ == nullptr ? nullptr : &release_either; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  static Allocator* installed;

 private:
  static void release_either(void* data) {
    if (!api().give_back(data)) installed->release_before_(data);
  }

  c10::Allocator* before_;
  at::DeleterFnPtr release_before_;
};

Allocator* Allocator::installed = nullptr;

}  // namespace

const pool::ModuleApi& api() { return *functions; }
void set_api(const pool::ModuleApi* api) { functions = api; }

Target switch_to(Target target) {
  static std::once_flag once;
  if (target.on) {
    std::call_once(once, [] {
      Allocator::installed = new Allocator(c10::GetCPUAllocator());  // for good: storages refer to it
      c10::SetCPUAllocator(Allocator::installed, UINT8_MAX);
    });
  }
  const Target before = current;
  current = target;
  return before;
}

at::DataPtr over(void* data) { return {data, data, &release, at::Device(at::kCPU)}; }

bool is_ours(const at::DataPtr& memory) { return memory.get_deleter() == &release; }

c10::Storage make_storage(void* data, uint64_t bytes) {
  return c10::Storage(
      c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, over(data), nullptr, false));
}

}  // namespace torchshm::torch_room
