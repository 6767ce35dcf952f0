"""What was measured: windows, and what is quoted from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any


class DemoError(Exception):
    """An arm failed, or two arms did not deliver the same."""


@dataclass(frozen=True)
class Window:
    """One timed run of batches: their number, seconds of wall clock, CPU seconds of parent and workers."""

    batches: int
    seconds: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """Batches per second."""
        return self.batches / self.seconds


@dataclass
class Result:
    """All that was measured of one case in one way.

    Attributes
    ----------
    case, way : str
        Keys of `torchshm.demo.case.CASES` and `WAYS`.
    batch_bytes : int
        Size of one batch.
    windows : list of Window
        One per round.
    peak_pss : int
        Bytes of memory in use by parent and workers together at their most, shared pages once.
    pooled : bool
        Whether batches arrived in the pool. False for stock, and where torchshm fell back to pickling.
    losses : list of float
        Losses of the first training steps, the same in every round; empty where nothing is trained.
    messages : str
        What the arm wrote to its standard error.
    """

    case: str
    way: str
    batch_bytes: int
    windows: list[Window] = field(default_factory=list)
    peak_pss: int = 0
    pooled: bool = False
    losses: list[float] = field(default_factory=list)
    messages: str = ""

    @property
    def batches_per_s(self) -> float:
        """Median over the rounds."""
        return median(window.rate for window in self.windows)

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10^6 bytes) delivered a second, median over the rounds."""
        return self.batches_per_s * self.batch_bytes / 1e6

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds of parent and workers per gigabyte (10^9 bytes) delivered, median over the rounds."""
        return median(window.cpu_s / window.batches for window in self.windows) / (self.batch_bytes / 1e9)

    def speedup(self, stock: Result) -> float:
        """How many times the batches a second of `stock`: the median of the ratios of paired windows."""
        pairs = zip(self.windows, stock.windows, strict=True)
        return median(mine.rate / theirs.rate for mine, theirs in pairs)

    def as_json(self, stock: Result) -> dict[str, Any]:
        """The result as JSON can hold it; units are in the names."""
        return {
            "case": self.case,
            "way": self.way,
            "batch_bytes": self.batch_bytes,
            "batches_per_s": self.batches_per_s,
            "mb_per_s": self.mb_per_s,
            "speedup": self.speedup(stock),
            "cpu_s_per_gb": self.cpu_s_per_gb,
            "peak_pss_bytes": self.peak_pss,
            "pooled": self.pooled,
            "losses": self.losses,
            "windows": [vars(window) for window in self.windows],
        }
