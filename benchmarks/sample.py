"""A sample: what one arm measured over the rounds, told by its median and quartiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Median and quartiles of `rounds` values."""

    median: float
    q1: float
    q3: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        q1, median, q3 = np.percentile(values, [25, 50, 75])
        return cls(rounded(median), rounded(q1), rounded(q3), len(values))


def rounded(value: float) -> float:
    """`value` to four significant digits: more would be noise, and would churn the JSON."""
    return float(f"{value:.4g}")


def ratio(above: Sequence[float], below: Sequence[float]) -> Sample:
    """The ratio of two arms, round by round.

    The values of one round were taken within a second of each other, so what slows the machine
    for a while slows both and leaves their ratio alone; a ratio of two medians has no such luck.
    """
    return Sample.of([a / b for a, b in zip(above, below, strict=True)])
