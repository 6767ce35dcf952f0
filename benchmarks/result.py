"""A result: what one benchmark measured, as it stands in ``results/<name>.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.sample import Sample


@dataclass(frozen=True)
class Arm:
    """One contender: `label` is what charts and tables call it, `how` what it does."""

    label: str
    how: str


@dataclass(frozen=True)
class Row:
    """One arm at one point (`at`: size, variant...); `also` holds what was counted besides."""

    arm: str
    at: dict[str, Any]
    sample: Sample
    also: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """Rows in `unit`, the arms by name, and the figures judged from them."""

    name: str
    quantity: str
    unit: str
    arms: dict[str, Arm]
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    not_available: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    date: str = ""
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, arm: str, values: list[float], also: dict[str, float] | None = None, **at: Any) -> None:
        """Adds the row of `arm` at the point `at`."""
        self.rows.append(Row(arm, at, Sample.of(values), also or {}))

    def find(self, arm: str, **at: Any) -> Row | None:
        """The row of `arm` at exactly the point `at`, or None where it was not measured."""
        return next((row for row in self.rows if row.arm == arm and row.at == at), None)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Result:
        stored = json.loads(path.read_text())
        stored["arms"] = {name: Arm(**arm) for name, arm in stored["arms"].items()}
        stored["rows"] = [Row(r["arm"], r["at"], Sample(**r["sample"]), r["also"]) for r in stored["rows"]]
        stored["figures"] = [Figure(**figure) for figure in stored["figures"]]
        return cls(**stored)
