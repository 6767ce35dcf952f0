"""Stages of torchshm.data.blocks that wait for one another, and what they are given memory for."""

from __future__ import annotations

import functools
import itertools
import os
import time

import numpy as np
import pytest
from scripts import passes

from torchshm.data import blocks
from torchshm.data.blocks import _home

pytestmark = pytest.mark.apart

ROWS = 20_000


def little(dataset, **more):
    return dataset.options(**{"memory": "96MiB", "block_size": "100KiB", "num_workers": 2, "seed": 1, **more})


def wide(rows=ROWS, width=64):
    """About 520 bytes a row."""
    return {"i": np.arange(rows), "x": np.zeros((rows, width))}


def numbers(dataset, column="i"):
    return np.concatenate([np.array(block[column]) for block in dataset.iter_blocks()])


# ---- zip


def most_of(dataset):
    for _ in dataset.iter_blocks():
        pass
    return dataset._statistics["most"]


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_side_of_a_zip_runs_ahead_of_the_other(workers):
    def slow(batch):
        time.sleep(0.002)
        return batch

    rows = 60_000  # 30 MB on each side
    quick = blocks.from_arrays(wide(rows))
    other = blocks.from_arrays({"k": np.arange(rows), "y": np.ones((rows, 64))}).map_batches(slow)
    for pair in (quick.zip(other), other.zip(quick)):
        assert most_of(little(pair, num_workers=workers)) < 20 << 20
    np.testing.assert_array_equal(numbers(little(quick.zip(other))), np.arange(rows))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_zip_of_endless_sides_goes_on(workers):
    left = blocks.from_arrays(wide(3000)).repeat()
    right = blocks.from_arrays({"k": np.arange(1000)}).repeat()
    pairs = little(left.zip(right), num_workers=workers, memory="64MiB").iter_batches(1000)
    for number, batch in enumerate(itertools.islice(pairs, 40)):
        np.testing.assert_array_equal(batch["i"], number % 3 * 1000 + np.arange(1000))
        np.testing.assert_array_equal(batch["k"], np.arange(1000))
    pairs.close()


def test_an_endless_side_that_meets_an_end_is_an_error():
    endless = blocks.from_arrays({"k": np.arange(100)}).repeat()
    finite = blocks.from_arrays({"i": np.arange(ROWS)})
    with pytest.raises(ValueError, match=f"left side has {ROWS} rows, the right side at least"):
        little(finite.zip(endless)).count()
    with pytest.raises(ValueError, match=f"left side has at least .* rows, the right side {ROWS}"):
        little(endless.zip(finite)).count()


def test_epochs_of_a_zip_that_differ_are_an_error_and_do_not_mix():
    left, right = blocks.from_arrays({"i": np.arange(10)}), blocks.from_arrays({"k": np.arange(12)})
    with pytest.raises(ValueError, match=r"10 rows, the right side .*12"):
        little(left.zip(right).repeat(3)).count()
    same = little(left.zip(left).shuffle().repeat(3))
    found = numbers(same).reshape(3, 10)
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(10), (3, 1)))


# ---- repeat


def test_a_repeat_within_a_repeat_is_shuffled_by_its_own_length():
    dataset = little(blocks.from_arrays({"i": np.arange(100)}).repeat(2).shuffle().repeat(3))
    epochs = numbers(dataset).reshape(3, 200)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.repeat(np.arange(100), 2))
        assert not np.array_equal(np.sort(epoch[:100]), np.arange(100))  # the two are one
    assert not np.array_equal(epochs[0], epochs[1])


def test_an_endless_plan_waits_for_its_consumer():
    dataset = little(blocks.from_arrays(wide()).repeat())
    taken = dataset.iter_blocks()
    for _ in range(3):
        next(taken)
    time.sleep(0.5)
    taken.close()
    assert dataset._statistics["most"] < 4 << 20


# ---- streams


def test_one_worker_reads_a_stream_and_does_what_follows():
    def forever():
        for number in itertools.count():
            yield {"i": np.arange(1000) + 1000 * number, "x": np.zeros((1000, 64))}

    plan = blocks.from_iter(forever, batched=True).shuffle(window="2MiB")
    taken = little(plan.map_batches(lambda batch: {"i": batch["i"]}), num_workers=1).iter_batches(1000)
    found = np.concatenate([next(taken)["i"].copy() for _ in range(100)])
    taken.close()
    assert len(np.unique(found)) == len(found)
    assert found.max() < 150_000


