"""Batches of tensors through DataLoader workers.

Quantity: time per batch over whole epochs of a DataLoader with two persistent workers and a dataset that costs nothing; the consumer
reads one byte of every page. Unit: seconds. Batches: 64 float32 images 3x224x224 (38.5 MB), a dict of 1,000 tensors of 100 bytes, 32
samples of 16 floats, and single tensors of 1 byte to 256 MB.
Opponents: PyTorch alone with its strategy file_descriptor, its limit of descriptors raised to what the system allows; and for images a
hand-made ring of warm shared blocks in which nothing but indices crosses.
"""

from __future__ import annotations

import functools
import resource
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.epochs import Epochs
from benchmarks.figure import at_least, at_most
from benchmarks.images import BATCH, BATCH_BYTES, SHAPE
from benchmarks.meter import Meter
from benchmarks.page import touch_pages
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio, rounded

NAME = "loader_tensors"
WORKERS = 2
MOST_BATCHES = 500
SWEEP = [1, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28]

ARMS = {
    "stock": Arm("stock", "torch's DataLoader and default_collate, sharing strategy file_descriptor"),
    "register": Arm("torchshm.register()", "the same after torchshm.register()"),
    "loader": Arm("torchshm.data.DataLoader", "torchshm's DataLoader and collate"),
    "pooled": Arm("torchshm.data.DataLoader(pooled=True)", "the worker's code allocates in the pool"),
    "ring": Arm("ring", "a hand-made ring of warm blocks that sends indices"),
}


class Repeated:
    """Every sample is the same."""

    def __init__(self, sample: Any, length: int) -> None:
        self.sample, self.length = sample, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.sample


class Many(Repeated):
    """A dict of new tensors."""

    def __getitem__(self, index: int) -> Any:
        import torch

        return {str(i): torch.full((25,), float(i)) for i in range(1000)}


def only(samples: list[Any]) -> Any:
    """A batch of one sample, as it is."""
    return samples[0]


class TensorLoader:
    """One arm at all points; loaders are made when they are first asked for, one at a time."""

    def __init__(self, arm: str) -> None:
        import torch.multiprocessing

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        self._arm = arm
        self._loader: Any = None
        self._point: str | int = ""
        if arm not in ("stock", "ring"):
            import torchshm

            torchshm.register()

    def open(self, point: str | int) -> None:
        """Starts the workers of a point, after those of the one before have ended."""
        import torch

        self._loader = None
        dataset: Any
        collate: Any = None
        if point == "images":
            size, dataset = BATCH, Repeated(torch.rand(SHAPE), BATCH)
        elif point == "dict":
            size, dataset, collate = 1, Many(None, 1), only
        elif point == "floats":
            size, dataset = 32, Repeated(torch.rand(16), 32)
        else:
            size, dataset = 1, Repeated(torch.zeros(int(point), dtype=torch.uint8), 1)
        if self._arm == "ring":
            from benchmarks.warm_ring import WarmRing

            self._loader = WarmRing([dataset[0]] * size, self._read, WORKERS)
            return
        make: Any = None
        if self._arm in ("loader", "pooled"):
            import torchshm.data

            make = functools.partial(torchshm.data.DataLoader, pooled=self._arm == "pooled")
        self._loader = Epochs(dataset, collate, self._read, workers=WORKERS, batch_size=size, loader=make)
        batch = self._loader.first()
        wanted = [dataset[0]] * size
        if point == "dict":
            if len(batch) != 1000 or batch["7"][24] != 7:
                raise AssertionError("the batch arrived damaged")
        elif not torch.equal(batch, torch.stack(wanted)):
            raise AssertionError("the batch arrived damaged")

    def run(self, batches: int) -> tuple[float, float, float]:
        """Seconds, minor faults and processor seconds per batch."""
        answer: tuple[float, float, float] = self._loader.run(batches)
        return answer

    @staticmethod
    def _read(batch: Any) -> None:
        if isinstance(batch, dict):
            for x in batch.values():
                x[0]
        else:
            touch_pages(batch.numpy())


def measure(quick: bool, meter: Meter) -> Result:
    """Point by point, the arms of each in turn."""
    result = Result(
        NAME, f"time per batch of tensors through a DataLoader with {WORKERS} workers", "s", ARMS, quick=quick
    )
    sweep = SWEEP[::4] if quick else SWEEP
    points: list[str | int] = ["images", "dict", "floats", *sweep]
    rounds = 3 if quick else 9
    epoch_seconds = 0.2 if quick else 0.5
    seconds: dict[str | int, dict[str, list[float]]] = {}
    faults: dict[str, float] = {}
    meter.expect(len(points) * (len(ARMS) + rounds))
    with Arms(result) as arms:
        for arm in ARMS:
            arms.start(
                arm, ("torch",) if arm in ("stock", "ring") else ("torch", "torchshm"), TensorLoader, arm
            )
        for point in points:
            calls = {}
            for arm in arms:
                if arm == "ring" and point != "images":
                    continue
                meter.doing(f"{point}: {arm}")
                arms.call(arm, "open", point)
                if arm in arms:
                    arms.call(arm, "run", 24)  # warms up
                answer = arms.call(arm, "run", 8) if arm in arms else None
                if answer:
                    calls[arm] = ("run", max(8, min(MOST_BATCHES, int(epoch_seconds / answer[0]))))
                meter.step()
            answers = arms.rounds(calls, rounds, after_round=meter.step)
            seconds[point] = {}
            for arm, epochs in answers.items():
                seconds[point][arm] = [epoch[0] for epoch in epochs]
                also = {
                    "batches": calls[arm][1],
                    "minor_faults": rounded(sum(epoch[1] for epoch in epochs) / rounds),
                    "cpu_seconds": rounded(sum(epoch[2] for epoch in epochs) / rounds),
                }
                if point == "images":
                    faults[arm] = also["minor_faults"]
                result.add(arm, seconds[point][arm], also, batch=point)

    def over(point: str | int, above: str, below: str) -> Sample | None:
        at = seconds.get(point, {})
        return ratio(at[above], at[below]) if above in at and below in at else None

    def worst(arm: str) -> Sample | None:
        ratios = [r for r in (over(size, arm, "stock") for size in sweep) if r is not None]
        return max(ratios, key=lambda r: r.median, default=None)

    megabytes = f"{BATCH_BYTES / 1e6:.1f} MB"
    result.figures = [
        at_most(f"{megabytes}: torchshm.data.DataLoader / ring", 1.3, "x", over("images", "loader", "ring")),
        at_least(f"{megabytes}: stock / torchshm.data.DataLoader", 8, "x", over("images", "stock", "loader")),
        at_least("1,000 tensors: stock / torchshm.data.DataLoader", 10, "x", over("dict", "stock", "loader")),
        at_least(
            "32 x 16 floats: stock / torchshm.data.DataLoader", 1.5, "x", over("floats", "stock", "loader")
        ),
        at_most("1 byte to 256 MB, the worst: register() / stock", 1.05, "x", worst("register")),
        at_most("1 byte to 256 MB, the worst: torchshm.data.DataLoader / stock", 1.05, "x", worst("loader")),
        at_most(
            f"{megabytes}: page faults per batch, of stock's",
            0.01,
            "x",
            Sample.of([faults["loader"] / faults["stock"]]) if {"loader", "stock"} <= set(faults) else None,
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "batches of tensors through two DataLoader workers", measure)
