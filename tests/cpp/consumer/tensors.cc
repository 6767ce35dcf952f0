// What a libtorch program does with a store, for tests/python/test_cpp_api.py.
#include <ATen/DLConvertor.h>
#include <ATen/Functions.h>
#include <torchshm/torch.h>

#include <optional>

#include "commands.h"

namespace {

std::optional<torchshm::Store> store;
std::map<std::string, at::Tensor> held;

std::string word(std::istringstream& from) {
  std::string w;
  from >> w;
  return w;
}

std::string told(const at::Tensor& t) {
  const at::Tensor plain = t.detach().contiguous();
  return std::string(c10::toString(t.scalar_type())) + ' ' + joined(t.sizes().vec()) + ' ' + joined(t.strides().vec()) +
         (t.requires_grad() ? " grad " : " plain ") + hex_of(plain.data_ptr(), plain.nbytes());
}

std::string save(std::istringstream&) {
  const at::Tensor base = at::arange(24, at::kFloat).reshape({2, 3, 4});
  torchshm::save(*store, "plain", base);
  torchshm::save(*store, "permuted", base.permute({2, 0, 1}));
  torchshm::save(*store, "sliced", base.slice(2, 0, 4, 2));
  torchshm::save(*store, "bfloat16", base.to(at::kBFloat16));
  torchshm::save(*store, "grad", base.clone().requires_grad_());
  torchshm::save(*store, "complex", at::complex(base, base).conj());
  torchshm::save(*store, "scalar", at::scalar_tensor(3.5));
  torchshm::save(*store, "empty", at::empty({0, 3}));
  return "done";
}

}  // namespace

int main() {
  return obey({
      {"connect",
       [](auto& from) {
         store = torchshm::Store::connect(word(from));
         return store->name();
       }},
      {"save", save},
      {"load",
       [](auto& from) {
         const std::string key = word(from);
         return told(torchshm::load_tensor(*store, key));
       }},
      {"load_all",
       [](auto& from) {
         std::string made;
         for (const auto& [name, tensor] : torchshm::load_tensors(*store, word(from)))
           made += name + '=' + std::to_string(tensor.detach().sum().template item<double>()) + ' ';
         return made;
       }},
      {"hold",
       [](auto& from) {
         const std::string key = word(from), mode = word(from);
         held[key] = torchshm::load_tensor(*store, key, mode_of(mode));
         return told(held[key]);
       }},
      {"add",
       [](auto& from) {
         held.at(word(from)).add_(1);
         return std::string("done");
       }},
      {"see", [](auto& from) { return told(held.at(word(from))); }},
      {"drop",
       [](auto& from) {
         held.erase(word(from));
         return std::string("done");
       }},
      {"make",
       [](auto& from) {
         const std::string key = word(from);
         held[key] = torchshm::empty_tensor(*store, {1000});
         held[key].fill_(7);
         const uint64_t before = store->info().live_bytes;
         torchshm::save(*store, key, held[key]);
         return std::to_string(store->info().live_bytes - before);
       }},
      // ---- through DLPack, whose structs are torch's own here
      {"into_dlpack",
       [](auto& from) {
         const std::string key = word(from);
         const at::Tensor t = at::arange(6, at::kLong).reshape({2, 3}).t();
         store->save(key, torchshm::from_dlpack(at::toDLPack(t)));
         store->save(key + "_versioned", torchshm::from_dlpack(at::toDLPackVersioned(t)));
         return told(t);
       }},
      {"from_dlpack",
       [](auto& from) {
         const std::string key = word(from);
         const torchshm::LoadOptions private_copy{torchshm::Mode::kCopyOnWrite, {}};
         return told(at::fromDLPack(torchshm::to_dlpack(store->load(key, private_copy)))) + " | " +
                told(at::fromDLPackVersioned(torchshm::to_dlpack_versioned(store->load(key, private_copy))));
       }},
      {"save_sparse",
       [](auto&) {
         torchshm::save(*store, "sparse", at::eye(3).to_sparse());
         return std::string("done");
       }},
  });
}
