"""DataLoader(pooled=True): batches cost nothing to send, and what the worker may still write to is copied."""

from __future__ import annotations

import functools
import multiprocessing
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import torchshm
from torchshm import _C
from torchshm.data import DataLoader, _parcel

pytestmark = pytest.mark.usefixtures("registered")

SIZE = 100_000
METHODS = ["fork", "spawn", "forkserver"]


def identity(x):
    return x


# ---- what is copied, told by the addresses of the blocks


def fresh(kept):
    return np.ones(SIZE)


def fresh_in_an_object(kept):
    return {"table": pd.DataFrame({"a": np.ones(SIZE)}), "name": "x"}


def fresh_in_a_cycle_that_is_left(kept):
    batch = {"a": np.ones(SIZE)}
    kept.append([batch])
    kept.clear()
    return batch


def fresh_tensor(kept):
    return torch.ones(SIZE)


def tensor_over_fresh(kept):
    return torch.from_numpy(np.ones(SIZE))


def array_over_tensor(kept):
    return torch.ones(SIZE).numpy()


def in_fortran_order(kept):
    return np.asfortranarray(np.ones((100, 1000)))


def tensor_kept(kept):
    kept.append(torch.ones(SIZE))  # PyTorch shares it with its receiver
    return kept[-1]


def array_kept(kept):
    kept.append(np.ones(SIZE))
    return kept[-1]


def view_kept(kept):
    x = np.ones(SIZE)
    kept.append(x[5:7])
    return x


def whole_kept(kept):
    kept.append(np.ones(SIZE))
    return kept[-1][:-1]


def memory_kept(kept):
    x = np.ones(SIZE)
    kept.append(memoryview(x))
    return x


def closure_kept(kept):
    x = np.ones(SIZE)
    kept.append(lambda: x)
    return {"x": [x]}


def thread_keeps(kept):
    x = np.ones(SIZE)
    go = threading.Event()
    kept.append(go)
    threading.Thread(target=lambda y: go.wait(), args=(x,), daemon=True).start()
    return x


def cycle_kept(kept):
    x = np.ones(SIZE)
    ring = [x]
    ring.append(ring)
    return x


def tensor_over_array_kept(kept):
    kept.append(np.ones(SIZE))
    return torch.from_numpy(kept[-1])


def array_over_tensor_kept(kept):
    kept.append(torch.ones(SIZE))
    return kept[-1].numpy()


def two_views(kept):
    x = np.ones(SIZE)
    return x[:60_000], x[40_000:]


def array_and_tensor(kept):
    x = np.ones(SIZE)
    return x, torch.from_numpy(x)


def small_part(kept):
    return np.ones(SIZE)[:5000]


def strided(kept):
    return np.ones((SIZE, 2))[:, 0]


def read_only(kept):
    x = np.ones(SIZE)
    x.flags.writeable = False
    return x


BY_REFERENCE = [
    *(
        fresh,
        fresh_in_an_object,
        fresh_in_a_cycle_that_is_left,
        fresh_tensor,
        tensor_over_fresh,
        array_over_tensor,
    ),
    *(in_fortran_order, tensor_kept),
]
COPIED = [
    *(
        array_kept,
        view_kept,
        whole_kept,
        memory_kept,
        closure_kept,
        thread_keeps,
        cycle_kept,
        two_views,
        small_part,
    ),
    *(tensor_over_array_kept, array_over_tensor_kept, array_and_tensor, strided, read_only),
]


def addresses(x):
    """Where the large arrays and tensors of a batch lie."""
    if isinstance(x, dict):
        return [a for v in x.values() for a in addresses(v)]
    if isinstance(x, list | tuple):
        return [a for v in x for a in addresses(v)]
    if isinstance(x, pd.DataFrame):
        return [x["a"].to_numpy().__array_interface__["data"][0]]
    if isinstance(x, torch.Tensor):
        return [x.data_ptr()]
    return [x.__array_interface__["data"][0]] if isinstance(x, np.ndarray) else []


def sent(make):
    """Addresses before and after, in one process: a block is mapped once."""
    kept = []
    with torchshm.pooled():
        box = [make(kept)]
    before = addresses(box[0])
    parcel = _parcel.pack(box)
    assert box == []
    return before, addresses(parcel.__reduce__()[0](*parcel.__reduce__()[1])), kept


