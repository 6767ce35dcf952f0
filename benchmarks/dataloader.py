"""Numpy batches through DataLoader workers.

Quantity: time per batch of 64 float32 images 3x224x224 (38.5 MB) over whole epochs of a
DataLoader with two persistent workers and a dataset that costs nothing; the consumer reads one
byte of every page. Unit: seconds.
Opponents: the same np.stack without torchshm (stock), and, as context, what torch users do:
default_collate to tensors, by file_descriptor and by file_system.
"""

from __future__ import annotations

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least
from benchmarks.images import BATCH_BYTES, ImageLoader
from benchmarks.loading import measure_loading
from benchmarks.meter import Meter
from benchmarks.result import Result
from benchmarks.sample import Sample, ratio

NAME = "dataloader"
WORKERS = 2


def measure(quick: bool, meter: Meter) -> Result:
    """Every variant, epoch by epoch in turn."""
    result = Result(
        NAME,
        f"time per batch of {BATCH_BYTES / 1e6:.1f} MB through a DataLoader with {WORKERS} workers",
        "s",
        ImageLoader.VARIANTS,
        quick=quick,
    )
    with Arms(result) as arms:
        for variant in ImageLoader.VARIANTS:
            packages = ("torch", "torchshm") if variant.startswith("torchshm") else ("torch",)
            arms.start(variant, packages, ImageLoader, variant, WORKERS)
        seconds = measure_loading(
            result,
            arms,
            meter,
            epoch_seconds=0.3 if quick else 0.8,
            rounds=3 if quick else 15,
            fewest=8 if quick else 16,
        )

    def over_stock(arm: str) -> Sample | None:
        return ratio(seconds["stock"], seconds[arm]) if arm in seconds and "stock" in seconds else None

    result.figures = [
        at_least("stock / torchshm.register() alone", 6, "x", over_stock("torchshm")),
        at_least("stock / collate inside torchshm.pooled()", 10, "x", over_stock("torchshm_pooled")),
    ]
    return result


BENCHMARK = Benchmark(NAME, "38.5 MB numpy batches through two DataLoader workers", measure)
