// The store from C++: named arrays, tensors and bytes in shared memory. Needs C++17, and neither Python nor torch.
//
//   auto store = torchshm::Store::connect("era5");
//   torchshm::Array t2m = store.load("t2m");         // no copy: the memory that everybody has, read-only
//   const float* values = t2m.data_as<const float>();
//   store.save("mean", torchshm::array(numbers));    // one copy; none for what lies in the store already (Store::empty, load)
//
// Shared: the values, with every process that has the store, Python's included. Private: these objects.
// When a process dies: what it has saved stays, what it was about to save is not there, what it had loaded comes back to the store.
// Thread safety: all functions, from any thread, and in a child after fork(). One object of type Array or Blob: one thread at a time.
// Errors are exceptions, see torchshm::Error. docs/store.md says which values can be read here and which can't.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#define TORCHSHM_API __attribute__((visibility("default")))

// DLPack's own. This header works with any that declares them, before or after it, and needs none.
struct DLManagedTensor;
struct DLManagedTensorVersioned;

namespace torchshm {

// ---- errors

/// Base of all errors here, and what is thrown when the system fails or the store is damaged. A bad argument, such as an empty key, is a
/// std::invalid_argument.
class TORCHSHM_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
/// There is no such name.
class TORCHSHM_API KeyError : public Error {
 public:
  using Error::Error;
};
/// The name is taken, or a store of that name is being served.
class TORCHSHM_API KeyExistsError : public Error {
 public:
  using Error::Error;
};
/// The store's limit, or the memory of the machine or cgroup, is reached. The message says who holds what.
class TORCHSHM_API PoolFullError : public Error {
 public:
  using Error::Error;
};
/// Nobody serves a store of that name, or it is another user's.
class TORCHSHM_API StoreUnavailableError : public Error {
 public:
  using Error::Error;
};
/// Nobody has saved the name, or let go of the lock, in time.
class TORCHSHM_API TimeoutError : public Error {
 public:
  using Error::Error;
};
/// The value can't be had, or saved, in this form: a pickled object, a dtype that C++ has no type for, another shape of value.
class TORCHSHM_API TypeError : public Error {
 public:
  using Error::Error;
};

// ---- values

/// The type of an element: DLPack's DLDataType, field by field. `lanes` is 1.
struct DType {
  enum Code : uint8_t {
    kInt = 0,
    kUInt = 1,
    kFloat = 2,
    kBFloat = 4,
    kComplex = 5,
    kBool = 6,
    kFloat8e3m4 = 7,
    kFloat8e4m3 = 8,
    kFloat8e4m3b11fnuz = 9,
    kFloat8e4m3fn = 10,
    kFloat8e4m3fnuz = 11,
    kFloat8e5m2 = 12,
    kFloat8e5m2fnuz = 13,
    kFloat8e8m0fnu = 14
  };
  uint8_t code = kFloat;
  uint8_t bits = 32;
  uint16_t lanes = 1;

