"""share() in the modes of numpy.memmap: "c" everyone's own writes over one copy, "r" read-only, "r+" shared writes."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from peer import Peer, give, keep, kept
from same import assert_same

import torchshm
from torchshm import _C

pytestmark = pytest.mark.usefixtures("registered")

SIZE = 30_000
MODES = ["c", "r", "r+"]


def numbers(size=SIZE):
    return np.arange(float(size))


def overwrite(name, value):
    kept[name][...] = value


def ends(name):
    return kept[name][[0, -1]].tolist()


def blocks():
    gc.collect()
    return torchshm.stats()["blocks"]


def blocks_with(x):
    return torchshm.stats()["blocks"], x[[0, -1]].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_share_moves_arrays_at_any_depth_to_the_pool_and_keeps_the_rest(mode):
    x = {"a": [numbers(), (numbers(3), "text")], "b": None, 7: {1, 2}}
    y = torchshm.share(x, mode)
    assert_same(y["a"][0], x["a"][0]) if mode != "r" else np.testing.assert_array_equal(y["a"][0], x["a"][0])
    assert torchshm.is_shared(y["a"][0])
    assert torchshm.is_shared(y["a"][1][0])
    assert not torchshm.is_shared(x["a"][0])
    assert (y["a"][1][1], y["b"], y[7]) == ("text", None, {1, 2})
    x["a"][0][0] = 5
    assert y["a"][0][0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_shared_object_is_sent_without_a_copy(peer, mode):
    x = torchshm.share(numbers(), mode)
    before = blocks()
    assert peer.call(blocks_with, x) == (before, [0.0, SIZE - 1])
    assert peer.call(blocks_with, x[::-7]) == (before, [SIZE - 1, (SIZE - 1) % 7])


def test_copy_on_write_gives_everyone_their_own_writes(peer, other):
    x = torchshm.share(numbers())
    for who in [peer, other]:
        who.call(keep, "x", x)
    x[0] = -1
    peer.call(overwrite, "x", 8)
    assert (x[0], x[-1]) == (-1, SIZE - 1)
    assert peer.call(ends, "x") == [8, 8]
    assert other.call(ends, "x") == [0, SIZE - 1]


def test_copy_on_write_is_what_arrives_when_it_was_copy_on_write(peer, other):
    """A peer that passes it on writes for itself alone."""
    x = torchshm.share(numbers())
    peer.call(keep, "x", x)
    y = peer.call(kept_under, "x")
    peer.call(overwrite, "x", 8)
    assert y[[0, -1]].tolist() == x[[0, -1]].tolist() == [0, SIZE - 1]
    y[...] = 3
    assert peer.call(ends, "x") == [8, 8]


def kept_under(name):
    return kept[name]


def test_copy_on_write_view_that_was_written_is_copied_when_sent(peer):
    x = torchshm.share(numbers())
    x[7] = -7
    before = blocks()
    count, _ = peer.call(blocks_with, x)
    assert count == before + 1
    assert_same(peer.call(give, x), x)
    x[7] = 70
    peer.call(keep, "x", x)
    x[7] = 71
    assert peer.call(give, x)[7] == 71
    assert peer.call(kept_under, "x")[7] == 70


def test_only_the_written_part_of_a_copy_on_write_array_counts_as_written(peer):
    x = torchshm.share(np.zeros((64, 4096), "u1"))
    x[40, 5] = 1
    before = blocks()
    assert peer.call(blocks_with, x[:32])[0] == before
    assert peer.call(blocks_with, x[48:])[0] == before
    count, _ = peer.call(blocks_with, x[38:42])
    assert count == before + 1
    assert peer.call(give, x[38:42])[2, 5] == 1


@pytest.mark.parametrize("size", [700, 1024, SIZE, 1 << 20])
def test_old_private_writes_do_not_shadow_the_next_content_of_a_block(peer, size):
    places = set()
    for turn in range(12):
        x = torchshm.share(np.full(size, float(turn)))
        places.add(x.ctypes.data)
        assert (x == turn).all()
        peer.call(keep, "x", x)
        assert peer.call(ends, "x") == [turn, turn]
        x[...] = -1
        peer.call(overwrite, "x", -2)
        assert peer.call(ends, "x") == [-2, -2]
        del x
        peer.forget()
    assert len(places) < 12, "no block was used again, so nothing was tested"


def test_old_private_writes_do_not_shadow_ordinary_messages(peer):
    for turn in range(10):
        x = torchshm.share(np.full(SIZE, float(turn)))
        x[...] = -1
        del x
        y = peer.call(give, np.full(SIZE, 100.0 + turn))
        assert (y == 100 + turn).all()
        again = torchshm.share(y)
        assert (again == 100 + turn).all()
        del y, again


def test_view_keeps_private_writes_until_the_last_one_is_dropped():
    x = torchshm.share(numbers())
    part = x[100:200]
    x[150] = -1
    second = torchshm.loads(torchshm.dumps(x[:50]))  # one more view of the block
    del x, second
    gc.collect()
    assert part[50] == -1
    assert part[51] == 151


@pytest.mark.parametrize("way", ["itself", "view", "received", "received view"])
def test_read_only_refuses_writes_everywhere(peer, way):
    x = torchshm.share(numbers(), "r")
    if way.startswith("received"):
        x = peer.call(give, x)
    if way.endswith("view"):
        x = x[5:].view("u1")
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        x.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        np.add(x, 1, out=x)
    assert memoryview(x).readonly


def test_shared_writes_are_seen_by_all(peer, other):
    x = torchshm.share(np.zeros(SIZE), "r+")
    peer.call(keep, "x", x)
    other.call(keep, "x", x)
    x[0] = 1
    assert peer.call(ends, "x") == [1, 0]
    peer.call(overwrite, "x", 2)
    assert other.call(ends, "x") == x[[0, -1]].tolist() == [2, 2]


@pytest.mark.parametrize("mode", ["c", "r"])
def test_nobody_writes_under_those_who_do_not_expect_it(mode):
    """What was shared for reading is copied when it is shared for writing."""
    x = torchshm.share(numbers(), mode)
    y = torchshm.share(x, "r+")
    y[...] = -1
    assert x[5] == 5
    assert torchshm.is_shared(y)


def test_share_of_a_written_copy_on_write_array_shares_what_is_seen():
    for mode in MODES:
        x = torchshm.share(numbers(), "c")
        x[5] = -5
        y = torchshm.share(x, mode)
        assert y[5] == -5
        assert y[6] == 6


def test_share_again_in_the_same_mode_costs_no_block():
    for mode in MODES:
        x = torchshm.share(numbers(), mode)
        before = blocks()
        y = torchshm.share(x, mode)
        assert blocks() == before
        assert_same(y, x)
        del x, y


@pytest.mark.parametrize("mode", ["w", "w+", "", None, "C"])
def test_unknown_mode_is_refused_by_name(mode):
    with pytest.raises(ValueError, match="'c', 'r' or 'r\\+'"):
        torchshm.share(numbers(), mode)


def test_share_that_fails_leaves_no_trace(peer):
    before = blocks()
    with pytest.raises(Exception, match=r"pickle|lambda"):
        torchshm.share([numbers(), lambda: None])
    x = peer.call(give, numbers(10))
    assert not torchshm.is_shared(x), "share's scope is still open: small arrays go to the pool"
    _C.set_ticket_age(0)
    try:
        assert blocks() <= before + 1, "one ticket of the pickle that failed may be out"
    finally:
        _C.set_ticket_age(300)


@pytest.mark.parametrize("mode", MODES)
def test_forked_child_has_what_its_parent_saw(mode):
    x = torchshm.share(numbers(), mode)
    if mode == "c":
        x[0] = -1
    first = x[0]
    keep("inherited", x)
    with Peer("fork") as child:
        kept.clear()
        if mode != "r":
            x[1] = -2
        assert child.call(ends, "inherited") == [first, SIZE - 1]
        assert child.call(kept_under, "inherited")[1] == (-2 if mode == "r+" else 1)
        if mode != "r":
            child.call(overwrite, "inherited", 9)
            assert x[-1] == (9 if mode == "r+" else SIZE - 1)
        del x
        gc.collect()
        fresh = [torchshm.share(np.zeros(SIZE)) for _ in range(4)]
        assert child.call(ends, "inherited")[1] == (SIZE - 1 if mode == "r" else 9)
        del fresh


def test_modes_are_kept_in_one_message(peer):
    x = {mode: torchshm.share(numbers(), mode) for mode in MODES}
    peer.call(keep, "all", x)
    peer.call(_try_to_write, "all")
    assert [x[mode][0] for mode in MODES] == [0, 0, 5]


def _try_to_write(name):
    kept[name]["c"][...] = 5
    kept[name]["r+"][...] = 5
    with pytest.raises(ValueError, match="read-only"):
        kept[name]["r"][...] = 5
