"""share(report=True): each leaf by its path, its bytes, and whether it was moved."""

from __future__ import annotations

import types

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from peer import give
from shareable import CASES, N, Sample, Slotted, dataset, mixed_frame, rng, table

import torchshm

pytestmark = pytest.mark.usefixtures("registered")


def outcomes(report):
    return {leaf.path: leaf.outcome for leaf in report}


def test_result_comes_with_a_report():
    x = {"a": np.zeros(N)}
    y, report = torchshm.share(x, report=True)
    np.testing.assert_array_equal(y["a"], x["a"])
    (leaf,) = report
    assert (leaf.path, leaf.kind, leaf.nbytes, leaf.outcome, leaf.why) == (
        "['a']",
        "float64 array",
        8 * N,
        "moved",
        "",
    )
    assert (len(report), report.moved, report.there, report.left) == (1, 8 * N, 0, 0)
    assert report.pickled < 300


def test_paths_are_how_a_program_reaches_the_leaves():
    x = types.SimpleNamespace(
        list=[np.zeros(N), (np.ones(N),)],
        frame=mixed_frame()[["a", "b", "when", "text"]],
        field=dataset()["temperature"],
        data=dataset(),
        sample=Sample({1: Slotted(np.zeros(N), "n")}, "m"),
        table=table().select(["f", "text"]),
        model=torch.nn.Linear(100, 100),
    )
    _, report = torchshm.share(x, report=True)
    large = {leaf.path for leaf in report if leaf.nbytes > 1000}
    assert large == {
        ".list[0]",
        ".list[1][0]",
        ".frame['a', 'b']",
        ".frame['when']",
        ".frame['text']",
        ".frame.index",
        ".field.values",
        ".field['time'].values",
        ".data['temperature'].values",
        ".data['count'].values",
        ".data['time'].values",
        ".data.attrs['table']",
        ".sample.fields[1].data",
        ".table['f']",
        ".table['text']",
        ".model._parameters['weight']",
    }
    assert set(outcomes(report).values()) == {"moved"}


@pytest.mark.parametrize("name", [name for name in CASES if name != "out of band"])
def test_all_that_moves_is_in_the_report_and_moves_once(name):
    x = CASES[name].make()
    before = torchshm.stats()["live_bytes"]
    y, report = torchshm.share(x, report=True)
    grown = torchshm.stats()["live_bytes"] - before
    blocks = torchshm.stats()["blocks"]
    assert 0.9 * report.moved - 5000 <= grown <= report.moved + 4096 * (blocks + 1)
    _, again = torchshm.share(y, report=True)
    assert again.moved == 0
    assert report.moved - 200 <= again.there <= report.moved  # pickling drops bitmaps of nothing missing
    assert outcomes(again).keys() == outcomes(report).keys()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_what_is_left_says_why():
    x = {
        "objects": np.array([[1], "two"] * N, dtype=object),
        "bytes": bytes(N),
        "frame": pd.DataFrame({"o": pd.Series([(1,)] * N, dtype=object)}),
        "strings": np.array(["a" * 40] * 1000, dtype=np.dtypes.StringDType()),
        "own": np.zeros(N).view(np.ndarray),
        "kind": np.char.array(["abc"] * N),
        "sparse": torch.eye(200).to_sparse(),
        "meta": torch.empty(2000, device="meta"),
    }
    _, report = torchshm.share(x, report=True)
    why = {leaf.path: leaf.why for leaf in report if leaf.outcome == "left"}
    assert why.keys() >= {"['objects']", "['bytes']", "['frame']['o']", "['strings']", "['kind']", "['meta']"}
    assert outcomes(report)["['own']"] == "moved"
    assert all(why.values())
    assert why["['objects']"] == why["['frame']['o']"] == "Python objects"
    assert "StringDType" in why["['strings']"]
    assert "meta" in why["['meta']"]
    assert report.left >= N


def test_what_is_copied_again_counts_as_moved(peer):
    """Written since, or received in a message."""
    y = torchshm.share([np.zeros(N), np.zeros(N)])
    y[1][5] = 1
    received = peer.call(give, np.zeros(N))
    _, report = torchshm.share([*y, received], report=True)
    assert outcomes(report) == {"[0]": "there", "[1]": "moved", "[2]": "moved"}


def test_modes_of_one_block_are_one_place():
    y = torchshm.share(np.zeros(N), "r+")
    _, report = torchshm.share(y, "r", report=True)
    assert outcomes(report) == {"": "there"}


def test_memory_is_listed_once():
    x = np.zeros(N)
    _, report = torchshm.share({"a": x, "b": x}, report=True)
    assert outcomes(report) == {"['a']": "moved"}


def test_objects_that_hold_themselves_have_a_report():
    x = {"a": np.zeros(N)}
    x["self"] = x
    _, report = torchshm.share(x, report=True)
    assert outcomes(report) == {"['a']": "moved"}


def test_report_is_a_table():
    _, report = torchshm.share(
        {"a": np.zeros(1 << 20), "text": b"x" * 5000, "b": pa.array(rng().random(N))}, report=True
    )
    lines = str(report).splitlines()
    assert lines[0].split() == ["['a']", "float64", "array", "8.0", "MiB", "moved"]
    assert "left: " in lines[1]
    assert lines[-1].startswith("moved 8.4 MiB, already there 0 B, left 4.9 KiB")
    assert "8.4 MiB moved" in repr(report)


def test_sizes_are_said_in_the_unit_that_fits():
    from torchshm._size import format_size

    assert [format_size(n) for n in (0, 1023, 1024, 1.5 * 2**20, 2**30, 2**40, 5000 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "1.0 GiB",
        "1.0 TiB",
        "5000.0 TiB",
    ]
