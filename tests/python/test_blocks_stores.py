"""torchshm.data.blocks over values of a store, which stay there, or go as they are read."""

from __future__ import annotations

import gc
import os
import signal
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import xarray as xr
from program import until

import torchshm
from torchshm.data import blocks

pytestmark = pytest.mark.apart

ROWS, PARTS = 1000, 20


def little(dataset, **more):
    return dataset.options(**{"memory": "64MiB", "block_size": "100KiB", "num_workers": 2, "seed": 1, **more})


def numbers(dataset, column="i"):
    return np.concatenate([np.array(block[column]) for block in dataset.iter_blocks(batch_format="numpy")])


def part(number, width=64):
    """Half a MiB."""
    return {"i": np.arange(number * ROWS, (number + 1) * ROWS), "x": np.full((ROWS, width), number * 1.0)}


@pytest.fixture
def parts(store):
    """A store with numbered rows in PARTS values."""
    for number in range(PARTS):
        store.save(f"part/{number:03d}", part(number))
    return store


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("by", ["store", "name"])
def test_values_are_read_in_the_order_of_their_names_and_stay(parts, method, by):
    dataset = little(blocks.from_store(parts if by == "store" else parts.name), start_method=method)
    np.testing.assert_array_equal(numbers(dataset), np.arange(ROWS * PARTS))
    np.testing.assert_array_equal(np.sort(numbers(dataset.shuffle())), np.arange(ROWS * PARTS))
    assert numbers(dataset.repeat(2)).sum() == 2 * np.arange(ROWS * PARTS).sum()
    assert len(parts) == PARTS


def test_keys_say_which_and_in_which_order(parts):
    chosen = blocks.from_store(parts, ["part/003", "part/001"])
    np.testing.assert_array_equal(numbers(chosen), np.concatenate([part(3)["i"], part(1)["i"]]))
    assert blocks.from_store(parts, "part/002").count() == ROWS
    assert blocks.from_store(parts, iter(parts.keys("part/00"))).count() == 10 * ROWS
    with pytest.raises(KeyError, match=r"has no 'part/9'"):
        blocks.from_store(parts, ["part/001", "part/9"]).count()
    with pytest.raises(torchshm.StoreUnavailableError):
        blocks.from_store("no-such-store").count()
    assert blocks.from_store(parts, []).count() == 0


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.arange(12).reshape(6, 2), "data"),
        (torch.arange(12).reshape(6, 2), "data"),
        ({"a": torch.arange(6), "b": np.arange(6)}, "a"),
        (pa.table({"a": np.arange(6)}), "a"),
        (pd.DataFrame({"a": np.arange(6)}), "a"),
        (xr.Dataset({"a": ("time", np.arange(6))}), "a"),
    ],
    ids=["array", "tensor", "dict", "arrow", "pandas", "xarray"],
)
def test_values_are_tables_or_arrays(store, value, name):
    store.save("v", value)
    found = numbers(blocks.from_store(store, allow_pickle=True), name)
    np.testing.assert_array_equal(found, np.arange(12).reshape(6, 2) if name == "data" else np.arange(6))
    if isinstance(value, (pa.Table, pd.DataFrame, xr.Dataset)):
        with pytest.raises(ValueError, match="allow_pickle"):
            blocks.from_store(store).count()


@pytest.mark.parametrize("value", [[1, 2], "text", {"a": np.arange(2), "b": np.arange(3)}, np.float64(3)])
def test_what_has_no_rows_is_refused_by_its_name(store, value):
    store.save("odd", value)
    with pytest.raises((TypeError, ValueError), match="the store's 'odd' holds"):
        blocks.from_store(store, allow_pickle=True).count()


# ---- consumed


def test_a_store_becomes_empty_as_it_is_read(parts):
    full = parts.info()["live_bytes"]
    dataset = little(blocks.from_store(parts, consume=True))
    left, memory = [], []
    for number, batch in enumerate(dataset.iter_batches(ROWS)):
        np.testing.assert_array_equal(batch["i"], part(number)["i"])
        assert (batch["x"] == number).all()
        time.sleep(0.05)
        left.append(len(parts))
        memory.append(parts.info()["live_bytes"])
    assert left[0] > PARTS // 2 and left[-1] == 0 and left == sorted(left, reverse=True)
    assert memory[0] > full / 2 > memory[-5]
    del batch
    gc.collect()
    until(lambda: parts.info()["live_bytes"] < full / 100)


def test_names_go_only_when_their_rows_have_been_read(parts):
    stream = little(blocks.from_store(parts, consume=True)).iter_batches(ROWS)
    next(stream)
    time.sleep(0.5)
    left = len(parts)
    assert 0 < left < PARTS  # a slow consumer does not empty it
    stream.close()
    assert len(parts) == left
    np.testing.assert_array_equal(
        numbers(little(blocks.from_store(parts, consume=True))),
        np.arange((PARTS - left) * ROWS, PARTS * ROWS),
    )
    assert len(parts) == 0


def test_only_what_was_chosen_is_consumed(parts):
    assert blocks.from_store(parts, ["part/001"], consume=True).count() == ROWS
    assert len(parts) == PARTS - 1 and "part/001" not in parts


def test_a_value_is_not_lost_when_its_worker_is_killed_in_the_middle(parts, tmp_path):
    def deadly(batch):
        for row in batch["i"][batch["i"] % 3000 == 517]:
            mark = tmp_path / str(row)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return batch

    dataset = little(blocks.from_store(parts, consume=True), max_retries=50).map_batches(
        deadly, batch_size=100
    )
    np.testing.assert_array_equal(numbers(dataset), np.arange(ROWS * PARTS))
    assert len(list(tmp_path.iterdir())) == 7
    assert len(parts) == 0


def test_a_value_of_a_function_that_fails_stays(parts):
    def bad(batch):
        raise LookupError

    with pytest.raises(LookupError):
        little(blocks.from_store(parts, consume=True)).map_batches(bad).count()
    assert len(parts) == PARTS


def test_what_is_consumed_has_no_second_time(parts):
    dataset = blocks.from_store(parts, consume=True)
    for twice in (dataset.repeat(2), dataset.repeat().shuffle(), dataset.zip(dataset)):
        with pytest.raises(ValueError, match="only once: consume=True"):
            twice.count()
    assert len(parts) == PARTS
    (shard,) = dataset.split(1)
    assert sum(len(batch["i"]) for batch in shard.iter_batches(ROWS)) == ROWS * PARTS
    with pytest.raises(ValueError, match="only once"):
        next(shard.iter_batches(ROWS))
