"""Values as named arrays, which is all that files of other libraries hold, and what their errors say."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

TREES = (dict, OrderedDict, list, tuple)
ELSEWHERE = (
    "leave it out with keys= or prefix=, or write store.snapshot(path), which holds all that a store does"
)
RENAME = "save the value under another key, or export to .safetensors, which takes any"


def arrays_of(name: str, value: Any, separator: str) -> Iterator[tuple[str, Any]]:
    """The arrays and tensors of a value: by its own name, those of dicts, lists and tuples by their path below it.

    Raises
    ------
    TypeError
        For what is no array.
    """
    if type(value) in (dict, OrderedDict):
        for key, each in value.items():
            if type(key) is not str:
                raise TypeError(
                    f"{name!r} is a dict with the key {key!r}, and names in files are strings: {ELSEWHERE}"
                )
            yield from arrays_of(f"{name}{separator}{key}" if name else key, each, separator)
    elif type(value) in (list, tuple):
        for i, each in enumerate(value):
            yield from arrays_of(f"{name}{separator}{i}" if name else str(i), each, separator)
    elif isinstance(value, (np.ndarray, np.generic, memoryview)):
        yield name, np.asarray(value)
    elif is_tensor(value):
        yield name, _plain(name, value)
    else:
        raise TypeError(
            f"{name!r} is of type {type(value).__name__}, and the file holds arrays and tensors only: {ELSEWHERE}"
        )


def is_tensor(x: Any) -> bool:
    """Whether `x` is a torch.Tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _plain(name: str, tensor: Any) -> Any:
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantised" if tensor.is_quantized else tensor.layout
        raise TypeError(
            f"{name!r} is a tensor that is {kind}, and the file holds dense ones only: {ELSEWHERE}"
        )
    return tensor.detach().resolve_conj().resolve_neg()


def as_ndarray(name: str, x: Any, format: str) -> np.ndarray[Any, Any]:
    """An array or a tensor as an array, without a copy.

    Raises
    ------
    TypeError
        For dtypes that NumPy has not.
    """
    if isinstance(x, np.ndarray):
        return x
    try:
        return np.asarray(x.numpy())
    except TypeError:
        raise TypeError(
            f"{name!r} is a tensor of {x.dtype}, which NumPy and {format} have not: export it to .safetensors"
        ) from None


def in_framework(name: str, array: np.ndarray[Any, Any], framework: str | None) -> Any:
    """An array as it is, or with "pt" as a tensor over its memory."""
    if framework != "pt":
        return array
    import torch

    try:
        return torch.from_numpy(
            array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        )
    except TypeError:
        raise TypeError(
            f"{name!r} has the dtype {array.dtype}, which torch has not: import it with framework='np'"
        ) from None


def lacking(format: str, package: str) -> ImportError:
    """What to raise where a library is not there."""
    return ImportError(
        f"{format} is read and written by the library {package}, which is not installed: pip install {package}, or "
        "pip install 'torchshm[exchange]'"
    )


def check_path(name: str, reserved: frozenset[str] = frozenset()) -> None:
    """Raise ValueError for names that are no path below the root of a file or directory."""
    for part in name.split("/"):
        if part in ("", ".", "..") or part in reserved:
            why = f"it has a part {part!r} between its slashes"
        elif "\0" in part or "\\" in part:
            why = "it has a zero byte or a backslash"
        elif len(part.encode("utf-8", "replace")) > 255:
            why = "a part of it is longer than 255 bytes"
        else:
            continue
        raise ValueError(f"the key {name!r} can't be a name in this file, since {why}: {RENAME}")
