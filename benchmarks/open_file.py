"""A store in a file, opened without a service.

Quantity: time of `torchshm.open(path)` of a file with 100,000 names, and of the first load from it, in fresh processes that have
imported torchshm; the file is in the page cache. Unit: seconds.
After that eight processes hold the file open and have read all that is in it, and the memory (PSS) of the file's mappings in
all of them is compared with what one of them has mapped (RSS).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import disk
from benchmarks.availability import missing
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import Figure, at_most
from benchmarks.memory import pss_of_files
from benchmarks.meter import Meter
from benchmarks.remote import Remote, RemoteFailed
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample
from benchmarks.units import GIB, KIB, format_bytes

NAME = "open_file"
NAMES, QUICK_NAMES = 100_000, 10_000
NBYTES = KIB
LIMIT = 2 * GIB
SECONDS_TO_OPEN = 0.010
PROCESSES = 8
ONE_COPY = 1.02

FRESH = """
import json, sys, time
import numpy, torchshm
path, keys = sys.argv[1], sys.argv[2:]
begin = time.perf_counter()
opened = torchshm.open(path)
at = time.perf_counter()
first = opened[keys[0]]
loaded = time.perf_counter()
assert int(first.view("u8")[0]) == int(keys[0].partition("-")[2]), first
for key in keys:
    opened[key]
print(json.dumps([at - begin, loaded - at, (time.perf_counter() - loaded) / len(keys), len(opened)]))
"""


class Maker:
    """Serves a store in a file, and fills it; what is in the file stays when it ends."""

    def __init__(self, path: str, names: int) -> None:
        import torchshm

        self._store = torchshm.start(f"bench-{os.getpid()}", limit=LIMIT, file=path)
        value = np.zeros(NBYTES, np.uint8)
        for number in range(names):
            value[:8].view(np.uint64)[0] = number
            self._store.save(f"name-{number}", value)

    def ready(self) -> bool:
        return len(self._store) > 0

    def close(self) -> None:
        self._store.close()


class Reader:
    """One process that has the file open and has read all of it."""

    def __init__(self, index: int, path: str) -> None:
        import torchshm

        self._opened = torchshm.open(path)
        self._sum = 0

    def read(self) -> int:
        """Reads every value; their number."""
        for key in self._opened:
            self._sum += int(self._opened[key][::64].sum())
        return len(self._opened)


def measure(quick: bool, meter: Meter) -> Result:
    """Fresh processes one after the other, then eight at once."""
    names = QUICK_NAMES if quick else NAMES
    rounds = 5 if quick else 21
    result = Result(
        NAME,
        f"time to open a store's file with {names:,} names, and to load one",
        "s",
        {"torchshm": Arm("torchshm", "torchshm.open in a fresh process")},
        quick=quick,
    )
    if reason := _unable():
        result.not_available["torchshm"] = reason
        result.figures = judge([], names, None)
        return result
    meter.expect(rounds + 2)
    with disk.folder("open-file") as folder:
        path = folder / "store"
        meter.doing("making the file")
        maker = Remote(Maker, str(path), names)
        try:
            maker.call("ready", timeout=600.0)
        finally:
            maker.close()
        meter.step()
        meter.doing("opening")
        answers = []
        for turn in range(rounds + 1):  # the first one warms up
            answer = _open(path, names, turn)
            answers += [answer] if turn else []
            meter.step()
        meter.doing(f"{PROCESSES} processes")
        memory = _measure_memory(result, path, names)
        status = path.stat()
        result.facts["the file"] = (
            f"{format_bytes(status.st_blocks * 512)} allocated of {format_bytes(status.st_size)}"
        )
        meter.step()
    for column, what in enumerate(("open", "first load", "load")):
        result.add("torchshm", [answer[column] for answer in answers], what=what)
    result.figures = judge([answer[0] for answer in answers], names, memory)
    return result


def _unable() -> str | None:
    reason = missing("torchshm")
    if reason is None:
        import torchshm

        if not hasattr(torchshm, "open"):
            return "this torchshm has no open()"
    return reason


def _open(path: Path, names: int, turn: int) -> list[float]:
    """Seconds of open, of the first load and of a later one, and how many names there are."""
    keys = [f"name-{number}" for number in random.Random(turn).choices(range(names), k=100)]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path), *keys], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RemoteFailed(f"a fresh process failed: {done.stderr}")
    answer: list[float] = json.loads(done.stdout)
    if answer[3] != names:
        raise AssertionError(f"the file has {answer[3]} names, not {names}")
    return answer


def _measure_memory(result: Result, path: Path, names: int) -> Sample:
    import torchshm  # noqa: F401 - before the fork

    crew = Crew(PROCESSES, Reader, str(path))
    try:
        if set(crew.call("read", timeout=600.0)) != {names}:
            raise AssertionError("not all names were read")
        of_all = sum(pss_of_files(pid, str(path)) for pid in crew.pids)
        of_one = max(pss_of_files(pid, str(path), "Rss") for pid in crew.pids)
    finally:
        crew.close()
    result.facts["mapped by one process, MiB"] = of_one >> 20
    result.facts[f"PSS in {PROCESSES} processes, MiB"] = of_all >> 20
    if of_one < names * NBYTES:
        raise AssertionError(f"{path} is not mapped: {of_one} bytes of it")
    return Sample.of([of_all / of_one])


def judge(opened: list[float], names: int, memory: Sample | None) -> list[Figure]:
    """Time to open, and whether pages are shared."""
    return [
        at_most(
            f"torchshm.open of {names:,} names",
            SECONDS_TO_OPEN,
            "s",
            Sample.of(opened) if opened else None,
            "in a fresh process",
        ),
        at_most(
            f"PSS of the file's mappings in {PROCESSES} processes / RSS of one",
            ONE_COPY,
            "x",
            memory,
            "its pages are shared",
        ),
    ]


BENCHMARK = Benchmark(NAME, "a store's file opened by fresh processes: time and memory", measure)
