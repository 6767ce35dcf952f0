"""An array by its name.

Quantity: time to load one uint8 array by name, which another process has saved, and to drop it
again; nothing is read. Unit: seconds.
Opponents: Ray's get of a reference that the driver holds, Vineyard's get_name + get, a
SharedMemory segment opened by name. Beside them: the same load where the store has a thousand and
a million names, random ones in turn, and the throughput of eight processes that load at once.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import Figure, at_least, at_most
from benchmarks.meter import Meter
from benchmarks.naming import Host, Naming
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio, rounded
from benchmarks.stores import STORES
from benchmarks.units import GIB, KIB, MIB, format_bytes, format_seconds

NAME = "store_load"
OPPONENTS = ("torchshm", "ray", "vineyard", "shared_memory")
SIZES = (64 * KIB, MIB, 4 * MIB, 64 * MIB)
QUICK_SIZES = (64 * KIB, 4 * MIB)
CAPACITY = 3 * GIB
"""Of one store: sixteen arrays of the largest size, with the room that Ray keeps free."""

NAMED_BYTES = 4 * KIB
FEW_NAMES, MANY_NAMES = 1_000, 1_000_000
QUICK_MANY_NAMES = 20_000
SAMPLED = 20_000
"""Names that a turn loads at most, chosen at random once."""

PROCESSES = 8
RUN_SECONDS = 0.02
MOST_LOADS = 20_000

Values = dict[str, list[float]]


class Named:
    """Loads random names of a store that has `names` of them; another process serves it and has saved them."""

    def __init__(self, names: int) -> None:
        import torchshm

        self._host = Remote(Host, "torchshm", max(GIB, 3 * names * NAMED_BYTES))
        address = self._host.call("address")
        self._host.call("fill", "name-", names, NAMED_BYTES, timeout=600.0)
        self._store = torchshm.connect(address)
        choice = random.Random(0).choices(range(names), k=SAMPLED)
        self._keys = [f"name-{number}" for number in choice]

    def run(self, loads: int) -> float:
        """Seconds per load."""
        load, keys = self._store.load, self._keys[:loads]
        begin = time.perf_counter()
        for key in keys:
            load(key)
        return (time.perf_counter() - begin) / len(keys)

    def close(self) -> None:
        self._host.close()


class Loader:
    """One process of the crew."""

    def __init__(self, index: int, address: str) -> None:
        import torchshm

        self._store = torchshm.connect(address)
        self._keys = [f"name-{number}" for number in range(FEW_NAMES)]
        random.Random(index).shuffle(self._keys)

    def run(self, seconds: float) -> tuple[float, float]:
        """Loads per second, and per second of the processor, over `seconds` at least."""
        load, loads = self._store.load, 0
        begin, busy = time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - begin) < seconds:
            for key in self._keys:
                load(key)
            loads += len(self._keys)
        return loads / passed, loads / (time.process_time() - busy)


class Loaders:
    """`processes` that load the same thousand names at once."""

    def __init__(self, processes: int) -> None:
        import torchshm  # noqa: F401 - before the fork

        self._host = Remote(Host, "torchshm", GIB)
        self._host.call("fill", "name-", FEW_NAMES, NAMED_BYTES)
        self._crew = Crew(processes, Loader, self._host.call("address"))

    def run(self, seconds: float) -> tuple[float, float]:
        """Loads per second of all together, and per second of a processor."""
        rates, of_processor = zip(*self._crew.call("run", seconds), strict=True)
        return sum(rates), sum(of_processor) / len(of_processor)

    def close(self) -> None:
        self._crew.close()
        self._host.close()


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm at every size, then the names, then the processes."""
    sizes = QUICK_SIZES if quick else SIZES
    many = QUICK_MANY_NAMES if quick else MANY_NAMES
    result = Result(
        NAME,
        "time to load one uint8 array by name, and to drop it",
        "s",
        {
            **{name: Arm(STORES[name].label, STORES[name].how) for name in OPPONENTS},
            "torchshm_few": Arm("torchshm, few names", f"random names of {FEW_NAMES:,}"),
            "torchshm_many": Arm("torchshm, many names", f"random names of {many:,}"),
            "torchshm_alone": Arm("torchshm, one process", "one process at it"),
            "torchshm_together": Arm(
                "torchshm, all processes", f"{PROCESSES} processes at it, time per load of all"
            ),
        },
        quick=quick,
    )
    meter.expect(len(sizes) + 2)
    loads: dict[int, Values] = {}
    with Arms(result) as arms:
        for name in OPPONENTS:
            package = STORES[name].package
            arms.start(name, (package,) if package else (), Naming, name, CAPACITY)
        for size in sizes:
            meter.doing(format_bytes(size))
            loads[size] = _measure_size(arms, size, 5 if quick else 41)
            for arm, seconds in loads[size].items():
                result.add(arm, seconds, bytes=size)
            meter.step()
    meter.doing(f"{many:,} names")
    names = _measure_names(result, many, 5 if quick else 21)
    meter.step()
    meter.doing(f"{PROCESSES} processes")
    processes = _measure_processes(result, 5 if quick else 15, 0.1 if quick else 0.3)
    meter.step()
    result.figures = [*judge(loads), *_judge_names(names, many), *_judge_processes(processes)]
    return result