  /// Bytes of an element.
  int64_t size() const { return bits / 8; }
  friend bool operator==(DType a, DType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }
  friend bool operator!=(DType a, DType b) { return !(a == b); }
};
static_assert(sizeof(DType) == 4, "DLPack's");

/// NumPy's and torch's name, as in "float32", "bfloat16", "complex64". Throws TypeError for what is not known here.
TORCHSHM_API std::string name_of(DType dtype);

namespace detail {
template <class T>
struct IsComplex : std::false_type {};
template <template <class> class C, class T>
struct IsComplex<C<T>> : std::bool_constant<sizeof(C<T>) == 2 * sizeof(T) && std::is_floating_point_v<T>> {};
template <class T>
constexpr bool kIsElement = std::is_arithmetic_v<T> || std::is_same_v<T, std::byte> || IsComplex<T>::value;
}  // namespace detail

/// Of bool, std::byte, the integers, float, double, long double, std::complex<float> and <double>.
template <class T>
constexpr DType dtype_of() {
  using U = std::remove_cv_t<T>;
  static_assert(detail::kIsElement<U> && sizeof(U) <= 16, "no DType for this type: give one by its fields");
  constexpr auto bits = static_cast<uint8_t>(8 * sizeof(U));
  if constexpr (std::is_same_v<U, bool>) {
    return {DType::kBool, 8, 1};
  } else if constexpr (std::is_same_v<U, std::byte>) {
    return {DType::kUInt, 8, 1};
  } else if constexpr (std::is_integral_v<U>) {
    return {std::is_signed_v<U> ? DType::kInt : DType::kUInt, bits, 1};
  } else if constexpr (std::is_floating_point_v<U>) {
    return {DType::kFloat, bits, 1};
  } else {
    return {DType::kComplex, bits, 1};
  }
}

/// Bytes to save, of anything with data() and size(): std::string, std::vector, std::array, std::span. Owns nothing.
class Bytes {
 public:
  Bytes(const void* data, size_t size) : data_(static_cast<const std::byte*>(data)), size_(size) {}
  template <class C, class T = std::remove_pointer_t<decltype(std::declval<const C&>().data())>,
            class = std::enable_if_t<std::is_trivially_copyable_v<T>>>
  Bytes(const C& from) : Bytes(from.data(), from.size() * sizeof(T)) {}
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const std::byte* data_;
  size_t size_;
};

/// Bytes of a store. They are held as long as there is a copy of this, or of owner().
class Blob {
 public:
  Blob() = default;
  Blob(std::byte* data, size_t size, bool writeable, std::shared_ptr<void> owner)
      : data_(data), size_(size), writeable_(writeable), owner_(std::move(owner)) {}
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::byte* begin() const { return data_; }
  const std::byte* end() const { return data_ + size_; }
  std::string_view view() const { return {reinterpret_cast<const char*>(data_), size_}; }
  bool writeable() const { return writeable_; }
  /// Throws TypeError when they were loaded with Mode::kRead: writing there would end the process.
  TORCHSHM_API std::byte* mutable_data() const;
  const std::shared_ptr<void>& owner() const { return owner_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  bool writeable_ = false;
  std::shared_ptr<void> owner_;
};

/// Elements in memory, of a store or of anywhere: what numpy.ndarray is to Python. A copy is a further view of the same memory.
struct Array {
  /// What Python's load() returns for it.
  enum class Kind : uint8_t { kArray, kTensor };

  void* data = nullptr;  ///< the first element; null where there are none
  DType dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  ///< in bytes, one for each dimension; may be 0 or negative
  std::shared_ptr<void> owner;   ///< keeps `data` valid; empty: somebody else does
  bool writeable = true;         ///< false: writing to it ends the process (SIGSEGV)
  Kind kind = Kind::kArray;
  bool requires_grad = false;  ///< of a tensor

  /// Number of elements.
  int64_t size() const {
    int64_t n = 1;
    for (const int64_t each : shape) n *= each;
    return n;
  }
  int64_t nbytes() const { return size() * dtype.size(); }
  /// Whether the elements lie one after the other, the last dimension first.
  TORCHSHM_API bool is_contiguous() const;

  /// The elements as T, from the first one on. Throws TypeError for another dtype, and for a T that is not const when this is read-only.
  template <class T>
  T* data_as() const {
    check(dtype_of<T>(), !std::is_const_v<T>);
    return static_cast<T*>(data);
  }

