"""torchdata.nodes and the StatefulDataLoader of torchdata 0.11, in an environment of their own: the same with PyTorch alone and after
register(), and then through the pool."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from nodes import CASES
from scripts import run

HERE = Path(__file__).parent
NODES = HERE.parents[1] / ".venv-nodes"  # `make test-python` fills it

pytestmark = pytest.mark.timeout(300)


def results(way, folder):
    assert (NODES / "torchdata" / "nodes").is_dir(), "torchdata 0.11 is not in .venv-nodes: make test-python"
    done = run(
        [sys.executable, str(HERE / "nodes.py"), way],
        folder,
        PYTHONPATH=os.pathsep.join([str(NODES), *filter(None, sys.path)]),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    return {way: results(way, tmp_path_factory.mktemp(way)) for way in ("stock", "register")}


def without_pool(told):
    """The same without where it lies."""
    if isinstance(told, dict):
        return {key: without_pool(value) for key, value in told.items() if key != "pooled"}
    return [without_pool(x) for x in told] if isinstance(told, list) else told


def pooled(told):
    """Where all lies that was large enough."""
    if isinstance(told, dict):
        return {x for key, value in told.items() for x in (value if key == "pooled" else pooled(value))}
    return {x for value in told for x in pooled(value)} if isinstance(told, list) else set()


def test_it_is_the_right_torchdata(ways):
    assert all(way["version"].startswith("0.11.") for way in ways.values())


@pytest.mark.parametrize("name", CASES)
def test_what_comes_is_the_same_and_lies_in_the_pool(ways, name):
    stock, ours = ways["stock"][name], ways["register"][name]
    assert without_pool(ours) == without_pool(stock)
    assert len(without_pool(ours)) > 0
    if pooled(stock):
        # Stacked after it has arrived, a batch lies in memory of this process.
        assert (pooled(stock), pooled(ours)) == ({False}, {name != "mappings, batched afterwards"})
    else:
        assert name in ("an error", "PinMemory")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("resumed")])
def test_a_loader_goes_on_where_another_one_was(ways, name):
    case = ways["register"][name]
    assert case["whole"] == case["seen"] + case["rest"] and len(case["seen"]) == 3


def test_the_other_workers_samples_come_and_no_more(ways):
    assert len(ways["register"]["a worker is killed"]["seen"]) == 23
    assert ways["register"]["a worker is killed"]["more"] == 0
