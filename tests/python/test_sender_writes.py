"""Nothing is shared behind anyone's back: what the program did not put in shared memory has pickle's semantics."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest
import torch
from peer import Peer, give, keep, kept
from torch.utils.data import DataLoader, Dataset, IterableDataset

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

SIZE = 20_000


def first_and_last(name):
    return kept[name][[0, -1]].tolist()


def overwrite(name, value):
    kept[name][...] = value


@pytest.mark.parametrize("size", [10, SIZE, 1 << 20])
def test_later_writes_of_the_sender_stay_the_senders(peer, size):
    x = np.ones(size)
    peer.call(keep, "x", x)
    x[...] = 2
    assert peer.call(first_and_last, "x") == [1.0, 1.0]


def test_writes_of_a_receiver_stay_the_receivers(peer, other):
    x = np.ones(SIZE)
    peer.call(keep, "x", x)
    other.call(keep, "x", x)
    peer.call(overwrite, "x", 3.0)
    assert other.call(first_and_last, "x") == [1.0, 1.0]
    assert x[0] == 1.0


def test_arrays_over_one_plain_memory_arrive_apart_as_ever(peer):
    x = np.ones(SIZE)
    a, b = peer.call(give, [x[:-1], x[1:]])
    a[...] = 2
    assert (b == 1).all()


def test_received_array_that_is_sent_on_is_the_next_receivers_own(peer, other):
    """The program never put this one in shared memory: it arrived in a message."""
    x = peer.call(give, np.ones(SIZE))
    other.call(keep, "x", x)
    x[...] = 2
    assert other.call(first_and_last, "x") == [1.0, 1.0]
    other.call(overwrite, "x", 3.0)
    assert x[0] == 2.0


def test_received_array_that_is_inherited_by_fork_is_the_childs_own(peer):
    """As any memory of a program is: after fork, everyone's writes are their own."""
    x = peer.call(give, np.ones(SIZE))
    keep("x", x)
    with Peer("fork") as child:
        kept.clear()
        child.call(overwrite, "x", 2.0)
        assert (x == 1).all()
        x[...] = 3
        assert child.call(first_and_last, "x") == [2.0, 2.0]


def test_what_a_manager_hands_out_is_each_receivers_own():
    with multiprocessing.Manager() as manager:
        box = manager.dict()
        box["x"] = np.ones(SIZE)
        mine = box["x"]
        mine[...] = 2
        assert box["x"][0] == 1.0


def test_process_arguments_are_the_childs_own():
    x = np.ones(SIZE)
    for method in ["fork", "spawn"]:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=_overwrite_argument, args=(x, theirs))
        process.start()
        x[-1] = 5
        ours.send("go")
        assert ours.recv() == [1.0, 9.0]
        process.join()
        assert x[0] == 1.0
        x[-1] = 1


def _overwrite_argument(x, pipe):
    pipe.recv()
    before = x[0]
    x[...] = 9
    pipe.send([before, x[-1]])


def test_queue_delivers_what_it_held_when_it_was_pickled():
    queue = multiprocessing.SimpleQueue()
    x = np.ones(SIZE)
    for value in range(20):
        x[...] = value
        queue.put(x)
    x[...] = -1
    assert [queue.get()[7] for _ in range(20)] == list(range(20))


class Reused(Dataset):
    """Every sample is the same buffer, filled anew."""

    def __init__(self, samples=24, size=SIZE):
        self.samples, self.buffer = samples, np.empty(size, "f4")

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.buffer[...] = index
        return self.buffer


class ReusedStream(IterableDataset):
    def __iter__(self):
        buffer = np.empty(SIZE, "f4")
        worker = torch.utils.data.get_worker_info().id
        for index in range(10):
            buffer[...] = 100 * worker + index
            yield buffer


def as_it_is(sample):
    return sample


def stacked(samples):
    return np.stack(samples)


def copied(sample):
    return sample.copy()


LOADERS = {
    # One batch under way per worker: the worker fills its buffer again only when the batch before has been received.
    "samples": {"dataset": Reused(), "batch_size": None, "collate_fn": as_it_is, "prefetch_factor": 1},
    "samples, copied": {"dataset": Reused(), "batch_size": None, "collate_fn": copied},
    "lists": {"dataset": Reused(), "batch_size": 3, "collate_fn": as_it_is, "prefetch_factor": 1},
    "stacks": {"dataset": Reused(), "batch_size": 4, "collate_fn": stacked},
    "tensors": {"dataset": Reused(), "batch_size": 4},
    "stream": {"dataset": ReusedStream(), "batch_size": None, "collate_fn": as_it_is, "prefetch_factor": 1},
}


def delivered(options):
    """All batches, kept until the end, as lists of their first and last values."""
    batches = list(DataLoader(num_workers=2, **options))
    return [np.asarray(batch)[..., [0, -1]].tolist() for batch in batches]


@pytest.mark.parametrize("name", LOADERS)
def test_dataset_that_reuses_its_buffer_delivers_what_stock_delivers(name):
    torchshm.unregister()
    stock = delivered(LOADERS[name])
    torchshm.register()
    assert delivered(LOADERS[name]) == stock


def test_array_that_changes_while_it_is_copied_harms_nobody(peer):
    """Torn, as any copy without a lock would be, but made of what was written, and the sender goes on."""
    x = np.zeros(1 << 21)
    stop = threading.Event()

    def change():
        value = 0.0
        while not stop.is_set():
            value += 1
            x[...] = value

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for _ in range(20):
            got = peer.call(give, x)
            assert got.min() >= 0
            assert (got == np.floor(got)).all()
    finally:
        stop.set()
        writer.join()
