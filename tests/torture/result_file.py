"""The file that a program of the long tests leaves for campaign.py; of those in C++ result_file.h writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass
class ResultFile:
    """What it was, what it counted, what it found wrong; in the order in which the file has them."""

    name: str
    seed: int | None
    full: bool
    seconds: float
    figures: Mapping[str, object]
    violations: list[str]

    def __post_init__(self) -> None:
        self.seconds = round(self.seconds, 1)

    def write(self, path: Path | None) -> None:
        """Nothing without a path."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self), indent=1) + "\n")
