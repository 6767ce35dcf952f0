"""Epochs: a DataLoader whose workers persist and whose epochs are as long as asked for."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.traffic import Traffic


class Plan:
    """A batch sampler of `batches` batches of `size` samples, changed between epochs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches = 1

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(self.size)) for _ in range(self.batches))

    def __len__(self) -> int:
        return self.batches


class Epochs:
    """`read` gets every batch in the consumer, which then drops it. `loader`: in the place of torch's DataLoader."""

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        read: Callable[[Any], Any],
        *,
        workers: int,
        batch_size: int,
        loader: Callable[..., Any] | None = None,
    ) -> None:
        from torch.utils.data import DataLoader

        self._plan = Plan(batch_size)
        self._read = read
        self._loader = (loader or DataLoader)(
            dataset,
            batch_sampler=self._plan,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=True,
            multiprocessing_context="fork",
        )

    def first(self) -> Any:
        """The first batch of an epoch of one; starts the workers."""
        self._plan.batches = 1
        (batch,) = self._loader
        return batch

    def run(self, batches: int) -> tuple[float, float, float]:
        """Seconds, minor faults and processor seconds (of all processes) per batch.

        The clock runs from the epoch's begin to the end of its last batch: nothing is prefetched
        before, nothing is under way after.
        """
        self._plan.batches = batches
        pids = [os.getpid()] + [child.pid or 0 for child in multiprocessing.active_children()]
        before = Traffic.of(pids)
        begin = time.perf_counter()
        for batch in self._loader:
            self._read(batch)
            del batch
        seconds = time.perf_counter() - begin
        traffic = Traffic.of(pids) - before
        return seconds / batches, traffic.minor_faults / batches, traffic.cpu_seconds / batches
