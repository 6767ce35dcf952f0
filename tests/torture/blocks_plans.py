"""Plans of torchshm.data.blocks, drawn from a seed: the same ones in every process that draws them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchshm.data import blocks

Batch = dict[str, Any]

SOURCES = ("arrays", "parquet", "iterator")
STEPS = (
    "map_batches",
    "map_batches",
    "filter",
    "flat_map",
    "shuffle in windows",
    "shuffle",
    "shuffle",
    "repartition",
    "zip",
    "repeat",
)
MEMORY = "80MiB"  # of which half is for blocks: many shuffles go to disk
BLOCKS = ("64KiB", "200KiB", "1MiB")
ROWS = (500, 5_000, 40_000)
WIDTHS = (1, 30, 200)  # float32 in a row
MANY_VALUES = 2_000_000  # of which the smallest blocks would be too many
MANY = 6_000  # rows that a function for single rows gets, at most
BATCH = 997  # rows; so that batches and blocks do not end together


# ---- functions


def noise(batch: Batch, name: str) -> Batch:
    """All the generators that functions use without asking."""
    count = len(next(iter(batch.values())))
    drawn = np.random.random(count)  # noqa: NPY002
    return {**batch, name: drawn + random.random()}


def keep(batch: Batch, part: int) -> Any:
    return batch["i"] % part != 0


def copies(row: Batch, most: int) -> list[Batch]:
    return [row] * int(row["i"] % (most + 1))


def counted(rows: int, width: int, each: int) -> Iterator[Batch]:
    """Batches whose second column only NumPy's own generator knows."""
    for begin in range(0, rows, each):
        i = np.arange(begin, min(begin + each, rows))
        yield {"i": i, "x": np.random.random((len(i), width)).astype("f4")}  # noqa: NPY002


# ---- drawn


@dataclass(frozen=True)
class Plan:
    """What is run, and how it is called in a report."""

    text: str
    dataset: blocks.Dataset


class Draw:
    """One plan, step by step."""

    def __init__(self, seed: int, folder: Path, spills: bool) -> None:
        self._dice, self._folder, self._spills = random.Random(seed), folder, spills
        self._numbers = iter(range(100))
        self._known = True  # how many rows there are
        self._repeated = False
        self.rows, self.width = self._dice.choice(ROWS), self._dice.choice(WIDTHS)
        if spills:
            self.rows, self.width = max(ROWS), max(WIDTHS)
        self.text: list[str] = []

    def plan(self) -> Plan:
        if self._spills:
            return self._with_options(self._then(self._source("arrays"), "shuffle"))
        dataset = self._source(self._dice.choice(SOURCES))
        for kind in self._dice.sample(STEPS, self._dice.randrange(1, 6)):
            dataset = self._then(dataset, kind)
        return self._with_options(dataset)

    def _with_options(self, dataset: blocks.Dataset) -> Plan:
        sizes = BLOCKS if self.rows * self.width < MANY_VALUES else BLOCKS[1:]
        options = {"block_size": self._dice.choice(sizes), "seed": self._dice.randrange(1000)}
        return Plan(
            f"{' -> '.join(self.text)}; {options}",
            dataset.options(memory=MEMORY, max_retries=1000, **options),
        )

    def _say(self, text: str) -> None:
        self.text.append(text)

    def _source(self, kind: str, beside: bool = False) -> blocks.Dataset:
        self._say(f"{'' if beside else f'{self.rows} x {self.width}, '}{kind}")
        if kind == "arrays":
            x = np.random.default_rng(self.rows).random((self.rows, self.width), "f4")
            return blocks.from_arrays({"i": np.arange(self.rows), "x": x})
        if kind == "parquet":
            return blocks.read_parquet(self._parquet())
        each = self._dice.choice([100, 1_500])
        return blocks.from_iter(partial(counted, self.rows, self.width, each), batched=True)

    def _parquet(self) -> list[Path]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths, files = [], 3
        for number in range(files):
            path = self._folder / f"{self.rows}-{self.width}-{number}.parquet"
            paths.append(path)
            i = np.arange(self.rows * number // files, self.rows * (number + 1) // files)
            columns = {f"x{n}": pa.array(np.sin(i * n)) for n in range(min(self.width, 10))}
            words = pa.array([f"row {each}" for each in i])
            table = pa.table({"i": i, "word": words, **columns})
            if not path.exists():
                pq.write_table(table, path, row_group_size=max(1, self.rows // 20))
        return paths

    def _then(self, dataset: blocks.Dataset, kind: str) -> blocks.Dataset:
        dice = self._dice
        if kind == "map_batches":
            size = dice.choice([None, 300])
            self._say(f"noise by {size}")
            return dataset.map_batches(noise, batch_size=size, fn_kwargs={"name": f"n{next(self._numbers)}"})
        if kind == "filter":
            self._known = False
            self._say(kind)
            return dataset.filter(keep, fn_args=(dice.choice([2, 7]),))
        if kind == "flat_map":
            if self.rows > MANY or self._repeated:
                return dataset
            self._known = False
            self._say(kind)
            return dataset.flat_map(copies, fn_args=(2,))
        if kind == "shuffle in windows":
            self._say(kind)
            return dataset.shuffle(window=dice.choice(["300KiB", "2MiB"]))
        if kind == "shuffle":
            self._say(kind)
            return dataset.shuffle()
        if kind == "repartition":
            if dice.random() < 0.5:
                self._say("repartition to blocks")
                return dataset.repartition(dice.choice([3, 20]))
            self._say("repartition by rows")
            return dataset.repartition(rows_per_block=dice.choice([100, 1_000]))
        if kind == "zip":
            if not self._known or self._repeated:
                return dataset
            self._say("zip with")
            return dataset.zip(self._source(dice.choice(SOURCES), beside=True).shuffle(window="1MiB"))
        if self._repeated:
            return dataset
        self._repeated = True
        self._say("repeat")
        return dataset.repeat(2)


def draw(seed: int, folder: Path, spills: bool = False) -> Plan:
    """The plan of that seed; files that it reads are put into `folder`. `spills`: one that goes to disk for sure."""
    return Draw(seed, folder, spills).plan()


# ---- read


@dataclass(frozen=True)
class Found:
    """All rows in their order, and how they came to be."""

    rows: int
    digest: str
    statistics: dict[str, Any]

    @property
    def retries(self) -> int:
        return sum(int(stage["retries"]) for stage in self.statistics["stages"])


def read(dataset: blocks.Dataset) -> Found:
    """Run it."""
    digest, rows = hashlib.blake2b(digest_size=16), 0
    for batch in dataset.iter_batches(BATCH):
        rows += len(next(iter(batch.values())))
        for name, column in batch.items():
            digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
            digest.update(repr(column.tolist()).encode() if column.dtype.hasobject else column.tobytes())
    assert dataset._statistics is not None
    return Found(rows, digest.hexdigest(), dataset._statistics)
