"""Sixteen processes that want the same at once, and the one that makes it is killed in half of the rounds.

Quantity: how much longer than `fn` itself the slowest of them waits for ``torchshm.data.once(key, fn)``: from its call, or from the kill
where that came later, to what it got, less what the completed `fn` took. Unit: seconds. Each round has a key of its own, and all call at
once. In every second round the first to run `fn` kills itself (SIGKILL) at a random time in it; another process takes its place in the
next round, and the store's service ends and is taken over wherever the dead one had it.
Counted besides: rounds in which not exactly one `fn` was completed, or not all got the same bytes, and blocks left when all keys are
forgotten.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import end
from benchmarks.figure import at_most
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, rounded
from benchmarks.units import MIB

NAME = "once_race"
PROCESSES, ROUNDS, SECONDS, NBYTES = 16, 200, 0.1, 4 * MIB
QUICK_ROUNDS = 20
MOST = 1.0  # s beyond fn
LEAD = 0.02  # s, for all to be ready


class Racer:
    """One process of the race."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def race(self, number: int, kills: bool, begin: float) -> tuple[float, float, int]:
        """When it called and when it had the value (CLOCK_MONOTONIC), and a checksum of that."""
        from torchshm.data import once

        def make() -> Any:
            began = time.monotonic()
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._folder / f"{number}.first", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                if kills:
                    time.sleep(random.random() * SECONDS)
                    (self._folder / f"{number}.killed").write_text(repr(time.monotonic()))
                    os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(SECONDS)
            made = np.frombuffer(os.urandom(NBYTES), np.uint8)
            with open(self._folder / f"{number}.completed", "a") as file:
                file.write(f"{time.monotonic() - began!r}\n")
            return made

        time.sleep(max(0.0, begin - time.monotonic()))
        called = time.monotonic()
        value = once(f"round {number}", make)
        return called, time.monotonic(), zlib.crc32(value)

    def forget(self, number: int) -> dict[str, Any]:
        """Figures of the store afterwards."""
        from torchshm.data import node_store

        node_store().remove(f"round {number}")
        return node_store().info()


def _serve(link: Connection, inherited: list[Connection], folder: Path) -> None:
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    racer = Racer(folder)
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = link.recv()
            link.send(getattr(racer, method)(*arguments))


class Race:
    """All of them, as ranks of one job; this process is none of it."""

    def __init__(self, processes: int) -> None:
        import torchshm.data  # noqa: F401 - before the forks

        self._folder = Path(tempfile.mkdtemp(prefix="race", dir="/tmp"))
        os.environ["TORCHSHM_JOB"] = f"race-{os.getpid()}"
        self._context = multiprocessing.get_context("fork")
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(processes):
            self._add()

    def _add(self) -> None:
        link, theirs = self._context.Pipe()
        self._links.append(link)
        process = self._context.Process(
            target=_serve, args=(theirs, list(self._links), self._folder), daemon=True
        )
        process.start()
        theirs.close()
        self._processes.append(process)

    def run(self, number: int, kills: bool) -> tuple[float, int, bool, int]:
        """The longest wait beyond `fn`, how many were completed and whether all got the same, and how many got it."""
        arguments = (number, kills, time.monotonic() + LEAD)
        for link in self._links:
            link.send(("race", arguments))
        answers, dead = [], []
        for index, link in enumerate(self._links):
            try:
                if not link.poll(60):
                    raise TimeoutError(f"a process waits for ever in round {number}")
                answers.append(link.recv())
            except (EOFError, OSError):
                dead.append(index)
        completed = (self._folder / f"{number}.completed").read_text().split()
        killed = float((self._folder / f"{number}.killed").read_text()) if kills else 0.0
        beyond = max(had - max(called, killed) for called, had, _ in answers) - float(completed[-1])
        for index in reversed(dead):
            self._links.pop(index).close()
            process = self._processes.pop(index)
            process.join()
            if process.exitcode != -signal.SIGKILL:
                raise RuntimeError(f"a process ended with {process.exitcode} in round {number}")
        if len(dead) != kills:
            raise RuntimeError(f"{len(dead)} processes died in round {number}")
        self._ask(0, "forget", number)
        for _ in dead:
            self._add()
        return beyond, len(completed), len({crc for *_, crc in answers}) == 1, len(answers)

    def left(self, number: int) -> int:
        """Blocks in the store after one more round, when all is forgotten and the service has had time to see the dead."""
        self.run(number, False)
        time.sleep(1)
        self._links[0].send(("race", (number + 1, False, 0.0)))
        self._links[0].recv()
        return int(self._ask(0, "forget", number + 1)["blocks"])

    def _ask(self, index: int, method: str, *arguments: Any) -> Any:
        self._links[index].send((method, arguments))
        if not self._links[index].poll(60):
            raise TimeoutError(f"no answer to {method}")
        return self._links[index].recv()

    def close(self) -> None:
        end(self._links, self._processes)
        shutil.rmtree(self._folder, ignore_errors=True)


def measure(quick: bool, meter: Meter) -> Result:
    """Rounds with a kill and without in turn."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    result = Result(
        NAME,
        f"longest wait of {PROCESSES} processes for once(key, fn), beyond fn",
        "s",
        {"torchshm": Arm("torchshm.data.once", f"{PROCESSES} processes, the first to run fn killed or not")},
        quick=quick,
    )
    meter.expect(rounds)
    found: dict[bool, list[Any]] = {False: [], True: []}
    left = None
    with Arms(result) as arms:
        arms.start("torchshm", ("torch", "torchshm"), Race, PROCESSES)
        for number in range(rounds):
            kills = number % 2 == 1
            meter.doing("the one that makes it is killed" if kills else "nobody is killed")
            if "torchshm" in arms:
                answer = arms.call("torchshm", "run", number, kills)
                if answer is not None:
                    found[kills].append(answer)
            meter.step()
        if "torchshm" in arms:
            left = arms.call("torchshm", "left", rounds)
    every = found[False] + found[True]
    whole = len(every) == rounds
    for kills, answers in found.items():
        if answers:
            also = {"longest": rounded(max(answer[0] for answer in answers)), "rounds": len(answers)}
            result.add("torchshm", [answer[0] for answer in answers], also, killed=kills)
    result.figures = [
        at_most(
            f"longest wait beyond fn, of {PROCESSES} processes in {rounds} rounds",
            MOST,
            "s",
            Sample.of([max(answer[0] for answer in every)]) if whole else None,
            f"the process that runs fn killed in {rounds // 2} rounds",
        ),
        at_most(
            "rounds in which fn was not completed exactly once",
            0,
            "rounds",
            Sample.of([sum(answer[1] != 1 for answer in every)]) if whole else None,
        ),
        at_most(
            "rounds in which not all got the same",
            0,
            "rounds",
            Sample.of([sum(not answer[2] for answer in every)]) if whole else None,
        ),
        at_most(
            "blocks left when all is forgotten", 0, "blocks", Sample.of([left]) if left is not None else None
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "16 processes at one key, the one that makes it killed", measure)
