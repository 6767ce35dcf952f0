#include "python/numpy_api.h"
// NumPy's header first.
#include "python/store_file_binding.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "pool/array_wire.h"
#include "python/errors.h"
#include "python/rebuild.h"
#include "python/without_gil.h"
#include "store/store_file.h"

namespace py = pybind11;

namespace torchshm::python {
namespace {

using pool::Mode;

constexpr char kArray = 'A';  // the text of one array: this, and its wire

[[noreturn]] void fail_missing(std::string_view key) {
  py::object name = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(key.data(), static_cast<Py_ssize_t>(key.size()), "surrogateescape"));
  PyErr_SetObject(PyExc_KeyError, name.ptr());
  throw py::error_already_set();
}

class Reader {
 public:
  explicit Reader(std::shared_ptr<store::StoreFile> file) : file_(std::move(file)) {}

  static std::unique_ptr<Reader> open(const std::string& path, bool any_state) {
    auto file = store::StoreFile::open(path, any_state);
    if (!file) fail_in_store(file.status());
    return std::make_unique<Reader>(file.take());
  }

  // An array, or (text, blocks) of what else the name stands for.
  py::object load(std::string_view key, int mode) {
    const store::Entry entry = entry_of(key);
    const std::string& text = entry.text;
    if (text.empty() || text[0] != kArray) return py::make_tuple(py::bytes(text), blocks_of(entry));
    auto wire = pool::decode(text.data() + 1, text.size() - 1);
    if (!wire) fail_damaged(key, wire.status().what());
    if (wire->carries || wire->dtype_apart || entry.blocks.empty() ||
        !pool::intact(text.data() + 1, text.size() - 1, file_->arena().header().secret))
      fail_damaged(key, "it is no array of this store");
    const auto [base, data, length] = bytes(entry.blocks[0].block, entry.blocks[0].generation, mode);
    const auto touched = pool::reach(wire->ndim, wire->shape.data(), wire->strides.data(), wire->item_size);
    const auto room = static_cast<int64_t>(length), offset = static_cast<int64_t>(wire->offset);
    if (!touched || wire->offset > length || offset + touched->low < 0 || touched->high > room - offset)
      fail_damaged(key, "its extent is larger than the block");
    PyArray_Descr* dtype = dtype_of(*wire, nullptr);
    if (dtype == nullptr) throw py::error_already_set();
    return over(base, PyArray_NewFromDescr(&PyArray_Type, dtype, wire->ndim, const_cast<npy_intp*>(wire->shape.data()),
                                           const_cast<npy_intp*>(wire->strides.data()),
                                           const_cast<std::byte*>(data) + wire->offset,
                                           writeable(mode) ? NPY_ARRAY_WRITEABLE : 0, nullptr));
  }

  // The whole block, as bytes.
  py::object open_block(uint32_t block, uint64_t generation, int mode) {
    const auto [base, data, length] = bytes(block, generation, mode);
    npy_intp shape = static_cast<npy_intp>(length);
    return over(base, PyArray_New(&PyArray_Type, 1, &shape, NPY_UINT8, nullptr, const_cast<std::byte*>(data), 0,
                                  writeable(mode) ? NPY_ARRAY_WRITEABLE : 0, nullptr));
  }

  py::dict find(std::string_view key) {
    const store::Entry entry = entry_of(key);
    uint64_t total = 0;
    for (const auto& block : entry.blocks) {
      if (auto found = file_->block(block.block, block.generation)) total += found->length;
    }
    py::dict row;
    row["text"] = py::bytes(entry.text);
    row["bytes"] = total;
    row["blocks"] = entry.blocks.size();
    row["created"] = static_cast<double>(entry.created) * 1e-9;
    if (entry.expires == 0) {
      row["expires_in"] = py::none();
    } else {
      row["expires_in"] = (static_cast<double>(entry.expires) - static_cast<double>(file_->now())) * 1e-9;
    }
    row["pid"] = entry.pid;
    row["policy"] = static_cast<int>(entry.policy);
    row["cell"] = entry.cell;
    row["life"] = entry.life;
    return row;
  }

  bool contains(std::string_view key) {
    auto entry = file_->find(key);
    if (!entry && entry.code() != Code::kMissing) fail_in_store(entry.status());
    return entry.ok();
  }

