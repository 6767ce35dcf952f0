"""Starts the arms, interleaves their rounds, compares what they deliver, collects the results."""

from __future__ import annotations

import json
import os
import pickle
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torchshm.demo import climate, flights
from torchshm.demo.case import CASES, FIELDS_FILE, FLIGHTS_FILE
from torchshm.demo.progress import Progress
from torchshm.demo.result import DemoError, Result, Window
from torchshm.demo.settings import Settings
from torchshm.demo.usage import PeakPss

# Seconds without an answer after which an arm is taken to hang. A round is over in ten, with spawn in thirty.
PATIENCE = 180

# Seconds an arm gets to end by itself.
FAREWELL = 10


def conduct(settings: Settings, progress: Progress, ways: Sequence[str] | None = None) -> list[Result]:
    """Prepare the data and measure every case.

    Parameters
    ----------
    settings : Settings
        Sizes, durations, workers.
    progress : Progress
        Told of every step.
    ways : sequence of str, optional
        Only these ways of each case, stock among them; all by default.

    Returns
    -------
    list of Result
        In the order of `torchshm.demo.case.CASES`, stock first in each case.

    Raises
    ------
    DemoError
        An arm failed or hung, a batch did not arrive as it was, or training losses differ between two arms.
    """
    with tempfile.TemporaryDirectory(prefix="torchshm-demo-") as folder:
        data = Path(folder)
        prepare(data, settings, progress)
        chosen = {case: [way for way in own if ways is None or way in ways] for case, own in CASES.items()}
        rounds = progress.bar("measuring", sum(len(own) * (settings.rounds + 2) for own in chosen.values()))
        results = []
        for case, own in chosen.items():
            results += _measure(case, own, data, settings, rounds)
        return results


def prepare(data: Path, settings: Settings, progress: Progress) -> None:
    """Write the climate field and the flights into the folder `data`, where every arm reads them."""
    fields = progress.bar("climate field", settings.time_steps)
    dataset = climate.interpolate(settings.time_steps, settings.grid, fields)
    dataset.to_netcdf(data / FIELDS_FILE)
    frame = flights.read(settings.flights)
    with open(data / FLIGHTS_FILE, "wb") as file:
        pickle.dump(frame, file, protocol=5)


def _measure(case: str, ways: Sequence[str], data: Path, settings: Settings, advance: Any) -> list[Result]:
    with ExitStack() as stack:
        arms = [stack.enter_context(Arm(case, way, data, settings)) for way in ways]
        for arm in arms:  # they start side by side
            arm.settle()
            advance(f"{case}: {arm.result.way} ready")
        for number in range(settings.rounds):
            # There and back, so that none is always the first.
            for arm in arms if number % 2 == 0 else reversed(arms):
                arm.round()
                advance(f"{case}: {arm.result.way}, round {number + 1} of {settings.rounds}")
        for arm in arms:
            arm.memory()
            advance(f"{case}: {arm.result.way}, memory")
    results = [arm.result for arm in arms]
    for result in results:
        if result.losses != results[0].losses:
            raise DemoError(f"{case}: losses with {result.way} differ from {results[0].way}'s")
    return results


class Arm:
    """One case in one way, in a fresh process of its own; a context that ends with the process."""

    def __init__(self, case: str, way: str, data: Path, settings: Settings) -> None:
        self.settings = settings
        self.result = Result(case, way, batch_bytes=0)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- __exit__ closes it
        order = {"case": case, "way": way, "data": str(data), "settings": asdict(settings)}
        # It imports what is imported here, from the same places, wherever the demo was started.
        places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchshm.demo.arm", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=data,
            env={**os.environ, "PYTHONPATH": places},
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> Arm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # a command that a dead arm did not read
            self._process.stdin.close()
        try:
            self._process.wait(FAREWELL if kind is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its workers notice and end
            self._process.wait()
        self._process.stdout.close()
        self.result.messages = self._said()
        self._errors.close()

    @property
    def pid(self) -> int:
        """Of the parent of its workers."""
        return self._process.pid

    def settle(self) -> None:
        """Wait until the arm has loaded its data."""
        self.result.batch_bytes = self._answer()["batch_bytes"]

    def round(self) -> None:
        """One timed window."""
        answer = self._ask("round")
        self.result.windows.append(Window(answer["batches"], answer["seconds"], answer["cpu_s"]))
        self.result.pooled = answer["pooled"]
        losses = answer["losses"][: self.settings.loss_steps]
        if len(self.result.windows) > 1 and losses != self.result.losses:
            raise DemoError(f"{self.result.case}: losses with {self.result.way} differ from round to round")
        self.result.losses = losses

    def memory(self) -> None:
        """One untimed run, its memory sampled from here."""
        with PeakPss(self.pid) as sampler:
            self._ask("memory")
        self.result.peak_pss = sampler.peak

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has died, which its answer tells
            print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        name = f"{self.result.case}, {self.result.way}"
        # One line per command, read as soon as it comes: nothing is ever left in the reader's buffer.
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise DemoError(f"{name}: no answer for {PATIENCE} s\n{self._said()}")
        line = self._process.stdout.readline()
        if not line:
            raise DemoError(f"{name}: ended with status {self._process.wait(FAREWELL)}\n{self._said()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DemoError(f"{name}: {answer['error']}\n{self._said()}")
        return answer

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()