 private:
  TORCHSHM_API void check(DType wanted, bool to_write) const;
};

/// Strides in bytes of a C-contiguous array. Throws std::invalid_argument for a negative size, or 2^63 bytes and more.
TORCHSHM_API std::vector<int64_t> contiguous_strides(DType dtype, const std::vector<int64_t>& shape);

/// An Array over memory of the caller's; C-contiguous unless `strides` (bytes) says otherwise. `owner` keeps the memory valid; without one
/// the caller does, as long as the Array is used. The memory may be const; the Array is read-only then.
template <class T>
Array array(T* data, std::vector<int64_t> shape, std::vector<int64_t> strides = {},
            std::shared_ptr<void> owner = nullptr) {
  Array made;
  made.data = const_cast<std::remove_const_t<T>*>(data);
  made.dtype = dtype_of<T>();
  made.shape = std::move(shape);
  made.strides = strides.empty() ? contiguous_strides(made.dtype, made.shape) : std::move(strides);
  made.owner = std::move(owner);
  made.writeable = !std::is_const_v<T>;
  return made;
}
/// Over all of a std::vector, std::array or std::span.
template <class C, class T = std::remove_pointer_t<decltype(std::declval<C&>().data())>>
Array array(C& from) {
  return array<T>(from.data(), std::vector<int64_t>{static_cast<int64_t>(from.size())});
}

/// A tensor of DLPack on the CPU. Takes it over, and calls its deleter when the last copy of the Array goes; on an error it stays the
/// caller's. Throws TypeError for another device, a dtype that name_of() does not know, or another major version of DLPack.
TORCHSHM_API Array from_dlpack(DLManagedTensor* tensor);
TORCHSHM_API Array from_dlpack(DLManagedTensorVersioned* tensor);
/// A tensor of DLPack that keeps the Array's owner until its deleter is called. The unversioned form can't say that something is read-only:
/// TypeError for what is (load it with Mode::kCopyOnWrite). TypeError also for strides that are no multiple of the element's size.
TORCHSHM_API DLManagedTensor* to_dlpack(const Array& array);
TORCHSHM_API DLManagedTensorVersioned* to_dlpack_versioned(const Array& array);

// ---- the store

/// What writing to a loaded value does, as in numpy.memmap.
enum class Mode : uint8_t {
  kReadWrite,   ///< "r+": everybody sees it
  kRead,        ///< "r": it ends the process
  kCopyOnWrite  ///< "c": it stays private to this process
};

using Nanoseconds = std::chrono::nanoseconds;
/// As long as it takes.
inline constexpr Nanoseconds kForever = Nanoseconds::max();

/// Bytes of memory that the machine has, or the tightest cgroup limit above this process if that is less: what a limit may be a share of.
TORCHSHM_API uint64_t memory_allowed();

/// What may become of a value that nobody uses, when the store needs room. Values go in the order kDrop, kSpill, kKeep, least recently used
/// first.
enum class Policy : uint8_t {
  kKeep,   ///< it goes to the spill directory, where there is one, and comes back when it is loaded
  kDrop,   ///< it is removed
  kSpill,  ///< as kKeep, but before what is kept
  kPin     ///< it stays in memory
};

struct StartOptions {
  uint64_t limit = 0;             ///< most bytes that the store takes; 0: half of what the machine or the cgroup allows
  Nanoseconds ttl{0};             ///< after which names go that were saved without one; 0: never
  uint32_t mode = 0600;           ///< permissions of the socket
  std::optional<uint32_t> group;  ///< whose members may use the store too; with a mode such as 0660
  std::string spill;              ///< directory, on a disk, for values that do not fit into memory; empty: none
  /// With `spill`: a value's memory is given up when the disk has its file. False: when the kernel has it, which then
  /// writes it out in its own time; several times faster while memory is to spare, and what the disk fails to take then is lost.
  bool spill_sync = true;
  /// Of values that are saved without one; default: kKeep, or what the store has that is there already.
  std::optional<Policy> policy = std::nullopt;
  std::optional<Nanoseconds>
      timeout;  ///< that savers and loaders wait for room; default: 10 s where room can be made, else none
  std::string hugepages = {};  ///< "auto", the default: transparent ones; "never"; "2MiB": those that are reserved
  bool prefault = false;       ///< take the memory up to the limit at the start, and keep it
  std::string numa = {};       ///< "local", the default; "interleave", "interleave:0,1", "bind:0,1" or "preferred:0"
  std::string file = {};       ///< path of a persistent store; empty: in memory
};

struct SaveOptions {
  bool overwrite = false;                       ///< replace what has that name; who holds the old value keeps it
  Nanoseconds ttl{0};                           ///< after which the name goes; 0: the store's default
  std::optional<Policy> policy = std::nullopt;  ///< default: the store's
};

struct LoadOptions {
  Mode mode = Mode::kRead;
  Nanoseconds timeout{0};  ///< to wait for a name that is not there yet
};

struct MakeOptions {
  Mode mode = Mode::kRead;
  Nanoseconds timeout = kForever;  ///< to wait for who is making it
  Nanoseconds ttl{0};              ///< after which the name goes, where it is made here; 0: the store's default
};

/// Figures about a name.
struct KeyInfo {
  std::string kind;     ///< "array", "values" or "object", as Python's Store.info() says
  uint64_t bytes = 0;   ///< of its blocks, or of its file
  uint64_t blocks = 0;  ///< how many
  std::chrono::system_clock::time_point created;
  std::optional<Nanoseconds> expires_in;  ///< nothing: never
  uint32_t pid = 0;                       ///< of who saved it
  bool on_disk = false;                   ///< and not in memory
  Policy policy = Policy::kKeep;
};

/// Figures about a store.
struct StoreInfo {
  std::string name;
  uint64_t names = 0;
  uint64_t live_bytes = 0, committed_bytes = 0, limit_bytes = 0;
  uint64_t saved = 0, removed = 0, expired = 0;  ///< names, since the store was made
  uint32_t service_pid = 0;                      ///< of the service, or of the last one
};

/// A lock of a store that is held, from Store::lock(): until release(), until this object is destroyed, or until the process dies, however
/// it dies. A forked child does not have what its parent holds.
class TORCHSHM_API Lock {
 public:
  Lock(Lock&& from) noexcept;
  Lock& operator=(Lock&& from) noexcept;
  ~Lock();
  /// Lets others have it. Throws Error when it is not held here: also in a forked child, where it was held in the parent.
  void release();
  /// Whether this object holds it, in this process.
  bool held() const;

