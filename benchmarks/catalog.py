"""All benchmarks, in the order in which they run."""

from __future__ import annotations

from benchmarks import (
    alloc,
    dataloader,
    datapipes,
    descriptors,
    early_break,
    fanout,
    inline_threshold,
    loader_tensors,
    message,
    pooled_dumps,
    queue,
    small_devshm,
    store_connect,
    store_crowd,
    store_load,
    store_module,
    store_save,
    syscalls,
    transforms,
    xarray_fields,
)
from benchmarks.benchmark import Benchmark

_MODULES = (
    message,
    inline_threshold,
    pooled_dumps,
    queue,
    dataloader,
    datapipes,
    loader_tensors,
    transforms,
    syscalls,
    early_break,
    fanout,
    xarray_fields,
    descriptors,
    small_devshm,
    store_load,
    store_save,
    store_connect,
    store_crowd,
    store_module,
    alloc,
)

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}
