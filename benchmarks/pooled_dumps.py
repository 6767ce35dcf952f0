"""Pickling what lies in the pool already.

Quantity: time of ForkingPickler.dumps + pickle.loads in one process, torch imported, of arrays
in the pool (made by torchshm.empty and by torchshm.share) of 64 KiB and of 1 GiB. Unit: seconds.
Opponent: the same on a tuple of six small values, the least that anything can cost.
"""

from __future__ import annotations

import time
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_most
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import ratio
from benchmarks.units import GIB, KIB

NAME = "pooled_dumps"
SMALL, LARGE = 64 * KIB, GIB
WARM_UP, ROUND_TRIPS = 2000, 1000
TUPLE = (1, 2.5, "three", b"four", None, True)

ARMS = {
    "tuple": Arm("a tuple of six small values", f"the tuple {TUPLE!r}"),
    "torchshm_empty_64KiB": Arm("torchshm.empty, 64 KiB", "a 64 KiB array made by torchshm.empty"),
    "torchshm_empty_1GiB": Arm("torchshm.empty, 1 GiB", "a 1 GiB array made by torchshm.empty"),
    "torchshm_share_64KiB": Arm("torchshm.share, 64 KiB", "a 64 KiB array returned by torchshm.share"),
    "torchshm_share_1GiB": Arm("torchshm.share, 1 GiB", "a 1 GiB array returned by torchshm.share"),
}


class Pickling:
    """All arms in one process: they differ in the object only."""

    def __init__(self) -> None:
        import torch.multiprocessing  # noqa: F401  # with it, ForkingPickler has more reducers to look through

        import torchshm

        torchshm.register()
        self._objects: dict[str, Any] = {"tuple": TUPLE}
        for name, nbytes in (("64KiB", SMALL), ("1GiB", LARGE)):
            empty = torchshm.empty((nbytes,), np.uint8)
            empty[-1] = 1
            self._objects[f"torchshm_empty_{name}"] = empty
            self._objects[f"torchshm_share_{name}"] = torchshm.share(np.ones(nbytes, np.uint8))
        for name, array in self._objects.items():
            if name != "tuple" and not torchshm.is_shared(array):
                raise AssertionError(f"{name} is not in the pool")

    def run(self, count: int) -> dict[str, float]:
        """Seconds per round trip of every arm."""
        return {name: self._time(thing, count) for name, thing in self._objects.items()}

    @staticmethod
    def _time(thing: Any, count: int) -> float:
        dumps, loads = ForkingPickler.dumps, ForkingPickler.loads
        begin = time.perf_counter()
        for _ in range(count):
            loads(dumps(thing))
        return (time.perf_counter() - begin) / count


def measure(quick: bool, meter: Meter) -> Result:
    """All objects in turn, round by round."""
    result = Result(
        NAME,
        "time of ForkingPickler.dumps + loads of an array that is in the pool already",
        "s",
        ARMS,
        quick=quick,
    )
    rounds = 7 if quick else 41
    meter.expect(rounds)
    answers: list[dict[str, float]] = []
    with Arms(result) as arms:
        arms.start("pooled arrays", ("torch", "torchshm"), Pickling)
        for arm in arms:
            arms.call(arm, "run", WARM_UP)
            if arm in arms:
                answers = arms.rounds({arm: ("run", ROUND_TRIPS)}, rounds, meter.step).get(arm, [])
    seconds = {arm: [answer[arm] for answer in answers] for arm in (answers[0] if answers else {})}
    for arm, values in seconds.items():
        result.add(arm, values)
    for made in ("empty", "share"):
        small, large = seconds.get(f"torchshm_{made}_64KiB"), seconds.get(f"torchshm_{made}_1GiB")
        size_ratio = ratio(large, small) if small and large else None
        tuple_ratio = ratio(small, seconds["tuple"]) if small else None
        result.figures += [
            at_most(f"torchshm.{made}: 1 GiB / 64 KiB", 1.1, "x", size_ratio),
            at_most(f"torchshm.{made}, 64 KiB / a tuple of six small values", 2.5, "x", tuple_ratio),
        ]
    return result


BENCHMARK = Benchmark(NAME, "pickling an array that is in the pool already, 64 KiB and 1 GiB", measure)
