"""The measurement that all DataLoader benchmarks share: epochs of every arm in turn."""

from __future__ import annotations

from benchmarks.arms import Arms
from benchmarks.meter import Meter
from benchmarks.result import Result
from benchmarks.sample import rounded

MOST_BATCHES = 1000


def measure_loading(
    result: Result, arms: Arms, meter: Meter, *, epoch_seconds: float, rounds: int, fewest: int
) -> dict[str, list[float]]:
    """Adds a row for each arm to `result`; returns its seconds per batch, round by round.

    An epoch aims to last `epoch_seconds` and has at least `fewest` batches. The arms' remotes have
    ``check()`` (a first batch is compared) and ``run(batches)`` (as `Epochs.run`).
    """
    arm_count = len(list(arms))
    meter.expect(arm_count + rounds)
    calls = {}
    for arm in arms:
        meter.doing(f"{arm}: first batches")
        arms.call(arm, "check")
        if arm in arms:
            arms.call(arm, "run", fewest)  # warms up
        if arm in arms:
            answer = arms.call(arm, "run", fewest)
            if arm in arms:
                calls[arm] = ("run", max(fewest, min(MOST_BATCHES, int(epoch_seconds / answer[0]))))
        meter.step()
    meter.doing("epochs in turn")
    answers = arms.rounds(calls, rounds, after_round=meter.step)
    seconds = {}
    for arm, epochs in answers.items():
        seconds[arm] = [epoch[0] for epoch in epochs]
        also = {
            "batches": calls[arm][1],
            "minor_faults": rounded(sum(epoch[1] for epoch in epochs) / rounds),
            "cpu_seconds": rounded(sum(epoch[2] for epoch in epochs) / rounds),
        }
        result.add(arm, seconds[arm], also)
    return seconds
