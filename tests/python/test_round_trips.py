"""Any dtype x shape x strides x order makes the way through a real child as numpy's own pickle would (hypothesis)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peer import give
from same import assert_same, by_numpy, values

import torchshm

MORE = settings(
    max_examples=500,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    hnp.datetime64_dtypes(endianness="?"),
    hnp.timedelta64_dtypes(endianness="?"),
    hnp.byte_string_dtypes(endianness="?", max_len=9),
    hnp.unicode_string_dtypes(endianness="?", max_len=5),
)
NAMES = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4, unique=True)


@st.composite
def structs(draw, inner):
    fields = []
    for name in draw(NAMES):
        shape = draw(st.sampled_from([(), (), (2,), (1, 3)]))
        fields.append((name, draw(inner), shape))
    return np.dtype(fields, align=draw(st.booleans()))


DTYPES = st.recursive(SCALARS, structs, max_leaves=5)


@st.composite
def arrays(draw, allocate=np.empty):
    """An array with its own memory, then up to four steps of views on it."""
    dtype = draw(DTYPES)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))
    base = allocate(shape, dtype)
    seed = draw(st.integers(0, 255))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    if count:
        # Small bytes are valid in every dtype here, true or false and numbers, but not as code points: those stay zero
        # (test_dtypes.py has text).
        content = (np.arange(count) * 7 + seed) % 2
        if "<U" in str(dtype) or ">U" in str(dtype):
            content[:] = 0
        flat = np.ndarray(
            (count,), "u1", buffer=base.reshape(-1).view("u1") if base.ndim else base.reshape(1).view("u1")
        )
        flat[:] = content
    view = base
    for _ in range(draw(st.integers(0, 4))):
        step = draw(st.sampled_from([_permuted, _sliced, _flipped, _broadcast, _widened]))(draw, view)
        view = step if type(step) is np.ndarray else view  # an index of integers alone gives a scalar
    return view


def _permuted(draw, x):
    return x.transpose(draw(st.permutations(range(x.ndim))))


def _sliced(draw, x):
    return (
        x[draw(hnp.basic_indices(x.shape, max_dims=6, allow_newaxis=True, allow_ellipsis=True))]
        if x.ndim
        else x
    )


def _flipped(draw, x):
    return x[tuple(slice(None, None, draw(st.sampled_from([1, -1, 2, -2]))) for _ in x.shape)]


def _broadcast(draw, x):
    return np.broadcast_to(x, (draw(st.integers(0, 3)), *x.shape)) if x.ndim < 6 else x


def _widened(draw, x):
    return x[..., np.newaxis] if x.ndim < 6 else x


@given(x=arrays())
@MORE
def test_any_array_arrives_as_numpy_pickles_it(peer, way, x):
    assert_same(peer.call(give, x), by_numpy(x), byte_order=False)
    got = torchshm.loads(torchshm.dumps(x))
    assert_same(got, by_numpy(x), byte_order=way == "pooled")
    assert torchshm.is_shared(got) == (way == "pooled" and x.nbytes > 0)


def describe(x):
    strides = [
        stride for stride, side in zip(x.strides, x.shape, strict=True) if side > 1
    ]  # of others they mean nothing
    return strides, x.flags.c_contiguous, x.flags.f_contiguous, x.flags.writeable, x.flags.aligned, values(x)


@st.composite
def pooled_arrays(draw):
    torchshm.register(min_bytes=0)
    return draw(arrays(allocate=torchshm.empty))


@given(x=pooled_arrays())
@MORE
def test_any_view_of_a_pooled_array_keeps_strides_and_flags_and_is_not_copied(peer, all_pooled, x):
    blocks = torchshm.stats()["blocks"]
    got = torchshm.loads(torchshm.dumps(x))
    assert got.shape == x.shape
    if x.nbytes:
        assert got.dtype == x.dtype
        assert describe(got) == describe(x)
        assert got.ctypes.data == x.ctypes.data
        assert torchshm.stats()["blocks"] == blocks
        assert peer.call(describe, x) == describe(x)
    else:
        assert_same(peer.call(give, x), by_numpy(x))


@given(data=st.data())
@MORE
@pytest.mark.parametrize("mode", ["c", "r", "r+"])
def test_share_in_every_mode_is_equal(peer, all_pooled, mode, data):
    x = data.draw(arrays())
    shared = torchshm.share(x, mode)
    wanted = by_numpy(x)
    if mode == "r" and x.nbytes:
        wanted.flags.writeable = False
    assert_same(shared, wanted)
    assert_same(peer.call(give, shared), wanted)
