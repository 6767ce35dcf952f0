"""Numpy batches through the worker processes of torchdata's DataLoader2.

Quantity: time per batch of 64 float32 images 3x224x224 (38.5 MB) over whole epochs of a DataLoader2 with two workers that persist; the
consumer reads one byte of every page. Unit: seconds. The workers' datapipe yields a batch that it has, or stacks one of images that it
has; np.stack spends more on fresh pages than anything that torchshm does for the batch afterwards.
Opponent: MultiProcessingReadingService without torchshm (stock). All services prefetch as they do by default, ten batches a worker and
ten in the consumer.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least
from benchmarks.images import BATCH, BATCH_BYTES, SHAPE, Images, stack
from benchmarks.loading import measure_loading
from benchmarks.meter import Meter
from benchmarks.page import touch_pages
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio
from benchmarks.traffic import Traffic

NAME = "datapipes"
WORKERS = 2

SERVICE = "MultiProcessingReadingService"
ARMS = {
    "stock": Arm("stock", f"{SERVICE}, a batch that is there, nothing registered"),
    "torchshm_register": Arm("torchshm.register()", "the same after torchshm.register()"),
    "torchshm_service": Arm("torchshm.data.ReadingService", "the same with torchshm's service"),
    "stock_stack": Arm("stock, np.stack", f"{SERVICE}, np.stack for each batch, nothing registered"),
    "torchshm_register_stack": Arm("torchshm.register(), np.stack", "the same after torchshm.register()"),
    "torchshm_service_collate": Arm(
        "ReadingService and collate", "torchshm's service, torchshm.data.collate(numpy=True) for each batch"
    ),
}

_batches_of_a_worker = multiprocessing.RawValue("q", 1)  # workers inherit it


class Batches:
    """What a worker iterates over; `collate` makes each batch anew, None yields the same again."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __iter__(self) -> Iterator[Any]:
        images = Images()
        samples = [images[i] for i in range(BATCH)]
        made = stack(samples) if self.collate is None else None
        for _ in range(_batches_of_a_worker.value):
            yield self.collate(samples) if made is None else made


class DataPipeLoader:
    """One arm: a DataLoader2 whose epochs are as long as asked for."""

    def __init__(self, arm: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torchdata will end
            from torchdata.dataloader2 import DataLoader2, MultiProcessingReadingService
            from torchdata.datapipes.iter import IterableWrapper

        service: Any = MultiProcessingReadingService
        collate: Any = stack if arm.endswith("stack") else None
        if arm.startswith("torchshm_register"):
            import torchshm

            torchshm.register()
        elif arm.startswith("torchshm_service"):
            from torchshm.data import ReadingService
            from torchshm.data import collate as ours

            service = ReadingService
            if arm.endswith("collate"):
                collate = functools.partial(ours, numpy=True)
        self._expected = stack([Images().image] * BATCH)
        self._loader = DataLoader2(
            IterableWrapper(Batches(collate), deepcopy=False),
            reading_service=service(num_workers=WORKERS, multiprocessing_context="fork"),
        )

    def check(self) -> None:
        """Gets a batch of each worker and compares it.

        Raises
        ------
        AssertionError
            It is not what ``np.stack`` gives here.
        """
        _batches_of_a_worker.value = 1
        for batch in self._loader:
            if batch.shape != (BATCH, *SHAPE) or not (batch == self._expected).all():
                raise AssertionError("the batch arrived damaged")

    def run(self, batches: int) -> tuple[float, float, float]:
        """As `Epochs.run`."""
        _batches_of_a_worker.value = -(-batches // WORKERS)
        pids = [os.getpid()] + [child.pid or 0 for child in multiprocessing.active_children()]
        before = Traffic.of(pids)
        begin = time.perf_counter()
        taken = 0
        for batch in self._loader:
            touch_pages(batch)
            del batch
            taken += 1
        seconds = time.perf_counter() - begin
        traffic = Traffic.of(pids) - before
        if taken != WORKERS * _batches_of_a_worker.value:
            raise AssertionError(f"{taken} batches arrived")
        return seconds / taken, traffic.minor_faults / taken, traffic.cpu_seconds / taken

    def close(self) -> None:
        self._loader.shutdown()


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm, epoch by epoch in turn."""
    result = Result(
        NAME,
        f"time per batch of {BATCH_BYTES / 1e6:.1f} MB through a DataLoader2 with {WORKERS} workers",
        "s",
        ARMS,
        quick=quick,
    )
    with Arms(result) as arms:
        for arm in ARMS:
            packages = (
                ("torch", "torchdata") if arm.startswith("stock") else ("torch", "torchdata", "torchshm")
            )
            arms.start(arm, packages, DataPipeLoader, arm)
        seconds = measure_loading(
            result,
            arms,
            meter,
            epoch_seconds=0.5 if quick else 1.0,
            rounds=3 if quick else 11,
            fewest=32,
        )

    def over(above: str, below: str) -> Sample | None:
        return ratio(seconds[above], seconds[below]) if above in seconds and below in seconds else None

    result.figures = [
        at_least("stock / torchshm.register() alone", 10, "x", over("stock", "torchshm_register")),
        at_least("stock / torchshm.data.ReadingService", 10, "x", over("stock", "torchshm_service")),
        at_least(
            "np.stack: stock / torchshm.register() alone",
            6,
            "x",
            over("stock_stack", "torchshm_register_stack"),
        ),
        at_least(
            "np.stack / ReadingService and collate", 10, "x", over("stock_stack", "torchshm_service_collate")
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "38.5 MB numpy batches through DataLoader2 with two workers", measure)
