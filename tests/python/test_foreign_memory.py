"""Arrays over memory that is shared already by other means arrive equal, and as the receiver's own."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import multiprocessing.shared_memory

import numpy as np
import pytest
import torch
from peer import keep, kept
from same import assert_same, by_numpy

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

SIZE = 20_000


def over_shared_memory(keep_alive):
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=8 * SIZE)
    keep_alive.callback(memory.unlink)
    return np.ndarray((SIZE,), "f8", buffer=memory.buf), memory


def over_raw_array(_):
    memory = multiprocessing.RawArray(ctypes.c_double, SIZE)
    return np.frombuffer(memory), memory


def over_locked_array(_):
    memory = multiprocessing.Array("d", SIZE)
    return np.frombuffer(memory.get_obj()), memory


def over_shared_tensor(_):
    memory = torch.zeros(SIZE, dtype=torch.float64).share_memory_()
    return memory.numpy(), memory


def over_anonymous_mapping(_):
    memory = mmap.mmap(-1, 8 * SIZE)
    return np.frombuffer(memory), memory


def over_bytearray(_):
    memory = bytearray(8 * SIZE)
    return np.frombuffer(memory), memory


def first_and_last(name):
    return kept[name][[0, -1]].tolist()


def overwrite(name):
    kept[name][...] = -1


@pytest.mark.parametrize(
    "make",
    [
        over_shared_memory,
        over_raw_array,
        over_locked_array,
        over_shared_tensor,
        over_anonymous_mapping,
        over_bytearray,
    ],
)
def test_array_over_other_memory_arrives_equal_and_is_the_receivers_own(peer, make):
    import contextlib

    with contextlib.ExitStack() as stack:
        x, memory = make(stack)
        x[:] = np.arange(SIZE)
        for view in [x, x[::3], x.reshape(100, -1).T]:
            assert_same(torchshm.loads(torchshm.dumps(view)), by_numpy(view))
        peer.call(keep, "x", x)
        x[0] = 5
        assert peer.call(first_and_last, "x") == [0, SIZE - 1]
        peer.call(overwrite, "x")
        assert x[-1] == SIZE - 1
        shared = torchshm.share(x)
        assert torchshm.is_shared(shared)
        assert not torchshm.is_shared(x)
        del view, x
        peer.forget()
        if hasattr(memory, "close"):
            memory.close()


@pytest.mark.parametrize("mode", ["r", "r+", "c", "w+"])
def test_array_over_a_mapped_file_arrives_equal(peer, tmp_path, mode):
    path = tmp_path / "numbers"
    np.arange(float(SIZE)).tofile(path)
    x = np.memmap(path, "f8", mode, shape=(SIZE,))
    x_plain = np.asarray(x)
    if mode == "w+":
        x[:] = np.arange(SIZE)
    for view in [x, x[5:500], x_plain, x_plain[::-2], x.reshape(100, -1)]:
        got = torchshm.loads(torchshm.dumps(view))
        wanted = by_numpy(view)
        assert type(got) is type(wanted)
        assert np.array_equal(got, wanted)
        assert got.flags.writeable
    peer.call(keep, "x", x_plain)
    peer.call(overwrite, "x")
    assert np.array_equal(np.fromfile(path), np.arange(SIZE))


def test_array_over_a_file_that_is_gone_arrives(peer, tmp_path):
    path = tmp_path / "numbers"
    np.arange(float(SIZE)).tofile(path)
    x = np.asarray(np.memmap(path, "f8", "r"))
    path.unlink()
    peer.call(keep, "x", x)
    assert peer.call(first_and_last, "x") == [0, SIZE - 1]
