"""What a worker does for a task: it passes values from a source, or from blocks, through the functions, and cuts blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from torchshm._store import Store
from torchshm.data.blocks import _random
from torchshm.data.blocks._cutter import Cutter
from torchshm.data.blocks._formats import Indices, convert, format_of, same_columns
from torchshm.data.blocks._functions import CACHED, apply
from torchshm.data.blocks._plan import Step
from torchshm.data.blocks._recipes import (
    Deal,
    Gather,
    Made,
    Merge,
    Outcome,
    Part,
    Read,
    Recipe,
    Shuffled,
    Task,
    Zipped,
)
from torchshm.data.blocks._rows import common_dtype
from torchshm.data.blocks._sources import Source

_GATHERED = 16 << 20  # bytes of rows that are put in order in one go


class _Loaded(list[Any]):
    """Values, of which the first `own` are copies, and the others lie in the store."""

    own = 0


class Kitchen:
    """Runs the tasks of one process."""

    def __init__(self, store: Store, stages: Sequence[tuple[Source | None, Sequence[Step]]]) -> None:
        self._store, self._stages = store, stages
        self._held: list[_Loaded] = []  # by tasks under way

    def let_go(self) -> None:
        """Go on with copies of what tasks have loaded: who waits with many blocks in his hands leaves room in between that fits nobody."""
        for values in self._held:
            for number in range(values.own, len(values)):
                values[number] = _own(values[number])
            values.own = len(values)

    def label(self, task: Task) -> str:
        """What the task is, for messages."""
        _, steps = self._stages[task.stage]
        functions = " -> ".join(step.label for step in steps)
        return f"task {task.number}, attempt {task.attempt}, of stage {task.stage}: {task.recipe}{', ' + functions if functions else ''}"

    def run(self, task: Task, tell: Callable[[Made], None], outcome: Outcome) -> None:
        """`tell` may wait, and run others in between."""
        before = len(self._held)
        try:
            self._run(task, tell, outcome)
        finally:
            del self._held[before:]

    def _run(self, task: Task, tell: Callable[[Made], None], outcome: Outcome) -> None:
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
        _random.seed(task.seed)
        # For a core's cache where functions follow, else at most as much as a block.
        piece = CACHED if steps else max(CACHED, min(_GATHERED, task.target))
        cuts = recipe.cuts if isinstance(recipe, Shuffled) else ()
        policy = "spill" if cuts else "keep"
        cutter = Cutter(self._store, task.prefix, task.target, task.skip, tell, policy, self.let_go)
        if isinstance(recipe, Shuffled) and cuts:
            for begin, end in cuts:
                cutter.whole(self._counted(self._shuffled(recipe, begin, end, piece), outcome), end - begin)
            return
        values = self._counted(self._values(source, recipe, piece), outcome)
        expected = self._expected(recipe) if all(step.kind == "map_batches" for step in steps) else 0
        for number, step in enumerate(steps):
            # Filters, and functions that promise not to write, may hand on what they got.
            theirs = all(before.zero_copy or before.kind == "filter" for before in steps[:number])
            values = apply(step, values, first=theirs and not isinstance(recipe, (Shuffled, Merge)))
        if task.whole:
            if steps:  # how many rows they leave is known when they are done
                values = iter(several := list(values))
                rows = sum(format_of(value).rows(value) for value in several)
            else:
                rows = self._expected(recipe)
            cutter.whole(values, rows)
            return
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

    def _load_all(self, keys: Sequence[str]) -> list[Any]:
        values = _Loaded()
        self._held.append(values)
        for key in keys:
            if values and self._store.info(key)["where"] == "disk":  # it may have to wait for room
                self.let_go()
            values.append(self._load(key))
        return values

    def _parts(self, parts: Sequence[Part]) -> Iterator[Any]:
        for part in parts:
            value = self._load(part.key)
            found = format_of(value)
            whole = part.begin == 0 and part.end == found.rows(value)
            yield value if whole else found.slice(value, part.begin, part.end)

    def _values(self, source: Source | None, recipe: Recipe, piece: int) -> Iterator[Any]:
        if isinstance(recipe, Read):
            assert source is not None
            return source.read(recipe.number)
        if isinstance(recipe, Gather):
            return self._parts(recipe.parts)
        if isinstance(recipe, Shuffled):
            return self._shuffled(recipe, recipe.begin, recipe.end, piece)
        if isinstance(recipe, Merge):
            return self._merged(recipe, piece)
        assert isinstance(recipe, Zipped)
        return self._zipped(recipe)

    def _zipped(self, recipe: Zipped) -> Iterator[Any]:
        sides = [list(self._parts(parts)) for parts in (recipe.left, recipe.right)]
        whole = [format_of(side[0]).concat(side) if len(side) > 1 else side[0] for side in sides]
        first = format_of(whole[0])
        yield first.merge([whole[0], convert(whole[1], first.name)])

    def _shuffled(self, recipe: Shuffled, begin: int, end: int, piece: int) -> Iterator[Any]:
        order = self._load(recipe.order)[begin:end].copy()
        return self._in_order(self._load_all(recipe.keys), recipe.rows, order, piece)

    def _merged(self, recipe: Merge, piece: int) -> Iterator[Any]:
        values = self._load_all(recipe.keys)
        rows = tuple(format_of(value).rows(value) for value in values)
        order = np.random.default_rng(recipe.seed).permutation(sum(rows))
        return self._in_order(values, rows, order, piece)

    def _in_order(self, values: list[Any], rows: Sequence[int], order: Indices, piece: int) -> Iterator[Any]:
        """Rows of all values in that order, so many bytes at a time."""
        if not len(order):
            return
        found = format_of(values[0])
        starts = np.concatenate([[0], np.cumsum(rows)])
        step = len(order)
        total = sum(found.nbytes(value) for value in values)
        if found.name == "numpy":
            per_row = total / max(sum(rows), 1)
            step = max(1, int(piece / max(per_row, 1e-9)))
        for begin in range(0, len(order), step):
            yield gather(found, values, starts, order[begin : begin + step])


def _own(value: Any) -> Any:
    found = format_of(value)
    if found.name == "numpy":
        return {name: array.copy() for name, array in value.items()}
    return found.take(value, np.arange(found.rows(value)))


def gather(found: Any, values: Sequence[Any], starts: Indices, order: Indices) -> Any:
    """Rows `order` of the values as if they were one; value i has the rows from ``starts[i]`` on."""
    if len(values) == 1:
        return found.take(values[0], order)
    which = np.searchsorted(starts, order, "right") - 1
    if found.name != "numpy":
        parts = [found.take(value, order[which == i] - starts[i]) for i, value in enumerate(values)]
        placed = np.concatenate([np.flatnonzero(which == i) for i in range(len(values))])
        back = np.empty(len(order), np.int64)
        back[placed] = np.arange(len(order))
        return found.take(found.concat([part for part in parts if found.rows(part)]), back)
    places = [np.flatnonzero(which == i) for i in range(len(values))]
    made = {}
    same_columns(values)
    for name, array in values[0].items():
        out = np.empty((len(order), *array.shape[1:]), common_dtype([value[name] for value in values]))
        for i, value in enumerate(values):
            if len(places[i]):
                out[places[i]] = value[name][order[places[i]] - starts[i]]
        made[name] = out
    return made
