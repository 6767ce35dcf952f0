"""What a worker does for a task: it passes values from a source, or from blocks, through the functions, and cuts blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchshm._store import Store
from torchshm.data.blocks._formats import Indices, checked, convert, format_of, same_columns
from torchshm.data.blocks._plan import Step
from torchshm.data.blocks._sources import Source, stack

CACHED = 1 << 20
"""Bytes of a batch where the user gives no size: what stays in a core's cache from one function to the next."""
_ROOMY = 0.75  # a block that fills less than that of its memory is moved to memory of its size


@dataclass(frozen=True)
class Read:
    """A task of the stage's source."""

    number: int


@dataclass(frozen=True)
class Part:
    """Rows of a block."""

    key: str
    begin: int
    end: int


@dataclass(frozen=True)
class Gather:
    """Rows of several blocks, one after the other."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Deal:
    """The order of all rows of a window, drawn once for all who gather them."""

    rows: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Shuffled:
    """Rows `begin` to `end` of all in the order that `order` has; as blocks that begin and end where `cuts` says, or as one."""

    keys: tuple[str, ...]
    rows: tuple[int, ...]
    order: str
    begin: int
    end: int
    cuts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Merge:
    """All rows of the blocks in an order of their own."""

    keys: tuple[str, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Zipped:
    """Rows of two sides, as many of each."""

    left: tuple[Part, ...]
    right: tuple[Part, ...]


Recipe = Read | Gather | Deal | Shuffled | Merge | Zipped


@dataclass(frozen=True)
class Task:
    number: int
    attempt: int
    stage: int
    recipe: Recipe
    seed: tuple[int, ...]
    prefix: str  # of the names of its blocks
    plain: bool = False  # without the stage's functions
    target: int = 0
    skip: int = 0  # so many of its blocks have been made by attempts before


@dataclass(frozen=True)
class Made:
    """A block that a task has made."""

    key: str
    rows: int
    nbytes: int


@dataclass
class Outcome:
    """What a task has cost. Blocks are told as they are made."""

    task: int
    attempt: int
    seconds: float = 0.0
    rows_in: int = 0
    bytes_in: int = 0
    error: tuple[bytes, str] | None = None  # pickled, and the text of its traceback
    private: int = 0  # bytes of the worker's own memory


# ---- functions


def check_batch_size(size: int | None) -> None:
    """Raise ValueError for what is none."""
    if size is not None and size < 1:
        raise ValueError(f"batch_size is 1 or more, or None, not {size}")


def batches(values: Iterator[Any], size: int | None, cached: bool) -> Iterator[Any]:
    """The rows in batches of `size`; None: as they come, or in pieces that fit into a core's cache."""
    if size is None:
        for value in values:
            found = format_of(value)
            rows = found.rows(value)
            if rows == 0:
                continue
            step = rows
            if cached and found.name == "numpy" and rows:
                step = max(1, int(CACHED * rows / max(found.nbytes(value), 1)))
            if step >= rows:
                yield value
            else:
                for begin in range(0, rows, step):
                    yield found.slice(value, begin, min(begin + step, rows))
        return
    kept: list[Any] = []  # fewer than `size` rows
    count = 0
    for value in values:
        found = format_of(value)
        rows, begin = found.rows(value), 0
        while count + rows - begin >= size:
            part = found.slice(value, begin, begin + size - count)
            begin += size - count
            yield found.concat([*kept, part]) if kept else part
            kept, count = [], 0
        if begin < rows:
            kept.append(found.slice(value, begin, rows))
            count += rows - begin
    if kept:
        yield format_of(kept[0]).concat(kept) if len(kept) > 1 else kept[0]


def _writable(value: Any) -> Any:
    """The batch in memory of its own: what a function writes to it is nobody else's."""
    if format_of(value).name != "numpy":
        return value  # pickled objects come copy-on-write
    return {name: array.copy() for name, array in value.items()}