  py::list keys(std::string_view prefix) {
    std::vector<std::string> found;
    {
      const WithoutGil release;
      file_->each(prefix, [&](store::Entry entry) { found.push_back(std::move(entry.key)); });
      std::sort(found.begin(), found.end());
    }
    py::list names;
    for (const std::string& key : found) {
      PyObject* name = PyUnicode_DecodeUTF8(key.data(), static_cast<Py_ssize_t>(key.size()), "surrogateescape");
      if (name == nullptr) throw py::error_already_set();
      names.append(py::reinterpret_steal<py::object>(name));
    }
    return names;
  }

  uint64_t size() {
    const WithoutGil release;
    return file_->size();
  }

  py::dict info() {
    const store::Header& header = file_->header();
    py::dict row;
    row["name"] = file_->name();
    row["created"] = static_cast<double>(header.created) * 1e-9;
    row["pool_id"] = file_->arena().header().pool_id;
    const uint64_t ttl = header.default_ttl.load(std::memory_order_relaxed);
    if (ttl == 0) {
      row["ttl"] = py::none();
    } else {
      row["ttl"] = static_cast<double>(ttl) * 1e-9;
    }
    row["limit_bytes"] = file_->arena().header().limit.load(std::memory_order_relaxed);
    row["policy"] = static_cast<int>(header.policy.load(std::memory_order_relaxed));
    row["patience"] = static_cast<double>(header.patience.load(std::memory_order_relaxed)) * 1e-9;
    row["trusted"] = file_->trusted();
    row["data_size"] = file_->arena().header().data_size;
    row["data_bytes"] = file_->data_used();
    row["file_bytes"] = file_->file_bytes();
    return row;
  }

 private:
  static bool writeable(int mode) { return mode == static_cast<int>(Mode::kCopyOnWrite); }

  store::Entry entry_of(std::string_view key) {
    auto entry = file_->find(key);
    if (entry) return entry.take();
    if (entry.code() == Code::kMissing) fail_missing(key);
    fail_in_store(entry.status());
  }

  static py::list blocks_of(const store::Entry& entry) {
    py::list blocks;
    for (const auto& block : entry.blocks) blocks.append(py::make_tuple(block.block, block.generation));
    return blocks;
  }

  // What keeps them mapped, and the bytes.
  struct Held {
    py::object base;
    const std::byte* data;
    uint64_t length;
  };
  Held bytes(uint32_t block, uint64_t generation, int mode) {
    if (mode != static_cast<int>(Mode::kRead) && mode != static_cast<int>(Mode::kCopyOnWrite))
      throw py::value_error("unknown mode");
    auto found = file_->block(block, generation);
    if (!found) fail_damaged("a name", found.status().what());
    if (!writeable(mode)) {
      auto* keep = new std::shared_ptr<store::StoreFile>(file_);
      return {py::capsule(keep, [](void* p) { delete static_cast<std::shared_ptr<store::StoreFile>*>(p); }),
              found->data, found->length};
    }
    if (auto copy = file_->copy(block, generation)) {
      auto* keep = new os::Mapping(std::move(copy->pages));
      return {py::capsule(keep, [](void* p) { delete static_cast<os::Mapping*>(p); }), keep->data() + copy->offset,
              copy->length};
    }
    // No address space, or too many mappings (vm.max_map_count).
    auto* keep = new std::vector<std::byte>(found->data, found->data + found->length);
    return {py::capsule(keep, [](void* p) { delete static_cast<std::vector<std::byte>*>(p); }), keep->data(),
            found->length};
  }

  static py::object over(const py::object& base, PyObject* made) {
    if (made == nullptr) throw py::error_already_set();
    py::object array = py::reinterpret_steal<py::object>(made);
    if (PyArray_SetBaseObject(reinterpret_cast<PyArrayObject*>(made), base.inc_ref().ptr()) < 0)
      throw py::error_already_set();
    return array;
  }

  [[noreturn]] static void fail_damaged(std::string_view key, const std::string& why) {
    fail_in_store(Status(Code::kCorrupt, "the entry of " + std::string(key) + " is damaged: " + why));
  }

  std::shared_ptr<store::StoreFile> file_;
};

}  // namespace

void add_store_file(py::module_& m) {
  py::class_<Reader>(m, "StoreFile")
      .def_static("open_file", &Reader::open, py::arg("path"), py::arg("any_state") = false)
      .def("load", &Reader::load)
      .def("open", &Reader::open_block)
      .def("find", &Reader::find)
      .def("contains", &Reader::contains)
      .def("keys", &Reader::keys)
      .def("size", &Reader::size)
      .def("info", &Reader::info);
}

}  // namespace torchshm::python