def test_random_numbers_of_a_stream_do_not_depend_on_what_is_put_between():
    def items():
        for _ in range(60):
            yield {"i": np.random.rand(1000), "x": np.zeros((1000, 64))}  # noqa: NPY002

    plan = blocks.from_iter(items, batched=True).repartition(rows_per_block=1500)
    plan = plan.map_batches(lambda batch: {"i": batch["i"], "r": np.random.rand(len(batch["i"]))})  # noqa: NPY002
    found = [[numbers(little(plan, num_workers=workers), column) for workers in (1, 2, 3)] for column in "ir"]
    for several in found:
        for each in several[1:]:
            np.testing.assert_array_equal(each, several[0])


def test_one_worker_is_enough_for_two_streams_side_by_side():
    def items(name):
        for number in range(200):
            yield {name: np.arange(1000) + 1000 * number, f"x{name}": np.zeros((1000, 64))}

    left, right = (blocks.from_iter(functools.partial(items, name), batched=True) for name in "ab")
    dataset = little(left.zip(right), num_workers=1)
    found = [(block["a"].copy(), block["b"].copy()) for block in dataset.iter_blocks()]
    for a, b in found:
        np.testing.assert_array_equal(a, b)
    assert sum(len(a) for a, _ in found) == 200_000
    assert dataset._statistics["most"] < 32 << 20  # of 208 MB


# ---- memory


def test_rows_that_grow_before_a_full_shuffle_still_fit():
    """32 times: a partition by the size of the source would not fit into memory."""
    rows = 60_000
    plan = blocks.from_arrays({"i": np.arange(rows)}).map_batches(
        lambda batch: {"i": batch["i"], "x": np.repeat(batch["i"], 256).reshape(-1, 256)}
    )
    dataset = plan.options(memory="64MiB", num_workers=2, seed=1).shuffle()
    found, most, home = np.zeros(rows, bool), 0, None
    for batch in dataset.iter_batches(500):
        assert (batch["x"] == batch["i"][:, None]).all()
        found[batch["i"]] = True
        home = home or next(each for each in _home._homes.values() if each.shares)
        most = max(most, home.store.info()["committed_bytes"])
    assert found.all()
    assert most <= 64 << 20


