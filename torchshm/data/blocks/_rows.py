"""Rows as columns: arrays of what rows hold, of which no value becomes another one."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchshm._reducers import masked_type

_SAMPLE = 64
"""Values that are looked at for the size of all."""
_DEEP = 3  # lists in lists, for their size
_NUMBERS = set("biufc")
_FLOATS = {float, complex, np.float16, np.float32, np.float64, np.complex64, np.complex128}
_EXACT = 1 << 53
"""As far as each integer is a float64."""


def stack(rows: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
    """Rows, each a dict or one value, as columns."""
    if isinstance(rows[0], Mapping):
        names = list(rows[0])
        for number, row in enumerate(rows):
            if list(row) != names:
                raise ValueError(f"row {number} has the columns {list(row)}, the first one has {names}")
        return {name: column([row[name] for row in rows]) for name in names}
    return {"item": column(rows)}


def column(values: Sequence[Any]) -> npt.NDArray[Any]:
    """One array of the values, as NumPy stacks them; of objects where they have different shapes or would lose something by it.

    Bytes would lose the NULs at their end, as would strings, and what is mixed would become strings.
    """
    types = set(map(type, values))
    made: npt.NDArray[Any] | None = None
    if not types:
        return np.asarray(values)
    if types == {str}:
        made = None if any(value.endswith("\0") for value in values) else np.array(values)
    elif types <= {bool, int, float, complex} or (
        len(types) == 1 and issubclass(next(iter(types)), (np.number, np.bool_))
    ):
        made = np.array(values)
    else:
        try:
            arrays = [_array(value) for value in values]
            kinds = {array.dtype.kind for array in arrays}
            if len(kinds) == 1 or kinds <= _NUMBERS:
                made = np.stack(arrays)
        except (ValueError, TypeError):
            pass
    if made is not None and made.dtype.kind in "fc" and not types <= _FLOATS and any(map(_is_large, values)):
        made = None  # integers that no float is equal to
    return objects(values) if made is None else made


def _is_large(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and abs(int(value)) > _EXACT


def common_dtype(arrays: Sequence[npt.NDArray[Any]]) -> np.dtype[Any]:
    """Of all rows of these, as NumPy has it, but that numbers do not become strings."""
    kinds = {array.dtype.kind for array in arrays}
    if len(kinds) == 1 or kinds <= _NUMBERS:
        return np.result_type(*arrays)
    return np.dtype(object)


def objects(values: Sequence[Any]) -> npt.NDArray[Any]:
    """The values as they are."""
    made = np.empty(len(values), object)
    for number, value in enumerate(values):
        made[number] = value
    return made


def is_masked(value: Any) -> bool:
    """Whether it is a masked array, and some of its values are."""
    kind = masked_type()
    if kind is None:
        return False
    if isinstance(value, (list, tuple)):
        return any(map(is_masked, value))
    if not isinstance(value, kind):
        return False
    mask = np.ma.getmaskarray(value)
    return bool(np.ascontiguousarray(mask).view(np.bool_).any())  # one for each field, where it has some


def unmasked(value: Any, what: str) -> npt.NDArray[Any]:
    """The value as an array; `what` says which it is.

    Raises
    ------
    ValueError
        Where values are masked: what lies under the mask would become a value.
    """
    if is_masked(value):
        raise ValueError(
            f"{what} is a masked array, and columns have no masks: give array.filled(value), or an xarray.Dataset with NaN"
        )
    return np.asarray(value)


def _array(value: Any) -> npt.NDArray[Any]:
    """The value as an array of the same; ValueError where there is none."""
    if is_masked(value):
        raise ValueError(value)
    made = np.asarray(value)
    if made.dtype.kind not in "SU" or isinstance(value, np.ndarray):
        return made
    for each in np.asarray(value, object).flat:
        if not isinstance(each, str) or each.endswith("\0"):
            raise ValueError(each)
    return made


def size_of(values: Sequence[Any] | npt.NDArray[Any], deep: int = _DEEP) -> int:
    """About the bytes of Python objects, by a sample of them; the same for equal ones, whatever was done with them before."""
    count = len(values)
    if count == 0:
        return 0
    sample = values[:: -(-count // _SAMPLE)]
    return sum(_size(value, deep) for value in sample) * count // len(sample)


def _size(value: Any, deep: int) -> int:
    if isinstance(value, str):
        return 57 + len(value) * (1 if value.isascii() else 2)
    if isinstance(value, (bytes, bytearray)):
        return 33 + len(value)
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return 112 + nbytes
    if isinstance(value, (list, tuple)):
        return 56 + 8 * len(value) + (size_of(value, deep - 1) if deep else 0)
    if isinstance(value, Mapping):
        return 64 + 100 * len(value) + (size_of(list(value.values()), deep - 1) if deep else 0)
    return sys.getsizeof(value, 64)
