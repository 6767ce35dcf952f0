"""NumPy's own files: one array in .npy, a zip archive of them in .npz. Never a pickle."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from torchshm._exchange import _arrays
from torchshm._exchange._item import Contents, Item


def write_npy(path: Path, arrays: Iterator[tuple[str, Any]]) -> None:
    """Write the only array."""
    first = next(arrays, None)
    if first is None:
        raise ValueError("there is nothing to export, and an .npy file has one array")
    with open(path, "xb") as file:
        _write(file, *first)
    del first
    if (second := next(arrays, None)) is not None:
        raise ValueError(f"an .npy file has one array, and {second[0]!r} is a second one: export to .npz")


def write_npz(path: Path, arrays: Iterator[tuple[str, Any]]) -> None:
    """As numpy.savez does, one array at a time."""
    with zipfile.ZipFile(path, "x", allowZip64=True) as archive:
        for name, array in arrays:
            _arrays.check_path(name)
            if len(name.encode()) > 65000:
                raise ValueError(
                    f"the key {name[:50]!r}... is longer than a name in a zip archive: {_arrays.RENAME}"
                )
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                _write(file, name, array)
            del array  # before the next one needs room


def _write(file: IO[bytes], name: str, x: Any) -> None:
    array = _arrays.as_ndarray(name, x, "its file")
    dtype = array.dtype
    if dtype.hasobject or dtype.type.__module__ == "ml_dtypes" or not _comes_back(dtype):
        raise TypeError(
            f"{name!r} has the dtype {dtype}, which NumPy's files can't hold: export it to .safetensors, or {_arrays.ELSEWHERE}"
        )
    np.lib.format.write_array(file, array, allow_pickle=False)


def _comes_back(dtype: np.dtype[Any]) -> bool:
    return bool(np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype)) == dtype)


@contextlib.contextmanager
def read_npy(path: Path, framework: str | None) -> Iterator[Contents]:
    """The array of an .npy file, under the name of the file."""
    with open(path, "rb") as file:
        name = path.name[:-4] if path.name.lower().endswith(".npy") else path.name
        yield Contents(
            [Item(name, os.fstat(file.fileno()).st_size, lambda: _read(file, path, name, framework))]
        )


@contextlib.contextmanager
def read_npz(path: Path, framework: str | None) -> Iterator[Contents]:
    """The arrays of an .npz file."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no .npz file, or damaged: {error}") from None
    with archive:

        def reader(member: zipfile.ZipInfo) -> Callable[[], Any]:
            def read() -> Any:
                try:
                    with archive.open(member) as file:
                        return _read(file, path, member.filename, framework)
                except (zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
                    raise ValueError(f"{member.filename!r} in {path} is damaged: {error}") from None

            return read

        yield Contents(
            [
                Item(member.filename.removesuffix(".npy"), member.file_size, reader(member))
                for member in archive.infolist()
                if not member.is_dir()
            ]
        )


def _read(file: IO[bytes], path: Path, name: str, framework: str | None) -> Any:
    try:
        array = np.lib.format.read_array(file, allow_pickle=False)  # type: ignore[no-untyped-call]
    except (EOFError, ValueError) as error:
        raise ValueError(f"{name!r} in {path} can't be read: {error}") from None
    return _arrays.in_framework(name, array, framework)
