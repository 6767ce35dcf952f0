"""xarray, pandas, scipy and torch objects carry their buffers through the pool and work as ever on arrival."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from peer import give, keep, kept

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

ROWS = 3000


def frame():
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "a": rng.standard_normal(ROWS),
            "b": rng.standard_normal(ROWS),
            "n": rng.integers(0, 100, ROWS),
            "small": rng.integers(0, 100, ROWS).astype("i1"),
            "flag": rng.integers(0, 2, ROWS).astype(bool),
            "time": pd.date_range("2013-01-01", periods=ROWS, freq="h", tz="UTC"),
            "carrier": pd.Categorical(rng.choice(["UA", "AA", "DL"], ROWS)),
            "name": rng.choice(["one", "two", None], ROWS),
            "nullable": pd.array([None, 1, 2] * (ROWS // 3), dtype="Int64"),
            "object": [(1, 2)] * ROWS,
        },
        index=pd.Index(np.arange(ROWS) * 2, name="key"),
    )


def dataset():
    rng = np.random.default_rng(2)
    times = pd.date_range("2020-01-01", periods=20)
    field = xr.DataArray(
        rng.standard_normal((20, 30, 40), "f4"),
        dims=("time", "latitude", "longitude"),
        coords={"time": times, "latitude": np.linspace(90, -90, 30), "longitude": np.arange(40.0)},
        attrs={"units": "K"},
    )
    return xr.Dataset({"t": field, "mean": field.mean("time"), "number": 7}, attrs={"source": "test"})


def buffers(x):
    """The NumPy arrays behind an object."""
    if isinstance(x, xr.Dataset):
        return [x[name].variable._data for name in ["t", "mean"]]
    return [x[name].to_numpy() for name in ["a", "n"]]


def change(name):
    x = kept[name]
    if isinstance(x, xr.Dataset):
        x["t"][:, 3] = -1
        x["t"].values[0] = -2
    else:
        x.loc[x.index < 100, "a"] = -1
        x["b"] = x["b"] * 2
        x.iloc[5, 2] = -5
    return x


def test_frame_arrives_equal_and_through_the_pool(peer):
    x = frame()
    got = peer.call(give, x)
    pd.testing.assert_frame_equal(got, x)
    assert all(map(torchshm.is_shared, buffers(got)))


def test_dataset_arrives_equal_and_through_the_pool(peer):
    x = dataset()
    got = peer.call(give, x)
    assert got.identical(x)
    assert torchshm.is_shared(got["t"].values)
    np.testing.assert_array_equal(got.sel(latitude=90)["t"].values, x.sel(latitude=90)["t"].values)


@pytest.mark.parametrize("make", [frame, dataset])
def test_shared_object_is_sent_without_a_copy(peer, make):
    x = torchshm.share(make())
    before = torchshm.stats()["live_bytes"]
    peer.call(keep, "x", x)
    assert torchshm.stats()["live_bytes"] - before < 64 << 10
    assert all(map(torchshm.is_shared, buffers(x)))


@pytest.mark.parametrize("make", [frame, dataset])
@pytest.mark.parametrize("shared", [True, False])
def test_everyone_changes_their_own(peer, other, make, shared):
    """Also pandas' copy-on-write, which counts references within a process only."""
    x = torchshm.share(make()) if shared else make()
    peer.call(keep, "x", x)
    other.call(keep, "x", x)
    wanted = make()
    keep("wanted", wanted)
    wanted = change("wanted")
    assert _same(peer.call(change, "x"), wanted)
    assert _same(x, make())
    assert _same(other.call(_kept, "x"), make())


def _kept(name):
    return kept[name]


def _same(x, y):
    if isinstance(x, xr.Dataset):
        return x.identical(y)
    pd.testing.assert_frame_equal(x, y)
    return True


def test_frame_works_as_ever_on_arrival(peer):
    x = torchshm.share(frame())
    got = peer.call(give, x)
    got.loc[got["n"] > 50, "a"] = 0.0
    got["filled"] = got["nullable"].fillna(0)
    got.fillna({"name": "none"}, inplace=True)
    got["a"].to_numpy(copy=True)[:] = 3
    wanted = frame()
    wanted.loc[wanted["n"] > 50, "a"] = 0.0
    wanted["filled"] = wanted["nullable"].fillna(0)
    wanted.fillna({"name": "none"}, inplace=True)
    pd.testing.assert_frame_equal(got, wanted)
    pd.testing.assert_frame_equal(
        got.groupby("carrier", observed=True)["a"].agg(["mean", "size"]),
        wanted.groupby("carrier", observed=True)["a"].agg(["mean", "size"]),
    )
    assert got.sort_values("b").index.tolist() == wanted.sort_values("b").index.tolist()


def test_index_and_series_arrive(peer):
    for x in [
        frame()["a"],
        frame().index,
        frame().set_index(["carrier", "n"]).index,
        frame()["time"],
        frame()["carrier"],
    ]:
        got = peer.call(give, x)
        (pd.testing.assert_series_equal if isinstance(x, pd.Series) else pd.testing.assert_index_equal)(
            got, x
        )


def test_sparse_matrix_arrives(peer):
    sparse = pytest.importorskip("scipy.sparse")
    x = sparse.random(300, 400, 0.1, "csr", random_state=1)
    got = peer.call(give, x)
    assert (got != x).nnz == 0
    assert torchshm.is_shared(got.data)
    assert type(got) is type(x)
    got.data[:] = 1


def test_tensors_and_arrays_in_one_message(peer):
    """Tensors keep torch's own way and semantics; arrays beside them go ours."""
    tensor, array = torch.arange(5000.0), np.arange(5000.0)
    got_tensor, got_array = peer.call(give, (tensor, array))
    assert torch.equal(got_tensor, tensor)
    assert np.array_equal(got_array, array)
    assert torchshm.is_shared(got_array)


def test_tensor_over_pooled_memory_can_be_sent(peer):
    x = torchshm.share(np.arange(5000.0), "r+")
    assert torch.equal(peer.call(give, torch.from_numpy(x)), torch.arange(5000.0, dtype=torch.float64))
    assert x[7] == 7
