"""One loader for several consumers, against a loader for each.

Quantity: time per batch and consumer, where four processes go through the same epochs at once: the whole time by all the batches that
they got together. A batch is 32 float32 images 3x224x224 (19.3 MB) that workers make of JPEG files as in `transforms.py`, which is what
the time is spent on; the consumers read one byte of every page. Unit: seconds.
Opponent: four DataLoaders of PyTorch alone, strategy file_descriptor, one worker each. The one loader that is published has a worker a
core. All workers persist.
After that, epochs of three consumers besides a fourth one, which in every other epoch is killed half-way (SIGKILL).
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import at_least, at_most
from benchmarks.meter import Meter
from benchmarks.page import touch_pages
from benchmarks.remote import Remote, RemoteFailed
from benchmarks.result import Arm, Result
from benchmarks.sample import ratio
from benchmarks.transforms import BATCH, Pictures

NAME = "fanout"
CONSUMERS = 4
ARMS = {
    "stock": Arm("a loader each", f"{CONSUMERS} processes with a DataLoader of torch's and one worker each"),
    "torchshm": Arm(
        "publish(), subscribe()", f"one torchshm.data.DataLoader published, {CONSUMERS} processes subscribed"
    ),
}


class _Epoch(Pictures):
    """So many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self._batches = batches

    def __len__(self) -> int:
        return self._batches * BATCH


class Consumer:
    """One process; without `address`, with a loader of its own."""

    def __init__(self, _index: int, batches: int, address: str | None) -> None:
        import torch.multiprocessing
        from torch.utils.data import DataLoader

        self._loader: Any
        if address is None:
            torch.multiprocessing.set_sharing_strategy("file_descriptor")
            self._loader = DataLoader(_Epoch(batches), BATCH, num_workers=1, persistent_workers=True)
        else:
            from torchshm.data import subscribe

            self._loader = subscribe(address, timeout=120)

    def run(self, killed_after: int | None = None) -> list[float]:
        """An epoch; a number of each batch."""
        found = []
        for batch in self._loader:
            touch_pages(np.asarray(batch))
            found.append(float(batch[-1, -1, -1, -1]))
            del batch
            if len(found) == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
        return found


class Host:
    """Publishes."""

    def __init__(self, address: str, batches: int) -> None:
        from torchshm.data import DataLoader, publish

        workers = len(os.sched_getaffinity(0))
        loader = DataLoader(_Epoch(batches), BATCH, num_workers=workers, persistent_workers=True)
        self._publisher = publish(loader, address, min_consumers=CONSUMERS)

    def run(self) -> None:
        """An epoch."""
        for _ in self._publisher:
            pass

    def close(self) -> None:
        self._publisher.close()


class Feed:
    """All consumers of one arm, the last of them in a crew of its own."""

    def __init__(self, arm: str, batches: int) -> None:
        import torch  # noqa: F401 - before the forks

        self._batches = batches
        self._address: str | None = None
        self._host: Remote | None = None
        if arm != "stock":
            import torchshm.data  # noqa: F401

            self._address = f"benchmark-{os.getpid()}"
            self._host = Remote(Host, self._address, batches)
        self._most = self._consumers(CONSUMERS - 1)
        self._last = self._consumers(1)

    def _consumers(self, count: int) -> Crew:
        return Crew(count, Consumer, self._batches, self._address, daemon=False)

    def run(self) -> tuple[float, list[float]]:
        """Seconds of an epoch that all go through, and what they got."""
        begin = time.perf_counter()
        for crew in (self._most, self._last):
            crew.begin("run")
        if self._host is not None:
            self._host.call("run")
        found = [*self._most.gather(), *self._last.gather()]
        return time.perf_counter() - begin, self._same(found)

    def run_without_last(self, killed: bool) -> float:
        """Seconds of an epoch of all but the last, a new one, which may be killed half-way."""
        self._last.close()
        self._last = self._consumers(1)
        assert self._host is not None
        begin = time.perf_counter()
        self._most.begin("run")
        self._last.begin("run", self._batches // 2 if killed else None)
        self._host.call("run")
        found = self._most.gather()
        seconds = time.perf_counter() - begin
        self._same(found)
        try:
            self._last.gather()
        except RemoteFailed:
            if not killed:
                raise
        return seconds

    def _same(self, found: list[list[float]]) -> list[float]:
        if any(each != found[0] for each in found) or len(found[0]) != self._batches:
            raise AssertionError("the consumers did not get the same batches")
        return found[0]

    def close(self) -> None:
        for crew in (self._last, self._most):
            crew.close()
        if self._host is not None:
            self._host.close()


def measure(quick: bool, meter: Meter) -> Result:
    """Both arms in turn, epoch by epoch; then epochs with and without a death."""
    batches, rounds = (6, 2) if quick else (24, 7)
    result = Result(
        NAME,
        f"time per batch and consumer, {CONSUMERS} consumers at once, batches of {BATCH} decoded pictures",
        "s",
        ARMS,
        quick=quick,
    )
    deaths: dict[bool, list[float]] = {True: [], False: []}
    meter.expect(1 + 2 * rounds)
    meter.doing("starting")
    with Arms(result) as arms:
        for arm in ARMS:
            packages = ("torch", "skimage", "PIL", *(() if arm == "stock" else ("torchshm",)))
            arms.start(arm, packages, Feed, arm, batches)
        first = {arm: arms.call(arm, "run") for arm in arms}  # starts the workers
        if len({str(each[1]) for each in first.values() if each is not None}) > 1:
            raise AssertionError("the arms did not get the same batches")
        meter.step()
        meter.doing("epochs")
        answers = arms.rounds(dict.fromkeys(arms, ("run",)), rounds, after_round=meter.step)
        for number in range(rounds):
            meter.doing("deaths")
            for killed in (True, False) if number % 2 else (False, True):
                if "torchshm" in arms:
                    deaths[killed].append(arms.call("torchshm", "run_without_last", killed))
            meter.step()
    seconds = {arm: [each[0] / (CONSUMERS * batches) for each in found] for arm, found in answers.items()}
    for arm, values in seconds.items():
        result.add(arm, values)
    both = all(arm in seconds for arm in ARMS)
    survived = "torchshm" in seconds and None not in (*deaths[True], *deaths[False])
    result.figures = [
        at_least(
            f"batches per second of {CONSUMERS} consumers: one loader published / a loader each",
            3,
            "x",
            ratio(seconds["stock"], seconds["torchshm"]) if both else None,
        ),
        at_most(
            "an epoch of three consumers: a fourth is killed half-way / it is not",
            1.05,
            "x",
            ratio(deaths[True], deaths[False]) if survived else None,
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "one loader published to four consumers, and a loader each", measure)
