"""A SharedList while threads and forked children append to it, seal it and read it, and in a pool that is nearly full."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading

import numpy as np
import pytest
from forked import ended, forked
from scripts import passes

import torchshm
from torchshm.data import SharedList


class Waits:
    """Holds whoever pickles it until it is told to go on."""

    def __init__(self):
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __reduce__(self):
        self.begun.set()
        self.go_on.wait()
        return str, ("waited",)


def test_a_child_does_not_append_inside_of_an_append():
    items = SharedList(range(10))
    refused = []

    class Appends:
        def __reduce__(self):
            try:
                items.append(np.full(1000, 7))
            except RuntimeError as error:
                refused.append(str(error))
            return str, ("item",)

    def child():
        items.append([np.arange(1000), Appends(), np.arange(500)])
        got = items[10]
        assert len(items) == 11 and len(refused) == 1 and got[1] == "item"
        assert (got[0] == np.arange(1000)).all() and (got[2] == np.arange(500)).all()

    assert ended(forked(child)) == 0


def test_a_child_does_not_go_on_with_what_another_thread_was_pickling():
    items, waits, known = SharedList(["first"]), Waits(), {"an object": "that the other thread has pickled"}
    thread = threading.Thread(target=items.append, args=([known, waits],))
    thread.start()
    waits.begun.wait()

    def child():
        items.append(known)
        items.append([np.arange(3000.0), known])
        assert items[1] == known and items[2][1] == known and (items[2][0] == np.arange(3000.0)).all()
        assert items.seal()[1] == known

    pid = forked(child)
    status = ended(pid)
    waits.go_on.set()
    thread.join()
    assert status == 0 and items == ["first", [known, "waited"]]


def test_a_child_that_was_forked_while_an_item_is_pickled_goes_on_with_its_own():
    items = SharedList(["first"])
    statuses = []

    def child():
        items.append("the child's")
        assert items == ["first", "the child's"]

    class Forks:
        def __reduce__(self):
            statuses.append(ended(forked(child)))
            return str, ("forked",)

    items.append([Forks(), np.arange(3000.0)])
    assert statuses == [0] and len(items) == 2 and items[1][0] == "forked"


def test_a_child_that_comes_back_from_a_fork_in_an_item_gets_an_error():
    items = SharedList(["first"])
    pid = -1

    class Forks:
        def __reduce__(self):
            nonlocal pid
            pid = os.fork()
            if pid == 0:
                items.append("inner")
                items.seal()
            return str, ("forked",)

    try:
        items.append(Forks())
    except RuntimeError as error:
        os._exit(0 if "forked" in str(error) and items == ["first", "inner"] else 3)
    else:
        if pid == 0:
            os._exit(4)
    assert ended(pid) == 0 and items == ["first", "forked"]


def _with_room():
    """A list whose sealing copies its last chunk."""
    items, block = SharedList(), np.zeros(1 << 20)
    while not (len(items) > 8 and items._parts()[0][-1].nbytes > 40 << 20 and items._parts()[3] > 10 << 20):
        items.append(block)
    return items


def _until_it_can(do):
    while True:
        try:
            return do()
        except RuntimeError:  # the other thread is inside of an append
            pass


@pytest.mark.parametrize("send", [False, True])
def test_what_was_appended_while_it_is_sealed_is_in_it(send):
    for _ in range(3):
        items, begun = _with_room(), threading.Event()
        before, appended = len(items), 0

        def append(items=items, begun=begun):
            nonlocal appended
            while appended < 1_000_000:
                try:
                    items.append(appended)
                except ValueError:  # it is sealed
                    return
                except RuntimeError:  # it is being sealed
                    continue
                appended += 1
                if appended == 10:
                    begun.set()

        thread = threading.Thread(target=append)
        thread.start()
        begun.wait()
        if send:
            assert len(pickle.loads(_until_it_can(lambda items=items: torchshm.dumps(items)))) == len(items)
        else:
            _until_it_can(items.seal)
        thread.join()
        assert list(items[before:]) == list(range(appended))


def test_nothing_is_appended_while_it_is_sealed_and_a_failure_leaves_it_open():
    items = SharedList([1])
    with pytest.raises(RuntimeError, match="seals it"):
        items._seal_with(lambda parts: items.append(2))
    items.append(3)
    assert not items.sealed and items == [1, 3]

    def inner(parts):
        items.seal()  # as another thread may
        return parts[:3]

    items._seal_with(inner)
    assert items.sealed and items == [1, 3]


def test_it_is_read_while_another_thread_appends():
    items, waits = SharedList(["first", np.arange(3000.0)]), Waits()
    thread = threading.Thread(target=items.append, args=(waits,))
    thread.start()
    waits.begun.wait()
    try:
        assert items[0] == "first" and items[:1] == ["first"] and items[[0]] == ["first"]
        assert len(items) == 2 and "first" in repr(items) and items.nbytes > 0
        assert copy.copy(items)[0] == "first"
        with pytest.raises(RuntimeError, match="appends to this list"):
            items.seal()
    finally:
        waits.go_on.set()
        thread.join()
    assert items.seal()[2] == "waited"


def test_what_a_signal_raises_while_an_item_is_pickled_stays_what_it_is():
    class Late(Exception):
        pass

    def raise_late(number, frame):
        raise Late

    class Signals:
        def __reduce__(self):
            signal.raise_signal(signal.SIGUSR1)
            return str, ("item",)

    items, before = SharedList(), signal.signal(signal.SIGUSR1, raise_late)
    try:
        with pytest.raises(Late):
            items.append(Signals())
    finally:
        signal.signal(signal.SIGUSR1, before)
    items.append(1)
    assert items == [1]


def test_a_list_of_a_pool_that_is_nearly_full_is_sealed_and_sent(tmp_path):
    passes(
        """
        import pickle, torchshm
        from torchshm.data import SharedDict, SharedList
        torchshm.register(limit=64 << 20)
        small, filler = [torchshm.empty(5000, "u1") for _ in range(6000)], []
        for size in (1 << 20, 1 << 18, 1 << 16, 1 << 15, 1 << 14, 1 << 13, 5000):
            try:
                while True:
                    filler.append(torchshm.empty(size, "u1"))
            except MemoryError:
                pass
        del small[::7]
        items = SharedList()
        try:
            items.extend(["x" * 4900] * 5)
        except torchshm.PoolFullError:
            pass
        count = len(items)
        assert len(items.seal()) == count and list(items) == ["x" * 4900] * count
        assert list(pickle.loads(torchshm.dumps(items))) == ["x" * 4900] * count
        try:
            assert SharedDict({"a": "x" * 4900})["a"] == "x" * 4900
        except torchshm.PoolFullError:
            pass
        """,
        tmp_path,
        PYTHONWARNINGS="ignore",
    )


def test_a_copy_that_lies_in_no_pool_is_sent():
    """Its chunk becomes a block that shares pages with others."""
    items = pickle.loads(pickle.dumps(SharedList([np.zeros(700), "text"]).seal()))
    for _ in range(3):
        items._seal_as(*_shrunk(items))
        items = pickle.loads(torchshm.dumps(items))
        got = items[0]
        got[0] = 7
        assert items[0][0] == 7 and items[1] == "text" and (got[1:] == 0).all()


def _shrunk(items):
    chunks, _, index, _ = items._parts()
    own = tuple(chunk[:6000].copy() for chunk in chunks)
    return own, own, index
