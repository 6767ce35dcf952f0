"""An array under a name.

Quantity: time to save one uint8 array of the process's own memory under a new name; removing what
was saved before is not counted. Unit: seconds.
Opponents: the limit, a memcpy to warm memory; Ray's put, Vineyard's put + put_name, a SharedMemory
segment for each. All have used their memory before, as in a program that has run for a while; the
rows with ``memory: first use`` are those of fresh processes that keep what they save, and those with
``memory: early loop`` of fresh processes that save and remove one after the other, without a pause.
Beside them: the same save of an array that lies in the store already, 64 KiB against 1 GiB.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import Figure, at_least, at_most
from benchmarks.meter import Meter
from benchmarks.naming import Host, Naming
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio
from benchmarks.stores import STORES
from benchmarks.units import GIB, KIB, MIB, format_bytes

NAME = "store_save"
OPPONENTS = ("torchshm", "memcpy", "ray_warm", "vineyard", "shared_memory")
FIRST_USE = ("torchshm", "ray", "vineyard", "shared_memory")
FIRST_BYTES, FIRST_SAVES, QUICK_FIRST_SAVES = 64 * MIB, 20, 6
SIZES = (64 * KIB, 4 * MIB, 64 * MIB)
JUDGED = (4 * MIB, 64 * MIB)
OF_MEMCPY, OVER_RAY = 1.15, 5
CAPACITY = 2 * GIB

POOLED = (64 * KIB, GIB)
QUICK_POOLED = (64 * KIB, 64 * MIB)
POOLED_SAVES = 500
GROWTH = 1.2
"""What still counts as no growth: the quartiles of a save of microseconds are that far apart."""

RUN_SECONDS = 0.05
MOST_SAVES = 2000

Values = dict[str, list[float]]


class PooledSaver:
    """Saves one array that lies in the store's memory under ever new names."""

    def __init__(self, nbytes: int) -> None:
        import torchshm

        self._host = Remote(Host, "torchshm", 2 * POOLED[-1])
        self._store = torchshm.connect(self._host.call("address"))
        with self._store.storage():
            self._array = np.empty(nbytes, np.uint8)
        self._array[:: 1 << 12] = 1
        self._saved = 0

    def run(self, saves: int) -> float:
        """Seconds per save."""
        save, remove, array = self._store.save, self._store.remove, self._array
        seconds = 0.0
        for _ in range(saves):
            self._saved += 1
            key = f"pooled-{self._saved}"
            begin = time.perf_counter()
            save(key, array)
            seconds += time.perf_counter() - begin
            remove(key)
        return seconds / saves

    def close(self) -> None:
        self._host.close()


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm at every size, then what is pooled."""
    pooled_sizes = QUICK_POOLED if quick else POOLED
    result = Result(
        NAME,
        "time to save one uint8 array under a name",
        "s",
        {
            **{name: Arm(STORES[name].label, STORES[name].how) for name in (*OPPONENTS, "ray")},
            "torchshm_pooled": Arm("torchshm, pooled", "Store.save of an array made in Store.storage()"),
        },
        quick=quick,
    )
    meter.expect(len(SIZES) + 2)
    saves: dict[int, Values] = {}
    with Arms(result) as arms:
        for name in OPPONENTS:
            package = STORES[name].package
            arms.start(name, (package,) if package else (), Naming, name, CAPACITY)
        for size in SIZES:
            meter.doing(format_bytes(size))
            saves[size] = _measure_size(arms, size, 5 if quick else 21)
            for arm, seconds in saves[size].items():
                result.add(arm, seconds, bytes=size)
            meter.step()
    meter.doing("first use")
    early = _measure_early_loop(result, QUICK_FIRST_SAVES if quick else FIRST_SAVES)
    first = _measure_first_use(result, QUICK_FIRST_SAVES if quick else FIRST_SAVES)
    meter.step()
    meter.doing("pooled")
    pooled: dict[Any, list[float]] = _measure_pooled(result, pooled_sizes, 5 if quick else 21)
    meter.step()
    result.figures = [*judge(saves, early, first), _judge_pooled(pooled, pooled_sizes)]
    return result


def _measure_size(arms: Arms, size: int, rounds: int) -> Values:
    calls: dict[str, tuple[Any, ...]] = {}
    for arm in arms:
        arms.call(arm, "save", size, 8)  # warms up
        if arm in arms:
            seconds = arms.call(arm, "save", size, 4)
        if arm in arms:
            calls[arm] = ("save", size, max(2, min(MOST_SAVES, int(RUN_SECONDS / seconds))))
    return arms.rounds(calls, rounds)


def _measure_first_use(result: Result, saves: int) -> Values:
    with Arms(result) as arms:
        for name in FIRST_USE:
            package = STORES[name].package
            arms.start(name, (package,) if package else (), Naming, name, CAPACITY)
        for arm in arms:
            arms.call(arm, "keep", FIRST_BYTES)  # maps and starts what is made only once
        values = arms.rounds(dict.fromkeys(arms, ("keep", FIRST_BYTES)), saves)
    for arm, seconds in values.items():
        result.add(arm, seconds, bytes=FIRST_BYTES, memory="first use")
    return values


def _measure_early_loop(result: Result, saves: int) -> Values:
    values: Values = {}
    with Arms(result) as arms:
        for name in FIRST_USE:
            package = STORES[name].package
            arms.start(name, (package,) if package else (), Naming, name, CAPACITY)
        for arm in arms:
            arms.call(arm, "save", FIRST_BYTES, 2)  # maps and starts what is made only once
        for arm in arms:
            seconds = arms.call(arm, "burst", FIRST_BYTES, saves)
            if seconds:
                values[arm] = seconds
    for arm, seconds in values.items():
        result.add(arm, seconds, bytes=FIRST_BYTES, memory="early loop")
    return values


def _measure_pooled(result: Result, sizes: tuple[int, ...], rounds: int) -> dict[Any, list[float]]:
    with Arms(result) as arms:
        for size in sizes:
            arms.start(f"torchshm_pooled {size}", ("torchshm",), PooledSaver, size)
        for arm in arms:
            arms.call(arm, "run", POOLED_SAVES)  # warms up
        values = arms.rounds(dict.fromkeys(arms, ("run", POOLED_SAVES)), rounds)
    by_size = {int(arm.rpartition(" ")[2]): seconds for arm, seconds in values.items()}
    for size, seconds in by_size.items():
        result.add("torchshm_pooled", seconds, bytes=size)
    return by_size


def judge(values: dict[int, Values], early: Values, first: Values) -> list[Figure]:
    """The figures of what is copied."""

    def compare(at: Values, above: str, below: str) -> Sample | None:
        return ratio(at[above], at[below]) if above in at and below in at else None

    figures = []
    for size in JUDGED:
        sample = compare(values.get(size, {}), "torchshm", "memcpy")
        figures.append(at_most(f"torchshm / warm memcpy at {format_bytes(size)}", OF_MEMCPY, "x", sample))
    for size in JUDGED:
        sample = compare(values.get(size, {}), "ray_warm", "torchshm")
        figures.append(
            at_least(f"Ray / torchshm at {format_bytes(size)}", OVER_RAY, "x", sample, "memory used before")
        )
    for at, note in ((early, "one after the other, early in a program"), (first, "first use of the memory")):
        sample = compare(at, "ray", "torchshm")
        figures.append(
            at_least(f"Ray / torchshm at {format_bytes(FIRST_BYTES)}", OVER_RAY, "x", sample, note)
        )
    return figures


def _judge_pooled(values: dict[Any, list[float]], sizes: tuple[int, ...]) -> Figure:
    small, large = sizes
    sample = ratio(values[large], values[small]) if small in values and large in values else None
    return at_most(
        f"a pooled array of {format_bytes(large)} / of {format_bytes(small)}",
        GROWTH,
        "x",
        sample,
        "no growth with the size",
    )


BENCHMARK = Benchmark(NAME, "an array under a name, against memcpy, Ray, Vineyard and SharedMemory", measure)
