"""System calls that a batch of tensors takes.

Quantity: system calls of all processes per batch of 64 float32 images 3x224x224 (38.5 MB) through a DataLoader with two persistent
workers and a dataset that costs nothing, counted by ``strace -f -c``: what a run of 2N batches makes more than one of N, divided by N,
so that beginning and end cancel. Unit: calls. Which calls they are is in ``also``.
Opponent: PyTorch alone with its strategy file_descriptor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_most
from benchmarks.images import BATCH_BYTES
from benchmarks.loader_tensors import ARMS as LOADERS
from benchmarks.loader_tensors import TensorLoader
from benchmarks.meter import Meter
from benchmarks.result import Result
from benchmarks.sample import Sample, rounded

NAME = "syscalls"
ARMS = {arm: LOADERS[arm] for arm in ("stock", "register", "loader")}
NAMED = 8  # of the calls, in `also`
# % time, seconds, usecs/call, calls, errors or nothing, name. Between the rows strace puts what it says of processes.
_ROW = re.compile(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) +(?:\d+ +)?(\w+)$", re.MULTILINE)


class CountedLoader:
    """One arm, run anew under strace for each count."""

    def __init__(self, arm: str) -> None:
        self._arm = arm

    def run(self, batches: int) -> dict[str, float]:
        """Calls per batch, by name."""
        calls = self._count(2 * batches)
        calls.subtract(self._count(batches))
        return {name: count / batches for name, count in calls.items()}

    def _count(self, batches: int) -> Counter[str]:
        with tempfile.NamedTemporaryFile() as summary:
            command = ["strace", "-f", "-c", "-o", summary.name, sys.executable, "-m", "benchmarks.syscalls"]
            done = subprocess.run(
                [*command, self._arm, str(batches)],
                cwd=Path(__file__).parents[1],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{done.stderr.strip()}\nstrace ended with {done.returncode}")
            rows = _ROW.findall(Path(summary.name).read_text())
        return Counter({name: int(calls) for calls, name in rows if name != "total"})


def load(arm: str, batches: int) -> None:
    """What is traced."""
    loader = TensorLoader(arm)
    loader.open("images")
    loader.run(24)  # warms up
    loader.run(batches)


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm in turn."""
    result = Result(
        NAME,
        f"system calls per batch of {BATCH_BYTES / 1e6:.1f} MB through a DataLoader with two workers",
        "calls",
        ARMS,
        quick=quick,
    )
    rounds, batches = (1 if quick else 3), 100
    meter.expect(rounds)
    meter.doing("under strace")
    with Arms(result) as arms:
        for arm in ARMS:
            if not shutil.which("strace"):
                result.not_available[arm] = "strace is not installed"
                continue
            arms.start(arm, ("torch",) if arm == "stock" else ("torch", "torchshm"), CountedLoader, arm)
        answers = arms.rounds(dict.fromkeys(arms, ("run", batches)), rounds, after_round=meter.step)
    totals = {arm: [sum(calls.values()) for calls in counted] for arm, counted in answers.items()}
    for arm, counted in answers.items():
        mean = Counter[str]()
        for calls in counted:
            mean.update({name: count / rounds for name, count in calls.items()})
        result.add(
            arm, totals[arm], {name: rounded(count) for name, count in mean.most_common(NAMED) if count}
        )
    result.figures = [
        at_most(
            "torchshm.data.DataLoader: system calls per batch",
            15,
            "calls",
            Sample.of(totals["loader"]) if "loader" in totals else None,
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "system calls per 38.5 MB batch of tensors", measure)

if __name__ == "__main__":
    load(sys.argv[1], int(sys.argv[2]))
