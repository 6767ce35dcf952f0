"""torchshm.data.blocks in torch's loaders: resumption without a seed, several datasets in one program, torchdata.nodes."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import run
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torchshm.data import blocks

pytestmark = pytest.mark.apart

ROWS = 5000
NODES = Path(__file__).parents[2] / ".venv-nodes"  # `make test-python` fills it


def job(rows=ROWS, begin=0, **more):
    given = {"i": np.arange(begin, begin + rows)}
    return (
        blocks.from_arrays(given)
        .options(**{"memory": "64MiB", "block_size": "4KiB", "num_workers": 2, **more})
        .shuffle(window="20KiB")
    )


def rows_of(batches):
    return [batch["i"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was_though_nobody_gave_a_seed(workers):
    def loader(dataset):
        return StatefulDataLoader(dataset.to_dataset(batch_size=100), batch_size=None, num_workers=workers)

    first = loader(job())
    stream = iter(first)
    seen = [next(stream)["i"].tolist() for _ in range(17)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    rest = rows_of(stream)
    second = loader(job())  # it has drawn another seed
    second.load_state_dict(state)
    assert rows_of(second) == rest
    assert sorted(i for batch in seen + rest for i in batch) == list(range(ROWS))


def test_a_state_is_of_the_batches_that_were_yielded():
    dataset = job().to_dataset(batch_size=100, batch_format="numpy")
    stream = iter(dataset)
    before = stream.state_dict()
    assert before["batches"] == 0
    expected = rows_of(stream)
    assert stream.state_dict() == {**before, "batches": 50}
    for done in (30, 10, 50):
        stream.load_state_dict({**before, "batches": done})
        assert stream.state_dict()["batches"] == done
        assert rows_of(stream) == expected[done:]
    assert rows_of(iter(dataset)) != expected  # the next epoch


def test_every_dataset_draws_a_seed_of_its_own_and_keeps_it_for_all_epochs():
    one, other = (job().to_dataset(batch_size=100, batch_format="numpy") for _ in range(2))
    assert rows_of(one) != rows_of(other)
    one.set_epoch(0)
    first = rows_of(one)
    again = pickle.loads(pickle.dumps(one))
    again.set_epoch(0)
    assert rows_of(again) == first != rows_of(again)
    given = job(seed=3).to_dataset(batch_size=100)
    assert iter(given).state_dict()["seed"] == 3


def test_datasets_of_loaders_with_the_same_seed_stay_apart():
    loaders = []
    for begin in (0, ROWS):
        loaders.append(
            DataLoader(
                job(begin=begin).to_dataset(batch_size=100),
                batch_size=None,
                num_workers=2,
                generator=torch.Generator().manual_seed(1),
            )
        )
    found = [[], []]
    for pair in zip(*loaders, strict=True):
        for rows, batch in zip(found, pair, strict=True):
            rows += batch["i"].tolist()
    assert sorted(found[0]) == list(range(ROWS))
    assert sorted(found[1]) == list(range(ROWS, 2 * ROWS))


@pytest.mark.parametrize("name", ["arrow", "pandas", "xarray"])
def test_rows_of_tables_are_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match=f"give a batch_size for batch_format='{name}'"):
        job().to_dataset(batch_format=name)
    assert len(list(job(300).to_dataset(batch_size=100, batch_format=name))) == 3
    with pytest.raises(ValueError, match="batch_format is one of"):
        job().to_dataset(batch_size=3, batch_format="polars")


def test_single_rows_are_dicts():
    rows = list(job(100).to_dataset(batch_format="numpy"))
    assert sorted(int(row["i"]) for row in rows) == list(range(100))


@pytest.mark.parametrize("size", [100, 64, 10 * ROWS])
def test_a_last_batch_that_is_short_is_left_out_by_all_consumers(size):
    dataset = job(1000, seed=1)
    expected = 1000 // size
    (shard,) = dataset.split(1)
    for batches in (
        dataset.iter_batches(size, drop_last=True),
        shard.iter_batches(size, drop_last=True),
        dataset.to_dataset(size, drop_last=True),
    ):
        assert [len(batch["i"]) for batch in batches] == [size] * expected


# ---- torchdata.nodes

PROGRAM = """
import json, sys
import numpy as np
import torchdata.nodes as tn
from torchshm.data import blocks


