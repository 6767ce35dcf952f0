"""torchshm.data.blocks for several consumers: shards, torch's DataLoader, torchdata's StatefulDataLoader."""

from __future__ import annotations

import itertools
import multiprocessing
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import torchshm
import torchshm.data
from torchshm.data import blocks

pytestmark = pytest.mark.apart

ROWS = 10_000


def job(rows=ROWS, **more):
    given = {"i": np.arange(rows), "x": np.arange(rows * 8, dtype=np.float32).reshape(rows, 8)}
    return blocks.from_arrays(given).options(
        **{"memory": "64MiB", "block_size": "20KiB", "num_workers": 2, "seed": 1, **more}
    )


def rank(shard, link):
    link.send([np.concatenate([batch["i"] for batch in shard.iter_batches(100)]) for _ in range(2)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_get_as_many_rows_each_and_none_twice(method):
    shards = job().shuffle(window="200KiB").split(3)
    context = multiprocessing.get_context(method)
    links, processes = [], []
    for shard in shards[1:]:
        here, there = context.Pipe()
        processes.append(context.Process(target=rank, args=(shard, there)))
        processes[-1].start()
        links.append(here)
    found = [[np.concatenate([batch["i"] for batch in shards[0].iter_batches(100)]) for _ in range(2)]]
    found += [link.recv() for link in links]
    for process in processes:
        process.join()
    for epoch in range(2):
        parts = [each[epoch] for each in found]
        assert len({len(part) for part in parts}) == 1
        whole = np.concatenate(parts)
        assert len(np.unique(whole)) == len(whole) > ROWS - 3 * 100
    assert (found[0][0] != found[0][1]).any()


def wait_for_death(shard, link):
    stream = shard.iter_batches(10)
    next(stream)
    link.send("begun")
    try:
        for _ in stream:
            time.sleep(0.001)
    except torchshm.TorchshmError as error:
        link.send(str(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_rank_is_told_when_the_execution_has_died(method):
    (shard,) = job(1_000_000).split(1)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=wait_for_death, args=(shard, there))
    process.start()
    assert here.recv() == "begun"
    shard._run._process.kill()
    assert here.poll(30) and "has died" in here.recv()
    process.join()


def test_shards_that_need_not_be_equal_get_whole_blocks():
    shards = job().split(2, equal=False)
    streams = [shard.iter_batches(None) for shard in shards]
    rows = np.concatenate(
        [batch["i"] for pair in itertools.zip_longest(*streams) for batch in pair if batch is not None]
    )
    np.testing.assert_array_equal(np.sort(rows), np.arange(ROWS))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("loader", [DataLoader, torchshm.data.DataLoader], ids=["torch", "torchshm"])
def test_a_loader_gets_every_row_once_each_epoch(workers, loader):
    made = loader(
        job().shuffle(window="200KiB").to_dataset(batch_size=64), batch_size=None, num_workers=workers
    )
    epochs = []
    for _ in range(2):
        rows = []
        for batch in made:
            assert isinstance(batch["x"], torch.Tensor) and batch["x"].shape[1:] == (8,)
            torch.testing.assert_close(batch["x"][:, 0], batch["i"].float() * 8)
            rows.append(batch["i"].clone())
        epochs.append(torch.cat(rows).numpy())
        np.testing.assert_array_equal(np.sort(epochs[-1]), np.arange(ROWS))
    assert (epochs[0] != epochs[1]).any()


def test_persistent_workers_go_on_for_many_epochs():
    loader = DataLoader(
        job(1000).to_dataset(batch_size=100), batch_size=None, num_workers=2, persistent_workers=True
    )
    for _ in range(20):
        rows = torch.cat([batch["i"].clone() for batch in loader])
        np.testing.assert_array_equal(np.sort(rows.numpy()), np.arange(1000))


def test_single_rows_are_collated_by_the_loader():
    loader = DataLoader(job(500).to_dataset(), batch_size=50)
    rows = torch.cat([batch["i"] for batch in loader])
    np.testing.assert_array_equal(rows.numpy(), np.arange(500))


def test_set_epoch_chooses_the_order():
    dataset = job().shuffle(window="200KiB").to_dataset(batch_size=100)

    def order(epoch):
        dataset.set_epoch(epoch)
        return torch.cat([batch["i"].clone() for batch in dataset])

    first = order(0)
    assert (order(1) != first).any()
    assert (order(0) == first).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_in_the_middle_of_an_epoch(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader():
        dataset = job().shuffle(window="200KiB").to_dataset(batch_size=100)
        dataset.set_epoch(3)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    expected = [batch["i"].clone() for batch in loader()]
    first = loader()
    stream = iter(first)
    for _ in range(17):
        next(stream)
    state = first.state_dict()
    del stream, first
    second = loader()
    second.load_state_dict(state)
    rest = [batch["i"].clone() for batch in second]
    assert len(rest) == len(expected) - 17
    assert all((one == other).all() for one, other in zip(rest, expected[17:], strict=True))
