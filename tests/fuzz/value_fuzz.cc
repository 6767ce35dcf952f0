// Any bytes as the text of a name in a store, read by the C++ API. What comes of it lies inside its block; everything else is one of
// the API's errors.
//
// An input is a selector and a text. An even selector: the text as it is. An odd one: laid over (xor) the text of a true array.
#include <cstdlib>
#include <cstring>
#include <string>

#include "input.h"
#include "pool/array_wire.h"
#include "require.h"
#include "service/server.h"
#include "torchshm/store.h"

namespace torchshm::fuzz {
namespace {

constexpr size_t kBytes = 8192;

class Target {
 public:
  Target() {
    char folder[] = "/tmp/torchshm-fuzz-XXXXXX";
    REQUIRE(::mkdtemp(folder) != nullptr);
    ::setenv("XDG_RUNTIME_DIR", folder, 1);
    service::ServerOptions options;
    options.name = "fuzz";
    options.limits.limit = uint64_t{64} << 20;
    auto server = service::Server::start(options);
    REQUIRE(server.ok());
    server_ = server.take();
    store_.emplace(Store::connect("fuzz"));
    auto view = server_->member().allocate(kBytes, true);
    REQUIRE(view.ok() && view->length == kBytes);
    block_ = view->block;
    auto handle = server_->member().issue(block_);
    REQUIRE(handle.ok());
    pool::ArrayWire wire;
    wire.handle = *handle;
    wire.type_num = 12;
    wire.item_size = 8;
    wire.ndim = 2;
    wire.shape[0] = wire.shape[1] = 32;
    char text[1 + pool::kWireMost] = {'A'};
    true_.assign(text, 1 + pool::encode(wire, text + 1, server_->member().arena().header().secret));
    REQUIRE(one(true_) == 3);
    REQUIRE(
        one(R"(J{"regions":[[0,64,32]],"leaves":[{"k":"array","dtype":"<f4","shape":[8],"strides":[4],"r":0,"o":0}],)"
            R"("value":{"d":[["a",{"x":0}]]}})") == 1);
  }

  void one(Input input) {
    const bool over = input.byte() % 2 != 0;
    std::string text(reinterpret_cast<const char*>(input.rest()), input.left());
    if (over) {
      text.resize(true_.size());
      for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(text[i] ^ true_[i]);
    }
    (void)one(text);
  }

 private:
  // How many of load(), load_blob() and load_all() returned something.
  int one(const std::string& text) {
    REQUIRE(server_->catalogue().save("x", text, {block_}, {.overwrite = true}).ok());
    int loaded = 0;
    // Each starts from nothing.
    loaded += returns([&](const LoadOptions& how) { check(store_->load("x", how)); });
    loaded += returns([&](const LoadOptions& how) {
      const Blob blob = store_->load_blob("x", how);
      if (blob.size() != 0 && blob.data() != nullptr && inside(blob.data())) REQUIRE(inside(blob.end() - 1));
    });
    loaded += returns([&](const LoadOptions& how) {
      for (const auto& [path, array] : store_->load_all("x", how)) check(array);
    });
    return loaded;
  }

  template <class F>
  bool returns(F load) {
    try {
      load({});
      return true;
    } catch (const TypeError&) {
    } catch (const Error& error) {
      // Nothing but the text is wrong here.
      REQUIRE(std::strstr(error.what(), "is damaged: ") != nullptr);
    }
    return false;
  }

  bool inside(const void* at) {
    const auto found = server_->member().find(at);
    return found && found->block == block_;
  }

  void check(const Array& array) {
    REQUIRE(array.shape.size() == array.strides.size() && !name_of(array.dtype).empty());
    for (const int64_t n : array.shape) {
      REQUIRE(n >= 0);
      if (n == 0) return;
    }
    // With arithmetic that can't overflow.
    const auto* data = static_cast<const std::byte*>(array.data);
    __int128 low = 0, high = array.dtype.size();
    for (size_t i = 0; i < array.shape.size(); ++i) {
      const __int128 span = static_cast<__int128>(array.shape[i] - 1) * array.strides[i];
      (span < 0 ? low : high) += span;
    }
    REQUIRE(low >= -static_cast<__int128>(kBytes) && high <= kBytes);
    REQUIRE(inside(data + static_cast<ptrdiff_t>(low)) && inside(data + static_cast<ptrdiff_t>(high) - 1));
  }

  std::unique_ptr<service::Server> server_;
  std::optional<Store> store_;
  uint32_t block_ = 0;
  std::string true_;
};

}  // namespace
}  // namespace torchshm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* target = new torchshm::fuzz::Target;
  target->one(torchshm::fuzz::Input(data, size));
  return 0;
}
