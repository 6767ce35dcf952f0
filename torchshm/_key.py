"""Names made of values."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np


def key(*parts: Any) -> str:
    """Return a name made of values: the same in every process and run, different for different values or types.

    Parameters
    ----------
    *parts : object
        None, bool, int, float, complex, str, bytes, paths, dtypes, arrays and NumPy scalars, and tuples, lists, sets and dicts of those.

    Returns
    -------
    str
        32 hexadecimal digits (BLAKE2b, 16 bytes).

    Raises
    ------
    TypeError
        For other types: what they mean can't be told from outside.
    """
    return hashlib.blake2b(_canonical(parts), digest_size=16).hexdigest()


def _canonical(x: Any) -> bytes:
    """Bytes that say type and value, and where they end."""
    if isinstance(x, np.generic) and not isinstance(x, (np.void, np.datetime64, np.timedelta64)):
        x = x.item()
    kind = type(x)
    if x is None or kind in (bool, int):
        tag, body = kind.__name__, str(x).encode()
    elif kind is float:
        tag, body = "float", (0.0 if x == 0 else x).hex().encode()
    elif kind is complex:
        tag, body = "complex", _canonical(x.real) + _canonical(x.imag)
    elif kind is str:
        tag, body = "str", x.encode("utf-8", "surrogatepass")
    elif kind in (bytes, bytearray, memoryview):
        tag, body = "bytes", bytes(x)
    elif isinstance(x, os.PathLike):
        tag, body = "path", os.fsencode(x)
    elif kind in (tuple, list):
        tag, body = kind.__name__, b"".join(map(_canonical, x))
    elif kind in (set, frozenset):
        tag, body = "set", b"".join(sorted(map(_canonical, x)))
    elif isinstance(x, dict):
        tag, body = "dict", b"".join(sorted(_canonical(k) + _canonical(v) for k, v in x.items()))
    elif isinstance(x, np.dtype):
        tag, body = "dtype", _canonical(repr(x))
    elif isinstance(x, (np.ndarray, np.generic)) and not x.dtype.hasobject:
        tag, body = "array", _canonical((x.dtype, x.shape)) + x.tobytes()
    else:
        raise TypeError(
            f"torchshm.key: no name can be made of a {kind.__name__}; give the values that identify it"
        )
    return f"{tag}:{len(body)}:".encode() + body