def apply(step: Step, values: Iterator[Any], first: bool) -> Iterator[Any]:
    """What the function makes of the values; `first`: they lie in a block, or in the source's memory."""
    whole = step.batch_format not in ("numpy", "torch")
    for batch in batches(values, step.batch_size, not whole):
        mine = step.zero_copy or step.kind == "filter"
        given = convert(batch if mine or not first else _writable(batch), step.batch_format)
        if not mine and isinstance(given, dict) and step.batch_format != "torch":
            given = {name: array if array.flags.writeable else array.copy() for name, array in given.items()}
        if step.kind == "map_batches":
            yield checked(_untorched(step.fn(given, *step.args, **step.kwargs)), step.label)
        elif step.kind == "filter":
            yield _filtered(step, batch, step.fn(given, *step.args, **step.kwargs))
        elif step.kind == "flat_map":
            made = [new for row in rows_of(given) for new in step.fn(row, *step.args, **step.kwargs)]
            if made:
                yield stack(made)
        else:
            yield checked(step.fn(given, *step.args, **step.kwargs), step.label)


def _untorched(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: each.numpy(force=True)
            if hasattr(each, "numpy") and hasattr(each, "requires_grad")
            else each
            for name, each in value.items()
        }
    return value


def _filtered(step: Step, batch: Any, chosen: Any) -> Any:
    found = format_of(batch)
    mask = np.asarray(chosen)
    if mask.dtype != np.bool_ or mask.shape != (found.rows(batch),):
        raise ValueError(
            f"{step.label} returned {mask.dtype} of shape {mask.shape} for a batch of {found.rows(batch)} rows: "
            "return one bool for each row"
        )
    return batch if mask.all() else found.take(batch, np.flatnonzero(mask))


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Each row as a dict."""
    columns = format_of(batch).to_numpy(batch)
    for number in range(format_of(batch).rows(batch)):
        yield {name: array[number] for name, array in columns.items()}


# ---- blocks


class Cutter:
    """Makes blocks of about `target` bytes of the values that it gets, in the store's memory, and saves them."""

    def __init__(
        self, store: Store, prefix: str, target: int, skip: int, tell: Callable[[Made], None]
    ) -> None:
        self._store, self._prefix, self._target, self._skip, self._tell = store, prefix, target, skip, tell
        self._count = 0
        self._block: dict[str, Any] | None = None  # arrays that are being filled
        self._filled = self._capacity = 0
        self._kept: list[Any] = []  # values of other formats
        self._kept_bytes = 0

    def add(self, value: Any, expected: int = 0) -> None:
        """`expected`: rows that are still to come, as far as is known, these among them."""
        found = format_of(value)
        rows = found.rows(value)
        if rows == 0:
            if self._count == 0 and not self._kept and self._block is None:
                self._kept, self._kept_bytes = [value], 0  # so that its columns are known
            return
        plain = found.name == "numpy" and not any(array.dtype.hasobject for array in value.values())
        if not plain:
            self._add_other(found, value, rows)
            return
        self._kept = [each for each in self._kept if format_of(each).rows(each)]
        begin = 0
        while begin < rows:
            if self._block is not None and not _alike(self._block, value):
                self._end_block()
            if self._block is None:
                self._begin_block(value, rows - begin, max(expected - begin, 0), found.nbytes(value) / rows)
            block = self._block
            assert block is not None
            count = min(rows - begin, self._capacity - self._filled)
            for name, array in value.items():
                block[name][self._filled : self._filled + count] = array[begin : begin + count]
            self._filled += count
            begin += count
            if self._filled == self._capacity:
                self._end_block()

    def _begin_block(self, value: Any, rows: int, expected: int, per_row: float) -> None:
        self._flush_other()
        fits = max(1, int(self._target / max(per_row, 1e-9)))
        # What is left over is shared out rather than made a small block.
        wanted = max(rows, expected)
        self._capacity = fits if wanted > fits * 1.5 or not expected else min(wanted, int(fits * 1.5) + 1)
        with self._store.storage():
            self._block = {
                name: np.empty((self._capacity, *array.shape[1:]), array.dtype)
                for name, array in value.items()
            }
        self._filled = 0

    def _end_block(self) -> None:
        block, filled = self._block, self._filled
        self._block, self._filled = None, 0
        if block is None or filled == 0:
            return
        if filled < self._capacity:
            block = {name: array[:filled] for name, array in block.items()}
            if filled < _ROOMY * self._capacity:
                with self._store.storage():
                    moved = {name: np.empty(array.shape, array.dtype) for name, array in block.items()}
                for name, array in block.items():
                    moved[name][...] = array
                block = moved
        self._save(block, filled, sum(array.nbytes for array in block.values()))

    def _add_other(self, found: Any, value: Any, rows: int) -> None:
        self._end_block()
        if self._kept and format_of(self._kept[0]).name != found.name:
            self._flush_other()
        nbytes = found.nbytes(value)
        if nbytes > 1.5 * self._target and rows > 1:
            self._flush_other()
            step = max(1, int(rows * self._target / nbytes))
            for begin in range(0, rows, step):
                self._kept = [found.slice(value, begin, min(begin + step, rows))]
                self._flush_other()
            return
        self._kept.append(value)
        self._kept_bytes += nbytes
        if self._kept_bytes >= self._target:
            self._flush_other()

    def _flush_other(self) -> None:
        kept, self._kept, self._kept_bytes = self._kept, [], 0
        if not kept:
            return
        found = format_of(kept[0])
        value = found.concat(kept) if len(kept) > 1 else kept[0]
        if found.rows(value):
            self._save(value, found.rows(value), found.nbytes(value))

    def end(self) -> None:
        self._end_block()
        self._flush_other()

    def whole(self, values: Sequence[Any], rows: int) -> None:
        """A block of its own, whatever its size."""
        self._target = 1 << 62
        for value in values:
            self.add(value, rows)
        self.end()

    def _save(self, value: Any, rows: int, nbytes: int) -> None:
        number = self._count
        self._count += 1
        if number < self._skip:
            return
        key = f"{self._prefix}{number}"
        self._store.save(key, value, policy="spill")
        self._tell(Made(key, rows, nbytes))


