"""A large xarray Dataset through a DataLoader worker.

Quantity: time per Dataset of 392 MB (100 x 700 x 1400 float32 and coordinates) over whole epochs
of a DataLoader with one persistent worker; the consumer drops it unread. Unit: seconds.
Opponents: the same without torchshm (stock). The arms that were shared beforehand come in three
sizes, since their time must not depend on it.
"""

from __future__ import annotations

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.fields import FieldsLoader
from benchmarks.figure import at_least, at_most
from benchmarks.loading import measure_loading
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio

NAME = "xarray"

SHARED = "moved to the pool beforehand by torchshm.share"
ARMS = {
    "stock": ("stock", 100, Arm("stock", "392 MB, nothing registered: pickled through a pipe")),
    "torchshm": (
        "torchshm",
        100,
        Arm("torchshm", "392 MB after torchshm.register(): one copy into the pool"),
    ),
    "torchshm_shared_39MB": ("shared", 10, Arm("torchshm, shared, 39 MB", f"39 MB, {SHARED}")),
    "torchshm_shared_392MB": ("shared", 100, Arm("torchshm, shared, 392 MB", f"392 MB, {SHARED}")),
    "torchshm_shared_1GB": ("shared", 256, Arm("torchshm, shared, 1 GB", f"1.0 GB, {SHARED}")),
}


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm, epoch by epoch in turn."""
    result = Result(
        NAME,
        "time per xarray Dataset through a DataLoader with one worker",
        "s",
        {name: arm for name, (_, _, arm) in ARMS.items()},
        quick=quick,
    )
    with Arms(result) as arms:
        for arm, (variant, times, _) in ARMS.items():
            packages = ("torch", "xarray") if variant == "stock" else ("torch", "xarray", "torchshm")
            arms.start(arm, packages, FieldsLoader, variant, times)
        seconds = measure_loading(
            result, arms, meter, epoch_seconds=0.3, rounds=2 if quick else 9, fewest=1 if quick else 3
        )

    def compare(above: str, below: str) -> Sample | None:
        return ratio(seconds[above], seconds[below]) if above in seconds and below in seconds else None

    shared = Sample.of(seconds["torchshm_shared_392MB"]) if "torchshm_shared_392MB" in seconds else None
    result.figures = [
        at_least("stock / torchshm.register() at 392 MB", 12, "x", compare("stock", "torchshm")),
        at_most("shared beforehand, 392 MB", 2e-3, "s", shared),
        at_most(
            "shared beforehand, 1.0 GB / 39 MB",
            1.1,
            "x",
            compare("torchshm_shared_1GB", "torchshm_shared_39MB"),
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "a 392 MB xarray Dataset through a DataLoader worker", measure)
