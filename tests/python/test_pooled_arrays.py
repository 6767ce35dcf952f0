"""An array that lies in the pool already is handed over without a copy, however deep the view, and stays one memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from peer import give, keep, kept, kept_value

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

ROWS, COLUMNS = 64, 96


def base():
    x = torchshm.empty((ROWS, COLUMNS), "f8")
    x[...] = np.arange(x.size).reshape(x.shape)
    return x


VIEWS = {
    "itself": lambda x: x,
    "plain view": lambda x: x[...],
    "row": lambda x: x[3],
    "column": lambda x: x[:, 5],
    "one element": lambda x: x[7:8, 9:10],
    "0-d": lambda x: x[7:8, 9].reshape(()),
    "block": lambda x: x[10:20, 30:50],
    "every third": lambda x: x[::3, ::2],
    "backwards": lambda x: x[::-1, ::-3],
    "transposed": lambda x: x.T,
    "reshaped": lambda x: x.reshape(4, 16, 2, 48),
    "flat": lambda x: x.ravel(),
    "new axes": lambda x: x[None, :, None],
    "bytes": lambda x: x.view("u1"),
    "complex": lambda x: x.view("c16"),
    "real part": lambda x: x.view("c16").real,
    "imaginary part": lambda x: x.view("c16").imag,
    "other byte order": lambda x: x.view(">f8"),
    "dates": lambda x: x.view("M8[s]"),
    "structs": lambda x: x.view([("a", "f8"), ("b", "f4", (2,))])[:, 0],
    "field of structs": lambda x: x.view([("a", "f8"), ("b", "f4", (2,))])["b"],
    "strided by hand": lambda x: as_strided(x, (5, 5), (3200, 8)),
    "windows": lambda x: sliding_window_view(x, (4, 4), writeable=True)[::7],
    "broadcast": lambda x: np.broadcast_to(x[:, None], (ROWS, 3, COLUMNS)),
    "diagonal": lambda x: x.diagonal(),
    "view of a view of a view": lambda x: x[1:][:, 2:-2].view("u2")[::-1, 4:-4].T[4:].T[1:, 8:].view(">i4"),
    "over a memoryview": lambda x: np.asarray(memoryview(x)[4:9]),
    "from a buffer": lambda x: np.frombuffer(x, "f4", 100, 800),
    "by the array interface": lambda x: np.asarray(WithInterface(x)),
    "by DLPack": lambda x: np.from_dlpack(x),
    "through torch": lambda x: torch.from_numpy(x).numpy(),
    "through torch, deep": lambda x: torch.from_numpy(x)[3:].t()[1:5].numpy()[::-1],
    "from another owner": lambda x: np.ndarray((3, 4), "f8", buffer=memoryview(x).cast("B"), offset=8),
}


class WithInterface:
    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


def description(view):
    strides = [
        stride for stride, side in zip(view.strides, view.shape, strict=True) if side > 1
    ]  # of others they mean nothing
    return view.tobytes(), view.shape, strides, view.flags.writeable, view.dtype.str, torchshm.is_shared(view)


def look(view, change):
    """What a peer sees; then it writes into the first element."""
    seen = description(view)
    if change:
        view[(0,) * view.ndim] = np.zeros((), view.dtype)
    figures = torchshm.stats()
    return seen, figures["blocks"], figures["live_bytes"]


@pytest.mark.parametrize("name", VIEWS)
def test_view_of_pooled_memory_crosses_without_a_copy(peer, name):
    x = base()
    view = VIEWS[name](x)
    assert torchshm.is_shared(view)
    figures = torchshm.stats()
    wanted = description(view)
    first = view[(0,) * view.ndim].tobytes()
    seen, blocks, live = peer.call(look, view, view.flags.writeable)
    assert seen == wanted
    assert (blocks, live) == (figures["blocks"], figures["live_bytes"])
    assert (view[(0,) * view.ndim].tobytes() == bytes(len(first))) or not view.flags.writeable


@pytest.mark.parametrize("name", VIEWS)
def test_what_comes_back_is_the_same_memory(peer, name):
    view = VIEWS[name](base())
    back = peer.call(give, view)
    assert back.ctypes.data == view.ctypes.data
    assert np.shares_memory(back, view)
    del view
    assert back.tobytes()


def test_received_block_lives_as_long_as_any_view_of_it(peer):
    before = torchshm.stats()["blocks"]
    back = peer.call(give, np.arange(10_000.0))
    part = back[5000:5003]
    bits = part.view("u1")[::-1].T[::-1].view("f8")
    del back, part
    fresh = [torchshm.empty(10_000) for _ in range(5)]
    for x in fresh:
        x[:] = -1
    assert bits.tolist() == [5000.0, 5001.0, 5002.0]
    del bits, fresh, x
    peer.forget()
    assert torchshm.stats()["blocks"] == before


@dataclasses.dataclass
class Sample:
    image: Any
    parts: dict[str, Any]


def write_into_whole(sample):
    sample.image[...] = 5.0
    parts = sample.parts
    return [parts["row"].tolist(), parts["deeper"]["bits"][0], [part.sum() for part in parts["list"]]]


def test_arrays_over_one_memory_in_a_message_stay_over_one_memory(peer):
    x = base()
    blocks = torchshm.stats()["blocks"]
    parts = {"row": x[2, :3], "deeper": {"bits": x.view("u8")[9]}, "list": [x[:2], x.T[:, 1]]}
    row, bits, sums = peer.call(write_into_whole, Sample(x, parts))
    assert torchshm.stats()["blocks"] == blocks
    assert row == [5.0] * 3
    assert bits == np.float64(5.0).view("u8")
    assert sums == [5.0 * 2 * COLUMNS, 5.0 * COLUMNS]
    assert (x == 5).all()


def test_writes_to_an_empty_array_are_seen_by_all_who_have_it(peer, other):
    x = torchshm.empty(5000, "i4")
    x[:] = 0
    peer.call(keep, "x", x)
    other.call(keep, "x", x[::-1])
    x[0] = 1
    peer.call(_set, "x", 1, 2)
    other.call(_set, "x", 4997, 3)
    wanted = [1, 2, 3, 0]
    assert x[:4].tolist() == wanted
    assert peer.call(_first, "x") == wanted
    assert other.call(kept_value, "x")[::-1][:4].tolist() == wanted


def _set(name, place, value):
    kept[name][place] = value


def _first(name):
    return kept[name][:4].tolist()


def _pass_on(x):
    return torchshm.stats()["blocks"], x


def test_pooled_array_is_passed_on_from_process_to_process_without_a_copy(peer, other):
    x = base()
    blocks = torchshm.stats()["blocks"]
    y = x
    for who in [peer, other, peer, other]:
        seen, y = who.call(_pass_on, y)
        assert seen == blocks
        assert y.ctypes.data == x.ctypes.data


def test_pooled_arrays_below_the_threshold_still_go_by_reference(peer):
    x = torchshm.empty(3, "u1")
    x[:] = 7
    peer.call(keep, "x", x)
    x[1] = 8
    assert peer.call(_first, "x") == [7, 8, 7]


def test_is_shared_tells_pooled_memory_from_any_other():
    x = base()
    for shared in [
        x,
        x[3:],
        x.T,
        memoryview(x),
        torch.from_numpy(x),
        torch.from_numpy(x)[2:],
        x.view(np.recarray),
    ]:
        assert torchshm.is_shared(shared) is True
    own = np.ones(5)
    objects = np.array([x], dtype=object)
    for private in [
        own,
        own.tolist(),
        objects,
        torch.ones(3),
        b"bytes",
        memoryview(own),
        None,
        7,
        torch.ones(3).to_sparse(),
    ]:
        assert torchshm.is_shared(private) is False


@pytest.mark.parametrize("dtype", [object, [("a", "i4"), ("o", object)], np.dtypes.StringDType(), "O"])
def test_empty_refuses_dtypes_with_objects(dtype):
    with pytest.raises(TypeError, match="object"):
        torchshm.empty(3, dtype)


@pytest.mark.parametrize("shape", [0, (0,), (3, 0), (), (2, 3, 4), 5, [2, 3]])
def test_empty_has_the_shape_of_numpy_empty(shape):
    x = torchshm.empty(shape, ">i2")
    wanted = np.empty(shape, ">i2")
    assert (x.shape, x.dtype, x.flags.writeable) == (wanted.shape, wanted.dtype, True)
    assert x.strides == wanted.strides or x.size == 0
    assert x.flags.c_contiguous


@pytest.mark.parametrize(
    ("shape", "error"),
    [(-1, ValueError), ((3, -1), ValueError), ((2**40, 2**40), ValueError), ("a", TypeError)],
)
def test_empty_refuses_impossible_shapes(shape, error):
    with pytest.raises(error):
        torchshm.empty(shape, "f8")