def _alike(block: dict[str, Any], value: dict[str, Any]) -> bool:
    return block.keys() == value.keys() and all(
        block[name].dtype == array.dtype and block[name].shape[1:] == array.shape[1:]
        for name, array in value.items()
    )


# ---- tasks


class Kitchen:
    """Runs the tasks of one process."""

    def __init__(self, store: Store, stages: Sequence[tuple[Source | None, Sequence[Step]]]) -> None:
        self._store, self._stages = store, stages

    def label(self, task: Task) -> str:
        """What the task is, for messages."""
        _, steps = self._stages[task.stage]
        functions = " -> ".join(step.label for step in steps)
        return f"task {task.number}, attempt {task.attempt}, of stage {task.stage}: {task.recipe}{', ' + functions if functions else ''}"

    def run(self, task: Task, tell: Callable[[Made], None], outcome: Outcome) -> None:
        source, steps = self._stages[task.stage]
        recipe = task.recipe
        if isinstance(recipe, Deal):
            if task.skip:
                return
            with self._store.storage():
                order = np.empty(recipe.rows, np.int64)
            order[...] = np.random.default_rng(recipe.seed).permutation(recipe.rows)
            self._store.save(task.prefix + "0", order, policy="spill")
            tell(Made(task.prefix + "0", recipe.rows, order.nbytes))
            return
        if task.plain:
            steps = ()
        _seed(task.seed)
        cutter = Cutter(self._store, task.prefix, task.target, task.skip, tell)
        if isinstance(recipe, Shuffled) and recipe.cuts:
            for begin, end in recipe.cuts:
                cutter.whole(
                    list(self._counted(self._shuffled(recipe, begin, end, False), outcome)), end - begin
                )
            return
        values = self._counted(self._values(source, recipe, bool(steps)), outcome)
        expected = self._expected(recipe) if all(step.kind == "map_batches" for step in steps) else 0
        for number, step in enumerate(steps):
            # Filters, and functions that promise not to write, may hand on what they got.
            theirs = all(before.zero_copy or before.kind == "filter" for before in steps[:number])
            values = apply(step, values, first=theirs and not isinstance(recipe, (Shuffled, Merge)))
        done = 0
        for value in values:
            cutter.add(value, max(expected - done, 0))
            done += format_of(value).rows(value)
        cutter.end()

    def _counted(self, values: Iterator[Any], outcome: Outcome) -> Iterator[Any]:
        for value in values:
            found = format_of(value)
            outcome.rows_in += found.rows(value)
            outcome.bytes_in += found.nbytes(value)
            yield value

    @staticmethod
    def _expected(recipe: Recipe) -> int:
        """Rows that go in; where as many come out, blocks are cut to that measure."""
        if isinstance(recipe, Gather):
            return sum(part.end - part.begin for part in recipe.parts)
        if isinstance(recipe, Zipped):
            return sum(part.end - part.begin for part in recipe.left)
        if isinstance(recipe, Shuffled):
            return recipe.end - recipe.begin
        return 0

    def _load(self, key: str) -> Any:
        return self._store.load(key, allow_pickle=True)

    def _parts(self, parts: Sequence[Part]) -> Iterator[Any]:
        for part in parts:
            value = self._load(part.key)
            found = format_of(value)
            whole = part.begin == 0 and part.end == found.rows(value)
            yield value if whole else found.slice(value, part.begin, part.end)

    def _values(self, source: Source | None, recipe: Recipe, pieces: bool) -> Iterator[Any]:
        if isinstance(recipe, Read):
            assert source is not None
            return source.read(recipe.number)
        if isinstance(recipe, Gather):
            return self._parts(recipe.parts)
        if isinstance(recipe, Shuffled):
            return self._shuffled(recipe, recipe.begin, recipe.end, pieces)
        if isinstance(recipe, Merge):
            return self._merged(recipe, pieces)
        assert isinstance(recipe, Zipped)
        return self._zipped(recipe)

    def _zipped(self, recipe: Zipped) -> Iterator[Any]:
        sides = [list(self._parts(parts)) for parts in (recipe.left, recipe.right)]
        whole = [format_of(side[0]).concat(side) if len(side) > 1 else side[0] for side in sides]
        first = format_of(whole[0])
        yield first.merge([whole[0], convert(whole[1], first.name)])

    def _shuffled(self, recipe: Shuffled, begin: int, end: int, pieces: bool) -> Iterator[Any]:
        order = self._load(recipe.order)[begin:end]
        return self._in_order([self._load(key) for key in recipe.keys], recipe.rows, order, pieces)

    def _merged(self, recipe: Merge, pieces: bool) -> Iterator[Any]:
        values = [self._load(key) for key in recipe.keys]
        rows = tuple(format_of(value).rows(value) for value in values)
        order = np.random.default_rng(recipe.seed).permutation(sum(rows))
        return self._in_order(values, rows, order, pieces)

    def _in_order(
        self, values: list[Any], rows: Sequence[int], order: Indices, pieces: bool
    ) -> Iterator[Any]:
        """Rows of all values in that order; in pieces for a core's cache where functions follow, else in one."""
        if not len(order):
            return
        found = format_of(values[0])
        starts = np.concatenate([[0], np.cumsum(rows)])
        step = len(order)
        total = sum(found.nbytes(value) for value in values)
        if found.name == "numpy":
            per_row = total / max(sum(rows), 1)
            step = max(1, int((CACHED if pieces else 16 * CACHED) / max(per_row, 1e-9)))
        for begin in range(0, len(order), step):
            yield gather(found, values, starts, order[begin : begin + step])


