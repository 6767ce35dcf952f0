"""Shared frames and datasets behave as the process's own: they can be written to, and what is lazy stays lazy."""

from __future__ import annotations

import gc

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from peer import give, keep, kept
from shareable import N, dataset, mixed_frame, rng, words

import torchshm

pytestmark = pytest.mark.usefixtures("registered")


def write_everywhere(name):
    """Assignments and in-place methods, on what was kept under a name; returns what this process sees then."""
    x = kept[name]
    x.loc[x.index[3], "a"] = -1.0
    x.loc[:, "b"] = 2.0
    x.iloc[0, x.columns.get_loc("i")] = -7
    x["flag"] ^= True
    x.loc[x.index[5], "text"] = "changed"
    x.loc[x.index[0], "nullable"] = 12
    x.loc[x.index[1], "when"] = pd.Timestamp("1999-01-01", tz="Europe/Berlin")
    x.loc[x.index[1], "kind"] = x["kind"].iloc[0]
    x["a"] += 1
    x.fillna({"nullable": 0}, inplace=True)
    x["new"] = x["a"] * 2
    return x


def is_still(name, wanted):
    """Compared there: what comes back over a block that this process has written to has its own writes."""
    compare = (
        pd.testing.assert_frame_equal if isinstance(wanted, pd.DataFrame) else xr.testing.assert_identical
    )
    compare(kept[name], wanted)
    return True


@pytest.mark.parametrize("here", ["argument", "result"])
def test_frame_can_be_written_to_and_nobody_else_sees_it(peer, other, here):
    x = mixed_frame()
    wanted = x.copy()
    y = torchshm.share(x)
    peer.call(keep, "y", y)
    other.call(keep, "y", y)
    changed = peer.call(write_everywhere, "y")
    kept["own"] = wanted.copy()
    pd.testing.assert_frame_equal(changed, write_everywhere("own"))
    kept.clear()
    pd.testing.assert_frame_equal(y, wanted)
    pd.testing.assert_frame_equal(x, wanted)
    assert other.call(is_still, "y", wanted)
    kept["here"] = x if here == "argument" else y
    write_everywhere("here")
    kept.clear()
    assert other.call(is_still, "y", wanted)
    assert peer.call(is_still, "y", changed)


def test_frame_is_not_consolidated():
    x = pd.DataFrame({"a": rng().random(N)})
    for i in range(5):
        x[f"more {i}"] = rng().random(N)
    y = torchshm.share(x)
    assert [b.values.shape for b in y._mgr.blocks] == [b.values.shape for b in x._mgr.blocks] == [(1, N)] * 6
    assert all(torchshm.is_shared(y[name].to_numpy()) for name in y)


def test_views_of_a_shared_frame_are_pandas_views(peer):
    """Copy-on-write of pandas goes on over it: the first write to one of two frames copies, and the other one stays."""
    y = torchshm.share(pd.DataFrame(rng().random((N, 3)), columns=list("abc")))
    wanted = y.copy(deep=True)
    part = y[["a"]]
    part.loc[0, "a"] = -1
    pd.testing.assert_frame_equal(y, wanted)
    assert peer.call(give, part).loc[0, "a"] == -1


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_frame_in_other_modes(peer, mode):
    y = torchshm.share(pd.DataFrame({"a": np.zeros(N)}), mode)
    peer.call(keep, "y", y)
    if mode == "r":
        with pytest.raises(ValueError, match="read-only"):
            y.loc[0, "a"] = 1
    else:
        y.loc[0, "a"] = 1
        assert peer.call(is_still, "y", y.copy())


def test_object_columns_fall_back_and_the_others_are_shared(peer):
    x = pd.DataFrame({"a": rng().random(N), "o": pd.Series([(i, "x") for i in range(N)], dtype=object)})
    y = torchshm.share(x)
    pd.testing.assert_frame_equal(peer.call(give, y), x)
    assert torchshm.is_shared(y["a"].to_numpy())


def test_dataset_can_be_written_to_and_nobody_else_sees_it(peer):
    x = torchshm.share(dataset())
    wanted = x.copy(deep=True)
    peer.call(keep, "x", x)
    x["temperature"][0, 0] = -1
    x["count"].values[:] += 1
    assert peer.call(is_still, "x", wanted)


# ---- lazy


@pytest.fixture
def file(tmp_path):
    pytest.importorskip("netCDF4")
    x = xr.Dataset({"a": ("x", rng().random(N)), "b": ("x", rng().random(N))}, {"x": np.arange(N)})
    x.to_netcdf(tmp_path / "x.nc", engine="netcdf4")
    return tmp_path / "x.nc"


def in_memory(x):
    return {name: isinstance(x[name].variable._data, np.ndarray) for name in x.data_vars}


def test_lazily_loaded_variables_stay_lazy(peer, file):
    with xr.open_dataset(file, engine="netcdf4") as x:
        x["a"].load()
        y, report = torchshm.share(x, report=True)
        assert in_memory(y) == {"a": True, "b": False}
        assert torchshm.is_shared(y["a"].variable._data)
        assert {leaf.path: leaf.outcome for leaf in report} == {
            "['a'].values": "moved",
            "['b'].values": "left",
            "['x'].values": "moved",
        }
        assert "share(x.load())" in str(report)
        assert peer.call(in_memory, y) == {"a": True, "b": False}
        xr.testing.assert_identical(peer.call(give, y).load(), x.load())


def test_loaded_dataset_is_shared(file):
    with xr.open_dataset(file, engine="netcdf4") as x:
        y = torchshm.share(x.load())
    xr.testing.assert_identical(y, x)
    assert torchshm.is_shared(y["b"].values)


def test_dask_arrays_stay_dask_arrays_and_their_chunks_are_shared(peer):
    array = pytest.importorskip("dask.array")
    x = xr.Dataset({"a": ("x", array.from_array(rng().random(N), chunks=N // 4))})
    before = torchshm.stats()["live_bytes"]
    y, report = torchshm.share(x, report=True)
    assert y["a"].chunks == x["a"].chunks
    assert torchshm.stats()["live_bytes"] - before >= 8 * N  # what the graph holds
    assert [(leaf.outcome, leaf.nbytes) for leaf in report] == [("left", 8 * N)]
    assert "share(x.compute())" in str(report)
    xr.testing.assert_identical(peer.call(give, y).compute(), x.compute())
    assert torchshm.is_shared(torchshm.share(x.compute())["a"].values)


def test_nothing_is_left_when_the_object_goes():
    gc.collect()
    before = torchshm.stats()["blocks"]
    y = torchshm.share([mixed_frame(), dataset(), pd.Index(words())])
    assert torchshm.stats()["blocks"] > before
    del y
    gc.collect()
    assert torchshm.stats()["blocks"] == before
