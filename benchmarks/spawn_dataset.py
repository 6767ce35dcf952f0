"""A dataset preloaded by the trainer and read by eight spawned DataLoader workers.

Quantities: seconds from the loader's start until each worker has delivered a batch; memory of all processes after an epoch at random
that reads every byte: the sum of their proportional set sizes (Pss), in which a page that several map counts once, and what the pool's
file has, free or in use. The dataset is an array of 1 GiB, and one of 1 MiB for what the processes need without it. Unit: seconds, MB.
Context: the same with PyTorch alone, which pickles the dataset once per worker.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
import warnings
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_most
from benchmarks.memory import rollup
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio, rounded

NAME = "spawn_dataset"
WORKERS = 8
SAMPLE = 64 << 10  # bytes
SMALL = 1  # MiB

ARMS = {
    "stock": Arm("stock", "the array in the Dataset, torch's DataLoader"),
    "torchshm": Arm("torchshm.share()", "the same after dataset.fields = torchshm.share(dataset.fields)"),
}


class Fields:
    """Samples of 64 KiB; what is delivered is their sum."""

    def __init__(self, mebibytes: int) -> None:
        count = (mebibytes << 20) // SAMPLE
        self.fields = np.empty((count, SAMPLE // 4), np.float32)
        self.fields[:] = np.arange(count, dtype=np.float32)[:, None]

    def __len__(self) -> int:
        return len(self.fields)

    def __getitem__(self, index: int) -> float:
        return float(self.fields[index].mean())


class Trainer:
    """One arm with a dataset of so many MiB."""

    def __init__(self, arm: str, mebibytes: int) -> None:
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        self._dataset = Fields(mebibytes)
        if arm == "torchshm":
            import torchshm

            torchshm.register()
            self._dataset.fields = torchshm.share(self._dataset.fields)

    def run(self) -> dict[str, float]:
        """Starts eight workers, has them read all, and ends them."""
        import torch
        from torch.utils.data import DataLoader

        begin = time.perf_counter()
        loader: Any = DataLoader(
            self._dataset,  # type: ignore[arg-type]
            batch_size=1,
            shuffle=True,
            num_workers=WORKERS,
            multiprocessing_context="spawn",
            generator=torch.Generator().manual_seed(0),
        )
        total, batches = 0.0, iter(loader)
        for _ in range(WORKERS):  # in order: one from each worker
            total += float(next(batches))
        seconds = time.perf_counter() - begin
        for number, batch in enumerate(batches, WORKERS + 1):
            total += float(batch)
            if number == len(self._dataset) - WORKERS // 2:  # the workers are still there
                found = self._memory()
        count = len(self._dataset)
        if total != count * (count - 1) / 2:
            raise AssertionError("the samples are not those of the dataset")
        return {"seconds": seconds} | found

    def _memory(self) -> dict[str, float]:
        gc.collect()
        pids = [os.getpid()] + [child.pid or 0 for child in multiprocessing.active_children()]
        if len(pids) != 1 + WORKERS:
            raise AssertionError(f"{len(pids) - 1} workers")
        pss = sum(rollup(pid)["Pss"] for pid in pids)
        torchshm = sys.modules.get("torchshm")
        pool = torchshm.stats()["committed_bytes"] if torchshm else 0
        return {"pss": rounded(pss / 1e6), "pool": rounded(pool / 1e6)}


def measure(quick: bool, meter: Meter) -> Result:
    """A remote for each arm and size; the start-ups of one arm in turn."""
    large, rounds = (128, 2) if quick else (1024, 7)
    sizes = (SMALL, large)
    result = Result(
        NAME,
        f"memory of a trainer and {WORKERS} spawned workers with one dataset, after reading all of it",
        "MB",
        ARMS,
        quick=quick,
    )
    meter.expect(len(ARMS) * rounds)
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for arm in ARMS:
        with Arms(result) as arms:
            packages = ("torch",) if arm == "stock" else ("torch", "torchshm")
            for size in sizes:
                arms.start(f"{arm}, {size} MiB", packages, Trainer, arm, size)
            meter.doing(f"{arm}: {large} MiB")
            runs = {f"{arm}, {size} MiB": ("run",) for size in sizes if f"{arm}, {size} MiB" in arms}
            values = arms.rounds(runs, rounds if arm == "torchshm" else min(rounds, 2), meter.step)
        if len(values) != len(sizes):
            continue
        found[arm] = {size: values[f"{arm}, {size} MiB"] for size in sizes}
        for size, of_size in found[arm].items():
            last = of_size[-1] | {"seconds": Sample.of([one["seconds"] for one in of_size]).median}
            result.add(arm, [one["pss"] for one in of_size], last, bytes=size << 20)

    def beyond(arm: str, what: str) -> Sample | None:
        """Of the dataset, what the large one takes more than the small one."""
        if arm not in found:
            return None
        by = ((large - SMALL) << 20) / 1e6
        small, big = ([one[what] for one in found[arm][size]] for size in sizes)
        return Sample.of([(b - s) / by for s, b in zip(small, big, strict=True)])

    def slower(arm: str) -> Sample | None:
        if arm not in found:
            return None
        return ratio(*([one["seconds"] for one in found[arm][size]] for size in reversed(sizes)))

    result.figures = [
        at_most(
            f"Pss with {large} MiB more than with {SMALL} / the dataset", 1.02, "x", beyond("torchshm", "pss")
        ),
        at_most("pages of the pool's file, likewise", 1.02, "x", beyond("torchshm", "pool")),
        at_most(f"start-up of {WORKERS} workers, {large} MiB / {SMALL} MiB", 1.1, "x", slower("torchshm")),
    ]
    result.facts = {
        "stock: Pss more / the dataset": beyond("stock", "pss").median if "stock" in found else None,
        f"stock: start-up {large} MiB / {SMALL} MiB": slower("stock").median if "stock" in found else None,
    }
    return result


BENCHMARK = Benchmark(NAME, "memory and start-up of spawned workers with a preloaded dataset", measure)
