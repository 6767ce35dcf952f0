"""Writers: the rows of a dataset as files. Parquet files are written by the workers, a file each block; arrays by the caller."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchshm.data.blocks._drafts import Drafts
from torchshm.data.blocks._formats import convert, format_of, handed_out
from torchshm.data.blocks._functions import batches

_PART = "part-{:05d}.parquet"
_ZARR = ("zarr.json", ".zgroup", ".zarray")
"""One of them is in each folder that is a Zarr group or array."""

Blocks = Callable[[], Generator[Any, None, None]]


def _free(paths: Iterable[Path], overwrite: bool) -> list[Path]:
    """The paths that are there; FileExistsError where they must not be."""
    taken = [path for path in paths if os.path.lexists(path)]
    if taken and not overwrite:
        raise FileExistsError(f"{taken[0]} exists; give overwrite=True, or another place")
    return taken


# ---- Parquet


def need_arrow() -> None:
    """Raise ImportError where there is no pyarrow."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(f"write_parquet() needs pyarrow: pip install pyarrow ({error})") from error


class PartWriter:
    """The function of the stage that writes: it makes a file of a block, and returns its name in place of the rows."""

    __name__ = "write_parquet"

    def __init__(self, drafts: Drafts, options: dict[str, Any]) -> None:
        self._drafts, self._options = drafts, options

    def __call__(self, table: Any) -> dict[str, npt.NDArray[Any]]:
        import pyarrow.parquet as pq

        path = self._drafts.name("part")
        pq.write_table(table, path, **self._options)
        return {"path": np.array([os.fspath(path)], object), "rows": np.array([table.num_rows])}


def parquet_drafts(folder: str | os.PathLike[str], overwrite: bool) -> Drafts:
    """Where the parts are written; the folder is made."""
    place = Path(folder).absolute()
    _free(sorted(place.glob("*.parquet")), overwrite)
    place.mkdir(parents=True, exist_ok=True)
    return Drafts(place)


def publish_parts(drafts: Drafts, written: Iterable[Any], overwrite: bool) -> list[str]:
    """Give the parts, of which the rows of `written` tell, their names in order. Parts of before go."""
    parts = [Path(path) for block in written for path in convert(block, "numpy")["path"]]
    paths = [drafts.folder / _PART.format(number) for number in range(len(parts))]
    old = [
        path
        for path in sorted(drafts.folder.glob("part-*.parquet"))
        if path.name[len("part-") : -len(".parquet")].isdecimal()
    ]
    drafts.publish(list(zip(parts, paths, strict=True)), _free(old, overwrite))
    return [os.fspath(path) for path in paths]


# ---- arrays


def _file_name(column: str) -> str:
    if not column or column.startswith(".") or "/" in column or "\0" in column:
        raise ValueError(f"a column of the name {column!r} can't be a file: rename it in map_batches")
    return column


class _Likeness:
    """What all blocks of a column have in common, by the first of them."""

    def __init__(self, what: str, first: dict[str, npt.NDArray[Any]]) -> None:
        self._what = what
        for name, array in first.items():
            _file_name(name)
            if array.dtype.hasobject:
                raise TypeError(
                    f"{what} can't write objects, which column {name!r} has: make an array of a fixed dtype of them in map_batches, "
                    "such as '<U20' for strings"
                )
        self._columns = {name: (array.dtype, array.shape[1:]) for name, array in first.items()}

    def check(self, arrays: dict[str, npt.NDArray[Any]], row: int) -> None:
        """Raise ValueError for a block that is of another kind; `row`: its first one."""
        if arrays.keys() != self._columns.keys():
            raise ValueError(
                f"{self._what} needs the same columns in all blocks: the first one has {sorted(self._columns)}, that of row {row:,} "
                f"has {sorted(arrays)}"
            )
        for name, (dtype, shape) in self._columns.items():
            array = arrays[name]
            if (array.dtype, array.shape[1:]) != (dtype, shape):
                raise ValueError(
                    f"{self._what} needs the same dtype and shape in all blocks: rows of column {name!r} are {dtype} of shape {shape} "
                    f"at first, and {array.dtype} of shape {array.shape[1:]} from row {row:,} on; convert them in map_batches"
                )


def write_npy(blocks: Blocks, folder: str | os.PathLike[str], overwrite: bool) -> dict[str, str]:
    """One file for each column. A header leaves room for any number of rows, and is written again when that is known."""
    place = Path(folder).absolute()
    _free(sorted(place.glob("*.npy")), overwrite)
    place.mkdir(parents=True, exist_ok=True)
    with Drafts(place) as drafts, contextlib.ExitStack() as files, contextlib.closing(blocks()) as stream:
        paths: dict[str, Path] = {}
        columns: dict[str, _NpyFile] = {}
        likeness: _Likeness | None = None
        rows = 0
        for block in stream:
            arrays: dict[str, npt.NDArray[Any]] = convert(block, "numpy")
            if likeness is None:
                likeness = _Likeness("write_npy", arrays)
                for name, array in arrays.items():
                    paths[name] = drafts.name(name)
                    columns[name] = files.enter_context(_NpyFile(paths[name], array))
            likeness.check(arrays, rows)
            for name, array in arrays.items():
                columns[name].write(array)
            rows += format_of(block).rows(block)
        for file in columns.values():
            file.end(rows)
        files.close()
        named = {name: place / f"{name}.npy" for name in paths}
        old = _free(named.values(), overwrite)
        drafts.publish([(paths[name], named[name]) for name in paths], old)
    return {name: os.fspath(path) for name, path in named.items()}


