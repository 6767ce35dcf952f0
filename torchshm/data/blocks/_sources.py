"""Where blocks come from: arrays, files, iterators. A source is a list of tasks that workers run, each of which yields values."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchshm._store import Store
from torchshm.data.blocks._formats import FORMATS, checked, with_rows
from torchshm.data.blocks._home import client
from torchshm.data.blocks._rows import stack

_CONNECT = 10.0  # s for a store that a plan reads from


class Source(ABC):
    """Tasks 0, 1, ..., `len(self)`; any process may run any of them, again and again, with the same result."""

    label: str = "read"
    once: bool = False
    """Whether its rows can be had only one time; `again` says what to do about it."""
    again: str = ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, task: int) -> Iterator[Any]:
        """Values of this task, in order; how large they are is the source's business."""

    def plan(self, target: int) -> Source:
        """This source divided into tasks of about `target` bytes."""
        return self

    def nbytes(self, task: int) -> int | None:
        """About how much a task yields; None: not known."""
        return None

    def done(self, task: int) -> None:  # noqa: B027 - most have nothing to do
        """Called by the executor when all that a task yields is in blocks, and it will not be read again."""


def only_once(source: Source) -> str:
    """What is said to who wants its rows a second time."""
    return f"the rows of {source.label} can be had only once: {source.again}"


class OpenFile:
    """The file that was opened last: it stays open until another one is, since a file's tasks mostly come one after the other.

    A copy that is pickled for a worker has none.
    """

    def __init__(self) -> None:
        self._path: str | None = None
        self._file: Any = None

    def get(self, path: str, open_it: Callable[[str], Any]) -> Any:
        """The file of that path."""
        if path != self._path:
            self.close()
            self._file = open_it(path)
            self._path = path
        return self._file

    def close(self) -> None:
        if self._path is not None:
            self._file.close()
            self._path = self._file = None

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFile, ()


class ArraySource(Source):
    """Slices of arrays in this process's memory, which workers inherit, or of memory maps."""

    label = "from_arrays"

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], cuts: Sequence[int] | None = None) -> None:
        self._arrays = dict(arrays)
        self._rows = len(next(iter(self._arrays.values()))) if self._arrays else 0
        self._cuts = list(cuts) if cuts is not None else [0, self._rows]

    def plan(self, target: int) -> Source:
        per_row = FORMATS["numpy"].nbytes(self._arrays) / max(self._rows, 1)
        rows = max(1, int(target / per_row)) if per_row else max(1, self._rows)
        return ArraySource(self._arrays, [*range(0, self._rows, rows), self._rows] if self._rows else [0])

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def read(self, task: int) -> Iterator[Any]:
        begin, end = self._cuts[task], self._cuts[task + 1]
        yield {name: array[begin:end] for name, array in self._arrays.items()}

    def nbytes(self, task: int) -> int | None:
        begin, end = self._cuts[task], self._cuts[task + 1]
        return FORMATS["numpy"].nbytes({name: array[begin:end] for name, array in self._arrays.items()})


class XarraySource(Source):
    """Slices of a Dataset along a dimension; what it has not loaded is read by the worker."""

    label = "from_xarray"

    def __init__(self, dataset: Any, dim: str, cuts: Sequence[int] | None = None) -> None:
        self._dataset, self._dim = dataset, dim
        self._rows = int(dataset.sizes[dim])
        self._cuts = list(cuts) if cuts is not None else [0, self._rows]

    def plan(self, target: int) -> Source:
        rows = max(1, int(target * self._rows / max(self._dataset.nbytes, 1)))
        return XarraySource(self._dataset, self._dim, [*range(0, self._rows, rows), self._rows])

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def read(self, task: int) -> Iterator[Any]:
        piece = self._dataset.isel({self._dim: slice(self._cuts[task], self._cuts[task + 1])}).load()
        yield with_rows(piece, self._dim)

    def nbytes(self, task: int) -> int | None:
        part = self._cuts[task + 1] - self._cuts[task]
        return int(self._dataset.nbytes * part / max(self._rows, 1))


