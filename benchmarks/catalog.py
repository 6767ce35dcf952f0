"""All benchmarks, in the order in which they run."""

from __future__ import annotations

from benchmarks import (
    alloc,
    block_reads,
    dataloader,
    datapipes,
    descriptors,
    early_break,
    fanout,
    inline_threshold,
    loader_tensors,
    message,
    once_race,
    pooled_dumps,
    queue,
    share_objects,
    shared_list,
    shared_list_fork,
    small_devshm,
    spawn_dataset,
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
    spawn_dataset,
    block_reads,
    fanout,
    xarray_fields,
    share_objects,
    descriptors,
    small_devshm,
    shared_list,
    shared_list_fork,
    store_load,
    store_save,
    store_connect,
    store_crowd,
    store_module,
    once_race,
    alloc,
)

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}