def _measure_size(arms: Arms, size: int, rounds: int) -> Values:
    calls: dict[str, tuple[Any, ...]] = {}
    for arm in arms:
        arms.call(arm, "fill", size)
        if arm in arms:
            arms.call(arm, "load", 64)  # warms up
        if arm in arms:
            seconds = arms.call(arm, "load", 64)
        if arm in arms:
            calls[arm] = ("load", max(1, min(MOST_LOADS, int(RUN_SECONDS / seconds))))
    return arms.rounds(calls, rounds)


def _measure_names(result: Result, many: int, rounds: int) -> Values:
    with Arms(result) as arms:
        for arm, names in (("torchshm_few", FEW_NAMES), ("torchshm_many", many)):
            arms.start(arm, ("torchshm",), Named, names)
        for arm in arms:
            arms.call(arm, "run", SAMPLED, timeout=600.0)  # warms up, and maps the blocks
        values = arms.rounds(dict.fromkeys(arms, ("run", SAMPLED)), rounds)
    for arm, seconds in values.items():
        result.add(arm, seconds, bytes=NAMED_BYTES, names=FEW_NAMES if arm == "torchshm_few" else many)
    return values


def _measure_processes(result: Result, rounds: int, seconds: float) -> Values:
    with Arms(result) as arms:
        for arm, processes in (("torchshm_alone", 1), ("torchshm_together", PROCESSES)):
            arms.start(arm, ("torchshm",), Loaders, processes)
        for arm in arms:
            arms.call(arm, "run", seconds)  # warms up
        answers = arms.rounds(dict.fromkeys(arms, ("run", seconds)), rounds)
    values: Values = {}
    for arm, rates in answers.items():
        values[arm] = [rate for rate, _ in rates]
        cpu = rounded(1 / Sample.of([rate for _, rate in rates]).median)
        processes = 1 if arm == "torchshm_alone" else PROCESSES
        at = {"bytes": NAMED_BYTES, "processes": processes}
        result.add(arm, [1 / rate for rate in values[arm]], {"cpu_seconds": cpu}, **at)
        result.facts[f"processor time per load, processes: {processes}"] = format_seconds(cpu)
    return values


def judge(values: dict[int, Values]) -> list[Figure]:
    """The figures of one array by name: the worst of all sizes."""
    figures = []
    for other, target in (("ray", 4), ("vineyard", 100)):
        ratios = {
            size: ratio(at[other], at["torchshm"])
            for size, at in values.items()
            if other in at and "torchshm" in at
        }
        size = min(ratios, key=lambda size: ratios[size].median, default=None)
        figures.append(
            at_least(
                f"{STORES[other].label} / torchshm, the worst of all sizes",
                target,
                "x",
                None if size is None else ratios[size],
                "" if size is None else f"at {format_bytes(size)}",
            )
        )
    return figures


def _judge_names(values: Values, many: int) -> list[Figure]:
    few_names, many_names = values.get("torchshm_few"), values.get("torchshm_many")
    return [
        at_most(
            f"a load among {many:,} names / among {FEW_NAMES:,}",
            2,
            "x",
            ratio(many_names, few_names) if few_names and many_names else None,
        )
    ]


def _judge_processes(rates: Values) -> list[Figure]:
    alone, together = rates.get("torchshm_alone"), rates.get("torchshm_together")
    cores = min(PROCESSES, len(os.sched_getaffinity(0)))
    kept: Sample | None = None
    if alone and together:
        kept = ratio([rate / cores for rate in together], alone)
    return [
        at_least(
            f"throughput of a core with {PROCESSES} processes loading / with one",
            0.8,
            "x",
            kept,
            f"{PROCESSES} processes share {cores} cores",
        )
    ]


BENCHMARK = Benchmark(NAME, "an array by its name, against Ray, Vineyard and SharedMemory", measure)
