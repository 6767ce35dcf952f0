"""CPU seconds and memory of several processes together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from types import TracebackType

import psutil

# Reading smaps_rollup of a 400 MB process takes a few milliseconds and its map lock: often enough for a peak
# that lasts a batch, seldom enough to leave the processes their cores.
PERIOD = 0.02


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that processes have used so far, all threads, to the nanosecond.

    ``/proc/<pid>/stat`` counts in ticks of 10 ms, too coarse for a batch of 1 ms.
    """
    return sum(time.clock_gettime(_cpu_clock(pid)) for pid in pids)


def _cpu_clock(pid: int) -> int:
    return ~pid << 3 | 2  # clock_getcpuclockid(3), which Python lacks; 2 is CPUCLOCK_SCHED


def tree_pss(root: int) -> int:
    """Bytes of memory of a process and its descendants: a page that several of them map counts once (PSS)."""
    try:
        process = psutil.Process(root)
        pids = [root, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    return sum(_pss(pid) for pid in pids)


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # it has just ended
        pass
    return 0


class PeakPss:
    """Context in which a thread samples `tree_pss` of a process; `peak` is the largest sum, in bytes."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(PERIOD):
            self.peak = max(self.peak, tree_pss(self.root))

    def __enter__(self) -> PeakPss:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