def node(**more):
    return (
        blocks.from_arrays({"i": np.arange(5000)})
        .options(memory="64MiB", block_size="4KiB", num_workers=2)
        .shuffle(window="20KiB")
        .to_node(**{"batch_size": 100, **more})
    )


def graph(kind):
    made = node()
    return tn.Prefetcher(made, prefetch_factor=3) if kind == "Prefetcher" else made


def told(batches):
    return [batch["i"].tolist() for batch in batches]


def epochs(kind):
    loader = tn.Loader(graph(kind))
    return [told(loader) for _ in range(2)]


def resumed(kind):
    first = tn.Loader(graph(kind))
    stream = iter(first)
    seen = [next(stream)["i"].tolist() for _ in range(17)]
    state = json.loads(json.dumps(first.state_dict()))
    rest, following = told(stream), told(first)
    del stream, first
    second = tn.Loader(graph(kind))
    second.load_state_dict(state)
    return {"seen": seen, "rest": rest, "following": following, "again": [told(second), told(second)]}


def at_the_end(kind):
    first = tn.Loader(graph(kind))
    whole = told(first)
    state = first.state_dict()
    following = told(first)
    second = tn.Loader(graph(kind))
    second.load_state_dict(state)
    return {"whole": whole, "following": following, "again": told(second)}


def left_early(kind):
    loader = tn.Loader(graph(kind))
    for batch in loader:
        break
    return told(loader)


print(json.dumps({
    "rows": [int(row["i"]) for row in node(batch_size=None, batch_format="numpy")],
    "batches": told(tn.Loader(node(batch_size=64, drop_last=True))),
    "mapped": told(tn.Loader(tn.ParallelMapper(node(), lambda b: {"i": b["i"] + 1}, 2, method="thread"))),
    **{f"{case.__name__}, {kind}": case(kind)
       for case in (epochs, resumed, at_the_end, left_early) for kind in ("plain", "Prefetcher")},
}))
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    assert (NODES / "torchdata" / "nodes").is_dir(), "torchdata 0.11 is not in .venv-nodes: make test-python"
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "program.py").write_text(PROGRAM)
    done = run(
        [sys.executable, folder / "program.py"],
        folder,
        PYTHONPATH=os.pathsep.join([str(NODES), *filter(None, sys.path)]),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def flat(batches):
    return sorted(i for batch in batches for i in batch)


def test_a_node_gives_all_rows(nodes):
    assert sorted(nodes["rows"]) == list(range(ROWS))
    assert [len(batch) for batch in nodes["batches"]] == [64] * (ROWS // 64)
    assert flat(nodes["mapped"]) == list(range(1, ROWS + 1))


@pytest.mark.parametrize("kind", ["plain", "Prefetcher"])
def test_each_reset_of_a_node_is_another_epoch(nodes, kind):
    first, second = nodes[f"epochs, {kind}"]
    assert flat(first) == flat(second) == list(range(ROWS)) and first != second
    assert flat(nodes[f"left_early, {kind}"]) == list(range(ROWS))


@pytest.mark.parametrize("kind", ["plain", "Prefetcher"])
def test_a_node_goes_on_in_the_middle_of_an_epoch_and_at_its_end(nodes, kind):
    case = nodes[f"resumed, {kind}"]
    assert len(case["seen"]) == 17 and flat(case["seen"] + case["rest"]) == list(range(ROWS))
    assert case["again"] == [case["rest"], case["following"]]
    case = nodes[f"at_the_end, {kind}"]
    assert case["again"] == case["following"] != case["whole"]


def test_without_nodes_it_is_said_what_to_install():
    with pytest.raises(ImportError, match=r"pip install 'torchdata>=0\.10'"):
        job().to_node(batch_size=3)