@pytest.mark.parametrize("make", BY_REFERENCE, ids=lambda f: f.__name__)
def test_is_sent_by_reference(make):
    before, after, _kept = sent(make)
    assert before and before == after


@pytest.mark.parametrize("make", COPIED, ids=lambda f: f.__name__)
def test_is_copied(make):
    before, after, kept = sent(make)
    if make is array_and_tensor:  # the same memory in the batch, and not in what is received
        assert before[0] == before[1] and after[0] != after[1]
    assert before and not set(before) & set(after)
    for go in kept:
        if isinstance(go, threading.Event):
            go.set()


def test_memory_comes_back():
    before = torchshm.stats()["blocks"]
    for make in BY_REFERENCE + COPIED:
        if make is not cycle_kept and make is not thread_keeps:
            sent(make)
    _C.reap()
    assert torchshm.stats()["blocks"] == before


def test_a_batch_that_can_not_be_pickled_is_left_to_the_queue():
    box = [lambda: 1]
    thing = box[0]
    assert _parcel.pack(box) is thing


# ---- in loaders


class Filled(Dataset):
    """One buffer for all samples."""

    def __init__(self):
        self.buffer = None

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if self.buffer is None:
            self.buffer = np.empty(SIZE)
        assert torchshm.is_shared(self.buffer)
        self.buffer[:] = index
        return self.buffer


class Fresh(Filled):
    def __getitem__(self, index):
        return np.full(SIZE, float(index))


class Stream(IterableDataset):
    def __iter__(self):
        for index in range(6):
            x = np.full(SIZE, float(index))
            yield x
            x[:] = -1


@pytest.mark.parametrize("method", METHODS)
def test_a_buffer_that_is_filled_again(method):
    loader = DataLoader(
        Filled(),
        batch_size=None,
        collate_fn=identity,
        num_workers=2,
        prefetch_factor=3,
        multiprocessing_context=method,
        pooled=True,
    )
    assert [(x[0], x[-1]) for x in list(loader)] == [(i, i) for i in range(12)]


def test_a_stream_that_writes_to_what_it_gave():
    loader = DataLoader(Stream(), batch_size=None, collate_fn=identity, num_workers=1, pooled=True)
    assert [x[0] for x in list(loader)] == list(range(6))


@pytest.mark.parametrize("collate_fn", [None, np.stack, identity])
def test_batches_lie_in_the_pool(collate_fn):
    loader = DataLoader(Fresh(), batch_size=3, collate_fn=collate_fn, num_workers=2, pooled=True)
    batches = list(loader)
    assert [float(b[1][0]) for b in batches] == [1, 4, 7, 10]
    assert all(torchshm.is_shared(x) for b in batches for x in (b if collate_fn is identity else [b]))


def test_memory_is_that_of_the_batches_under_way():
    loader = DataLoader(
        Fresh(),
        batch_size=2,
        collate_fn=np.stack,
        num_workers=2,
        prefetch_factor=2,
        persistent_workers=True,
        pooled=True,
    )
    peak = 0
    for _ in range(4):
        for batch in loader:
            assert batch.shape == (2, SIZE)
            peak = max(peak, torchshm.stats()["blocks"])
            del batch
    # Two workers' two batches, one being made of two samples by each, one with the user: 4 + 2 * 3 + 1, and workers may have
    # begun the next.
    assert peak - torchshm.stats()["blocks"] <= 14


def test_it_registers_by_itself_and_leaves_the_context_alone():
    torchshm.unregister()
    loader = DataLoader(Fresh(), batch_size=3, num_workers=1)
    assert torchshm.is_shared(next(iter(loader)))
    assert loader.multiprocessing_context is None


def test_without_workers_nothing_is_pooled_but_the_batch():
    seen = []
    loader = DataLoader(
        Fresh(), batch_size=3, collate_fn=lambda b: seen.append(torchshm.is_shared(b[0])), pooled=True
    )
    list(loader)
    assert seen == [False] * 4


def nested(worker_id, log):
    log.put(worker_id)


def test_the_users_worker_init_fn_is_called():
    log = multiprocessing.get_context("fork").SimpleQueue()
    function = functools.partial(nested, log=log)
    loader = DataLoader(
        Fresh(), num_workers=2, worker_init_fn=function, multiprocessing_context="fork", pooled=True
    )
    list(loader)
    assert sorted([log.get(), log.get()]) == [0, 1]
    assert loader.worker_init_fn is function
