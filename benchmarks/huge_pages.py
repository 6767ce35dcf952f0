"""Pages of 4 KiB, transparent huge pages and reserved ones under the same store.

Quantities: time per element of reading 2 million elements of 8 bytes at random places of an array of 256 MiB that was loaded from a
store, and time of saving such an array where the store has no page yet, or, prefaulted, has all of them. Unit: seconds.
The reserved pages are asked for here (vm.nr_hugepages, as root) and given back; where there are none that arm is left out.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import ratio
from benchmarks.units import MIB

NAME = "huge_pages"
BYTES = 256 * MIB
READS = 2_000_000
LIMIT = 320 * MIB
RESERVED = Path("/proc/sys/vm/nr_hugepages")

ARMS = {
    "numpy": Arm("NumPy", "an array of the process's own; saved: copied to a new one"),
    "small": Arm("4 KiB", "hugepages=False"),
    "transparent": Arm("transparent", 'hugepages="auto", the default'),
    "reserved": Arm("reserved, 2 MiB", "hugepages=True"),
    "prefault": Arm("prefaulted", "the default with prefault=True"),
}
OPTIONS: dict[str, dict[str, bool]] = {
    "small": {"hugepages": False},
    "transparent": {},
    "reserved": {"hugepages": True},
    "prefault": {"prefault": True},
}


class Private:
    """NumPy's own memory, as the system gives it."""

    def __init__(self, _arm: str = "") -> None:
        self._source = np.arange(BYTES // 8)
        self._random = np.random.default_rng(7)

    def save(self) -> float:
        """Seconds of a copy."""
        begin = time.perf_counter()
        copy = self._source.copy()
        seconds = time.perf_counter() - begin
        self._check(copy)
        return seconds

    def read(self) -> float:
        """Seconds per element, at random places."""
        return self._read(self._source)

    def _read(self, array: np.ndarray) -> float:
        places = self._random.integers(0, array.size, READS)
        into = np.empty(READS, array.dtype)
        begin = time.perf_counter()
        np.take(array, places, out=into, mode="clip")
        seconds = time.perf_counter() - begin
        if not (into == places).all():
            raise AssertionError("another element was read")
        return seconds / READS

    def _check(self, array: np.ndarray) -> None:
        if array[-1] != array.size - 1 or array[array.size // 2] != array.size // 2:
            raise AssertionError("something else was saved")


class Stored(Private):
    """A store of this process, with the pages of its arm."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        import torchshm
        from torchshm import _C

        self._prefaulted = arm == "prefault"
        self._store = torchshm.start(f"pages-{uuid.uuid4().hex[:12]}", LIMIT, **OPTIONS[arm])  # type: ignore[arg-type]
        _C.choose(self._store.info()["pool_id"])

    def save(self) -> float:
        """Seconds of a save."""
        import torchshm

        if "x" in self._store:
            del self._store["x"]
        if not self._prefaulted:
            while self._store.info()["committed_bytes"] != 0:  # the janitor may be at it
                torchshm.trim()
        begin = time.perf_counter()
        self._store.save("x", self._source)
        seconds = time.perf_counter() - begin
        self._check(self._store["x"])
        return seconds

    def read(self) -> float:
        """Seconds per element, at random places."""
        return self._read(self._store["x"])


@contextlib.contextmanager
def _reserved(pages: int) -> Iterator[str | None]:
    """Reserve huge pages for as long as this lasts. Why there are none, or None."""
    try:
        before = RESERVED.read_text()
        RESERVED.write_text(str(int(before) + pages))
    except OSError as error:
        yield f"huge pages can't be reserved: {RESERVED}: {os.strerror(error.errno or 0)}"
        return
    try:
        got = int(RESERVED.read_text()) - int(before)
        yield None if got >= pages else f"the kernel reserved {got} of {pages} huge pages"
    finally:
        RESERVED.write_text(before)


def measure(quick: bool, meter: Meter) -> Result:
    """All arms in turn."""
    result = Result(
        NAME,
        "reading an element of 8 bytes at a random place of 256 MiB, and saving 256 MiB for the first time",
        "s",
        ARMS,
        quick=quick,
    )
    rounds = 3 if quick else 21
    meter.expect(rounds)
    with _reserved(LIMIT // (2 * MIB)) as why, Arms(result) as arms:
        arms.start("numpy", (), Private)
        for arm in OPTIONS:
            if arm == "reserved" and why is not None:
                result.not_available[arm] = why
            else:
                arms.start(arm, ("torchshm",), Stored, arm)
        meter.doing("saving and reading")
        for arm in arms:
            arms.call(arm, "save")
            arms.call(arm, "read")
        saves: dict[str, list[float]] = {arm: [] for arm in arms}
        reads: dict[str, list[float]] = {arm: [] for arm in arms}
        for what, into in (("save", saves), ("read", reads)):
            for arm, seconds in arms.rounds(dict.fromkeys(arms, (what,)), rounds, meter.step).items():
                if seconds:
                    into[arm] = seconds
                    result.add(arm, seconds, what=what)
    for arm in ("transparent", "reserved"):
        if reads.get(arm) and reads.get("small"):
            result.figures.append(
                at_least(
                    f"random reads, {ARMS[arm].label} / 4 KiB", 1.0, "x", ratio(reads["small"], reads[arm])
                )
            )
            result.figures.append(
                at_least(
                    f"first save, {ARMS[arm].label} / 4 KiB", 1.5, "x", ratio(saves["small"], saves[arm])
                )
            )
    return result


BENCHMARK = Benchmark(NAME, "huge pages, small ones, and pages that are there before", measure)
