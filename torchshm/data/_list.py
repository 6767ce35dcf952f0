"""SharedList: a list of any objects, its items pickled in the pool."""

from __future__ import annotations

import json
import multiprocessing.reduction
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

import torchshm
from torchshm import _C
from torchshm.data import _items

T = TypeVar("T")


class SharedList(_C.ItemList, Sequence[T]):
    """A list whose items lie pickled in shared memory, once for all processes.

    Each access unpickles the item anew: what is done to it does not change the list. Arrays and tensors of 1 KiB or more in an item
    are views of the shared memory and cost nothing. Workers, of any start method, read the same pages; no reference count of an item
    is ever written there, which is what makes a list grow in forked workers.

    A list is open, and can be appended to, until :meth:`seal` is called, or until it is sent to another process. Slices, and lists
    indexed by arrays, are sealed lists over the same memory. Until it is sealed, arrays in items are copies.

    Parameters
    ----------
    iterable : iterable
        Picklable objects, taken one at a time.
    mode : {"c", "r"}
        What writing to an item's array does, as in :class:`numpy.memmap`. ``"c"``: it is this process's own, seen by the next
        access to the item here, and not sent. ``"r"``: the arrays are read-only; tensors, which can't be, are copies.

    Raises
    ------
    pickle.PicklingError
        For an item that pickle refuses; its number is in the message. What came before it stays in the list. What an item's own
        ``__reduce__`` raises otherwise passes as it is.
    PoolFullError
        When there is no room, likewise.
    ValueError
        From ``append`` and ``extend`` of a list that is sealed.

    Notes
    -----
    Any number of threads may read, also while one appends; two that append at the same time get a RuntimeError.

    A forked child that appends to an open list appends to its own: parent and child do not see each other's items, as with a list.

    Examples
    --------
    >>> samples = SharedList({"id": i, "text": str(i)} for i in range(1_000_000))
    >>> samples[-1]
    {'id': 999999, 'text': '999999'}
    """

    __slots__ = ("__weakref__", "_mode")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, iterable: Iterable[T] = (), mode: str = "c") -> None:
        if mode not in ("c", "r"):
            raise ValueError(f"mode is 'c' or 'r', not {mode!r}")
        self._mode = mode
        _items.open_list(self)
        self._extend(iterable)

    @classmethod
    def _over(cls, chunks: Any, arrays: Any, index: _items.Words, mode: str) -> SharedList[T]:
        made = cls.__new__(cls)
        made._mode = mode
        made._seal_as(chunks, arrays, index)
        return made

    # ---- from files

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], mode: str = "c") -> SharedList[Any]:
        """One item for each line of a JSON-lines file that is not blank, read line by line.

        Raises
        ------
        ValueError
            For a line that is no JSON; its number is in the message.
        """
        made = cls(_json_lines(path), mode)
        made.seal()
        return made

    @classmethod
    def from_parquet(
        cls, path: str | os.PathLike[str], columns: Sequence[str] | None = None, mode: str = "c"
    ) -> SharedList[dict[str, Any]]:
        """One dict for each row of a Parquet file, read batch by batch.

        Parameters
        ----------
        path : path
        columns : sequence of str, optional
            Read these only.
        mode : {"c", "r"}

        Raises
        ------
        ImportError
            Without pyarrow.
        KeyError
            For a column that the file has not.
        """
        made: Any = cls(cast("Iterable[T]", _parquet_rows(path, columns)), mode)
        made.seal()
        return made

    # ---- appending

    def extend(self, iterable: Iterable[T]) -> None:
        """Pickle the items of an iterable at the end of the list, one at a time."""
        self._extend(iterable)

    def seal(self) -> SharedList[T]:
        """Let nothing be appended any more, and give spare room back. Returns the list. A second call does nothing."""
        _items.seal(self, self._mode)
        return self

    # ---- reading

    if TYPE_CHECKING:  # the base class's own: a function in its place costs each access

        @overload
        def __getitem__(self, key: int) -> T: ...
        @overload
        def __getitem__(self, key: slice | Sequence[int] | npt.NDArray[Any]) -> SharedList[T]: ...
        def __getitem__(self, key: Any) -> Any: ...

    def _select(self, key: Any) -> Any:
        """What an index that is no integer stands for."""
        if not isinstance(key, slice):
            ndim = getattr(key, "ndim", None)  # arrays of one item are indices as well
            chooses = isinstance(key, Sequence) and not isinstance(key, (str, bytes, tuple))
            if not chooses if ndim is None else ndim == 0:
                try:
                    return self[operator.index(cast("Any", key))]
                except TypeError:
                    if not hasattr(key, "__array__") or ndim == 0:
                        raise TypeError(
                            "SharedList indices are integers, slices, or lists and arrays of integers or bools, not "
                            + type(key).__name__
                        ) from None
            key = np.asarray(key)
            if key.size == 0 and key.ndim == 1:
                key = key.astype(np.int64)
            if key.ndim != 1 or key.dtype.kind not in "iub":
                raise TypeError(
                    f"an array that indexes a SharedList has one dimension and integers or bools, not {key.ndim} and {key.dtype}"
                )
        count = len(self)  # before the parts: these may be more, and never less
        chunks, arrays, index, used = self._parts()
        entries = _entries(index, used, count)[key]
        return type(self)._over(chunks, arrays, entries, self._mode)

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (SharedList, list)):
            return NotImplemented
        return len(self) == len(other) and all(a is b or a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = [repr(item) for item in self[:3]]
        if len(self) > 3:
            shown.append("...")
        return f"<SharedList of {len(self):,}: [{', '.join(shown)}]>"

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that the list keeps: those of the whole list, for a part of it."""
        chunks, _, index, _ = self._parts()
        return sum(chunk.nbytes for chunk in chunks) + (0 if index is None else index.nbytes)

    def __add__(self, other: list[T] | SharedList[T]) -> SharedList[T]:
        return self._joined(self, other)

    def __radd__(self, other: list[T]) -> SharedList[T]:
        return self._joined(other, self)

    def _joined(self, *lists: Any) -> SharedList[T]:
        if not all(isinstance(items, (SharedList, list)) for items in lists):
            return NotImplemented
        made = type(self).__new__(type(self))
        made._mode = self._mode
        _items.open_list(made)
        for items in lists:
            made._extend(items)
        return made

    def copy(self) -> SharedList[T]:
        """Of a sealed list one over the same memory; of an open one another open one, with copies of its items."""
        return self[:] if self.sealed else self._joined(self)

    # ---- pickling

    def __copy__(self) -> SharedList[T]:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> SharedList[T]:
        return self.copy()

    def _contents(self) -> tuple[Any, ...]:
        self.seal()
        chunks, _, index, _ = self._parts()
        return chunks, index, self._mode

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), *self._contents())


def _entries(index: Any, used: int | None, count: int) -> _items.Words:
    if used is None:
        return cast("_items.Words", index)
    return np.empty(0, np.uint64) if index is None else index.view(np.uint64)[:count]


def _rebuild(cls: type[SharedList[Any]], chunks: Any, index: _items.Words, mode: str) -> SharedList[Any]:
    texts, arrays = _items.received(chunks, mode)
    return cls._over(texts, arrays, index, mode)


def reduce_pooled(items: SharedList[Any]) -> Any:
    """For multiprocessing's pickler: by handles, whether or not the reducers are registered."""
    chunks, index, mode = items._contents()
    if index.nbytes > _items.PAGES and not torchshm.is_shared(index) and _C.is_member():
        index = _items.fresh(index)
        items._seal_as(chunks, items._parts()[1], index)
    pooled = tuple(map(_items.Pooled, chunks))
    return _rebuild, (type(items), pooled, _items.Pooled(index), mode)


multiprocessing.reduction.ForkingPickler.register(SharedList, reduce_pooled)


def _json_lines(path: str | os.PathLike[str]) -> Iterator[Any]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{os.fspath(path)}, line {number} is no JSON: {error}") from error


def _parquet_rows(path: str | os.PathLike[str], columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("SharedList.from_parquet needs pyarrow: pip install pyarrow") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        if columns is not None:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise KeyError(f"{os.fspath(path)} has no column {missing}, but {file.schema_arrow.names}")
        for batch in file.iter_batches(columns=None if columns is None else list(columns)):
            yield from batch.to_pylist()
