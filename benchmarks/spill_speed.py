"""How fast values go to disk and come back.

Quantity: bytes written a second while room is made out of values that lie in memory only, and bytes loaded a second of values that lie
on disk only (their files out of the page cache), 768 MiB in values of 16 and 64 MiB. Unit: GB/s.
Opponents: dd with ``oflag=direct`` and ``iflag=direct`` and blocks of the same size, and fio, where it is installed, with eight requests
in flight, in the same folder and round. Judged by the faster of the two. Before each of them
writes, what it wrote before is removed and given back by the file system.
Beside them: the 99th percentile of the loads of one process, of names that stay in memory, while another process makes the
store write to disk without a pause, and in quiet.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import numpy as np

from benchmarks import disk
from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.exchange import content_of
from benchmarks.figure import Figure, at_least, at_most
from benchmarks.meter import Meter
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio, rounded
from benchmarks.units import GIB, KIB, MIB, format_bytes, format_seconds

NAME = "spill_speed"
SIZES = (16 * MIB, 64 * MIB)
LIMIT, TOTAL = GIB, 768 * MIB
OF_DISK = 0.8
PATIENCE = 60.0
"""Seconds that a save waits for room."""

STEADY_NAMES, STEADY_BYTES = 256, 64 * KIB
STEADY_LIMIT = 512 * MIB
STEADY_SECONDS, QUICK_STEADY_SECONDS = 1.0, 0.3
P99_MOST = 2

Values = dict[str, list[float]]


class Host:
    """Serves the store."""

    def __init__(self, limit: int, directory: str) -> None:
        import torchshm

        self._store = torchshm.start(f"bench-{os.getpid()}", limit=limit, spill=directory, timeout=PATIENCE)

    def address(self) -> str:
        return self._store.name

    def close(self) -> None:
        self._store.close()


class Pusher:
    """Wants the whole store for one value, so that everything else has to go to disk."""

    def __init__(self, index: int, address: str) -> None:
        import torchshm

        self._store = torchshm.connect(address)

    def push(self, nbytes: int) -> None:
        self._store.save("room", np.zeros(nbytes, np.uint8), policy="pin")
        self._store.remove("room")


class Spilling:
    """A client that saves and loads, one that pushes, and the service."""

    def __init__(self, directory: str) -> None:
        import torchshm

        self._directory = Path(directory)
        self._host = Remote(Host, LIMIT, directory)
        address = self._host.call("address")
        self._crew = Crew(1, Pusher, address)
        self._store = torchshm.connect(address)
        self._keys: list[str] = []

    def write(self, nbytes: int, count: int) -> float:
        """GB/s from the moment that the values may go until the last of them is on disk."""
        for key in self._keys:
            self._store.remove(key)
        disk.settle(self._directory)
        self._keys = [f"value-{number}" for number in range(count)]
        for key in self._keys:
            self._store.save(key, content_of(nbytes), policy="pin")
        before = self._store.info()["spilled_total_bytes"]
        begin = time.perf_counter()
        for key in self._keys:
            self._store.set_policy(key, "spill")
        self._crew.begin("push", LIMIT - nbytes // 2)
        while self._store.info()["spilled_total_bytes"] < before + nbytes * count:
            if time.perf_counter() - begin > PATIENCE:
                raise AssertionError(f"the values did not all go to disk: {self._store.info()}")
            time.sleep(0.0005)
        seconds = time.perf_counter() - begin
        self._crew.gather()
        return nbytes * count / seconds / 1e9

    def read(self, nbytes: int, count: int) -> float:
        """GB/s of loads of what was written last."""
        disk.forget(self._directory)
        before = self._store.info()["restores"]
        begin = time.perf_counter()
        for key in self._keys:
            self._store.load(key)
        seconds = time.perf_counter() - begin
        if self._store.info()["restores"] != before + count:
            raise AssertionError("not all values were on disk")
        last = self._store.load(self._keys[-1])
        if not np.array_equal(last, content_of(nbytes)):
            raise AssertionError("a value came back damaged")
        return nbytes * count / seconds / 1e9

    def close(self) -> None:
        self._crew.close()
        self._host.close()


class Writer:
    """Makes the store write to disk: each of its saves needs the room of others."""

    def __init__(self, index: int, address: str) -> None:
        import torchshm

        self._store = torchshm.connect(address)
        self._content = content_of(16 * MIB)
        self._saved = 0

    def run(self, seconds: float) -> int:
        """Saves for that long; bytes saved."""
        names = 2 * STEADY_LIMIT // self._content.nbytes
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            self._store.save(f"moving-{self._saved % names}", self._content, overwrite=True)
            self._saved += 1
            count += 1
        return count * self._content.nbytes


class Steady:
    """A process that loads names which stay in memory, and one that makes the store write."""

    def __init__(self, directory: str) -> None:
        import torchshm

        self._host = Remote(Host, STEADY_LIMIT, directory)
        address = self._host.call("address")
        self._crew = Crew(1, Writer, address)
        self._store = torchshm.connect(address)
        self._keys = [f"steady-{number}" for number in range(STEADY_NAMES)]
        for key in self._keys:
            self._store.save(key, content_of(STEADY_BYTES), policy="pin")
        random.Random(0).shuffle(self._keys)

    def run(self, busy: bool, seconds: float) -> tuple[float, float, float]:
        """Median and 99th percentile of the loads' seconds, and bytes that the store wrote a second meanwhile."""
        before = self._store.info()["spilled_total_bytes"]
        if busy:
            self._crew.begin("run", seconds + 0.2)
            time.sleep(0.1)
        load, clock = self._store.load, time.perf_counter_ns
        times: list[int] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for key in self._keys:
                at = clock()
                load(key)
                times.append(clock() - at)
        passed = time.perf_counter() - begin
        written = self._store.info()["spilled_total_bytes"] - before
        if busy:
            self._crew.gather()
            if written == 0:
                raise AssertionError("nothing was written to disk meanwhile")
        median, p99 = np.percentile(times, [50, 99])
        return float(median) / 1e9, float(p99) / 1e9, written / passed

    def close(self) -> None:
        self._crew.close()
        self._host.close()


