"""A handle is checked: damaged, forged, old or truncated ones give a clear error, never a crash, a hang or other data."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from forgery import ORDER_C, ORDER_FORTRAN, ORDER_STRIDED, secret, signed, with_extent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.array_utils import byte_bounds
from peer import Peer, PeerError, kept

import torchshm
from torchshm import _C

pytestmark = pytest.mark.usefixtures("registered")

MANY = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
STRUCT = np.dtype([("a", "i4"), ("b", "f8", (2,))])
SECRET = -1.2345678901234567e-89  # in no other test, whose leftovers may fill a block up
KINDS = ["small", "large", "strided", "Fortran", "copy-on-write", "read-only", "struct", "matrix", "carried"]


def make_originals():
    """Runs in the peer: arrays that stay alive, neighbours between them, and what pickle would be given for each."""
    torchshm.register(min_bytes=0)
    torchshm.empty(1)
    large = torchshm.empty((300, 50))
    large[...] = 1
    originals = {
        "small": torchshm.share(np.ones(50, "i2"), "r+"),
        "large": large,
        "strided": large[::-3, 5:40:2],
        "Fortran": torchshm.share(np.ones((40, 30)), "r+").T,
        "copy-on-write": torchshm.share(np.ones(5000)),
        "read-only": torchshm.share(np.ones(5000), "r"),
        "struct": torchshm.share(np.ones(100, STRUCT), "r+"),
        "matrix": torchshm.share(np.ones((30, 40)), "r+").view(np.matrix),
    }
    kept["originals"] = originals
    kept["secrets"] = [torchshm.share(np.full(size, SECRET)) for size in [10, 100, 5000, 100_000] * 3]
    torchshm.register(1 << 40)
    kept["arguments"] = {"carried": _C.reduce_ndarray(np.ones(60))[1]}
    torchshm.register(0)
    for name in KINDS[:-1]:
        kept["arguments"][name] = _C.reduce_ndarray(originals[name])[1]
    return {name: arguments[0] for name, arguments in kept["arguments"].items()}


def inside_some_block(array):
    """Whether the array touches nothing but bytes of one of the originals, or has memory of its own."""
    if array.size == 0 or not torchshm.is_shared(array):
        return True
    low, high = byte_bounds(array)
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    length = int(repr(base).split(", ")[1].split()[0])  # <torchshm block 512, 4096 bytes>
    return high - low <= length


def rebuild(name, wire, more=(), anything=False):
    """Runs in the peer: what comes of unpickling this wire, in a word. A member's forgery may name anything, within a block."""
    arguments = kept["arguments"][name]
    try:
        array = _C.array(wire, *(more or arguments[1:]))
    except (torchshm.TorchshmError, TypeError, ValueError) as error:
        return type(error).__name__
    except MemoryError:
        return "MemoryError"
    assert isinstance(array, np.ndarray)
    assert inside_some_block(array), (array.shape, array.strides)
    bytes_seen = array.tobytes() if array.size < 10**6 else np.asarray(array.flat[:1000]).tobytes()
    assert anything or struct.pack("d", SECRET) not in bytes_seen, "another block's content"
    return "array"


def intact():
    originals = kept["originals"]
    figures = torchshm.stats()
    for name, x in originals.items():
        if name != "strided":
            assert all(
                (part == 1).all() for part in ([x[n] for n in STRUCT.names] if name == "struct" else [x])
            ), name
    assert all((x == SECRET).all() for x in kept["secrets"])
    return figures["blocks"]


@pytest.fixture(scope="module")
def forger():
    torchshm.register()
    with Peer("spawn") as peer:
        wires = peer.call(make_originals)
        yield peer, wires
        torchshm.unregister()


INTERESTING = st.sampled_from(
    [0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63)]
)


@st.composite
def damage(draw):
    """A change of bytes: a few bits, a field of some size overwritten, bytes cut off, added, doubled."""
    kind = draw(st.sampled_from(["bits", "number", "cut", "longer", "double", "random"]))
    if kind == "bits":
        return kind, draw(st.lists(st.integers(0, 8 * 120), min_size=1, max_size=3))
    if kind == "number":
        return (
            kind,
            draw(st.integers(0, 15)),
            draw(st.sampled_from("qiH")),
            draw(INTERESTING | st.integers(-(2**63), 2**63 - 1)),
        )
    if kind == "cut":
        return kind, draw(st.integers(0, 120))
    return kind, draw(st.binary(min_size=1, max_size=150))


