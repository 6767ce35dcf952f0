"""A benchmark: a named measurement that gives a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.meter import Meter
from benchmarks.result import Result


@dataclass(frozen=True)
class Benchmark:
    """`measure(quick, meter)` measures; `quick` is for a look, its numbers are not for quoting."""

    name: str
    summary: str
    measure: Callable[[bool, Meter], Result]