 private:
  friend class Store;
  struct Impl;
  explicit Lock(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// A client of a store; with start() its service too. Copies are the same client, and the service ends with the last of them.
///
/// Saving, loading and removing work on shared memory and need no answer from the service: they go on while it is down.
class TORCHSHM_API Store {
 public:
  /// Serves a store from this process, by a thread of its own, and returns a client of it. A store of that name that is not served any more
  /// and that some process still has is taken over with all that is in it.
  /// Throws KeyExistsError when a store of that name is being served, std::invalid_argument for a bad name or options, and Error when the
  /// directory of sockets is not this user's alone.
  static Store start(const std::string& name, const StartOptions& options = {});
  /// Waits for a store that is about to start. Throws StoreUnavailableError when there is none in time, or when it is somebody else's.
  static Store connect(const std::string& name, Nanoseconds timeout = std::chrono::seconds(10));

  /// Saves an array or a tensor under a name: others see all of it or nothing. What lies in this store already (empty(), load()) is only
  /// named; anything else is copied once, without gaps.
  /// Throws KeyExistsError, PoolFullError; std::invalid_argument for a key that is empty or begins with a zero byte, more than 64
  /// dimensions, and strides that do not fit the shape; TypeError for a dtype that name_of() does not know.
  void save(std::string_view key, const Array& array, const SaveOptions& options = {}) const;
  /// Saves bytes; Python's load() returns a memoryview over them. Errors as above.
  void save_blob(std::string_view key, Bytes bytes, const SaveOptions& options = {}) const;

  /// Returns the array or tensor behind a name, without a copy.
  /// Throws KeyError when there is no such name and the timeout is 0, TimeoutError when the time is up, TypeError for other values.
  Array load(std::string_view key, const LoadOptions& options = {}) const;
  /// Returns the bytes behind a name: of a blob, of Python's bytes, bytearray and other buffers, or of an array or tensor that is
  /// C-contiguous, whatever its dtype. Without a copy, but for Python's bytes of up to 1 KiB. Errors as above.
  Blob load_blob(std::string_view key, const LoadOptions& options = {}) const;
  /// Returns the arrays and tensors in a list, tuple or dict, such as a state_dict, in their order; nested ones by their path, joined with
  /// '.'. Plain values in it are left out, an array alone has the path "". Errors as above.
  std::vector<std::pair<std::string, Array>> load_all(std::string_view key, const LoadOptions& options = {}) const;

  /// Returns what a name stands for; where there is none, exactly one process makes it by `make` and saves it, and the others, C++ or Python
  /// (`get_or_create`), wait and get the same memory. When the one at work fails, its caller gets what `make` has thrown; when it fails or
  /// dies, one of those who wait takes over. Throws TimeoutError when the time is up and another process is still at it. Errors of load()
  /// and save().
  Array get_or_create(std::string_view key, const std::function<Array()>& make, const MakeOptions& options = {}) const;
  /// Waits for an advisory lock and takes it: Python's `store.lock(key)`. It keeps out those who take it too, in this and in other processes,
  /// also this thread, and nobody else: values can be loaded and saved without. Many may hold it shared at once; or one, not shared. An empty
  /// key: the store's own lock, which has nothing to do with those of keys.
  /// Throws TimeoutError when the time is up and somebody else has it; a timeout of 0 is one try.
  Lock lock(std::string_view key = {}, bool shared = false, Nanoseconds timeout = kForever) const;

  /// An uninitialised array in the store's memory: filled and then saved, it is not copied. Writing to it later changes what others have
  /// loaded. Throws PoolFullError, std::invalid_argument.
  Array empty(DType dtype, const std::vector<int64_t>& shape) const;

  bool contains(std::string_view key) const;
  /// Frees a name at once; who holds the data keeps it. False when there is no such name.
  bool remove(std::string_view key) const;
  /// All names that begin with `prefix`, sorted.
  std::vector<std::string> keys(std::string_view prefix = {}) const;
  /// Number of names.
  uint64_t size() const;
  /// Throws KeyError.
  KeyInfo info(std::string_view key) const;
  StoreInfo info() const;

  std::string name() const;
  /// Whether the service is here.
  bool serving() const;
  /// Whether start() found a store that was there.
  bool took_over() const;
  /// Waits until a client asks the service that is here to stop (`torchshm stop`). False when the time is up, or a signal has come.
  bool wait_for_stop(Nanoseconds timeout) const;
  /// Ends the service, if it is here. Names and data stay, for whoever has the store.
  void stop() const;

 private:
  struct Impl;
  explicit Store(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace torchshm
