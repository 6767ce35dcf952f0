"""register() and unregister(): what goes through the pool, from which size on, and the way back to stock."""

from __future__ import annotations

import multiprocessing
import multiprocessing.reduction
import pickle
import subprocess
import sys

import numpy as np
import pytest
from peer import Peer, give, keep, kept
from same import assert_same, by_numpy

import torchshm
from torchshm import _C

ForkingPickler = multiprocessing.reduction.ForkingPickler


def table():
    return dict(ForkingPickler._extra_reducers)


def shared(x):
    return torchshm.is_shared(x)


def threshold():
    return _C.min_bytes()


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    torchshm.register()
    torchshm.unregister()


def test_unregister_restores_the_table_of_reducers():
    torchshm.unregister()
    before = table()
    torchshm.register()
    assert table() != before
    torchshm.unregister()
    assert table() == before
    torchshm.unregister()
    assert table() == before


def test_unregister_restores_a_reducer_that_the_program_had_set():
    torchshm.unregister()

    def mine(x):
        return np.asarray, (x.tolist(),)

    ForkingPickler.register(np.ndarray, mine)
    try:
        before = table()
        torchshm.register()
        torchshm.unregister()
        assert table() == before
    finally:
        ForkingPickler._extra_reducers.pop(np.ndarray, None)


def test_unregister_leaves_alone_what_the_program_set_since():
    def mine(x):
        return np.asarray, (x.tolist(),)

    torchshm.register()
    ForkingPickler.register(np.ndarray, mine)
    try:
        torchshm.unregister()
        assert table()[np.ndarray] is mine
    finally:
        ForkingPickler._extra_reducers.pop(np.ndarray, None)


def test_register_twice_is_register_once(registered):
    before = table()
    torchshm.register()
    torchshm.register()
    assert table() == before
    torchshm.unregister()
    assert np.ndarray not in table()


@pytest.mark.parametrize("min_bytes", [0, 1, 100, 5000, 1 << 20])
def test_min_bytes_is_the_size_from_which_buffers_are_pooled(registered, min_bytes):
    torchshm.register(min_bytes)
    for size in {1, 99, 100, 4999, 5000, (1 << 20) - 1, 1 << 20}:
        x = np.ones(size, "u1")
        data = bytes(ForkingPickler.dumps(x))
        tickets = torchshm.stats()["tickets"]
        y = pickle.loads(data)
        assert torchshm.is_shared(y) == (size >= min_bytes)
        assert torchshm.stats()["tickets"] == tickets - (size >= min_bytes)
        assert_same(y, x)
        if size < min_bytes:
            y[...] = 2  # every receiver's own
            assert_same(pickle.loads(data), x)


def test_register_without_a_size_is_the_measured_threshold(registered):
    measured = _C.min_bytes()
    torchshm.register(0)
    assert _C.min_bytes() == 0
    torchshm.register()
    assert _C.min_bytes() == measured
    assert 64 <= measured <= 64 << 10


@pytest.mark.parametrize("wrong", [-1, -(2**70)])
def test_negative_min_bytes_is_refused(registered, wrong):
    before = _C.min_bytes()
    with pytest.raises(ValueError, match="min_bytes"):
        torchshm.register(wrong)
    assert _C.min_bytes() == before


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_inherit_min_bytes(registered, method):
    torchshm.register(12_345)
    with Peer(method) as child:
        assert child.call(threshold) == 12_345
        assert not torchshm.is_shared(child.call(np.ones, 1000))
        assert torchshm.is_shared(child.call(np.ones, 2000))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_an_unregistered_process_pickle_as_ever(method):
    torchshm.unregister()
    with Peer(method) as child:
        assert child.call(shared, np.ones(10_000)) is False
        assert not torchshm.is_shared(child.call(np.ones, 10_000))


def test_messages_under_way_arrive_after_unregister(peer):
    x = np.arange(10_000.0)
    peer.ask(give, x)
    torchshm.unregister()
    y = peer.answer()
    assert torchshm.is_shared(y)
    assert_same(y, x)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, -1, None])
