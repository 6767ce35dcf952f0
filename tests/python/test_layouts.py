"""A plain array of any layout arrives as numpy's own pickle delivers it, aligned to a cache line."""

from __future__ import annotations

import multiprocessing

import numpy as np
import psutil
import pytest
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from peer import Peer, give
from same import assert_same, by_numpy

import torchshm

GIB = 1 << 30


def numbers(*shape, dtype="f8"):
    return np.arange(np.prod(shape)).astype(dtype).reshape(shape)


def unaligned():
    return np.frombuffer(bytearray(8 * 600 + 3), "u1")[3:].view("f8")


def read_only():
    x = numbers(40, 50)
    x.flags.writeable = False
    return x


LAYOUTS = {
    "C": lambda: numbers(30, 40),
    "Fortran": lambda: np.asfortranarray(numbers(30, 40)),
    "Fortran, 3-d": lambda: numbers(6, 7, 8).T,
    "axes permuted": lambda: numbers(6, 7, 8).transpose(1, 0, 2),
    "rows of a larger one": lambda: numbers(30, 40)[5:20],
    "columns of a larger one": lambda: numbers(30, 40)[:, 5:20],
    "every third": lambda: numbers(3000)[::3],
    "backwards": lambda: numbers(3000)[::-1],
    "backwards in two axes": lambda: numbers(30, 40)[::-1, ::-2],
    "broadcast": lambda: np.broadcast_to(numbers(40), (30, 40)),
    "broadcast from one": lambda: np.broadcast_to(np.float32(7), (50, 60)),
    "overlapping windows": lambda: sliding_window_view(numbers(300), 20),
    "stride of zero, writeable": lambda: as_strided(numbers(100), (30, 100), (0, 8)),
    "0-d": lambda: np.array(3.25),
    "0-d of a larger one": lambda: numbers(3000)[7:8].reshape(()),
    "one element": lambda: numbers(1, 1, 1),
    "axes of one": lambda: numbers(30, 1, 40)[:, ::-1],
    "64 axes": lambda: numbers(256).reshape((2,) * 8 + (1,) * 56),
    "empty": lambda: np.empty(0),
    "empty, 3-d": lambda: np.empty((3, 0, 4), "i2"),
    "read-only": read_only,
    "not aligned": unaligned,
    "field of a struct": lambda: np.ones(500, [("a", "i1"), ("b", "f8")])["b"],
    "real part": lambda: numbers(20, 30, dtype="c16").real,
    "reinterpreted": lambda: numbers(20, 30).view("u2"),
    "of a page": lambda: numbers(512),
    "of odd size": lambda: numbers(4097, dtype="u1"),
    "of several megabytes": lambda: numbers(3, 1 << 19),
    "of several megabytes, strided": lambda: numbers(1 << 19, 6)[:, ::2],
    "of several megabytes, Fortran": lambda: numbers(3, 1 << 19).T,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_arrives_as_numpy_pickles_it(peer, way, name):
    x = LAYOUTS[name]()
    before = x.copy()
    data = torchshm.dumps(x)
    got = torchshm.loads(data)
    assert_same(got, by_numpy(x))
    assert torchshm.is_shared(got) == (x.size > 0 and way == "pooled")
    if way == "pooled" and x.size:
        assert got.ctypes.data % 64 == 0
    assert got.flags.writeable
    got[...] = 0
    assert np.array_equal(x, before)
    assert_same(peer.call(give, x), by_numpy(x))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_layouts_cross_whatever_the_start_method(all_pooled, method):
    with Peer(method) as peer:
        for make in LAYOUTS.values():
            assert_same(peer.call(give, make()), by_numpy(make()))


def test_all_layouts_cross_in_one_message(peer, way):
    made = {name: make() for name, make in LAYOUTS.items()}
    got = peer.call(give, made)
    assert list(got) == list(made)
    for name, x in made.items():
        assert_same(got[name], by_numpy(x))


def test_one_array_twice_in_a_message_arrives_as_one(peer, way):
    x = numbers(300)
    a, b = peer.call(give, [x, x])
    assert a is b


def marks(x):
    places = [0, GIB, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1, x.size - 1]
    return [int(x[place]) for place in places]


def mark_end(x):
    assert torchshm.is_shared(x)
    x[-1] = 99
    x[4 * GIB] = 98
    return marks(x), x.nbytes


@pytest.mark.skipif(psutil.virtual_memory().available < 12 * GIB, reason="needs 12 GiB of free memory")
@pytest.mark.timeout(300)
def test_more_than_four_gibibytes_cross(peer):
    x = torchshm.empty(9 * GIB // 2, "u1")
    for value, place in enumerate([0, GIB, 4 * GIB - 1, 4 * GIB, 4 * GIB + 1, x.size - 1], start=1):
        x[place] = value
    assert peer.call(mark_end, x) == ([1, 2, 3, 98, 5, 99], x.nbytes)
    assert marks(x) == [1, 2, 3, 98, 5, 99]
    tail = x[::-1][: GIB // 4]
    assert int(peer.call(give, tail)[0]) == 99
    size = x.size
    del x, tail
    peer.forget()
    plain = np.zeros(size, "u1")  # pages that are not touched cost nothing
    plain[[GIB, 4 * GIB, -1]] = [11, 12, 13]
    seen, nbytes = peer.call(mark_end, plain)
    assert (seen, nbytes) == ([0, 11, 0, 98, 0, 99], size)
    assert marks(plain) == [0, 11, 0, 12, 0, 13]
    peer.forget()
    torchshm.trim()
    assert multiprocessing.active_children()