def test_a_block_of_repartition_is_not_cut():
    sizes = [len(block["i"]) for block in little(blocks.from_arrays(wide())).repartition(2).iter_blocks()]
    assert sizes == [ROWS // 2, ROWS // 2]
    odd = (
        little(blocks.from_arrays(wide()))
        .repartition(rows_per_block=6000)
        .filter(lambda batch: batch["i"] % 2 == 1)
    )
    assert [len(block["i"]) for block in odd.iter_blocks()] == [3000, 3000, 3000, 1000]


@pytest.mark.parametrize("kind", ["numpy", "arrow"])
def test_a_block_of_repartition_may_be_a_third_of_the_memory(kind):
    rows = 110_000  # 57 MB in five blocks, where 32 MiB of 64 are for blocks, and the loop has one of them
    dataset = blocks.from_arrays(wide(rows))
    if kind == "arrow":
        dataset = dataset.map_batches(lambda table: table, batch_format="arrow")
    dataset = little(dataset.repartition(5), memory="64MiB")
    assert [len(block["i"]) for block in dataset.iter_blocks()] == [rows // 5] * 5
    found = [np.array(block["i"]) for block in dataset.shuffle(window="1MiB").iter_blocks()]
    assert np.concatenate(found).sum() == rows * (rows - 1) // 2


def test_blocks_of_repartition_are_whole_though_their_types_differ():
    words = [f"{'w' * (number // 500)}{number}" for number in range(6000)]
    dataset = little(blocks.from_iter(words).repartition(rows_per_block=2000))
    found = [block["item"].copy() for block in dataset.iter_blocks()]
    assert [len(block) for block in found] == [2000, 2000, 2000]
    assert np.concatenate(found).tolist() == words


def test_columns_without_bytes_take_no_memory():
    dataset = blocks.from_arrays({"nothing": np.zeros((5, 0, 100)), "void": np.zeros(5, "S0")})
    (block,) = dataset.map_batches(lambda batch: batch).options(num_workers=1).iter_blocks()
    assert block["nothing"].shape == (5, 0, 100)


# ---- seeds


def test_the_seed_of_a_shuffle_is_that_of_its_order_alone():
    def drawn(order, run):
        plan = blocks.from_arrays({"i": np.arange(1000)}).shuffle(seed=order, window="1MiB")
        plan = plan.map_batches(lambda batch: {"i": batch["i"], "r": np.random.rand(len(batch["i"]))})  # noqa: NPY002
        return [numbers(little(plan, seed=run), column) for column in "ir"]

    first, other_run, other_order = drawn(1, 1), drawn(1, 2), drawn(2, 1)
    np.testing.assert_array_equal(first[0], other_run[0])
    assert not np.array_equal(first[1], other_run[1])
    assert not np.array_equal(first[0], other_order[0])
    np.testing.assert_array_equal(first[1], other_order[1])


def test_torch_is_seeded_though_a_function_imports_it(tmp_path):
    passes(
        """
import sys
import numpy as np
from torchshm.data import blocks

def draw(batch):
    import torch
    assert torch.get_num_threads() == 1
    return {"r": torch.rand(len(batch["i"]))}

def run(workers):
    plan = blocks.from_arrays({"i": np.arange(40_000)}).map_batches(draw)
    plan = plan.options(seed=1, num_workers=workers, block_size="64KiB", memory="96MiB")
    return np.concatenate([block["r"].copy() for block in plan.iter_blocks()])

found = [run(workers) for workers in (1, 2, 4)]
assert "torch" not in sys.modules
for each in found:
    np.testing.assert_array_equal(each, found[0])
assert len(np.unique(found[0])) > 39_000
""",
        tmp_path,
    )


# ---- shards


def test_an_epoch_that_all_shards_leave_is_given_up_and_the_next_one_begins():
    plan = little(blocks.from_arrays(wide(100_000)), memory="64MiB").shuffle(seed=1, window="2MiB")
    first, second = plan.split(2)
    for _ in range(3):
        for shard in (first, second):
            taken = shard.iter_batches(100)
            next(taken)
            taken.close()
    assert sum(len(batch["i"]) for shard in (first, second) for batch in _interleaved(shard)) > 0
    first._run.close()


def _interleaved(shard):
    yield from itertools.islice(shard.iter_batches(100), 5)


def test_a_shard_that_is_left_early_does_not_hold_up_the_others():
    plan = little(blocks.from_arrays(wide(100_000)), memory="64MiB")
    first, second = plan.split(2, equal=False)
    taken = first.iter_batches(100)
    next(taken)
    taken.close()
    assert sum(len(batch["i"]) for batch in second.iter_batches(1000)) >= 49_000
    assert second._statistics["most"] < 24 << 20
    rows = sum(len(batch["i"]) for batch in _both(first, second))  # the next epoch, all of it
    assert rows == 100_000
    first._run.close()


def _both(first, second):
    sides = [first.iter_batches(1000), second.iter_batches(1000)]
    for pair in itertools.zip_longest(*sides):
        yield from (batch for batch in pair if batch is not None)


def test_a_forked_child_that_drops_an_iterator_leaves_the_parents_alone():
    (shard,) = little(blocks.from_arrays(wide())).split(1)
    taken = shard.iter_batches(100)
    first = next(taken)["i"].copy()
    child = os.fork()
    if child == 0:
        try:
            taken.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    rest = np.concatenate([batch["i"] for batch in taken])
    np.testing.assert_array_equal(np.concatenate([first, rest]), np.arange(ROWS))
    shard._run.close()


def test_an_iterator_that_is_kept_does_not_hold_up_the_next_epoch():
    (shard,) = little(blocks.from_arrays(wide(100_000))).split(1)
    kept = shard.iter_batches(100)
    next(kept)
    assert sum(len(batch["i"]) for batch in shard.iter_batches(1000)) == 100_000
    shard._run.close()
