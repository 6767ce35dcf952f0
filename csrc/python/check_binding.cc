#include "python/check_binding.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "os/mapped_file.h"
#include "os/memfd.h"
#include "pool/checker.h"
#include "pool/stats.h"
#include "python/errors.h"
#include "python/stats_binding.h"
#include "python/without_gil.h"
#include "service/address.h"
#include "store/backing.h"
#include "store/catalogue_check.h"

namespace py = pybind11;

namespace torchshm::python {
namespace {

// The descriptors stay the caller's.
Result<pool::Arena> inspect(int data, int control) {
  auto own_data = os::duplicate(data), own_control = os::duplicate(control);
  if (!own_data) return std::move(own_data.status());
  if (!own_control) return std::move(own_control.status());
  return pool::Arena::inspect(own_data.take(), own_control.take());
}

py::list as_list(const std::vector<pool::Violation>& violations) {
  py::list rows;
  for (const pool::Violation& v : violations) rows.append(py::make_tuple(v.invariant, v.what));
  return rows;
}

py::dict report_of(const pool::Arena& arena, bool at_rest) {
  pool::CheckReport report;
  {
    const WithoutGil release;
    report = pool::check(arena, {.at_rest = at_rest, .limit = false});  // set_limit() may have lowered it
  }
  py::list members;
  for (const pool::Signature& s : pool::signatures(arena)) {
    members.append(py::make_tuple(s.pid, py::reinterpret_steal<py::object>(lenient_text(s.name))));
  }
  py::dict out;
  out["pool_id"] = arena.header().pool_id;
  out["is_copy"] = arena.is_copy();
  out["members"] = members;
  out["blocks"] = report.blocks;
  out["tickets"] = report.tickets;
  out["named_tickets"] = report.named;
  out["violations"] = as_list(report.violations);
  return out;
}

// A pool that this process need not have joined. The descriptors stay the caller's.
py::dict check(int data, int control, bool at_rest) {
  auto arena = inspect(data, control);
  if (!arena) fail(arena.status());
  return report_of(*arena, at_rest);
}

py::dict report_of(const store::CatalogueReport& report) {
  py::dict out;
  out["names"] = report.names;
  out["marks"] = report.marks;
  py::list spilled;
  for (const auto& [key, file] : report.spilled) {
    PyObject* name = PyUnicode_DecodeUTF8(key.data(), static_cast<Py_ssize_t>(key.size()), "backslashreplace");
    if (name == nullptr) throw py::error_already_set();
    spilled.append(py::make_tuple(py::reinterpret_steal<py::object>(name), file));
  }
  out["spilled"] = spilled;
  out["directory"] = report.directory;
  out["cells"] = report.cells;
  out["violations"] = as_list(report.violations);
  return out;
}

// A persistent store's file, served or not: of its pool, of its catalogue, and the store's name.
py::tuple check_file(const std::string& path, bool at_rest) {
  auto fd = os::open_to_read(path);
  if (!fd) fail_in_store(fd.status());
  auto facts = os::file_facts(fd->get());
  if (!facts) fail_in_store(facts.status());
  auto superblock = store::read_superblock(fd->get(), path);
  if (!superblock) fail_in_store(superblock.status());
  const store::Superblock& s = **superblock;
  if (Status valid = store::check_superblock(s, facts->size, true, path); !valid) fail_in_store(valid);
  auto file = os::duplicate(fd->get());
  if (!file) fail_in_store(file.status());
  auto arena = pool::Arena::inspect_in(file.take(), {s.control_at, s.control_size, s.data_at, s.data_size});
  if (!arena) fail_in_store(arena.status());
  py::dict pool = report_of(*arena, at_rest);
  Result<store::CatalogueReport> report = Status();
  {
    const WithoutGil release;
    report = store::check_catalogue(fd->get(), *arena, at_rest, s.catalogue_at);
  }
  if (!report) fail_in_store(report.status());
  auto named = store::catalogue_name(fd->get(), s.catalogue_at);
  if (!named) fail_in_store(named.status());
  return py::make_tuple(pool, report_of(*report), py::reinterpret_steal<py::object>(lenient_text(named->name)));
}

// Figures of a pool that this process need not have joined. The descriptors stay the caller's.
py::dict pool_stats(int data, int control) {
  auto arena = inspect(data, control);
  if (!arena) fail(arena.status());
  pool::Stats stats;
  {
    const WithoutGil release;
    stats = pool::collect(*arena);
  }
  return describe(stats);
}

// A store that this process need not be a client of. The descriptors stay the caller's.
py::dict check_catalogue(int catalogue, int data, int control, bool at_rest) {
  auto arena = inspect(data, control);
  if (!arena) fail_in_store(arena.status());
  Result<store::CatalogueReport> report = Status();
  {
    const WithoutGil release;
    report = store::check_catalogue(catalogue, *arena, at_rest);
  }
  if (report.code() == Code::kForeign) fail_in_store(Status(Code::kInvalid, report.status().what()));
  if (!report) fail_in_store(report.status());
  return report_of(*report);
}

// (name, pool id)
py::tuple catalogue_name(int catalogue) {
  auto named = store::catalogue_name(catalogue);
  if (!named) fail_in_store(named.status());
  return py::make_tuple(named->name, named->pool_id);
}

// Descriptors of data, control and catalogue, which the caller closes.
py::tuple store_files(const std::string& name) {
  if (Status named = service::check_name(name); !named) fail_in_store(named);
  auto files = service::find_files(name);
  if (!files) fail_unavailable(files.status());
  return py::make_tuple(files->data.release(), files->control.release(), files->catalogue.release());
}

}  // namespace

void add_check(py::module_& m) {
  m.def("check", &check, py::arg("data_fd"), py::arg("control_fd"), py::arg("at_rest") = false);
  // Gone when a service has ended, all that it does at its end included.
  m.def("store_lock_path", &service::lock_path, py::arg("name"));
  m.def("pool_stats", &pool_stats, py::arg("data_fd"), py::arg("control_fd"));
  m.def("store_names", &service::names);
  m.def("store_files", &store_files, py::arg("name"));
  m.def("catalogue_name", &catalogue_name, py::arg("catalogue_fd"));
  m.def("check_file", &check_file, py::arg("path"), py::arg("at_rest") = false);
  m.def("check_catalogue", &check_catalogue, py::arg("catalogue_fd"), py::arg("data_fd"), py::arg("control_fd"),
        py::arg("at_rest") = false);
}

}  // namespace torchshm::python
