"""Cutter: blocks of about the same size, out of values of any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from torchshm import _C
from torchshm._store import Store
from torchshm.data.blocks._formats import format_of
from torchshm.data.blocks._recipes import Made
from torchshm.errors import PoolFullError

_ALIGNED = 64  # bytes: where columns begin
_OVERFULL = 1.25  # of the size that was asked for: a block of several values is not more
_SOON = 1.0  # s in which there mostly is room
_ROOMY = 0.75  # a block that fills less than that of its memory is moved to memory of its size


class Cutter:
    """Makes blocks of about `target` bytes of the values that it gets, in the store's memory, and saves them."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        target: int,
        skip: int,
        tell: Callable[[Made], None],
        policy: str,
        let_go: Callable[[], None],
    ) -> None:
        """policy: ``"spill"`` for what goes to disk before what others are about to use. let_go: called before a wait for room."""
        self._store, self._prefix, self._target, self._skip, self._tell = store, prefix, target, skip, tell
        self._policy, self._let_go = policy, let_go
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
            return
        if not _plain(value) or any(array.dtype.hasobject for array in value.values()):
            self._add_other(found, value, rows)
            return
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
                _fill(block[name], self._filled, array[begin : begin + count])
            self._filled += count
            begin += count
            if self._filled == self._capacity:
                self._end_block()

    def _begin_block(self, value: Any, rows: int, expected: int, per_row: float) -> None:
        self._flush_other()
        fits = max(1, int(self._target / max(per_row, 1.0)))
        # What is left over is shared out rather than made a small block.
        wanted = max(rows, expected)
        self._capacity = fits if wanted > fits * 1.5 or not expected else min(wanted, int(fits * 1.5) + 1)
        self._block = self._blank(value, self._capacity)
        self._filled = 0

    def _blank(self, like: dict[str, Any], rows: int) -> dict[str, Any]:
        """Columns that lie one after the other in one piece of the store's memory: small ones by themselves would be strewn all over it."""
        places, nbytes = [], 0
        for array in like.values():
            places.append(nbytes)
            nbytes += -(-rows * array.nbytes // max(len(array), 1) // _ALIGNED) * _ALIGNED
        with self._store.storage():
            memory = np.empty(nbytes, np.uint8)
        return {
            name: np.ndarray((rows, *array.shape[1:]), array.dtype, memory, place)
            for (name, array), place in zip(like.items(), places, strict=True)
        }

    def _end_block(self) -> None:
        block, filled = self._block, self._filled
        self._block, self._filled = None, 0
        if block is None or filled == 0:
            return
        if filled < self._capacity:
            block = {name: array[:filled] for name, array in block.items()}
            if filled < _ROOMY * self._capacity:
                moved = self._blank(block, filled)
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
        if self._kept_bytes + nbytes > _OVERFULL * self._target:
            self._flush_other()
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
        kept.clear()
        if found.rows(value):
            self._save(value, found.rows(value), found.nbytes(value))

    def end(self) -> None:
        self._end_block()
        self._flush_other()

    def whole(self, values: Iterable[Any], rows: int) -> None:
        """A block of its own, whatever its size. Of what comes one by one none is kept: it may have the room that the block waits for."""
        self._target = 1 << 62
        done = 0
        like: dict[str, Any] | None = None
        coming = iter(values)
        for value in coming:
            if _plain(value):
                if like is None:
                    like = {name: array[:0].copy() for name, array in value.items()}
                elif not _alike(like, value):
                    value = self._with_others(value, coming)
                    done = 0
            self.add(value, rows - done)
            done += format_of(value).rows(value)
        self.end()

    def _with_others(self, value: dict[str, Any], coming: Iterator[Any]) -> Any:
        """What there is, that value, and all that still come: rows of types that have to be made one."""
        before = self._kept
        if self._block is not None:
            before = [{name: array[: self._filled].copy() for name, array in self._block.items()}]
        self._block, self._filled = None, 0
        self._kept, self._kept_bytes = [], 0
        return format_of(value).concat([*before, value, *coming])

    def _save(self, value: Any, rows: int, nbytes: int) -> None:
        number = self._count
        self._count += 1
        if number < self._skip:
            return
        key = f"{self._prefix}{number}"
        try:
            self._store.save(key, value, policy=self._policy, timeout=_SOON)
        except PoolFullError:
            self._let_go()
            self._store.save(key, value, policy=self._policy)
        self._tell(Made(key, rows, nbytes))


def _fill(column: np.ndarray[Any, Any], at: int, rows: np.ndarray[Any, Any]) -> None:
    """Put the rows into a block's column, from `at` on."""
    if rows.dtype == column.dtype and rows.flags.c_contiguous and rows.nbytes:
        row = column.strides[0]
        _C.copy_into(column, at * row, rows.__array_interface__["data"][0], rows.nbytes, column.nbytes)
    else:
        column[at : at + len(rows)] = rows


def _plain(value: Any) -> bool:
    return format_of(value).name == "numpy"


def _alike(block: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether the rows of the one can be put behind those of the other."""
    return block.keys() == value.keys() and all(
        block[name].shape[1:] == array.shape[1:] and _holds(block[name].dtype, array.dtype)
        for name, array in value.items()
    )


def _holds(dtype: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Strings have another type for each length."""
    return dtype == other or (
        dtype.kind == other.kind and dtype.kind in "SU" and dtype.itemsize >= other.itemsize
    )
