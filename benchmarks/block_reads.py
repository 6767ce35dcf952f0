"""Reading blocks of a token array at random places.

Quantity: time to take a copy of 4 KiB (2,048 tokens of two bytes) at a random place of an array of 128 MB, in eight processes at once;
each reads from the array that all share and from a private copy of it in turn, so what else slows the machine slows both. Unit: seconds.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import ratio

NAME = "block_reads"
READERS = 8
TOKENS = 64 << 20  # of two bytes
BLOCK = 2048  # tokens
READS = 20_000  # at a time

ARMS = {
    "private": Arm("private", "a NumPy array of each process's own"),
    "share": Arm("torchshm.share()", 'one array for all, mode "c"'),
    "read": Arm('torchshm.share(mode="r")', "one array for all, read-only"),
}


def read_blocks(link: Connection, arrays: dict[str, Any], seed: int) -> None:
    """A reader: at each request, the seconds per read of one of the arrays."""
    arrays = arrays | {"private": arrays["share"].copy()}
    random = np.random.default_rng(seed)
    into = np.empty(BLOCK, np.uint16)
    while (arm := link.recv()) is not None:
        tokens = arrays[arm]
        places = random.integers(0, TOKENS - BLOCK, READS).tolist()
        expected, begin = 0, time.perf_counter()
        for place in places:
            into[:] = tokens[place : place + BLOCK]
            expected += place
        seconds = time.perf_counter() - begin
        if into[0] != places[-1] & 0xFFFF:
            raise AssertionError("another block was read")
        link.send(seconds / READS)


class Readers:
    """Eight spawned processes that read at the same time."""

    def __init__(self) -> None:
        import torchshm

        torchshm.register()
        tokens = np.arange(TOKENS).astype(np.uint16)
        arrays = {"share": torchshm.share(tokens), "read": torchshm.share(tokens, mode="r")}
        context = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        for seed in range(READERS):
            ours, theirs = context.Pipe()
            context.Process(target=read_blocks, args=(theirs, arrays, seed), daemon=True).start()
            self._links.append(ours)

    def read(self, arm: str) -> float:
        """Mean seconds per read over the readers."""
        for link in self._links:
            link.send(arm)
        return float(np.mean([link.recv() for link in self._links]))


def measure(quick: bool, meter: Meter) -> Result:
    """All arms in the same readers, in turn."""
    rounds = 5 if quick else 41
    result = Result(
        NAME, f"reading 4 KiB at a random place of 128 MB, in {READERS} processes", "s", ARMS, quick=quick
    )
    meter.expect(rounds)
    values: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with Arms(result) as arms:
        arms.start("share", ("torchshm",), Readers)
        meter.doing("reading")
        for number in range(-1, rounds):  # the first shows all pages to all readers
            for arm in ARMS:
                seconds = arms.call("share", "read", arm) if "share" in arms else None
                if number >= 0 and seconds is not None:
                    values[arm].append(seconds)
            meter.step()
    if not all(len(of_arm) == rounds for of_arm in values.values()):
        return result
    for arm, of_arm in values.items():
        result.add(arm, of_arm)
    result.figures = [
        at_least(f"speed, {ARMS[arm].label} / private", 0.95, "x", ratio(values["private"], values[arm]))
        for arm in ("share", "read")
    ]
    return result


BENCHMARK = Benchmark(NAME, "random reads from one array that many processes share", measure)
