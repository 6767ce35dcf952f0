"""Carriers: the ways to get one array from a process to another, by name.

A carrier says only how; `benchmarks.exchange` does the timing, with the same loop for all.
"""

from __future__ import annotations

from benchmarks.carriers.carrier import Carrier
from benchmarks.carriers.joblib_memmap import JoblibMemmap
from benchmarks.carriers.limit import Limit
from benchmarks.carriers.pickled import Protocol5, Stock
from benchmarks.carriers.ray_store import RayStore
from benchmarks.carriers.shared_memory import SharedMemoryEach
from benchmarks.carriers.tensor import FileDescriptorTensor, FileSystemTensor
from benchmarks.carriers.torchshm_array import Inline, Plain, Pooled, PooledAlways

CARRIERS: dict[str, type[Carrier]] = {
    "torchshm": Plain,
    "torchshm_pooled": Pooled,
    "torchshm_inline": Inline,
    "torchshm_always": PooledAlways,
    "limit": Limit,
    "stock": Stock,
    "pickle5": Protocol5,
    "torch_fd": FileDescriptorTensor,
    "torch_fs": FileSystemTensor,
    "shared_memory": SharedMemoryEach,
    "joblib": JoblibMemmap,
    "ray": RayStore,
}
