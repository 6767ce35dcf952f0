"""Arrays inherited by fork stay valid in the child whatever the parent does, and the other way round."""

from __future__ import annotations

import ctypes
import gc
import os

import numpy as np
import pytest
from forked import SYS_FORK, ended, forked, numbers
from scripts import passes

import torchshm

pytestmark = pytest.mark.usefixtures("registered")


def test_inherited_arrays_stay_when_the_parent_drops_theirs():
    before = torchshm.stats()["blocks"]
    children = []
    for turn in range(20):
        x = torchshm.share(numbers(turn), "r+")
        go, gone = os.pipe()

        def child(x=x, turn=turn, go=go):
            os.read(go, 1)
            assert np.array_equal(x, numbers(turn))
            y = torchshm.loads(torchshm.dumps(x))
            assert np.array_equal(y, numbers(turn))

        children.append((forked(child), gone))
        os.close(go)
        del x, child
    fresh = [torchshm.share(np.zeros(40_000), "r+") for _ in range(30)]
    for pid, gone in children:
        os.write(gone, b"!")
        os.close(gone)
        assert ended(pid) == 0
    assert not any(x.any() for x in fresh)
    del fresh
    gc.collect()
    assert torchshm.stats()["blocks"] == before


def test_what_a_child_drops_stays_the_parents():
    x = torchshm.share(numbers(1), "r+")
    received = torchshm.loads(torchshm.dumps(numbers(2)))
    kept = [x, received]

    def child():
        nonlocal x, received
        del x, received
        kept.clear()
        gc.collect()
        fresh = [torchshm.share(np.zeros(40_000)) for _ in range(30)]
        assert not any(y.any() for y in fresh)

    for _ in range(5):
        assert ended(forked(child)) == 0
    assert np.array_equal(x, numbers(1))
    assert np.array_equal(received, numbers(2))


def test_messages_pickled_before_the_fork_are_received_after_it_once_on_either_side():
    ours, theirs = torchshm.dumps(numbers(1)), torchshm.dumps(numbers(2))

    def child():
        assert np.array_equal(torchshm.loads(theirs), numbers(2))

    assert ended(forked(child)) == 0
    assert np.array_equal(torchshm.loads(ours), numbers(1))
    with pytest.raises(torchshm.StaleHandleError):
        torchshm.loads(theirs)


def test_five_generations_hand_their_arrays_down():
    x = torchshm.share(numbers(0), "r+")

    def generation(depth, handed):
        assert np.array_equal(handed, numbers(depth))
        if depth < 5:
            own = torchshm.share(handed + 1, "r+")
            del handed
            assert ended(forked(lambda: generation(depth + 1, own))) == 0

    assert ended(forked(lambda: generation(0, x))) == 0


def test_orphan_keeps_its_arrays():
    held = [torchshm.share(numbers(1), "r+")]
    read, write = os.pipe()

    def parent():
        def orphan():
            while os.getppid() == middle:
                pass
            assert np.array_equal(held[0], numbers(1))
            os.write(write, b"alive")

        middle = os.getpid()
        forked(orphan)

    assert ended(forked(parent)) == 0
    held.clear()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"alive"


def test_children_that_end_leave_no_lease():
    before = torchshm.stats()
    x = torchshm.share(numbers(1))
    for _ in range(20):
        assert ended(forked(lambda: torchshm.share(numbers(2)))) == 0
    after = torchshm.stats()
    assert after["leases"] == before["leases"]
    assert after["blocks"] == before["blocks"] + 1
    assert np.array_equal(x, numbers(1))


def test_fork_that_runs_no_handlers_is_noticed():
    """clone() called by hand: what a library in C might do."""
    libc = ctypes.CDLL(None)
    x = torchshm.share(numbers(1), "r+")
    dropped = torchshm.share(numbers(2), "r+")
    go, gone = os.pipe()

    def child():
        y = torchshm.share(numbers(3))
        os.read(go, 1)
        assert np.array_equal(x, numbers(1))
        assert np.array_equal(torchshm.loads(torchshm.dumps(x)), numbers(1))
        fresh = [torchshm.share(np.zeros(40_000)) for _ in range(10)]
        assert not any(z.any() for z in fresh)
        assert np.array_equal(y, numbers(3))
        assert any(process["pid"] == os.getpid() for process in torchshm.stats()["processes"])

    pid = forked(child, fork=lambda: libc.syscall(SYS_FORK))
    del dropped
    fresh = [torchshm.share(np.full(40_000, 5.0)) for _ in range(10)]
    os.write(gone, b"!")
    assert ended(pid) == 0
    assert all((z == 5).all() for z in fresh)
    assert np.array_equal(x, numbers(1))
    os.close(go)
    os.close(gone)


def test_more_children_than_leases_still_read_what_they_inherited(tmp_path):
    script = """
import os

import numpy as np
import torchshm
from multiprocessing.reduction import ForkingPickler
import pickle

torchshm.register()
x = torchshm.share(np.arange(5000.0), "r+")
go, gone = os.pipe()
ready, done = os.pipe()
children = []
for n in range(1100):
    pid = os.fork()
    if pid == 0:
        os.close(gone)
        os.write(done, b".")
        os.read(go, 1)
        y = pickle.loads(bytes(ForkingPickler.dumps(x + 1)))
        os._exit(0 if (x == np.arange(5000.0)).all() and (y == x + 1).all() else 1)
    children.append(pid)
for n in range(1100):
    os.read(ready, 1)
y = torchshm.share(np.ones(5000))
os.close(gone)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 1100
assert (y == 1).all()
print(torchshm.stats()["leases"])
"""
    assert passes(script, tmp_path, PYTHONWARNINGS="ignore") == "1\n"
