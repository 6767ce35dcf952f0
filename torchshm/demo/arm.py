"""The process that runs one case in one way: ``python -m torchshm.demo.arm``.

One JSON argument tells it what to be. It answers the commands ``round`` and ``memory`` on its standard input
with one line of JSON each, and ends when that input does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from torchshm.demo.case import Case, build
from torchshm.demo.settings import Settings
from torchshm.demo.usage import cpu_seconds

# Runs of `memory` look at no clock worth quoting, only at how much is in use meanwhile.
MEMORY_SECONDS = 0.5


def main() -> None:
    """Build the case, report its size, then answer commands until the conductor hangs up."""
    # The answers get a descriptor of their own; what anything prints joins the errors.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    order = json.loads(sys.argv[1])
    settings = Settings(**order["settings"])
    try:
        if order["way"] != "stock":
            import torchshm

            torchshm.register()
        case = build(order["case"], Path(order["data"]), order["way"], settings)
        print(json.dumps({"batch_bytes": case.batch_bytes}), file=answers)
        for line in sys.stdin:
            print(json.dumps(_answer(line.strip(), case, order["way"], settings)), file=answers)
    except Exception:
        print(json.dumps({"error": traceback.format_exc()}), file=answers)
        sys.exit(1)


def _answer(command: str, case: Case, way: str, settings: Settings) -> dict[str, Any]:
    if command == "round":
        return run(case, way, settings, settings.seconds, settings.batches, check=True)
    if command == "memory":
        return run(case, way, settings, min(settings.seconds, MEMORY_SECONDS), 1, check=False)
    raise ValueError(f"no such command: {command!r}")


def run(
    case: Case, way: str, settings: Settings, seconds: float, batches: int, check: bool
) -> dict[str, Any]:
    """Receive batches from a fresh loader, its first ones unmeasured, and leave it before its end.

    Parameters
    ----------
    case : Case
        What to load.
    way : str
        How; asks the pool about the first batch unless it is ``"stock"``.
    settings : Settings
        Workers of the loader, and how many losses are wanted of a case that trains.
    seconds, batches : float, int
        The measured window lasts at least this long and has at least this many batches.
    check : bool
        Compare the first batch with the dataset. Left out where memory is sampled: comparing takes some.

    Returns
    -------
    dict
        ``batches`` and ``seconds`` of the window, ``cpu_s`` of this process and its workers in it, ``pooled``
        (whether the first batch arrived in the pool) and ``losses``.
    """
    losses: list[float] = []
    consume = case.consumer(losses)
    arriving = iter(case.loader())
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)]

    batch = next(arriving)
    pooled = False
    if way != "stock":
        import torchshm

        pooled = bool(torchshm.is_shared(case.array(batch)))
    if check:
        case.check(batch, 0)
    consume(batch)
    # Whatever the workers had time to prepare during start-up and check is not measured.
    for _ in range(settings.workers * case.prefetch):
        batch = next(arriving)
        consume(batch)

    count = 0
    cpu = cpu_seconds(pids)
    start = time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds or count < batches or 0 < len(losses) < settings.loss_steps:
        batch = next(arriving)
        consume(batch)
        count += 1
        elapsed = time.perf_counter() - start
    return {
        "batches": count,
        "seconds": elapsed,
        "cpu_s": cpu_seconds(pids) - cpu,
        "pooled": pooled,
        "losses": losses,
    }


if __name__ == "__main__":
    main()
