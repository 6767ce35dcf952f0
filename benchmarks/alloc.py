"""Allocation and release in C++.

Quantity: time of allocating and releasing one warm block, in one thread, and the throughput of
one core with eight processes at it. Unit: seconds. Opponent: malloc and free.
Runs the google-benchmark executable ``torchshm_bench`` and reads its BM_AllocRelease/<bytes>,
BM_AllocReleaseProcesses/1 and /8 (items_per_second: of all processes together, by wall time) and
BM_MallocFree/<bytes>.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least, at_most
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample
from benchmarks.units import format_bytes

NAME = "alloc"
EXECUTABLE = Path(__file__).parents[1] / "build" / "release" / "torchshm_bench"
PROCESSES = 8

ARMS = {
    "torchshm": Arm("torchshm", "torchshm's allocator, one thread"),
    "torchshm_processes": Arm("torchshm, processes at once", "torchshm's allocator, processes at once"),
    "malloc": Arm("malloc", "malloc and free"),
}
ARM_OF = {
    "BM_AllocRelease": "torchshm",
    "BM_AllocReleaseProcesses": "torchshm_processes",
    "BM_MallocFree": "malloc",
}


def measure(quick: bool, meter: Meter) -> Result:
    """Runs the executable, its benchmarks in random order, and reads what it says."""
    result = Result(NAME, "time of allocating and releasing one warm block", "s", ARMS, quick=quick)
    runs: list[dict[str, Any]] = []
    if EXECUTABLE.exists():
        meter.doing("C++")
        try:
            runs = _run(quick)
        except (subprocess.SubprocessError, ValueError) as error:
            result.not_available["torchshm_bench"] = f"failed: {error}"
    else:
        result.not_available["torchshm_bench"] = "build/release/torchshm_bench is not built"
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    for run in runs:
        name, *arguments = run["run_name"].split("/")
        if name in ARM_OF:
            point = ARM_OF[name], int(arguments[0])
            times[point].append(_seconds(run))
            rates[point].append(run.get("items_per_second", 0.0))
    for (arm, argument), values in times.items():
        at = {"processes": argument} if arm == "torchshm_processes" else {"block": format_bytes(argument)}
        result.add(arm, values, {"items_per_second": Sample.of(rates[arm, argument]).median}, **at)

    single = [Sample.of(values) for (arm, _), values in times.items() if arm == "torchshm"]
    result.figures = [
        at_most(
            "allocation + release of a warm block, the slowest size",
            150e-9,
            "s",
            max(single, key=lambda sample: sample.median, default=None),
        ),
        at_least(
            f"throughput of a core with {PROCESSES} processes / with one",
            0.5,
            "x",
            _throughput_kept(rates["torchshm_processes", 1], rates["torchshm_processes", PROCESSES]),
            f"{PROCESSES} processes share {_busy_cores()} cores",
        ),
    ]
    return result


def _run(quick: bool) -> list[dict[str, Any]]:
    repetitions, seconds = (3, 0.05) if quick else (9, 0.2)
    command = [
        str(EXECUTABLE),
        "--benchmark_format=json",
        f"--benchmark_repetitions={repetitions}",
        f"--benchmark_min_time={seconds}",
        "--benchmark_enable_random_interleaving=true",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return [run for run in json.loads(done.stdout)["benchmarks"] if run["run_type"] == "iteration"]


def _seconds(run: dict[str, Any]) -> float:
    return run["real_time"] * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[run["time_unit"]]


def _throughput_kept(alone: list[float], together: list[float]) -> Sample | None:
    """The share of a core's throughput that is left with all processes at it.

    Eight processes on two cores can do no more than two on two, so the total is divided by the
    cores they really had.
    """
    if not alone or not together:
        return None
    one = Sample.of(alone).median
    return Sample.of([total / _busy_cores() / one for total in together])


def _busy_cores() -> int:
    return min(PROCESSES, len(os.sched_getaffinity(0)))


BENCHMARK = Benchmark(NAME, "allocation and release of a warm block in C++", measure)