class NetcdfSource(Source):
    """Slices of NetCDF files along a dimension, by xarray; a file is opened by the worker that reads from it."""

    label = "read_netcdf"

    def __init__(
        self,
        paths: Sequence[str],
        dim: str | None,
        columns: Sequence[str] | None,
        options: Mapping[str, Any],
        tasks: Sequence[tuple[str, str, int, int, int]] = (),
    ) -> None:
        self._paths, self._dim, self._columns, self._options = list(paths), dim, columns, dict(options)
        self._tasks = list(tasks)
        self._open = OpenFile()

    def _dataset(self, path: str) -> Any:
        return self._open.get(path, self._opened)

    def _opened(self, path: str) -> Any:
        import xarray as xr

        found = xr.open_dataset(path, **self._options)
        return found if self._columns is None else found[list(self._columns)]

    def plan(self, target: int) -> Source:
        tasks = []
        for path in self._paths:
            dataset = self._dataset(path)
            dim = self._dim or str(next(iter(dataset.sizes)))
            if dim not in dataset.sizes:
                raise ValueError(
                    f"{path} has no dimension {dim!r}; it has {', '.join(map(str, dataset.sizes))}"
                )
            rows = int(dataset.sizes[dim])
            per_row = max(1, dataset.nbytes // max(rows, 1))
            step = max(1, target // per_row)
            tasks += [
                (path, dim, begin, min(begin + step, rows), per_row * (min(begin + step, rows) - begin))
                for begin in range(0, rows, step)
            ]
        self._open.close()
        return NetcdfSource(self._paths, self._dim, self._columns, self._options, tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def read(self, task: int) -> Iterator[Any]:
        path, dim, begin, end, _ = self._tasks[task]
        dataset = self._dataset(path)
        loaded = dataset.isel({dim: slice(begin, end)}).copy(deep=False)
        yield with_rows(loaded.load(), dim)

    def nbytes(self, task: int) -> int | None:
        return self._tasks[task][4]


class ZarrSource(Source):
    """Slices of the arrays of a Zarr group along their first dimension, at the borders of chunks."""

    label = "read_zarr"

    def __init__(
        self, path: str, columns: Sequence[str] | None, cuts: Sequence[int] = (), per_row: int = 0
    ) -> None:
        self._path, self._columns, self._cuts, self._per_row = path, columns, list(cuts), per_row
        self._arrays: dict[str, Any] | None = None

    def _opened(self) -> dict[str, Any]:
        if self._arrays is None:
            import zarr

            found = zarr.open(self._path, mode="r")
            arrays = dict(found.arrays()) if isinstance(found, zarr.Group) else {"data": found}
            if self._columns is not None:
                arrays = {name: arrays[name] for name in self._columns}
            self._arrays = arrays
        return self._arrays

    def plan(self, target: int) -> Source:
        arrays = self._opened()
        rows = {name: array.shape[0] for name, array in arrays.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(
                f"the arrays of {self._path} have different numbers of rows: {rows}; choose by columns="
            )
        count = next(iter(rows.values()), 0)
        per_row = sum(array.nbytes // max(count, 1) for array in arrays.values())
        chunk = max((array.chunks[0] for array in arrays.values()), default=1)
        step = max(chunk, target // max(per_row, 1) // chunk * chunk)
        return ZarrSource(self._path, self._columns, [*range(0, count, step), count], per_row)

    def __len__(self) -> int:
        return max(0, len(self._cuts) - 1)

    def read(self, task: int) -> Iterator[Any]:
        begin, end = self._cuts[task], self._cuts[task + 1]
        yield {name: array[begin:end] for name, array in self._opened().items()}

    def nbytes(self, task: int) -> int | None:
        return self._per_row * (self._cuts[task + 1] - self._cuts[task])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


class NpySource(Source):
    """Slices of .npy files, which workers map."""

    label = "read_npy"

    def __init__(
        self, paths: Sequence[str], column: str, tasks: Sequence[tuple[str, int, int, int]] = ()
    ) -> None:
        self._paths, self._column, self._tasks = list(paths), column, list(tasks)

    def plan(self, target: int) -> Source:
        tasks = []
        for path in self._paths:
            array = np.load(path, mmap_mode="r")
            if array.ndim == 0:
                raise ValueError(f"{path} holds a single value, without rows")
            per_row = max(1, array.nbytes // max(len(array), 1))
            # In equal parts, so that no small one is left at the end of each file.
            parts = max(1, round(array.nbytes / target))
            cuts = [len(array) * part // parts for part in range(parts + 1)]
            tasks += [
                (path, begin, end, per_row * (end - begin))
                for begin, end in itertools.pairwise(cuts)
                if begin < end
            ]
        return NpySource(self._paths, self._column, tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def read(self, task: int) -> Iterator[Any]:
        path, begin, end, _ = self._tasks[task]
        yield {self._column: np.load(path, mmap_mode="r")[begin:end]}

    def nbytes(self, task: int) -> int | None:
        return self._tasks[task][3]


class IteratorSource(Source):
    """What a function or an iterable yields, in its order, by one worker after another: a single task that goes on and on."""

    label = "from_iter"
    again = "give from_iter a function that makes an iterator, or a list"

    def __init__(self, make: Callable[[], Iterator[Any]] | Iterable[Any], rows: int, batched: bool) -> None:
        self._make, self._rows, self._batched = make, rows, batched
        self.once = isinstance(make, Iterator) and iter(make) is make

    def __len__(self) -> int:
        return 1

    def read(self, task: int) -> Iterator[Any]:
        items = self._make() if callable(self._make) else iter(self._make)
        rows: list[Any] = []
        for item in items:
            if self._batched or is_table(item):
                if rows:
                    yield stack(rows)
                    rows = []
                yield checked(item, "the iterable of from_iter yielded")
                continue
            rows.append(item)
            if len(rows) == self._rows:
                yield stack(rows)
                rows = []
        if rows:
            yield stack(rows)


def is_table(item: Any) -> bool:
    """Whether an item has rows of its own, as tables of all libraries have."""
    return type(item).__module__.partition(".")[0] in ("pyarrow", "pandas", "xarray")


class StoreSource(Source):
    """Values of a store, a task for each name. Where they are consumed a name goes when its rows are in blocks of this plan."""

    label = "from_store"
    again = "consume=True takes the values out of the store; leave it out"

    def __init__(
        self,
        store: str,
        keys: Sequence[str] | None,
        consume: bool,
        allow_pickle: bool,
        sizes: Sequence[int] = (),
    ) -> None:
        self._store, self._keys, self._allow_pickle = store, keys, allow_pickle
        self._sizes = list(sizes)
        self.once = consume

    def _client(self) -> Store:
        return client(self._store, _CONNECT)

    def plan(self, target: int) -> Source:
        store = self._client()
        sizes: dict[str, int] = {}
        missing: list[str] = []
        for key in store.keys() if self._keys is None else self._keys:
            try:
                sizes[key] = store.info(key)["bytes"]
            except KeyError:
                missing.append(key)
        if missing and self._keys is not None:
            raise KeyError(f"the store {self._store} has no {', '.join(map(repr, missing[:5]))}")
        keys = list(sizes) if self._keys is None else self._keys
        return StoreSource(self._store, keys, self.once, self._allow_pickle, [sizes[key] for key in keys])

    def __len__(self) -> int:
        return len(self._sizes)

    def read(self, task: int) -> Iterator[Any]:
        assert self._keys is not None
        key = self._keys[task]
        value = self._client().load(key, allow_pickle=self._allow_pickle)
        if hasattr(value, "__array__") and not is_table(value):
            value = {"data": value}
        yield checked(value, f"the store's {key!r} holds")

    def nbytes(self, task: int) -> int | None:
        return self._sizes[task]

    def done(self, task: int) -> None:
        if self.once and self._keys is not None:
            with contextlib.suppress(KeyError):  # somebody else was faster
                self._client().remove(self._keys[task])


def expand(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], ending: str) -> list[str]:
    """Files: a path, a folder's files of that ending, a pattern, or several of those.

    Raises
    ------
    FileNotFoundError
        When there is none.
    """
    several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[str] = []
    for each in [os.fspath(path) for path in several]:
        if os.path.isdir(each):
            matching = sorted(str(path) for path in Path(each).rglob(f"*{ending}"))
        elif glob.has_magic(each):
            matching = sorted(glob.glob(each, recursive=True))
        else:
            matching = [each] if os.path.exists(each) else []
        if not matching:
            raise FileNotFoundError(f"no such file, or no {ending} file in it: {each}")
        found += matching
    return found