@pytest.mark.parametrize("size", [10, 10_000])
def test_every_protocol_carries_arrays(peer, protocol, size):
    x = {"a": np.arange(float(size)).reshape(2, -1).T, "b": torchshm.empty((size, 3), "i2")}
    x["b"][...] = 5
    for data in [bytes(ForkingPickler.dumps(x, protocol)), torchshm.dumps(x, protocol)]:
        y = pickle.loads(data)
        assert_same(y["a"], by_numpy(x["a"]))
        assert np.shares_memory(y["b"], x["b"])
        assert len(data) < 20_000


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_carry_them_too(registered, protocol):
    x = np.arange(10_000.0)
    assert_same(pickle.loads(bytes(ForkingPickler.dumps(x, protocol))), x)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_is_unchanged_and_needs_no_torchshm(registered, protocol):
    pooled = torchshm.empty(5000)
    pooled[...] = 3
    for x in [np.arange(5000.0), pooled, pooled[::2], torchshm.share(np.arange(5000.0), "r")]:
        own = np.array(x, copy=True)
        data = pickle.dumps(x, protocol)
        if x.flags.c_contiguous and x.flags.writeable:
            assert data == pickle.dumps(own, protocol)
        code = (
            "import pickle, sys; x = pickle.loads(sys.stdin.buffer.read())\n"
            "assert not any(name.startswith('torchshm') for name in sys.modules), 'torchshm was imported'\n"
            "print(x.sum(), x.shape)"
        )
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
        assert done.stderr == b""
        assert done.stdout.decode().strip() == f"{own.sum()} {own.shape}"


def test_torchshm_needs_and_loads_numpy_alone():
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'pandas', 'xarray', 'typer', 'rich', 'psutil', 'pyarrow', 'ml_dtypes'):\n"
        "            raise ImportError(name + ' was wanted')\n"
        "sys.meta_path.insert(0, Refuse)\n"
        "import torchshm, numpy as np\n"
        "torchshm.register()\n"
        "x = torchshm.share(np.ones(5000))\n"
        "assert torchshm.is_shared(torchshm.loads(torchshm.dumps(x)))\n"
        "torchshm.stats(); torchshm.trim()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_buffers_out_of_band_are_unchanged(registered):
    x = np.arange(10_000.0)
    buffers = []
    data = pickle.dumps(x, 5, buffer_callback=buffers.append)
    assert len(buffers) == 1
    assert_same(pickle.loads(data, buffers=buffers), x)


def test_inline_pickles_plainly(registered):
    x = {"a": np.arange(10_000.0), "b": torchshm.empty(100)}
    x["b"][...] = 4
    with torchshm.inline():
        data = bytes(ForkingPickler.dumps(x))
        again = torchshm.dumps(x)
    assert data == pickle.dumps(x)
    for _ in range(3):  # for many receivers
        for one in [data, again]:
            y = pickle.loads(one)
            assert not torchshm.is_shared(y["a"]) and not torchshm.is_shared(y["b"])
            assert_same(y["a"], x["a"])
    assert torchshm.is_shared(pickle.loads(torchshm.dumps(x))["a"])


def test_inline_nests_and_ends_with_exceptions(registered):
    x = np.arange(10_000.0)
    with torchshm.inline():
        with pytest.raises(KeyError), torchshm.inline():
            raise KeyError
        assert bytes(ForkingPickler.dumps(x)) == pickle.dumps(x)
    assert bytes(ForkingPickler.dumps(x)) != pickle.dumps(x)


def test_inline_concerns_its_thread_only(registered):
    import threading

    x = np.arange(10_000.0)
    sizes = []
    with torchshm.inline():
        thread = threading.Thread(target=lambda: sizes.append(len(torchshm.dumps(x))))
        thread.start()
        thread.join()
    assert sizes[0] < 1000


def test_inline_message_reaches_a_child_as_its_own(peer):
    x = torchshm.empty(10_000)
    x[...] = 1
    with torchshm.inline():
        peer.call(keep, "x", x)
    x[...] = 2
    assert peer.call(_first, "x") == (1.0, False)


def _first(name):
    return float(kept[name][0]), torchshm.is_shared(kept[name])
