// What a C++ program does with a store, for tests/python/test_cpp_api.py. Commands and their arguments are read from standard input.
#include "commands.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <complex>
#include <cstring>
#include <optional>
#include <thread>
#include <vector>

// Any header with DLPack's structs will do; here are the two that are used, as the specification has them.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  torchshm::DType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

namespace {

using torchshm::Array;
using torchshm::DType;

std::optional<torchshm::Store> store;
std::map<std::string, Array> held;
std::map<std::string, torchshm::Blob> blobs;
std::map<std::string, torchshm::Lock> locks;

// Elements in C order, whatever the strides.
std::string elements(const Array& a) {
  std::string bytes;
  std::vector<int64_t> at(a.shape.size());
  for (int64_t n = a.size(); n > 0; --n) {
    const auto* from = static_cast<const char*>(a.data);
    for (size_t i = 0; i < at.size(); ++i) from += at[i] * a.strides[i];
    bytes.append(from, static_cast<size_t>(a.dtype.size()));
    for (size_t i = at.size(); i-- > 0;) {
      if (++at[i] < a.shape[i]) break;
      at[i] = 0;
    }
  }
  return hex_of(bytes.data(), bytes.size());
}

std::string told(const Array& a) {
  return name_of(a.dtype) + ' ' + joined(a.shape) + ' ' + joined(a.strides) + ' ' + (a.writeable ? "w" : "r") + ' ' +
         (a.kind == Array::Kind::kTensor ? "tensor" : "array") + (a.requires_grad ? "+grad" : "") + ' ' + elements(a);
}

std::string word(std::istringstream& from) {
  std::string w;
  from >> w;
  return w;
}

template <class T>
void save_as(const std::string& key) {
  std::vector<T> numbers(6);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<T>(i);
  store->save(key, torchshm::array(numbers.data(), {2, 3}));
}

std::string save_dtypes(std::istringstream&) {
  bool truths[6] = {false, true, true, true, true, true};
  store->save("bool", torchshm::array(truths, {2, 3}));
  save_as<int8_t>("int8");
  save_as<uint8_t>("uint8");
  save_as<int16_t>("int16");
  save_as<uint16_t>("uint16");
  save_as<int32_t>("int32");
  save_as<uint32_t>("uint32");
  save_as<int64_t>("int64");
  save_as<uint64_t>("uint64");
  save_as<long long>("longlong");
  save_as<float>("float32");
  save_as<double>("float64");
  save_as<long double>("longdouble");
  save_as<std::complex<float>>("complex64");
  save_as<std::complex<double>>("complex128");
  uint16_t bits[] = {0x3f80, 0x4000};
  Array half = torchshm::array(bits, {2});
  half.dtype = {DType::kFloat, 16};
  store->save("float16", half);
  half.dtype = {DType::kBFloat, 16};
  store->save("bfloat16", half);
  return "done";
}

std::string save_layouts(std::istringstream&) {
  std::vector<int32_t> n(24);
  for (size_t i = 0; i < n.size(); ++i) n[i] = static_cast<int32_t>(i);
  const int32_t* last = n.data() + 23;
  store->save("c", torchshm::array(n.data(), {4, 6}));
  store->save("fortran", torchshm::array(n.data(), {6, 4}, {4, 24}));
  store->save("gaps", torchshm::array(n.data(), {4, 3}, {24, 8}));
  store->save("backwards", torchshm::array(last, {24}, {-4}));
  store->save("broadcast", torchshm::array(n.data() + 5, {3, 2}, {0, 0}));
  store->save("scalar", torchshm::array(n.data() + 7, {}));
  store->save("empty", torchshm::array(n.data(), {0, 5}));
  store->save("vector", torchshm::array(n));
  const std::array<double, 2> pair{1.5, 2.5};
  store->save("const", torchshm::array(pair));
  return "done";
}

struct Exporter {
  std::vector<float> values{1, 2, 3, 4, 5, 6};
  int64_t shape[2] = {3, 2}, strides[2] = {1, 3};  // in elements
  DLManagedTensor tensor{};
  static int living;
  Exporter() {
    ++living;
    tensor.dl_tensor = {values.data() - 1, {1, 0}, 2, {DType::kFloat, 32, 1}, shape, strides, sizeof(float)};
    tensor.manager_ctx = this;
    tensor.deleter = [](DLManagedTensor* self) { delete static_cast<Exporter*>(self->manager_ctx); };
  }
  ~Exporter() { --living; }
};
int Exporter::living = 0;

std::string save_dlpack(std::istringstream&) {
  {
    const Array imported = torchshm::from_dlpack(&(new Exporter)->tensor);
    if (Exporter::living != 1) return "freed too early";
    store->save("dlpack", imported);
  }
  return Exporter::living == 0 ? "done" : "not freed";
}

// A loaded array as another library gets it, after the Array itself is gone.
std::string export_dlpack(std::istringstream& from) {
  const std::string key = word(from), mode = word(from);
  DLManagedTensor* tensor = torchshm::to_dlpack(store->load(key, mode_of(mode)));
  store->remove(key);
  const DLTensor& t = tensor->dl_tensor;
  const std::string told = std::to_string(t.ndim) + ' ' + std::to_string(t.shape[0]) + ' ' +
                           std::to_string(t.strides[0]) + ' ' + hex_of(static_cast<char*>(t.data) + t.byte_offset, 8);
  const uint64_t before = store->info().live_bytes;
  tensor->deleter(tensor);
  return told + (store->info().live_bytes < before ? " freed" : " kept");
}

torchshm::Nanoseconds time_in(std::istringstream& from) {
  double seconds = 0;
  from >> seconds;
  return torchshm::Nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

// How a name comes to be: in the store's memory; by an error; or when a line comes.
std::string create(std::istringstream& from) {
  const std::string how = word(from);
  torchshm::MakeOptions options;
  options.timeout = time_in(from);
  const std::string key = word(from);
  bool made = false;
  const auto make = [&] {
    made = true;
    if (how == "fail") throw std::runtime_error("out of ideas");
    if (how == "slowly") {
      std::cout << "making" << std::endl;
      std::string line;
      std::getline(std::cin, line);
    }
    Array array = store->empty(torchshm::dtype_of<double>(), {2});
    array.data_as<double>()[0] = 1;
    array.data_as<double>()[1] = 2;
    return array;
  };
  const Array got = store->get_or_create(key, make, options);
  return told(got) + (made ? " made" : " found");
}

// A child that is forked while a lock is held.
std::string fork_locked(std::istringstream& from) {
  torchshm::Lock& lock = locks.at(word(from));
  const pid_t pid = ::fork();
  if (pid == 0) {
    bool refused = false;
    try {
      lock.release();
    } catch (const torchshm::Error&) {
      refused = true;
    }
    ::_exit(refused && !lock.held() ? 0 : 1);
  }
  int status = -1;
  ::waitpid(pid, &status, 0);
  return std::to_string(status) + (lock.held() ? " held" : " lost");
}

std::string seconds_of(const torchshm::KeyInfo& info) {
  return info.expires_in ? std::to_string(info.expires_in->count() / 1'000'000'000) : "never";
}

}  // namespace

int main() {
  return obey({
      {"connect",
       [](auto& from) {
         const std::string name = word(from);
         double seconds = 10;
         from >> seconds;
         store = torchshm::Store::connect(name, torchshm::Nanoseconds(static_cast<int64_t>(seconds * 1e9)));
         return store->name();
       }},
      {"start",
       [](auto& from) {
         torchshm::StartOptions options;
         options.limit = uint64_t{64} << 20;
         store = torchshm::Store::start(word(from), options);
         return std::string(store->serving() ? "serving" : "not serving") + (store->took_over() ? " again" : "");
       }},
      {"stop",
       [](auto&) {
         store->stop();
         return std::string(store->serving() ? "serving" : "not serving");
       }},
      {"save_dtypes", save_dtypes},
      {"save_layouts", save_layouts},
      {"save_dlpack", save_dlpack},
      {"export_dlpack", export_dlpack},
      {"load",
       [](auto& from) {
         const std::string key = word(from), mode = word(from);
         return told(store->load(key, mode_of(mode)));
       }},
      {"wait",
       [](auto& from) {
         const std::string key = word(from);
         torchshm::LoadOptions options;
         options.timeout = time_in(from);
         return told(store->load(key, options));
       }},
      {"load_all",
       [](auto& from) {
         std::string made;
         for (const auto& [path, array] : store->load_all(word(from)))
           made += path + '=' + name_of(array.dtype) + ':' + joined(array.shape) + ' ';
         return made;
       }},
      {"blob",
       [](auto& from) {
         const std::string key = word(from), mode = word(from);
         const auto blob = store->load_blob(key, mode_of(mode));
         return hex_of(blob.data(), blob.size()) + (blob.writeable() ? " w" : " r");
       }},
      {"save_blob",
       [](auto& from) {
         const std::string key = word(from), text = word(from);
         store->save_blob(key, text);
         return std::string("done");
       }},
      // ---- memory in common
      {"hold",
       [](auto& from) {
         const std::string key = word(from), mode = word(from);
         held[key] = store->load(key, mode_of(mode));
         return told(held[key]);
       }},
      {"make",  // float64 in the store's memory
       [](auto& from) {
         const std::string key = word(from);
         int64_t size = 0;
         from >> size;
         Array made = store->empty(torchshm::dtype_of<double>(), {size});
         for (int64_t i = 0; i < size; ++i) made.template data_as<double>()[i] = static_cast<double>(i);
         const uint64_t before = store->info().live_bytes;
         store->save(key, made);
         held[key] = made;
         return std::to_string(store->info().live_bytes - before);
       }},
      {"alias",  // a further name for what is held
       [](auto& from) {
         const std::string key = word(from), name = word(from);
         const uint64_t before = store->info().live_bytes;
         store->save(name, held.at(key));
         return std::to_string(store->info().live_bytes - before);
       }},
      {"set",
       [](auto& from) {
         const std::string key = word(from);
         int64_t index = 0;
         double value = 0;
         from >> index >> value;
         held.at(key).template data_as<double>()[index] = value;
         return std::string("done");
       }},
      {"get",
       [](auto& from) {
         const std::string key = word(from);
         int64_t index = 0;
         from >> index;
         return std::to_string(held.at(key).template data_as<const double>()[index]);
       }},
      {"drop",
       [](auto& from) {
         held.erase(word(from));
         return std::string("done");
       }},
      {"threads",  // each loads what all have, and saves and replaces names of its own
       [](auto& from) {
         const std::string key = word(from);
         std::vector<std::thread> threads;
         std::atomic<int> right{0};
         for (int t = 0; t < 4; ++t) {
           threads.emplace_back([&, t] {
             const std::string own = "thread" + std::to_string(t);
             for (int i = 0; i < 500; ++i) {
               double value = t * 1000 + i;
               store->save(own, torchshm::array(&value, {}), {true});
               const Array all = store->load(key), mine = store->load(own);
               right += all.template data_as<const double>()[9] == 9 && *mine.template data_as<const double>() == value;
             }
           });
         }
         for (std::thread& each : threads) each.join();
         return std::to_string(right);
       }},
      {"fork",  // a child saves a copy of what is held, and says nothing
       [](auto& from) {
         const std::string key = word(from), name = word(from);
         const pid_t pid = ::fork();
         if (pid == 0) {
           const Array& seen = held.at(key);
           std::vector<double> own(seen.template data_as<const double>(),
                                   seen.template data_as<const double>() + seen.size());
           store->save(name, torchshm::array(own));
           held.clear();
           store.reset();
           ::_exit(0);
         }
         int status = -1;
         ::waitpid(pid, &status, 0);
         return std::to_string(status);
       }},
      // ---- working together
      {"create", create},
      {"lock",  // without a key: the store's own
       [](auto& from) {
         const bool shared = word(from) == "shared";
         const auto time = time_in(from);
         const std::string key = word(from);
         locks.insert_or_assign(key, store->lock(key, shared, time));
         return std::string(locks.at(key).held() ? "held" : "not held");
       }},
      {"unlock",
       [](auto& from) {
         locks.at(word(from)).release();
         return std::string("done");
       }},
      {"drop_lock",
       [](auto& from) {
         locks.erase(word(from));
         return std::string("done");
       }},
      {"fork_locked", fork_locked},
      // ---- names
      {"contains", [](auto& from) { return std::string(store->contains(word(from)) ? "yes" : "no"); }},
      {"remove", [](auto& from) { return std::string(store->remove(word(from)) ? "yes" : "no"); }},
      {"keys",
       [](auto& from) {
         std::string made;
         for (const std::string& key : store->keys(word(from))) made += key + ' ';
         return made;
       }},
      {"info",
       [](auto& from) {
         const auto info = store->info(word(from));
         return info.kind + ' ' + std::to_string(info.bytes) + ' ' + std::to_string(info.pid) + ' ' + seconds_of(info);
       }},
      {"save_for",  // seconds
       [](auto& from) {
         const std::string key = word(from);
         int64_t seconds = 0;
         from >> seconds;
         double one = 1;
         store->save(key, torchshm::array(&one, {}), {false, std::chrono::seconds(seconds)});
         return std::string("done");
       }},
      {"replace",
       [](auto& from) {
         double two = 2;
         store->save(word(from), torchshm::array(&two, {}), {true});
         return std::string("done");
       }},
      {"save_empty_key",
       [](auto&) {
         store->save("", torchshm::array("x", {1}));
         return std::string("done");
       }},
      {"save_wrong_strides",
       [](auto&) {
         double one = 1;
         store->save("wrong", torchshm::array(&one, {1}, {8, 8}));
         return std::string("done");
       }},
  });
}
