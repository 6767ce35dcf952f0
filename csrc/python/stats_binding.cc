#include "python/stats_binding.h"

#include "python/errors.h"

namespace py = pybind11;

namespace torchshm::python {

py::list describe_processes(const pool::Stats& stats) {
  py::list processes;
  for (const pool::LeaseStats& lease : stats.leases) {
    py::dict row;
    row["pid"] = lease.pid;
    row["name"] = py::reinterpret_steal<py::object>(lenient_text(lease.name));
    row["held_blocks"] = lease.held_blocks;
    row["held_bytes"] = lease.held_bytes;
    row["allocations"] = lease.allocations;
    row["fallbacks"] = lease.fallbacks;
    row["grown_bytes"] = lease.grown_bytes;
    processes.append(row);
  }
  return processes;
}

py::dict describe(const pool::Stats& stats) {
  py::dict out;
  out["live_bytes"] = stats.live;
  out["warm_bytes"] = stats.warm;
  out["committed_bytes"] = stats.committed;
  out["limit_bytes"] = stats.limit;
  out["warm_limit_bytes"] = stats.warm_limit;
  out["control_bytes"] = stats.control;
  out["blocks"] = stats.blocks;
  out["leases"] = stats.leases.size();
  out["tickets"] = stats.tickets;
  out["ticket_bytes"] = stats.ticket_bytes;
  out["named"] = stats.named;
  out["reaped"] = stats.reaped;
  out["tickets_taken_back"] = stats.taken_back;
  out["processes"] = describe_processes(stats);
  return out;
}

}  // namespace torchshm::python
