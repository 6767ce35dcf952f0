"""Every dtype without Python objects crosses through the pool as numpy's pickle would deliver it; the others as they always did."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from peer import give
from same import assert_same, by_numpy

import torchshm

POINT = np.dtype([("x", "<f4"), ("y", ">f8")])

DTYPES = {
    **{
        code: code
        for code in ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
    },
    "longlong": "q",
    "ulonglong": "Q",
    "longdouble": "g",
    "clongdouble": "G",
    **{
        f"big endian {code}": f">{code}"
        for code in ["i2", "u4", "i8", "f2", "f4", "f8", "c16", "U5", "M8[ns]"]
    },
    "bytes": "S7",
    "bytes of one": "S1",
    "text": "U5",
    "void": "V9",
    "date": "M8[D]",
    "time of 25 seconds": "M8[25s]",
    "time": "M8[ns]",
    "time without unit": "M8",
    "duration": "m8[ms]",
    "duration of 3 days": "m8[3D]",
    "structured": [("a", "i1"), ("b", "<f8"), ("c", "S3")],
    "structured, both byte orders": [("a", "<i4"), ("b", ">i4"), ("c", ">U2")],
    "nested": [("p", POINT), ("q", [("inner", POINT), ("n", "u2")]), ("t", "M8[us]")],
    "aligned": np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True),
    "padding": {"names": ["a", "b"], "formats": ["i2", "f8"], "offsets": [3, 16], "itemsize": 40},
    "overlapping fields": {
        "names": ["whole", "low"],
        "formats": ["<u4", "<u2"],
        "offsets": [0, 0],
        "itemsize": 4,
    },
    "titles": [(("the first", "a"), "i4"), (("the second", "b"), "f4")],
    "sub-array": [("a", "f4", (2, 3)), ("b", "i1")],
    "sub-array of structs": [("a", POINT, (2,)), ("b", "S2", (2, 1, 2))],
    "metadata": np.dtype("i4", metadata={"unit": "m"}),
    "metadata in a struct": np.dtype([("a", np.dtype("f8", metadata={"unit": "s"}))]),
    "record": np.dtype((np.record, [("a", "i4"), ("b", "f4")])),
    "void of one": "V1",
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in [
            "bfloat16",
            "float8_e4m3fn",
            "float8_e5m2",
            "float8_e8m0fnu",
            "float4_e2m1fn",
            "int4",
            "uint4",
        ]
    },
    "bfloat16 in a struct": np.dtype([("w", ml_dtypes.bfloat16, (2,)), ("i", "i1")]),
}


def fill(array: np.ndarray, seed: int = 1) -> None:
    """Values that this dtype can hold, all of them different from zeros somewhere."""
    rng = np.random.default_rng(seed)
    if array.dtype.names is not None:
        for position, name in enumerate(array.dtype.names):
            fill(array[name], seed + position)
    elif array.dtype.kind == "b":
        array[...] = rng.integers(0, 2, array.shape)
    elif array.dtype.kind in "iumM":
        array[...] = rng.integers(0, 100, array.shape).astype(array.dtype)
    elif array.dtype.kind == "c":
        array[...] = rng.standard_normal(array.shape) + 1j * rng.standard_normal(array.shape)
    elif array.dtype.kind in "SU":
        array[...] = rng.integers(0, 10**5, array.shape).astype("U5")
    elif array.dtype.type is np.void:
        array[...] = np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)
    else:
        array[...] = rng.standard_normal(array.shape).astype("f4").astype(array.dtype)
    if array.dtype.kind in "fc" and array.dtype.type.__module__ == "numpy":
        array.reshape(-1)[:3] = [np.nan, -np.inf, -0.0]


def made(dtype, shape=(7, 30)) -> np.ndarray:
    array = np.zeros(shape, dtype)
    fill(array)
    assert array.tobytes() != bytes(array.nbytes)
    return array


def seen_in_child(x):
    return torchshm.is_shared(x), type(x), x.dtype.str, x.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_crosses_and_comes_back_as_numpy_pickles_it(peer, way, name):
    x = made(DTYPES[name])
    assert not torchshm.is_shared(x)
    shared, kind, code, data = peer.call(seen_in_child, x)
    assert shared == (way == "pooled")
    assert (kind, code, data) == (np.ndarray, x.dtype.str, x.tobytes())
    pooled = torchshm.share(x, mode="r+")
    back = peer.call(give, pooled)
    assert torchshm.is_shared(back)
    assert_same(back, by_numpy(x))


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_that_is_not_contiguous_crosses_as_numpy_pickles_it(way, name):
    x = made(DTYPES[name], (6, 8, 5))[::2, ::-1, 1:4]
    back = torchshm.loads(torchshm.dumps(x))
    assert torchshm.is_shared(back) == (way == "pooled")
    assert_same(back, by_numpy(x), byte_order=way == "pooled")


@pytest.mark.parametrize("name", DTYPES)
def test_empty_makes_every_dtype_in_the_pool(registered, name):
    x = torchshm.empty((3, 4), DTYPES[name])
    assert torchshm.is_shared(x)
    assert x.dtype == np.dtype(DTYPES[name])
    fill(x)
    assert_same(torchshm.loads(torchshm.dumps(x)), by_numpy(x))


def test_numpy_pickle_is_a_fair_judge():
    """assert_same tells apart what it must."""
    x = np.arange(6, dtype="<i4").reshape(2, 3)
    for other in [x.astype(">i4"), x.astype("u4"), x.copy("F"), x + 1, x.view(np.matrix), x.reshape(3, 2)]:
        with pytest.raises(AssertionError):
            assert_same(other, x)
    unwriteable = x.copy()
    unwriteable.flags.writeable = False
    with pytest.raises(AssertionError):
        assert_same(unwriteable, x)
    with pytest.raises(AssertionError):
        assert_same(x.view(np.dtype("i4", metadata={"a": 1})), x)
