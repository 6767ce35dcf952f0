"""Whether two arrays are the same in all that a program can tell, by what numpy's own pickle delivers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

FLAGS = ["C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEABLE", "ALIGNED"]


def by_numpy(x: Any) -> Any:
    """What plain pickling delivers, but for the byte order, which numpy makes the machine's below protocol 5 and torchshm keeps."""
    got = pickle.loads(pickle.dumps(x))
    return got if got.dtype == x.dtype or x.nbytes == 0 else got.astype(x.dtype)


def _leaves(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.dtype.names is None:
        yield array
        return
    for name in array.dtype.names:
        yield from _leaves(array[name])


def _describe(dtype: np.dtype) -> Any:
    """All of a dtype, also what == leaves out."""
    fields = dtype.fields and {name: (_describe(f[0]), *f[1:]) for name, f in dtype.fields.items()}
    inner = dtype.subdtype and (_describe(dtype.subdtype[0]), dtype.subdtype[1])
    metadata = dtype.metadata and dict(dtype.metadata)
    # Pickled by numpy, longlong becomes int64: the same in all but its name.
    kind = dtype.type if dtype.kind == "V" else dtype.kind
    return dtype.str, dtype.itemsize, dtype.alignment, dtype.isalignedstruct, kind, fields, inner, metadata


def _values(leaf: np.ndarray) -> bytes:
    if leaf.dtype.type in (np.longdouble, np.clongdouble):  # padding bytes are nobody's
        parts = leaf.view(leaf.real.dtype) if leaf.flags.c_contiguous and leaf.ndim else leaf
        return repr(parts.tolist()).encode()
    return leaf.tobytes()


def values(array: np.ndarray) -> list[bytes]:
    """The bytes of all elements in C order, without the padding of structs."""
    return [_values(leaf) for leaf in _leaves(np.asarray(array))]


def assert_same_values(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert _describe(got.dtype) == _describe(wanted.dtype)
    assert values(got) == values(wanted)


def native(x: np.ndarray) -> np.ndarray:
    """In the byte order of the machine, as numpy pickles below protocol 5."""
    return x if x.dtype.names or x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def assert_same(got: Any, wanted: Any, byte_order: bool = True) -> None:
    """Type, dtype, shape, strides, flags and values."""
    if not byte_order:
        got, wanted = native(got), native(wanted)
    assert type(got) is type(wanted)
    assert_same_values(got, wanted)
    assert {f: got.flags[f] for f in FLAGS} == {f: wanted.flags[f] for f in FLAGS}
    assert got.strides == wanted.strides