def gather(found: Any, values: Sequence[Any], starts: Indices, order: Indices) -> Any:
    """Rows `order` of the values as if they were one; value i has the rows from ``starts[i]`` on."""
    if len(values) == 1:
        return found.take(values[0], order)
    if found.name != "numpy":
        which = np.searchsorted(starts, order, "right") - 1
        parts = [found.take(value, order[which == i] - starts[i]) for i, value in enumerate(values)]
        placed = np.concatenate([np.flatnonzero(which == i) for i in range(len(values))])
        back = np.empty(len(order), np.int64)
        back[placed] = np.arange(len(order))
        return found.take(found.concat([part for part in parts if found.rows(part)]), back)
    which = np.searchsorted(starts, order, "right") - 1
    places = [np.flatnonzero(which == i) for i in range(len(values))]
    made = {}
    same_columns(values)
    for name, array in values[0].items():
        out = np.empty((len(order), *array.shape[1:]), np.result_type(*(value[name] for value in values)))
        for i, value in enumerate(values):
            if len(places[i]):
                out[places[i]] = value[name][order[places[i]] - starts[i]]
        made[name] = out
    return made


def _seed(seed: tuple[int, ...]) -> None:
    """The generators that functions use without asking, so that a task gives the same result wherever it runs, and again."""
    import random
    import sys

    words = np.random.SeedSequence(seed).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:])  # noqa: NPY002 - what functions use
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(int(words[0]))


@dataclass
class Progress:
    """Of a stage, as it stands."""

    label: str
    tasks: int = 0
    blocks: int = 0
    rows: int = 0
    nbytes: int = 0
    rows_in: int = 0
    bytes_in: int = 0
    seconds: float = 0.0
    retries: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
