"""A hand-made ring of warm blocks: what two cores can do when nothing but indices crosses."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from typing import Any

import torch

from benchmarks.traffic import Traffic


class WarmRing:
    """`workers` processes stack `samples` into slots of one shared mapping; the consumer gives slots back.

    No more than a program that knows its one batch shape could have: no pickle, no queue, no checks. For `Epochs.run` alike.
    """

    SLOTS_OF_A_WORKER = 3

    def __init__(self, samples: list[Any], read: Any, workers: int) -> None:
        shape = (len(samples), *samples[0].shape)
        count = self.SLOTS_OF_A_WORKER * workers
        size = samples[0].numel() * len(samples)
        memory = mmap.mmap(-1, count * size * 4)
        whole = torch.frombuffer(memory, dtype=torch.float32)
        self._slots = [whole[i * size : (i + 1) * size].view(shape) for i in range(count)]
        self._read = read
        self._ready_from, self._ready_to = os.pipe()
        self._free = [os.pipe() for _ in range(workers)]
        context = multiprocessing.get_context("fork")
        for worker in range(workers):
            context.Process(target=self._work, args=(worker, samples), daemon=True).start()

    def _work(self, worker: int, samples: list[Any]) -> None:
        torch.set_num_threads(1)
        while slot := os.read(self._free[worker][0], 1):
            torch.stack(samples, 0, out=self._slots[slot[0]])
            os.write(self._ready_to, slot)

    def first(self) -> Any:
        """A batch."""
        os.write(self._free[0][1], bytes([0]))
        return self._slots[os.read(self._ready_from, 1)[0]].clone()

    def run(self, batches: int) -> tuple[float, float, float]:
        """As `Epochs.run`."""
        workers = len(self._free)
        pids = [os.getpid()] + [child.pid or 0 for child in multiprocessing.active_children()]
        before = Traffic.of(pids)
        begin = time.perf_counter()
        asked = 0
        for slot in range(min(batches, len(self._slots))):
            os.write(self._free[slot % workers][1], bytes([slot]))
            asked += 1
        for _ in range(batches):
            slot = os.read(self._ready_from, 1)[0]
            self._read(self._slots[slot])
            if asked < batches:
                os.write(self._free[slot % workers][1], bytes([slot]))
                asked += 1
        seconds = time.perf_counter() - begin
        traffic = Traffic.of(pids) - before
        return seconds / batches, traffic.minor_faults / batches, traffic.cpu_seconds / batches
