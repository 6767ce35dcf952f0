"""The machine and the software that a result was measured with."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torchshm", "numpy", "torch", "joblib", "ray", "vineyard", "xarray", "pandas")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, kernel, size of /dev/shm, and the load that the run began under."""
    devshm = os.statvfs("/dev/shm")
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devshm_bytes": devshm.f_frsize * devshm.f_blocks,
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python, the C library and every package that an arm uses."""
    versions = {"python": platform.python_version(), "libc": " ".join(platform.libc_ver())}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _field(path: str, key: str) -> str | None:
    found = re.search(rf"^{key}\s*:\s*(.+)$", Path(path).read_text(), re.MULTILINE)
    return found.group(1) if found else None