def damaged(wire, how):
    data = bytearray(wire)
    if how[0] == "bits":
        for bit in how[1]:
            data[bit // 8 % len(data)] ^= 1 << bit % 8
    elif how[0] == "number":
        _, place, code, number = how
        size = struct.calcsize(code)
        at = 8 * place % max(len(data) - size + 1, 1)
        data[at : at + size] = (number & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    elif how[0] == "cut":
        del data[how[1] % len(data) :]
    elif how[0] == "longer":
        data += how[1]
    elif how[0] == "double":
        data = data[: len(data) // 2] * 2 + how[1]
    else:
        data = bytearray(how[1])
    return bytes(data)


@given(name=st.sampled_from(KINDS), how=damage())
@MANY
def test_damaged_handle_is_an_error_or_the_same_block(forger, name, how):
    peer, wires = forger
    peer.call(rebuild, name, damaged(wires[name], how))


@given(name=st.sampled_from(KINDS[:-1]), how=damage())
@MANY
def test_forged_handle_with_a_valid_sum_is_an_error_or_some_block(forger, name, how):
    """Whoever can make these is a member, and may see any block; but no survivor follows a wild pointer."""
    peer, wires = forger
    peer.call(rebuild, name, signed(damaged(wires[name], how), secret()), (), True)


@given(data=st.data(), name=st.sampled_from(KINDS[:-1]))
@MANY
def test_forged_extent_with_a_valid_sum_stays_within_the_block(forger, data, name):
    peer, wires = forger
    ndim = data.draw(st.integers(0, 5))
    number = INTERESTING | st.integers(-(2**63), 2**63 - 1) | st.integers(-9000, 9000) | st.integers(0, 40)
    numbers = data.draw(st.lists(number, min_size=2 * ndim, max_size=2 * ndim))
    order = data.draw(st.sampled_from([ORDER_C, ORDER_FORTRAN, ORDER_STRIDED]))
    forged = with_extent(wires[name], order, numbers[:ndim], numbers[ndim:], data.draw(st.none() | number))
    peer.call(rebuild, name, signed(forged, secret()))


def test_forgeries_above_are_believed_when_they_are_true(forger):
    """Else the tests above would test the sum only."""
    peer, wires = forger
    for offset in [0, 8, 800]:
        forged = signed(with_extent(wires["large"], ORDER_STRIDED, [30, 7], [400, -8], offset + 48), secret())
        assert peer.call(rebuild, "large", forged) == "array"
        assert peer.call(
            rebuild, "large", with_extent(wires["large"], ORDER_STRIDED, [30, 7], [400, -8], offset + 48)
        ) == ("StaleHandleError")
    assert signed(wires["large"], secret()) == wires["large"]
    beyond = with_extent(wires["large"], ORDER_C, [300, 50_000], [], None)
    assert peer.call(rebuild, "large", signed(beyond, secret())) == "StaleHandleError"


@pytest.mark.parametrize("name", KINDS)
def test_every_truncation_is_an_error(forger, name):
    peer, wires = forger
    for length in range(len(wires[name])):
        assert peer.call(rebuild, name, wires[name][:length]) == "StaleHandleError"
    assert peer.call(rebuild, name, wires[name]) == "array"


@pytest.mark.parametrize("name", KINDS)
def test_every_single_bit_of_a_handle_matters(forger, name):
    peer, wires = forger
    wire = wires[name]
    said = []
    for bit in range(8 * min(len(wire), 96)):
        data = bytearray(wire)
        data[bit // 8] ^= 1 << bit % 8
        said.append(peer.call(rebuild, name, bytes(data)))
    if name != "carried":  # that one is a value, with no block behind it
        assert set(said[:64]) == {"StoreUnavailableError"}  # the pool
        assert set(said[64:]) == {"StaleHandleError"}


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ((np.dtype(object),), "StaleHandleError"),
        ((np.dtype("f4"),), "StaleHandleError"),
        ((np.dtype([("o", object)]),), "StaleHandleError"),
        ((np.dtypes.StringDType(),), "StaleHandleError"),
        (("f8",), "TypeError"),
        ((7,), "TypeError"),
        ((np.dtype("f8"), int), "TypeError"),
        ((np.dtype("f8"), 5), "TypeError"),
        ((np.dtype("f8"), np.ndarray, 1), "TypeError"),
        ((None,), "array"),
        ((np.dtype(">f8"),), "array"),
        ((np.dtype("M8[s]"), np.ndarray), "array"),
        ((np.dtype("f8"), np.recarray), "array"),
        ((np.dtype("f8"), np.memmap), "array"),
        ((np.dtype("f8"), np.ma.MaskedArray), "array"),
    ],
)
@pytest.mark.parametrize("name", ["large", "carried"])
def test_wrong_arguments_beside_the_handle_are_an_error(forger, name, more, error):
    peer, wires = forger
    assert peer.call(rebuild, name, wires[name], more) == error


@pytest.mark.parametrize("wire", [None, "text", 5, bytearray(64), b""])
def test_what_is_no_bytes_is_an_error(wire):
    with pytest.raises((TypeError, torchshm.StaleHandleError)):
        _C.array(wire)
    with pytest.raises(TypeError):
        _C.array()
    with pytest.raises(TypeError):
        _C.array(wire=b"")


def test_text_whose_items_are_no_whole_characters_is_an_error(forger):
    peer, wires = forger
    wire = bytearray(wires["large"])
    wire[36:40] = np.dtype("U").num.to_bytes(4, "little")
    for size, said in [(8, "array"), (6, "StaleHandleError"), (1, "StaleHandleError")]:
        wire[40:48] = size.to_bytes(8, "little")
        assert peer.call(rebuild, "large", signed(bytes(wire), secret()), (), True) == said


def test_a_released_handle_stays_stale_through_all_lives_of_its_block(forger):
    """The peer makes one, releases it, and uses the same memory again and again."""
    peer, _ = forger
    assert peer.call(_use_again) == {"StaleHandleError"}


def _use_again():
    (wire,) = _C.reduce_ndarray(torchshm.share(np.zeros(5000), "r+"))[1]
    _C.array(wire)
    said, places = set(), set()
    for _ in range(200):
        fresh = torchshm.share(np.full(5000, 77.0), "r+")
        places.add(fresh.ctypes.data)
        try:
            said.add(str(_C.array(wire)))
        except torchshm.TorchshmError as error:
            said.add(type(error).__name__)
        del fresh
    assert len(places) < 50
    return said


def test_forgers_have_harmed_nobody(forger):
    peer, _ = forger
    blocks = peer.call(intact)
    assert blocks == torchshm.stats()["blocks"]


def test_a_crash_of_the_peer_would_be_seen(registered):
    with Peer("spawn") as peer, pytest.raises((EOFError, ConnectionError)):
        peer.call(_crash)
    with Peer("spawn") as peer, pytest.raises(PeerError):
        peer.call(_fail)


def _crash():
    import ctypes

    ctypes.string_at(1)


def _fail():
    raise AssertionError
