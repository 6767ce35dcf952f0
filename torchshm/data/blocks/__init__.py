"""Data sets larger than memory, prepared block by block by worker processes, in bounded memory.

>>> from torchshm.data import blocks
>>> ds = blocks.read_parquet("flights/").map_batches(normalize).shuffle(seed=1, window="1GiB")
>>> for batch in ds.iter_batches(batch_size=256, num_workers=4):
...     step(batch)

A plan is made of lazy calls. It is run by worker processes that hand each other blocks of rows in a private store: dicts of NumPy arrays,
Arrow tables, pandas DataFrames or xarray Datasets. Functions that follow one another run in one go, what does not fit into `memory` goes to
disk, a slow consumer makes the workers wait, and the block of a worker that was killed is made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from torchshm._store import Store
from torchshm.data.blocks import _sources
from torchshm.data.blocks._dataset import Dataset
from torchshm.data.blocks._parquet import ParquetSource
from torchshm.data.blocks._rows import unmasked

__all__ = [
    "Dataset",
    "from_arrays",
    "from_iter",
    "from_store",
    "from_xarray",
    "read_netcdf",
    "read_npy",
    "read_parquet",
    "read_zarr",
]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def from_arrays(arrays: Mapping[str, npt.ArrayLike]) -> Dataset:
    """A dataset of arrays in memory, or mapped from files, whose first dimension is that of the rows.

    Parameters
    ----------
    arrays : mapping of str to array_like
        Of the same length. Workers that are forked read them where they are.

    Raises
    ------
    ValueError
        When their lengths differ, one has no dimension, or values are masked.
    """
    made = {str(name): unmasked(array, f"column {name!r}") for name, array in arrays.items()}
    lengths = {name: array.shape[0] if array.ndim else None for name, array in made.items()}
    if not made or None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"from_arrays takes arrays with the same number of rows, not {lengths}")
    return Dataset._of(_sources.ArraySource(made))


def from_xarray(dataset: Any, dim: str | None = None) -> Dataset:
    """A dataset of the slices of an xarray.Dataset along a dimension, its first one by default; what it has not loaded workers read."""
    rows = str(next(iter(dataset.sizes))) if dim is None else dim
    if rows not in dataset.sizes:
        raise ValueError(
            f"the dataset has no dimension {rows!r}; it has {', '.join(map(str, dataset.sizes))}"
        )
    return Dataset._of(_sources.XarraySource(dataset, rows))


def from_iter(
    items: Callable[[], Iterator[Any]] | Iterable[Any], *, batched: bool = False, rows_per_batch: int = 1024
) -> Dataset:
    """A dataset of what an iterable yields: rows, as dicts or single values, or batches.

    Parameters
    ----------
    items : iterable, or callable that returns an iterator
        It is gone through by one worker. A list, or a function, can be begun again when that worker is killed; an iterator can't.
    batched : bool
        Whether it yields dicts of arrays that have many rows each. Tables always have.
    rows_per_batch : int
        How many single rows are put together before a function sees them.
    """
    return Dataset._of(_sources.IteratorSource(items, rows_per_batch, batched))


def from_store(
    store: Store | str,
    keys: Iterable[str] | None = None,
    *,
    consume: bool = False,
    allow_pickle: bool = False,
) -> Dataset:
    """A dataset of values that lie in a store by their names: dicts of arrays, tables, or arrays, as column ``data``.

    Parameters
    ----------
    store : torchshm.Store or str
        The store, or its name.
    keys : iterable of str, optional
        In the order of the rows. Default: all names that there are when the plan is run, sorted.
    consume : bool
        Take the values out: a name is removed when its rows are in blocks of the plan, so that the store becomes empty as it is read. What
        the loop does not get, since it ends early, is gone with the rest of the plan; a worker that is killed loses nothing. There
        is no second epoch.
    allow_pickle : bool
        Also read what :meth:`torchshm.Store.load` loads with it alone: tables of Arrow, pandas and xarray. It runs code that the saver
        chose.
    """
    name = store if isinstance(store, str) else store.name
    several = [keys] if isinstance(keys, str) else None if keys is None else list(keys)
    return Dataset._of(_sources.StoreSource(name, several, consume, allow_pickle))


def read_netcdf(
    paths: Paths, *, dim: str | None = None, columns: Sequence[str] | None = None, **options: Any
) -> Dataset:
    """A dataset of NetCDF files, as xarray.Dataset blocks.

    Parameters
    ----------
    paths : path, or several
        Files, folders or patterns.
    dim : str, optional
        The dimension of the rows. Default: each file's first one.
    columns : sequence of str, optional
        Variables to read. Default: all.
    **options
        Those of :func:`xarray.open_dataset`.
    """
    return Dataset._of(_sources.NetcdfSource(_sources.expand(paths, ".nc"), dim, columns, options))


def read_npy(paths: Paths, *, column: str = "data") -> Dataset:
    """A dataset of .npy files, whose arrays' first dimension is that of the rows, in the column of that name.

    Parameters
    ----------
    paths : path, or several
        Files, folders or patterns. Arrays have the same dtype and, but for the rows, the same shape.
    column : str
    """
    return Dataset._of(_sources.NpySource(_sources.expand(paths, ".npy"), column))


def read_parquet(paths: Paths, *, columns: Sequence[str] | None = None) -> Dataset:
    """A dataset of Parquet files, as pyarrow.Table blocks of one or several row groups.

    Parameters
    ----------
    paths : path, or several
        Files, folders or patterns.
    columns : sequence of str, optional
        Default: all.
    """
    return Dataset._of(ParquetSource(_sources.expand(paths, ".parquet"), columns))


def read_zarr(path: str | os.PathLike[str], *, columns: Sequence[str] | None = None) -> Dataset:
    """A dataset of a Zarr array, as column ``data``, or of the arrays of a group, which have the same first dimension.

    Parameters
    ----------
    path : path
    columns : sequence of str, optional
        Arrays of the group. Default: all.
    """
    return Dataset._of(_sources.ZarrSource(os.fspath(path), columns))
