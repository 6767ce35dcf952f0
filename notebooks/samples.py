"""Datasets of the notebooks, in a module of their own: spawned workers import it."""

from __future__ import annotations

from typing import Any

import numpy as np


class Windows:
    """Pieces of 64 x 64 points of an xarray variable, at places that depend on the index alone."""

    size = 64

    def __init__(self, field: Any, name: str, length: int) -> None:
        self.field, self.name, self.length = field, name, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        variable = self.field[self.name]
        chance = np.random.default_rng(index)
        step, *corner = (
            chance.integers(0, n - size)
            for n, size in zip(variable.shape, (0, *[self.size] * 2), strict=True)
        )
        y, x = (slice(at, at + self.size) for at in corner)
        return variable[int(step), y, x].values


class Rows:
    """Rows of a table by number, as a dict; `table` is a list or what looks like one."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> int:
        return len(self.table[index])
