"""A figure: a claim about the measurements, its target, and whether this run met it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.sample import Sample
from benchmarks.units import format_quantity


@dataclass(frozen=True)
class Figure:
    """One claim; `measured` and `met` are None where an arm it needs was not available."""

    claim: str
    relation: str  # ">=" or "<="
    target: float
    unit: str
    measured: float | None = None
    q1: float | None = None
    q3: float | None = None
    met: bool | None = None
    note: str = ""

    @property
    def target_text(self) -> str:
        return f"{self.relation} {format_quantity(self.target, self.unit)}"

    @property
    def measured_text(self) -> str:
        return "not measured" if self.measured is None else format_quantity(self.measured, self.unit)


def at_least(claim: str, target: float, unit: str, measured: Sample | None, note: str = "") -> Figure:
    """A figure that is met by `target` or more."""
    met = None if measured is None else measured.median >= target
    return _figure(claim, ">=", target, unit, measured, met, note)


def at_most(claim: str, target: float, unit: str, measured: Sample | None, note: str = "") -> Figure:
    """A figure that is met by `target` or less."""
    met = None if measured is None else measured.median <= target
    return _figure(claim, "<=", target, unit, measured, met, note)


def _figure(
    claim: str, relation: str, target: float, unit: str, measured: Sample | None, met: bool | None, note: str
) -> Figure:
    if measured is None:
        return Figure(claim, relation, target, unit, note=note)
    return Figure(claim, relation, target, unit, measured.median, measured.q1, measured.q3, met, note)
