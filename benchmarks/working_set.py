"""A working set larger than memory: which names there are, how large, and in which order processes ask for them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.units import MIB

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SIZES = (MIB, 4 * MIB, 16 * MIB)
OVERWRITES = 0.2
ZIPF = 1.0
"""Exponent: the name of rank r is asked for as often as 1 / r."""


@dataclass(frozen=True)
class Access:
    """One step of a process: read a name, or save it anew."""

    name: int
    overwrites: bool


@dataclass(frozen=True)
class WorkingSet:
    """Names 0, 1, ... of 1, 4 and 16 MiB in turn, `nbytes` in all; `processes` work on them.

    Of `processes` those of even number go through the names in order, again and again, the worst that can happen to who keeps what was
    used last; the others choose names by Zipf's law, whose favourites fit into memory. Each fifth access saves the name anew. Where the
    names are not `shared` each process has a part of them for itself.
    """

    nbytes: int
    processes: int
    shared: bool

    @property
    def names(self) -> int:
        return self.processes * round(self.nbytes * len(SIZES) / sum(SIZES) / self.processes)

    @staticmethod
    def size_of(name: int) -> int:
        # Not by the remainder of the name alone, which would give a process of three or six one size.
        return SIZES[(name + name // len(SIZES)) % len(SIZES)]

    def own(self, index: int) -> range:
        """The names that process `index` saves at first."""
        return range(index, self.names, self.processes)

    def accesses(self, index: int) -> Iterator[Access]:
        """What process `index` does, without end, and the same in every run."""
        chance = random.Random(index)
        names = list(range(self.names) if self.shared else self.own(index))
        if index % 2 == 0:
            begin = len(names) * index // self.processes
            order: Iterator[int] = itertools.cycle(names[begin:] + names[:begin])
        else:
            chance.shuffle(names)
            weights = list(itertools.accumulate(1 / rank**ZIPF for rank in range(1, len(names) + 1)))
            order = (chance.choices(names, cum_weights=weights)[0] for _ in itertools.count())
        for name in order:
            yield Access(name, chance.random() < OVERWRITES)


class Values:
    """What names stand for: random bytes, which no disk can shorten; the first word is the name."""

    def __init__(self) -> None:
        self._content = np.random.default_rng(0).integers(0, 256, max(SIZES), np.uint8)
        self._whole = {size: self._content[:size].copy() for size in SIZES}

    def of(self, name: int) -> Bytes:
        """The array to save; the next one of that size is made in the same memory."""
        array = self._whole[WorkingSet.size_of(name)]
        array[:8].view(np.uint64)[0] = name
        return array

    def check(self, name: int, found: Bytes, whole: bool = False) -> None:
        """Compares size and name, or every byte."""
        size = WorkingSet.size_of(name)
        if found.nbytes != size or found[:8].view(np.uint64)[0] != name:
            raise AssertionError(f"another value was loaded than {name}")
        if whole and not np.array_equal(found[8:], self._content[8:size]):
            raise AssertionError(f"the value {name} was loaded damaged")
