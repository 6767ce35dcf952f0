"""What epochs that are left early leave behind.

Quantity: memory of a process before and after 100 times ten epochs of a DataLoader with eight new workers each, ended by ``break``
after two or three batches of 4 MB: the process's own anonymous memory and all that the pool has, free or in use. Unit: MB. Before
"before" are epochs enough for the pool to have had as many batches under way as there can be.
Context: PyTorch alone with its strategy file_descriptor, a tenth of the epochs.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from itertools import islice
from typing import Any

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_most
from benchmarks.memory import rollup
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, rounded

NAME = "early_break"
WORKERS, EPOCHS, TIMES = 8, 10, 100
FIRST = 200  # epochs, before "before"
FILL = 1.0  # s
SHAPE = (8, 256, 128)  # float32: 1 MB, four to a batch

ARMS = {
    "stock": Arm("stock", "torch's DataLoader, sharing strategy file_descriptor"),
    "torchshm": Arm("torchshm.data.DataLoader", "torchshm's DataLoader"),
}


class Numbers:
    """Sample i is filled with i."""

    def __len__(self) -> int:
        return 4 * 50

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.full(SHAPE, float(index))


class Breaker:
    """One arm: ten epochs with eight new workers each at a call."""

    def __init__(self, arm: str) -> None:
        import torch.multiprocessing
        from torch.utils.data import DataLoader

        warnings.filterwarnings("ignore", message="This DataLoader will create")
        torch.multiprocessing.set_sharing_strategy("file_descriptor")
        self._stats: Any = dict
        make: Any = DataLoader
        if arm == "torchshm":
            import torchshm
            import torchshm.data

            make, self._stats = torchshm.data.DataLoader, torchshm.stats
        self._loader = make(Numbers(), batch_size=4, num_workers=WORKERS, multiprocessing_context="fork")

    def fill(self) -> None:
        """Leaves an epoch when its workers have all made what was asked of them."""
        for _ in islice(self._loader, 2):
            time.sleep(FILL)

    def run(self, epochs: int) -> None:
        """Leaves so many epochs early."""
        for epoch in range(epochs):
            for expected, batch in enumerate(islice(self._loader, 2 + epoch % 2)):
                if not (batch[3] == 4 * expected + 3).all():
                    raise AssertionError("a batch arrived damaged")

    def look(self) -> dict[str, float]:
        """What there is now, in MB and numbers."""
        gc.collect()
        stats = self._stats()
        own = rollup()["Anonymous"]
        pool = stats.get("committed_bytes", 0) + stats.get("control_bytes", 0)
        return {
            "memory": rounded((own + pool) / 1e6),
            "own": rounded(own / 1e6),
            "pool": rounded(pool / 1e6),
            "blocks": stats.get("blocks", 0),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }


def measure(quick: bool, meter: Meter) -> Result:
    """Both arms; there is nothing to repeat."""
    times, first = (5, 50) if quick else (TIMES, FIRST)
    result = Result(
        NAME,
        f"memory of a consumer with {WORKERS} workers, before and after epochs that are left early",
        "MB",
        ARMS,
        quick=quick,
    )
    found: dict[str, list[dict[str, float]]] = {}
    of_arm = {"stock": max(1, times // 10), "torchshm": times}
    meter.expect(sum(of_arm.values()))
    with Arms(result) as arms:
        for arm in ARMS:
            arms.start(arm, ("torch",) if arm == "stock" else ("torch", "torchshm"), Breaker, arm)
        for arm in arms:
            meter.doing(f"{arm}: epochs that are left early")
            for method, *arguments in (("fill",), ("run", first)):
                if arm in arms:
                    arms.call(arm, method, *arguments)
            found[arm] = [arms.call(arm, "look")] if arm in arms else []
            for _ in range(of_arm[arm]):
                if arm in arms:
                    arms.call(arm, "run", EPOCHS)
                meter.step()
            if arm in arms:
                found[arm].append(arms.call(arm, "look"))
    for arm, looks in found.items():
        for epochs, look in zip((first, first + EPOCHS * of_arm[arm]), looks, strict=False):
            result.add(arm, [look["memory"]], look, epochs=epochs)
    before, after = found["torchshm"] if len(found.get("torchshm", ())) == 2 else ({}, {})

    def more(of: str) -> Sample | None:
        return Sample.of([after[of] - before[of]]) if after else None

    result.figures = [
        at_most(
            f"memory after {times} times {EPOCHS} epochs / before",
            1.01,
            "x",
            Sample.of([after["memory"] / before["memory"]]) if after else None,
        ),
        at_most("blocks of the pool more than before", 0, "blocks", more("blocks")),
        at_most("descriptors more than before", 0, "fds", more("descriptors")),
    ]
    return result


BENCHMARK = Benchmark(NAME, "memory after epochs that are left early", measure)