class _NpyFile:
    """A .npy file that grows."""

    def __init__(self, path: Path, first: npt.NDArray[Any]) -> None:
        self._dtype, self._shape = first.dtype, first.shape[1:]
        self._file = open(path, "xb")  # noqa: SIM115 - this object is the context
        self._write_header(0)
        self._begin = self._file.tell()

    def __enter__(self) -> _NpyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write_header(self, rows: int) -> None:
        facts = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (rows, *self._shape),
        }
        np.lib.format.write_array_header_2_0(self._file, facts)

    def write(self, array: npt.NDArray[Any]) -> None:
        np.ascontiguousarray(array).tofile(self._file)

    def end(self, rows: int) -> None:
        """That was all."""
        self._file.seek(0)
        self._write_header(rows)
        # NumPy keeps room for a first dimension that grows.
        assert self._file.tell() == self._begin


def write_zarr(
    blocks: Blocks, path: str | os.PathLike[str], overwrite: bool, rows_per_chunk: int | None
) -> None:
    """A group of one array for each column, or of what xarray makes of its datasets."""
    try:
        import zarr
    except ImportError as error:
        raise ImportError(f"write_zarr() needs zarr: pip install zarr ({error})") from error
    place = Path(path).absolute()
    if (
        _free([place], overwrite)
        and not any((place / name).exists() for name in _ZARR)
        and not (place.is_dir() and not any(place.iterdir()))
    ):
        raise FileExistsError(f"{place} is no Zarr group: it is not overwritten")
    place.parent.mkdir(parents=True, exist_ok=True)
    with Drafts(place.parent) as drafts, contextlib.closing(blocks()) as stream:
        draft = drafts.name(place.name)
        first = next(stream, None)
        if first is None:
            zarr.open_group(os.fspath(draft), mode="w")
        else:
            rows = rows_per_chunk or format_of(first).rows(first)
            # Chunks are whole from the beginning: one that is filled in two steps is read and written again.
            whole = batches(chain([first], stream), rows, cached=False)
            write = _write_datasets if format_of(first).name == "xarray" else _write_arrays
            write(zarr, os.fspath(draft), whole, rows)
        drafts.publish([(draft, place)], _free([place], overwrite))


def _write_arrays(zarr: Any, path: str, values: Iterator[Any], chunk: int) -> None:
    group = zarr.open_group(path, mode="w")
    # Version 2 has them as an attribute.
    named = hasattr(group, "create_array") and group.metadata.zarr_format >= 3
    columns: dict[str, Any] = {}
    likeness: _Likeness | None = None
    done = 0
    for value in values:
        arrays: dict[str, npt.NDArray[Any]] = convert(value, "numpy")
        if likeness is None:
            likeness = _Likeness("write_zarr", arrays)
            create = getattr(group, "create_array", None) or group.create_dataset
            for name, array in arrays.items():
                dims = ["row", *(f"{name}_{i}" for i in range(1, array.ndim))]
                columns[name] = create(
                    name,
                    shape=(0, *array.shape[1:]),
                    chunks=(chunk, *(max(each, 1) for each in array.shape[1:])),
                    dtype=array.dtype,
                    **({"dimension_names": dims} if named else {}),
                )
                if not named:
                    columns[name].attrs["_ARRAY_DIMENSIONS"] = dims
        likeness.check(arrays, done)
        for name, array in arrays.items():
            columns[name].append(array)
        done += format_of(value).rows(value)


def _write_datasets(zarr: Any, path: str, values: Iterator[Any], chunk: int) -> None:
    first = next(values)
    dim = format_of(first).dim(first)  # type: ignore[attr-defined]
    along = {str(name): variable for name, variable in first.variables.items() if dim in variable.dims}
    encoding: dict[str, dict[str, Any]] = {}
    for name, variable in along.items():
        encoding[name] = {
            "chunks": tuple(chunk if each == dim else size for each, size in variable.sizes.items())
        }
        # Of the first rows alone xarray takes units that the following may not fit.
        if variable.dtype.kind in "mM" and "units" not in variable.encoding:
            since = " since 1970-01-01" if variable.dtype.kind == "M" else ""
            encoding[name] |= {"units": f"nanoseconds{since}", "dtype": "int64"}
    handed_out(first, None).to_zarr(path, mode="w", encoding=encoding, consolidated=False)
    done = first.sizes[dim]
    for value in values:
        rest = value.drop_vars([name for name, each in value.variables.items() if dim not in each.dims])
        if set(rest.variables) != set(along):
            raise ValueError(
                f"write_zarr needs the same variables in all blocks: the first one has {sorted(along)}, that of row {done:,} has "
                f"{sorted(map(str, rest.variables))}"
            )
        handed_out(rest, None).to_zarr(path, append_dim=dim, consolidated=False)
        done += value.sizes[dim]
