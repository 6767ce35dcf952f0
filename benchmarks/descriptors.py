"""What live arrays cost a process in descriptors and mappings.

Quantity: file descriptors and memory mappings that 100,000 live pooled arrays of 128 bytes add
to a process. Unit: count.
Opponents, as context: 1,000 torch tensors shared by file_descriptor, 1,000 by file_system, 1,000
SharedMemory segments (100,000 of those would not be possible), and 100,000 plain numpy arrays,
which show what the interpreter's own memory adds.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_most
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample

NAME = "descriptors"
MANY, FEW = 100_000, 1_000
ITEMS = 16  # float64: 128 bytes

ARMS = {
    "torchshm": (MANY, Arm("torchshm", f"{MANY:,} arrays made by torchshm.empty")),
    "numpy": (MANY, Arm("plain numpy", f"{MANY:,} plain numpy arrays")),
    "torch_fd": (FEW, Arm("torch fd", f"{FEW:,} torch tensors, share_memory_(), file_descriptor")),
    "torch_fs": (FEW, Arm("torch fs", f"{FEW:,} torch tensors, share_memory_(), file_system")),
    "shared_memory": (FEW, Arm("SharedMemory", f"{FEW:,} SharedMemory segments")),
}
PACKAGES = {"torchshm": "torchshm", "torch_fd": "torch", "torch_fs": "torch"}


class Holder:
    """Makes arrays and keeps them; imports come before the baseline, the pool does not."""

    def __init__(self, arm: str) -> None:
        self._arm = arm
        if arm == "torchshm":
            import torchshm

            self._torchshm: Any = torchshm
        elif arm.startswith("torch_"):
            import torch

            self._torch: Any = torch
            strategy = {"torch_fd": "file_descriptor", "torch_fs": "file_system"}[arm]
            torch.multiprocessing.set_sharing_strategy(strategy)

    def count(self, arrays: int) -> tuple[int, int]:
        """Descriptors and mappings that `arrays` live arrays added."""
        before = _descriptors(), _mappings()
        self._kept = [self._make() for _ in range(arrays)]
        return _descriptors() - before[0], _mappings() - before[1]

    def close(self) -> None:
        if self._arm == "shared_memory":
            for segment in self._kept:
                segment.close()
                segment.unlink()

    def _make(self) -> Any:
        if self._arm == "torchshm":
            return self._torchshm.empty((ITEMS,), np.float64)
        if self._arm == "numpy":
            return np.empty(ITEMS)
        if self._arm == "shared_memory":
            from multiprocessing.shared_memory import SharedMemory

            return SharedMemory(create=True, size=8 * ITEMS)
        return self._torch.zeros(ITEMS, dtype=self._torch.float64).share_memory_()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


def measure(quick: bool, meter: Meter) -> Result:
    """One count per arm: there is nothing to repeat."""
    result = Result(
        NAME,
        "file descriptors and memory mappings that live arrays of 128 bytes add to a process",
        "count",
        {name: arm for name, (_, arm) in ARMS.items()},
        quick=quick,
    )
    meter.expect(len(ARMS))
    with Arms(result) as arms:
        for arm in ARMS:
            arms.start(arm, (PACKAGES[arm],) if arm in PACKAGES else (), Holder, arm)
        for arm, (arrays, described) in ARMS.items():
            meter.doing(described.how)
            added = arms.call(arm, "count", arrays) if arm in arms else None
            if added:
                result.add(arm, [added[0]], counted="descriptors", arrays=arrays)
                result.add(arm, [added[1]], counted="mappings", arrays=arrays)
            meter.step()

    def counted(what: str) -> Sample | None:
        row = result.find("torchshm", counted=what, arrays=MANY)
        return row.sample if row else None

    result.figures = [
        at_most(f"file descriptors added by {MANY:,} live arrays", 16, "fds", counted("descriptors")),
        at_most(f"memory mappings added by {MANY:,} live arrays", 64, "mappings", counted("mappings")),
    ]
    return result


BENCHMARK = Benchmark(NAME, "descriptors and mappings of 100,000 live arrays", measure)
