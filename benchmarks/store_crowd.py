"""Many processes at the same names.

Quantity: time per load where 64 processes load the same 1,000 keys at once, 100 times, each in an
order of its own; that is the whole time by all loads. Unit: seconds.
Opponent: the same number of loads by one process a core, which has nobody to wait for.
After that all processes hold and read all arrays, and their memory (PSS) is compared with the
arrays' bytes: what is mapped of the store's files, in all processes and the one that serves. As a
fact besides, what the loading has added to everything else, which is Python's objects.
``cpu_seconds`` of a row is what a load costs on the processor, whatever else the machine does;
a process that waits for another one shows in ``voluntary_switches``.
"""

from __future__ import annotations

import os
import random
import resource
import time
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import at_most
from benchmarks.memory import pss_of_files, rollup
from benchmarks.meter import Meter
from benchmarks.naming import Host
from benchmarks.page import touch_pages
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio, rounded
from benchmarks.units import GIB, KIB, MIB, format_seconds

NAME = "store_crowd"
PROCESSES, KEYS, PASSES, NBYTES = 64, 1_000, 100, MIB
QUICK = (16, 200, 20, 256 * KIB)
PSS_MOST = 1.02
CONVOY = 1.25
"""More than that by the time of a process a core, and processes wait for each other."""


class Reader:
    """One process of the crowd."""

    def __init__(self, index: int, address: str, keys: int) -> None:
        import torchshm

        self._store = torchshm.connect(address)
        self._keys = [f"name-{number}" for number in range(keys)]
        random.Random(index).shuffle(self._keys)

    def run(self, passes: int) -> tuple[float, float, int, float, int]:
        """When it began and ended (CLOCK_MONOTONIC), how many loads failed, processor seconds, and voluntary context switches."""
        load, errors = self._store.load, 0
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.monotonic()
        for _ in range(passes):
            for key in self._keys:
                try:
                    load(key)
                except Exception:
                    errors += 1
        end, after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return begin, end, errors, cpu, after.ru_nvcsw - before.ru_nvcsw

    def hold(self) -> None:
        """Loads all, and reads every page."""
        self._held = [self._store.load(key) for key in self._keys]
        for array in self._held:
            touch_pages(array)


class Crowd:
    """`processes` that load the same keys; another one serves and has saved them."""

    def __init__(self, processes: int, keys: int, nbytes: int) -> None:
        import torchshm  # noqa: F401 - before the fork

        self._bytes = keys * nbytes
        self._host = Remote(Host, "torchshm", 2 * self._bytes + GIB)
        address = self._host.call("address")
        self._host.call("fill", "name-", keys, nbytes)
        self._loads = processes * keys
        self._crew = Crew(processes, Reader, address, keys)

    def run(self, passes: int) -> tuple[float, int, float, int]:
        """Over all processes: seconds per load, loads that failed, processor seconds per load, voluntary context switches."""
        begins, ends, errors, cpu, switches = zip(*self._crew.call("run", passes), strict=True)
        loads = self._loads * passes
        return (max(ends) - min(begins)) / loads, sum(errors), sum(cpu) / loads, sum(switches)

    def memory(self) -> tuple[float, float]:
        """By one copy of the arrays: the store's files in all processes, and the copy with all that loading has added."""
        pids = [*self._crew.pids, self._host.pid]
        before = sum(rollup(pid)["Pss"] for pid in pids)
        self._crew.call("hold")
        added = sum(rollup(pid)["Pss"] for pid in pids) - before
        files = sum(pss_of_files(pid, "memfd:torchshm") for pid in pids)
        return files / self._bytes, 1 + added / self._bytes

    def close(self) -> None:
        self._crew.close()
        self._host.close()


def measure(quick: bool, meter: Meter) -> Result:
    """The crowd and one process a core in turn, then the crowd's memory."""
    processes, keys, passes, nbytes = QUICK if quick else (PROCESSES, KEYS, PASSES, NBYTES)
    cores = min(processes, len(os.sched_getaffinity(0)))
    rounds = 3 if quick else 5
    result = Result(
        NAME,
        f"time per load, {keys:,} names loaded {passes} times by {processes} processes at once",
        "s",
        {
            "torchshm_crowd": Arm(f"{processes} processes", f"{processes} processes at once"),
            "torchshm_cores": Arm("one process a core", f"as many loads by {cores} processes"),
        },
        quick=quick,
    )
    meter.expect(rounds + 2)
    meter.doing("starting")
    memory: tuple[float, float] | None = None
    with Arms(result) as arms:
        arms.start("torchshm_crowd", ("torchshm",), Crowd, processes, keys, nbytes)
        arms.start("torchshm_cores", ("torchshm",), Crowd, cores, keys, nbytes)
        calls: dict[str, tuple[Any, ...]] = {}
        for arm, each in (("torchshm_crowd", passes), ("torchshm_cores", passes * processes // cores)):
            if arm in arms:
                arms.call(arm, "run", 1)  # warms up
                calls[arm] = ("run", each)
        meter.step()
        meter.doing("loading")
        answers = arms.rounds(calls, rounds, after_round=meter.step)
        meter.doing("memory")
        if "torchshm_crowd" in arms:
            memory = arms.call("torchshm_crowd", "memory")
        meter.step()
    seconds = {arm: [each[0] for each in values] for arm, values in answers.items()}
    errors = {arm: sum(each[1] for each in values) for arm, values in answers.items()}
    for arm, values in answers.items():
        also = {
            "errors": errors[arm],
            "cpu_seconds": Sample.of([each[2] for each in values]).median,
            "voluntary_switches": sum(each[3] for each in values),
        }
        result.add(arm, seconds[arm], also)
        result.facts[f"{arm}: processor time per load"] = format_seconds(also["cpu_seconds"])
        result.facts[f"{arm}: voluntary context switches of all loads"] = also["voluntary_switches"]
    if memory:
        result.facts["PSS of one copy and of all that loading has added, by one copy"] = rounded(memory[1])
    crowd, alone = seconds.get("torchshm_crowd"), seconds.get("torchshm_cores")
    result.figures = [
        at_most(
            f"loads that failed, of {processes * keys * passes * rounds:,}",
            0,
            "loads",
            Sample.of([errors["torchshm_crowd"]]) if crowd else None,
        ),
        at_most(
            f"{processes} processes at once / one process a core",
            CONVOY,
            "x",
            ratio(crowd, alone) if crowd and alone else None,
            "no lock convoy",
        ),
        at_most(
            "PSS of the store's files in all processes / one copy of the arrays",
            PSS_MOST,
            "x",
            Sample.of([memory[0]]) if memory else None,
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "64 processes at the same names: time, errors and memory", measure)
