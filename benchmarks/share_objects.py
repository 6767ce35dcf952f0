"""Objects of data put in the pool: an xarray Dataset by share(), a pandas frame through a DataLoader worker.

Quantity: time of ``torchshm.share(x)`` for a Dataset of 392 MB (100 x 700 x 1400 float32 and coordinates), the pool warm; of sharing once
more what is shared, in three sizes; the same, as context, when all of it has been read and a page has faulted since, so that the kernel
looks through its pages for private writes; and time per frame of 1,000,000 rows x 24 mixed columns over epochs
of a DataLoader with one persistent worker. Unit: seconds.
Opponents: for share() the limit, one copy of all variables into warm memory and a pickle round trip of the rest; for the frame the same
loader without torchshm.
"""

from __future__ import annotations

import mmap
import pickle
import time

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.fields import make_fields
from benchmarks.figure import at_least, at_most
from benchmarks.frames import ROWS, FrameLoader
from benchmarks.loading import measure_loading
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio

NAME = "share_objects"
QUICK_ROWS = 100_000
TIMES = 10  # of the Dataset that is compared: the others stay unread
REPEATS = 50
"""Of what takes a fraction of a millisecond, in one turn."""

SHARING = {
    "limit": (100, Arm("limit", "392 MB: np.copyto into warm memory, and pickle of the rest")),
    "share": (100, Arm("torchshm.share", "392 MB into a warm pool")),
    "again_39MB": (10, Arm("share again, 39 MB", "39 MB that are shared")),
    "again_392MB": (100, Arm("share again, 392 MB", "392 MB that are shared")),
    "again_1GB": (256, Arm("share again, 1 GB", "1.0 GB that are shared")),
    "read_1GB": (256, Arm("share again, 1 GB, read", "1.0 GB that are shared and read, after a page fault")),
}
LOADING = {
    "frame_stock": ("stock", Arm("stock", "a pandas frame, nothing registered")),
    "frame_torchshm": ("torchshm", Arm("torchshm", "a pandas frame after torchshm.register()")),
    "frame_shared": ("shared", Arm("torchshm, shared", "a pandas frame moved to the pool by torchshm.share")),
}


class Sharing:
    """One arm of share()."""

    def __init__(self, arm: str, times: int) -> None:
        import torchshm

        self._share = torchshm.share
        self._fields = make_fields(times)
        self.run = getattr(self, f"run_{arm.partition('_')[0]}")
        if arm.startswith(("again", "read")):
            self._fields = torchshm.share(self._fields)
        if arm == "limit":
            self._warm = [np.full_like(v.values, v.values.flat[0]) for v in self._fields.variables.values()]
            buffers: list[pickle.PickleBuffer] = []
            pickle.dumps(self._fields, 5, buffer_callback=buffers.append)
            self._buffers = buffers

    def check(self) -> None:
        """Compares what is shared with what was given.

        Raises
        ------
        AssertionError
            They are not equal.
        """
        expected = make_fields(TIMES)
        shared = self._share(expected)
        if not (shared.identical(expected) and self._share(shared).identical(expected)):
            raise AssertionError("the Dataset was damaged")
        if self.run == self.run_read:
            self._fields.sum()

    def run_limit(self) -> float:
        """Seconds."""
        begin = time.perf_counter()
        for variable, warm in zip(self._fields.variables.values(), self._warm, strict=True):
            np.copyto(warm, variable.values)
        rest = pickle.dumps(self._fields, 5, buffer_callback=lambda buffer: False)
        pickle.loads(rest, buffers=self._buffers)
        return time.perf_counter() - begin

    def run_share(self) -> float:
        """Seconds; giving the memory back is not in them."""
        begin = time.perf_counter()
        shared = self._share(self._fields)
        seconds = time.perf_counter() - begin
        del shared
        return seconds

    def run_again(self) -> float:
        """Seconds for each."""
        share, fields = self._share, self._fields
        begin = time.perf_counter()
        for _ in range(REPEATS):
            share(fields)
        return (time.perf_counter() - begin) / REPEATS

    def run_read(self) -> float:
        """Seconds."""
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page[0] = 1
        begin = time.perf_counter()
        self._share(self._fields)
        return time.perf_counter() - begin


def measure(quick: bool, meter: Meter) -> Result:
    """share() in turns, then the frames epoch by epoch."""
    result = Result(
        NAME,
        "time to put an xarray Dataset in the pool, and per pandas frame through a DataLoader with one worker",
        "s",
        {name: arm for name, (_, arm) in (SHARING | LOADING).items()},
        quick=quick,
    )
    seconds = _measure_sharing(result, 5 if quick else 21, meter)
    with Arms(result) as arms:
        for arm, (variant, _) in LOADING.items():
            packages = ("torch", "pandas", "pyarrow", *(() if variant == "stock" else ("torchshm",)))
            arms.start(arm, packages, FrameLoader, variant, QUICK_ROWS if quick else ROWS)
        seconds |= measure_loading(
            result, arms, meter, epoch_seconds=0.3, rounds=2 if quick else 9, fewest=1 if quick else 3
        )

    def compare(above: str, below: str) -> Sample | None:
        return ratio(seconds[above], seconds[below]) if above in seconds and below in seconds else None

    rows = f"{QUICK_ROWS if quick else ROWS:,} rows"
    result.figures = [
        at_most(
            "share() of 392 MB / one warm copy and a pickle of the rest", 1.3, "x", compare("share", "limit")
        ),
        at_most("shared once more, 1.0 GB / 39 MB", 1.1, "x", compare("again_1GB", "again_39MB")),
        at_least(
            f"stock / torchshm.register(), a frame of {rows}",
            8,
            "x",
            compare("frame_stock", "frame_torchshm"),
        ),
    ]
    return result


def _measure_sharing(result: Result, rounds: int, meter: Meter) -> dict[str, list[float]]:
    meter.expect(rounds)
    with Arms(result) as arms:
        for arm, (times, _) in SHARING.items():
            arms.start(arm, ("xarray", "torchshm"), Sharing, arm, times)
        for arm in arms:
            meter.doing(f"{arm}: first")
            for method in ("check", "run", "run"):
                if arm in arms:
                    arms.call(arm, method)
        meter.doing("in turn")
        seconds = arms.rounds(dict.fromkeys(arms, ("run",)), rounds, after_round=meter.step)
    for arm, values in seconds.items():
        result.add(arm, values)
    return seconds


BENCHMARK = Benchmark(NAME, "xarray and pandas objects into the pool and through a worker", measure)
