"""The traffic of a process and its children: faults and processor time, from /proc/<pid>/stat."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Traffic:
    """Counters since the processes began; the difference of two is what happened between."""

    minor_faults: int
    cpu_seconds: float

    @classmethod
    def of(cls, pids: list[int]) -> Traffic:
        tick = os.sysconf("SC_CLK_TCK")
        faults, ticks = 0, 0
        for pid in pids:
            # Fields after the command's name, which may hold spaces: 10 is minflt, 14 and 15 are
            # utime and stime (proc(5), counted from 1).
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            faults += int(fields[7])
            ticks += int(fields[11]) + int(fields[12])
        return cls(faults, ticks / tick)

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.minor_faults - before.minor_faults, self.cpu_seconds - before.cpu_seconds)