def measure(quick: bool, meter: Meter) -> Result:
    """Writing and reading at every size, then the loads beside."""
    rounds = 3 if quick else 11
    total = TOTAL // 2 if quick else TOTAL
    result = Result(
        NAME,
        f"bytes written to disk and read back a second, {format_bytes(total)} at a time",
        "GB/s",
        {
            "torchshm": Arm(
                "torchshm", "values that make room for another one; loads of values that are on disk"
            ),
            "dd": Arm("dd", "dd oflag=direct, dd iflag=direct, bs= the value's size"),
            "fio": Arm("fio", "fio --direct=1 --ioengine=libaio --iodepth=8 --bs=1m, random bytes"),
        },
        quick=quick,
    )
    meter.expect(len(SIZES) * rounds + 1)
    with disk.folder("spill-speed") as folder:
        values = _measure_disk(result, meter, folder, total, rounds)
    with disk.folder("spill-steady") as folder:
        meter.doing("loads beside")
        quiet, busy = _measure_steady(
            result, folder, rounds, QUICK_STEADY_SECONDS if quick else STEADY_SECONDS
        )
        meter.step()
    result.figures = [*judge(values), judge_loads(quiet, busy)]
    return result


def _measure_disk(
    result: Result, meter: Meter, folder: Path, total: int, rounds: int
) -> dict[tuple[int, str], Values]:
    values: dict[tuple[int, str], Values] = {}
    with Arms(result) as arms:
        arms.start("torchshm", ("torchshm",), Spilling, str(folder))
        arms.start("dd", (), disk.Dd, str(folder))
        if shutil.which("fio"):
            arms.start("fio", (), disk.Fio, str(folder))
        else:
            result.not_available["fio"] = "fio is not installed"
        for size in SIZES:
            count = total // size
            at: dict[str, Values] = {"write": {}, "read": {}}
            for turn in range(rounds + 1):  # the first one warms up
                order = list(arms)
                random.Random(turn).shuffle(order)
                for arm in order:
                    meter.doing(f"{format_bytes(size)}, {arm}")
                    for what, found in at.items():
                        rate = arms.call(arm, what, size, count) if arm in arms else None
                        if rate is not None and turn:
                            found.setdefault(arm, []).append(rate)
                meter.step()
            for what, found in at.items():
                values[size, what] = {arm: rates for arm, rates in found.items() if arm in arms}
                for arm, rates in values[size, what].items():
                    result.add(arm, rates, bytes=size, what=what)
    return values


def _measure_steady(
    result: Result, folder: Path, rounds: int, seconds: float
) -> tuple[list[float], list[float]]:
    p99: dict[bool, list[float]] = {False: [], True: []}
    medians: dict[bool, list[float]] = {False: [], True: []}
    written = []
    with Arms(result) as arms:
        arms.start("torchshm", ("torchshm",), Steady, str(folder))
        for turn in range(rounds + 1):  # the first one warms up
            for busy in (False, True) if turn % 2 else (True, False):
                answer = arms.call("torchshm", "run", busy, seconds) if "torchshm" in arms else None
                if answer is not None and turn:
                    medians[busy].append(answer[0])
                    p99[busy].append(answer[1])
                    written += [answer[2]] if busy else []
    if "torchshm" in result.not_available:
        return [], []
    for busy, name in ((False, "in quiet"), (True, "while the store writes")):
        median, high = Sample.of(medians[busy]).median, Sample.of(p99[busy]).median
        result.facts[f"a load {name}, median and 99th percentile"] = (
            f"{format_seconds(median)}, {format_seconds(high)}"
        )
    result.facts["written to disk meanwhile, GB/s"] = rounded(Sample.of(written).median / 1e9)
    return p99[False], p99[True]


def judge(values: dict[tuple[int, str], Values]) -> list[Figure]:
    """Each size and direction by what the faster of dd and fio reaches."""
    figures = []
    for (size, what), at in values.items():
        others = {arm: Sample.of(rates).median for arm, rates in at.items() if arm != "torchshm"}
        best = max(others, key=lambda arm: others[arm], default=None)
        measured = ratio(at["torchshm"], at[best]) if best and "torchshm" in at else None
        claim = f"{'spilling' if what == 'write' else 'restoring'} values of {format_bytes(size)} / dd or fio"
        note = "" if best is None else f"{best} reaches {others[best]:.2f} GB/s"
        figures.append(at_least(claim, OF_DISK, "x", measured, note))
    return figures


def judge_loads(quiet: list[float], busy: list[float]) -> Figure:
    """What a load that needs no disk has to do with those that do."""
    cores = len(os.sched_getaffinity(0))
    return at_most(
        "99th percentile of loads from memory while the store writes to disk / in quiet",
        P99_MOST,
        "x",
        ratio(busy, quiet) if busy and quiet else None,
        f"on {cores} cores",
    )


BENCHMARK = Benchmark(NAME, "values to disk and back, against dd and fio; loads beside", measure)
