"""Four times the memory, mapped, shuffled in windows and iterated: torchshm.data.blocks against Ray Data.

Quantity: rows a second of one pass over .npy files, through a function that scales and shifts, a shuffle in windows of an eighth of
the memory, and batches of 1,024 rows, of which one element per row is read; the files are in the page cache. Unit: rows/s. Beside
it the most memory of all processes of the arm at once, Pss without what is shared, and the store. Unit: bytes.
Opponent: Ray Data with `object_store_memory` of the same size and as many cores; its iterator's local shuffle, which is how Ray shuffles
in windows.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import disk
from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import Figure, at_least, at_most
from benchmarks.memory import rollup
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio
from benchmarks.units import MIB, format_bytes

NAME = "blocks_ray"
LIMIT, QUICK_LIMIT = 1024 * MIB, 512 * MIB
TIMES, WORKERS, BATCH = 4, 2, 1024
WIDTH = 1024
"""float32 in a row."""
FILE = 64 * MIB
OVER_RAY, OVER_LIMIT = 3, 1.05

Batch = dict[str, Any]


def scale(batch: Batch) -> Batch:
    """What both run."""
    return {"data": batch["data"] * np.float32(0.5) + np.float32(1)}


def write(folder: Path, nbytes: int) -> int:
    """Files of float32 whose first element is the row's number; the number of rows."""
    rows = FILE // (4 * WIDTH)
    for number in range(nbytes // FILE):
        array = np.ones((rows, WIDTH), np.float32)
        array[:, 0] = np.arange(number * rows, (number + 1) * rows)
        np.save(folder / f"{number:05}.npy", array)
    return nbytes // FILE * rows


class Watch(threading.Thread):
    """Looks at the memory of this process and its descendants, and of `shared`, until it is told to end."""

    def __init__(self, shared: Any) -> None:
        super().__init__(daemon=True)
        self.most, self._shared, self._over = 0, shared, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            own = psutil.Process()
            total = self._shared()
            for process in [own, *own.children(recursive=True)]:
                with contextlib.suppress(OSError):  # it has gone
                    sizes = rollup(process.pid)
                    total += sizes.get("Pss", 0) - sizes.get("Pss_Shmem", 0)
            self.most = max(self.most, total)

    def end(self) -> int:
        self._over.set()
        self.join()
        return self.most


class Pass(ABC):
    """One pass over the files."""

    def __init__(self, folder: str, limit: int, spill: str) -> None:
        self._folder, self._limit, self._spill = folder, limit, spill

    @abstractmethod
    def batches(self) -> Iterator[Batch]: ...

    @abstractmethod
    def shared(self) -> int:
        """Bytes of shared memory at this moment."""

    def run(self) -> tuple[float, float, int, int]:
        """Seconds until the first batch and of all, rows, most bytes of memory."""
        watch = Watch(self.shared)
        watch.start()
        begin = time.perf_counter()
        first = total = 0.0
        rows = 0
        for batch in self.batches():
            first = first or time.perf_counter() - begin
            total += float(batch["data"][:, 0].sum(dtype=np.float64))
            rows += len(batch["data"])
        seconds = time.perf_counter() - begin
        expected = 0.5 * rows * (rows - 1) / 2 + rows
        if abs(total / expected - 1) > 1e-6:
            raise AssertionError(f"the rows add up to {total}, not {expected}")
        return first, seconds, rows, watch.end()


class TorchshmPass(Pass):
    """blocks."""

    def batches(self) -> Iterator[Batch]:
        from torchshm.data import blocks

        dataset = blocks.read_npy(self._folder).options(
            memory=self._limit,
            num_workers=WORKERS,
            spill=self._spill,
            seed=1,
            start_method="fork",  # as in a program that is started by itself; an arm is spawned
        )
        return dataset.map_batches(scale).shuffle(window=self._limit // 8).iter_batches(BATCH)

    def shared(self) -> int:
        from torchshm.data.blocks import _home

        return sum(int(home.store.info()["committed_bytes"]) for home in list(_home._homes.values()))


class RayPass(Pass):
    """Ray Data."""

    def __init__(self, folder: str, limit: int, spill: str) -> None:
        import ray

        super().__init__(folder, limit, spill)
        ray.init(
            num_cpus=WORKERS,
            object_store_memory=limit,
            object_spilling_directory=spill,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        ray.data.DataContext.get_current().enable_progress_bars = False

    def batches(self) -> Iterator[Batch]:
        import ray

        dataset = ray.data.read_numpy(self._folder).map_batches(scale, batch_format="numpy")
        window = self._limit // 8 // (4 * WIDTH)
        found: Iterator[Batch] = iter(
            dataset.iter_batches(
                batch_size=BATCH, batch_format="numpy", local_shuffle_buffer_size=window, local_shuffle_seed=1
            )
        )
        return found

    def shared(self) -> int:
        facts = os.statvfs("/dev/shm")
        return (facts.f_blocks - facts.f_bfree) * facts.f_frsize

    def close(self) -> None:
        import ray

        ray.shutdown()


def measure(quick: bool, meter: Meter) -> Result:
    """A pass of each in turn."""
    limit = QUICK_LIMIT if quick else LIMIT
    rounds = 3 if quick else 7
    result = Result(
        NAME,
        f"{TIMES} times as much as the {format_bytes(limit)} of memory, mapped, shuffled in windows and iterated",
        "rows/s",
        {
            "torchshm": Arm(
                "torchshm", "blocks.read_npy(...).map_batches(...).shuffle(window=...).iter_batches()"
            ),
            "ray": Arm(
                "Ray Data", "read_numpy(...).map_batches(...).iter_batches(local_shuffle_buffer_size=...)"
            ),
        },
        quick=quick,
    )
    meter.expect(rounds)
    with disk.folder("blocks-ray") as folder, Arms(result) as arms:
        for name in ("data", "torchshm", "ray"):
            (folder / name).mkdir()
        meter.doing("writing the files")
        write(folder / "data", TIMES * limit)
        arms.start(
            "torchshm", ("torchshm",), TorchshmPass, str(folder / "data"), limit, str(folder / "torchshm")
        )
        arms.start("ray", ("ray",), RayPass, str(folder / "data"), limit, str(folder / "ray"))
        for arm in arms:
            meter.doing(f"{arm}, warming up")
            arms.call(arm, "run", timeout=600)
        meter.doing("passes")
        answers = arms.rounds(dict.fromkeys(arms, ("run",)), rounds, meter.step)
        rates = {arm: [rows / seconds for _, seconds, rows, _ in found] for arm, found in answers.items()}
        memory = {arm: [float(most) for *_, most in found] for arm, found in answers.items()}
        for arm, found in answers.items():
            result.add(arm, rates[arm])
            result.facts[f"{arm}, first batch after, s"] = round(
                Sample.of([each[0] for each in found]).median, 3
            )
            result.facts[f"{arm}, most memory"] = format_bytes(int(Sample.of(memory[arm]).median))
    result.figures = judge(rates, memory, limit)
    return result


def judge(rates: dict[str, list[float]], memory: dict[str, list[float]], limit: int) -> list[Figure]:
    """Rows a second, and the memory, by Ray's and by the limit."""
    both = {"torchshm", "ray"} <= set(rates)
    own = "torchshm" in rates
    return [
        at_least(
            "torchshm / Ray Data, rows a second",
            OVER_RAY,
            "x",
            ratio(rates["torchshm"], rates["ray"]) if both else None,
        ),
        at_most(
            "torchshm / Ray Data, most memory",
            1,
            "x",
            ratio(memory["torchshm"], memory["ray"]) if both else None,
        ),
        at_most(
            "most memory of all processes and the store / the limit",
            OVER_LIMIT,
            "x",
            Sample.of([each / limit for each in memory["torchshm"]]) if own else None,
        ),
    ]


BENCHMARK = Benchmark(NAME, "blocks against Ray Data, four times as much data as memory", measure)
