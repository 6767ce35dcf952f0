"""Messages through a queue.

Quantities: time per message of 1 KiB (bytes), one sender to one taker and eight senders to one taker, the queue never bounded; half a
round trip between two that answer at once; and the median time from put() until get() has returned in another process that has slept
in it. Unit: seconds.
Opponent: multiprocessing.Queue, the same loops. CPU per message of all processes together is in ``also``.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio

NAME = "queue"
BYTES = 1024
GAP = 200e-6  # s, between two messages that are timed one by one: the taker waits by then

ARMS = {
    "torchshm": Arm("torchshm", "torchshm.get_context('fork').Queue()"),
    "multiprocessing": Arm("multiprocessing", "multiprocessing.get_context('fork').Queue()"),
}
PACKAGES = {"torchshm": ("torchshm",), "multiprocessing": ()}


def _send(queue: Any, ready: Any, start: Any, sender: int, count: int) -> None:
    data = b"x" * BYTES
    ready.release()
    start.wait()
    if sender < 0:
        for _ in range(count):
            queue.put(data)
    else:
        for i in range(count):
            queue.put((sender, i, data))


def _stamp(queue: Any, answers: Any, count: int) -> None:
    for _ in range(count):
        queue.get()
        answers.put(time.perf_counter())


def _return(there: Any, back: Any, count: int) -> None:
    for _ in range(count):
        back.put(there.get())


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Exchange:
    """One arm: a queue of its kind, and children that were forked for each measurement."""

    def __init__(self, arm: str) -> None:
        self._plain = multiprocessing.get_context("fork")
        if arm == "torchshm":
            import torchshm

            self._context: Any = torchshm.get_context("fork")
        else:
            self._context = self._plain

    def one_to_one(self, count: int) -> tuple[float, float]:
        """Seconds and CPU seconds per message."""
        return self._many(1, count)

    def eight_to_one(self, count: int) -> tuple[float, float]:
        """The same, every sender's messages checked to be complete and in order."""
        return self._many(8, count // 8)

    def ping_pong(self, count: int) -> tuple[float, float]:
        """Mean seconds of one way of a round trip; each side answers at once."""
        there, back = self._context.Queue(), self._context.Queue()
        child = self._plain.Process(target=_return, args=(there, back, count + 100))
        child.start()
        data = b"x" * BYTES
        for _ in range(100):
            there.put(data)
            back.get()
        before, begin = _cpu(), time.perf_counter()
        for _ in range(count):
            there.put(data)
            back.get()
        seconds = time.perf_counter() - begin
        child.join()
        return seconds / (2 * count), (_cpu() - before) / (2 * count)

    def latency(self, count: int) -> tuple[float, float]:
        """Median seconds from put() until get() has returned elsewhere."""
        queue, answers = self._context.Queue(), self._context.Queue()
        child = self._plain.Process(target=_stamp, args=(queue, answers, count))
        child.start()
        data, taken = b"x" * BYTES, []
        before = _cpu()
        for _ in range(count):
            time.sleep(GAP)
            begin = time.perf_counter()
            queue.put(data)
            taken.append(answers.get() - begin)
        child.join()
        return statistics.median(taken), (_cpu() - before) / count

    def _many(self, senders: int, each: int) -> tuple[float, float]:
        queue, ready, start = self._context.Queue(), self._plain.Semaphore(0), self._plain.Event()
        children = [
            self._plain.Process(target=_send, args=(queue, ready, start, s if senders > 1 else -1, each))
            for s in range(senders)
        ]
        for child in children:
            child.start()
        for _ in children:
            ready.acquire()
        following = [0] * senders
        before, begin = _cpu(), time.perf_counter()
        start.set()
        for _ in range(senders * each):
            got = queue.get()
            if senders > 1:
                if got[1] != following[got[0]]:
                    raise AssertionError("a message is lost, or not in order")
                following[got[0]] += 1
        seconds = time.perf_counter() - begin
        for child in children:
            child.join()
        return seconds / (senders * each), (_cpu() - before) / (senders * each)


CASES = {  # the loop, its messages, and the figure
    "one to one": ("one_to_one", 20_000, 2.0),
    "8 to one": ("eight_to_one", 20_000, 3.0),
    "ping-pong, one way": ("ping_pong", 5_000, 2.5),
    "latency to one that sleeps": ("latency", 1_000, 2.5),
}


def measure(quick: bool, meter: Meter) -> Result:
    """Each loop in turn, both arms in each round."""
    result = Result(NAME, f"time per message of {BYTES} bytes through a queue", "s", ARMS, quick=quick)
    rounds = 5 if quick else 21
    meter.expect(rounds * len(CASES))
    with Arms(result) as arms:
        for arm in ARMS:
            arms.start(arm, PACKAGES[arm], Exchange, arm)
        for case, (loop, count, target) in CASES.items():
            meter.doing(case)
            answers = arms.rounds(dict.fromkeys(arms, (loop, count)), rounds, meter.step)
            seconds = {arm: [answer[0] for answer in taken] for arm, taken in answers.items()}
            for arm, taken in answers.items():
                cpu = Sample.of([answer[1] for answer in taken]).median
                result.add(arm, seconds[arm], {"cpu_seconds": cpu}, case=case)
            both = len(seconds) == len(ARMS)
            gain = ratio(seconds["multiprocessing"], seconds["torchshm"]) if both else None
            result.figures.append(at_least(f"{case}: multiprocessing.Queue / torchshm", target, "x", gain))
    return result


BENCHMARK = Benchmark(NAME, "messages of 1 KiB through a queue, and their latency", measure)
