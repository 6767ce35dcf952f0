"""Zarr hierarchies, through the library zarr, versions 2 and 3: slashes in names are groups."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchshm._exchange import _arrays
from torchshm._exchange._item import Contents, Item

_RESERVED = frozenset(("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata"))


def _library() -> tuple[Any, bool]:
    """The library, and whether it has the interface of version 3."""
    try:
        import zarr
    except ImportError:
        raise _arrays.lacking(".zarr", "zarr") from None
    return zarr, int(zarr.__version__.split(".")[0]) >= 3


def write(path: Path, arrays: Iterator[tuple[str, Any]]) -> None:
    """Write a directory."""
    zarr, _ = _library()
    _write_into(zarr.open_group(str(path), mode="w"), arrays)


def write_zip(path: Path, arrays: Iterator[tuple[str, Any]]) -> None:
    """Write a zip archive."""
    zarr, _ = _library()
    with contextlib.closing(zarr.storage.ZipStore(str(path), mode="w")) as archive:
        _write_into(zarr.open_group(archive, mode="w"), arrays)


def _write_into(group: Any, arrays: Iterator[tuple[str, Any]]) -> None:
    _, third = _library()
    held: dict[str, str] = {}  # paths of arrays, and of groups above them, with whose they are
    for name, x in arrays:
        _arrays.check_path(name, _RESERVED)
        parts = name.split("/")
        above = ["/".join(parts[:i]) for i in range(1, len(parts))]
        rivals = [held[name]] if name in held else [each for each in above if held.get(each) == each]
        if rivals:
            raise ValueError(
                f"{rivals[0]!r} and {name!r} would be an array and a group of one name: {_arrays.RENAME}"
            )
        held |= {each: held.get(each, name) for each in above} | {name: name}
        array = _arrays.as_ndarray(name, x, "zarr")
        try:
            # Chunks that equal the fill value are written too: it is equal to -0.0.
            if third:
                made = group.create_array(
                    name, shape=array.shape, dtype=array.dtype, config={"write_empty_chunks": True}
                )
            else:
                made = group.create_dataset(
                    name, shape=array.shape, dtype=array.dtype, write_empty_chunks=True
                )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise _unfit(name, array.dtype, str(error)) from None
        if made.dtype != array.dtype:
            raise _unfit(name, array.dtype, f"it would become {made.dtype}")
        if array.size:
            made[...] = array
        del x, array  # before the next one needs room


def _unfit(name: str, dtype: Any, why: str) -> TypeError:
    return TypeError(
        f"{name!r} has the dtype {dtype}, which zarr can't hold ({why}): export it to .npz, or {_arrays.ELSEWHERE}"
    )


@contextlib.contextmanager
def read(path: Path, framework: str | None) -> Iterator[Contents]:
    """The arrays in a directory, of all its groups."""
    zarr, _ = _library()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no directory; a zarr archive has the format 'zarr.zip'")
    yield _contents(zarr, str(path), path, framework)


@contextlib.contextmanager
def read_zip(path: Path, framework: str | None) -> Iterator[Contents]:
    """The arrays in a zip archive, of all its groups."""
    zarr, _ = _library()
    try:
        zipfile.ZipFile(path).close()
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from None
    with contextlib.closing(zarr.storage.ZipStore(str(path), mode="r")) as archive:
        yield _contents(zarr, archive, path, framework)


def _contents(zarr: Any, where: Any, path: Path, framework: str | None) -> Contents:
    try:
        root = zarr.open(where, mode="r")
    except Exception as error:
        raise _damaged(path, error) from error
    if isinstance(root, zarr.Array):
        name = path.name.removesuffix(".zip").removesuffix(".zarr")
        return Contents([_item(name, root, framework)])
    found = []
    if hasattr(root, "members"):
        found = [(name, each) for name, each in root.members(max_depth=None) if isinstance(each, zarr.Array)]
    else:
        root.visititems(
            lambda name, each: found.append((name, each)) if isinstance(each, zarr.Array) else None
        )
    return Contents([_item(name, each, framework) for name, each in sorted(found, key=lambda pair: pair[0])])


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is no zarr hierarchy, or damaged: {error}")


def _item(name: str, array: Any, framework: str | None) -> Item:
    dtype = np.dtype(array.dtype)
    if dtype.hasobject or dtype.kind == "T":
        raise TypeError(
            f"{name!r} holds {'strings of variable length' if dtype.kind == 'T' else 'Python objects'}, which can't lie in shared "
            "memory; leave it out of the hierarchy, or save its values yourself"
        )
    nbytes = math.prod(array.shape) * dtype.itemsize
    return Item(name, nbytes, _reader(name, array, dtype, framework))


def _reader(name: str, array: Any, dtype: np.dtype[Any], framework: str | None) -> Callable[[], Any]:
    def read() -> Any:
        _, third = _library()
        made = np.empty(array.shape, dtype)
        if made.size == 0 or made.nbytes == 0:
            return _arrays.in_framework(name, made, framework)
        out: Any = made
        if third:
            from zarr.buffer.cpu import NDBuffer

            out = NDBuffer.from_numpy_array(made)
        array.get_basic_selection(Ellipsis, out=out)  # chunk by chunk, each decoded to its place
        return _arrays.in_framework(name, made, framework)

    return read
