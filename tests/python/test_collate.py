"""What torchshm.data.collate does besides default_collate."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scripts import passes
from torch.utils.data import DataLoader, Dataset

import torchshm
from torchshm.data import collate

pytestmark = pytest.mark.usefixtures("registered")

SIZE = 3000


def arrays(*values, dtype=float):
    return [np.full(SIZE, v, dtype) for v in values]


@pytest.mark.parametrize("samples", [arrays(1, 2), [torch.ones(SIZE)] * 2], ids=["arrays", "tensors"])
@pytest.mark.parametrize("numpy", [False, True])
def test_a_batch_lies_in_the_pool(samples, numpy):
    batch = collate(samples, numpy=numpy)
    assert type(batch) is (np.ndarray if numpy else torch.Tensor)
    assert torchshm.is_shared(batch)


def test_a_batch_outside_workers_can_be_resized_as_torchs():
    batch = collate([torch.ones(SIZE)] * 2)
    batch.resize_(SIZE * 20)
    assert batch[0] == 1


def test_samples_are_not_changed_by_what_is_written_to_the_batch():
    samples = arrays(1, 2)
    collate(samples).zero_()
    assert samples[0][0] == 1


def test_without_a_pool_it_is_plain_memory(folder):
    passes(
        """
        import numpy as np, torch
        from torchshm import _C
        from torchshm.data import collate
        for numpy in (False, True):
            batch = collate([np.ones(3000), np.zeros(3000)], numpy=numpy)
            assert batch.shape == (2, 3000) and batch[0, 0] == 1
        assert not _C.is_member()
        """,
        folder,
    )


def test_with_a_full_pool_it_is_plain_memory(folder):
    passes(
        """
        import numpy as np, torchshm
        from torchshm.data import collate
        torchshm.register(limit="8MiB")
        samples = [np.ones(3_000_000), np.zeros(3_000_000)]
        for numpy in (False, True):
            batch = collate(samples, numpy=numpy)
            assert batch.shape == (2, 3_000_000) and batch[0, 0] == 1
            assert not torchshm.is_shared(batch)
        """,
        folder,
    )


@pytest.mark.parametrize(
    "samples",
    [
        arrays(1, 2),
        arrays(1, 2, dtype="M8[s]"),
        arrays(1, 2, dtype=">f4"),
        arrays("a", "b", dtype="U3"),
        [np.array(["a", None], object)] * 2,
        [np.zeros(SIZE, [("x", "f4"), ("y", "i8")])] * 2,
        [np.ones(3), np.ones(3, int)],
        [np.ones((0, 3))] * 2,
        [torch.ones(SIZE)] * 2,
        [torch.ones(SIZE, dtype=torch.complex64).conj()] * 2,
        [1, 2],
        [True, False],
        [1.5, 2.5],
        [np.float32(1), np.float32(2)],
        [np.datetime64("2020-01-01"), np.datetime64("2020-01-02")],
    ],
    ids=str,
)
def test_numpy_batches(samples):
    wanted = np.stack([np.asarray(x.resolve_conj() if torch.is_tensor(x) else x) for x in samples])
    batch = collate(samples, numpy=True)
    assert type(batch) is np.ndarray and batch.dtype == wanted.dtype
    np.testing.assert_array_equal(batch, wanted)


def test_numpy_batches_in_containers():
    batch = collate([{"x": np.ones(3), "y": (1, "a")}] * 2, numpy=True)
    assert batch["x"].shape == (2, 3) and batch["y"][1] == ("a", "a")
    assert batch["y"][0].dtype == np.int64


# ---- padding


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("make", [np.ones, torch.ones], ids=["arrays", "tensors"])
def test_pad_fills_up_to_the_largest(make, numpy):
    batch = collate([make((2, 3)), make((1, 5))], pad=-1, numpy=numpy)
    wanted = np.full((2, 2, 5), -1.0)
    wanted[0, :2, :3] = wanted[1, :1, :5] = 1
    np.testing.assert_array_equal(np.asarray(batch), wanted)
    assert isinstance(batch, np.ndarray) == numpy


@pytest.mark.parametrize("numpy", [False, True])
def test_pad_takes_lists_of_numbers_as_arrays(numpy):
    batch = collate([{"ids": [1, 2, 3]}, {"ids": [4]}, {"ids": []}], pad=0, numpy=numpy)["ids"]
    assert np.asarray(batch).tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    assert str(batch.dtype).endswith("int64")
    assert collate([[1, 2], [3, 4]], pad=0, numpy=numpy).shape == (2, 2)
    batch = collate([[[1, 2], [3]], [[4]]], pad=9, numpy=numpy)
    assert np.asarray(batch).tolist() == [[[1, 2], [3, 9]], [[4, 9], [9, 9]]]


def test_pad_leaves_other_lists_alone():
    assert collate([["a", 1], ["b", 2]], pad=0)[0] == ("a", "b")
    with pytest.raises(RuntimeError, match="equal size"):
        collate([["a"], ["b", "c"]], pad=0)


def test_a_nested_batch():
    batch = collate([torch.arange(3.0), torch.arange(5.0)], pad="nested")
    assert batch.is_nested and batch.layout is torch.jagged
    assert [x.tolist() for x in batch.unbind()] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    batch = collate([[1, 2, 3], [4]], pad="nested")
    assert [x.tolist() for x in batch.unbind()] == [[1, 2, 3], [4]]


def test_what_can_not_be_padded():
    with pytest.raises(ValueError, match="'nested'"):
        collate([np.ones(3)], pad="edge")
    with pytest.raises(ValueError, match="numpy"):
        collate([np.ones(3)], pad="nested", numpy=True)
    with pytest.raises(RuntimeError, match="number of dimensions"):
        collate([np.ones(3), np.ones((3, 3))], pad=0)
    with pytest.raises(RuntimeError, match="first dimension"):
        collate([np.ones((3, 2)), np.ones((3, 3))], pad="nested")


# ---- xarray and pandas


def field(i, shift=0):
    return xr.Dataset(
        {"t": (("y", "x"), np.full((50, 40), float(i)))},
        {"x": np.arange(40) + shift, "y": np.arange(50), "when": i},
    )


def test_xarray_samples_are_stacked_along_batch():
    batch = collate([field(1), field(2)])
    assert dict(batch.sizes) == {"batch": 2, "y": 50, "x": 40}
    assert batch.when.values.tolist() == [1, 2]
    assert list(batch.indexes) == ["x", "y"]
    assert torchshm.is_shared(batch.t.values)
    assert collate([field(1).t, field(2).t]).dims == ("batch", "y", "x")
    assert collate([{"a": field(1).t.variable}] * 2)["a"].dims == ("batch", "y", "x")


def test_windows_of_one_field_keep_their_labels():
    batch = collate([field(1), field(2, shift=40)])
    assert dict(batch.sizes) == {"batch": 2, "y": 50, "x": 40} and not np.isnan(batch.t).any()
    assert batch.x.dims == ("batch", "x") and batch.x.values[1, 0] == 40
    assert list(batch.indexes) == ["y"]


def test_windows_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="align"):
        collate([field(1), field(2).isel(x=slice(5))])


def test_pandas_samples_are_put_below_one_another():
    table = pd.DataFrame({"a": np.arange(SIZE), "b": np.arange(SIZE) * 2.0}, pd.RangeIndex(SIZE, name="row"))
    batch = collate([table, table[5:7]])
    assert batch.index.names == ["batch", "row"]
    assert batch.loc[1].equals(table[5:7])
    assert collate([table.a, table.a]).loc[1].equals(table.a)


# ---- in loaders


class Ragged(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return np.full(SIZE + index, float(index))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_can_be_a_collate_fn_with_options(method):
    loader = DataLoader(
        Ragged(),
        batch_size=3,
        num_workers=1,
        collate_fn=functools.partial(collate, numpy=True, pad=-1.0),
        multiprocessing_context=method,
    )
    _, last = loader
    assert last.shape == (3, SIZE + 5) and last[0, -1] == -1 and last[2, -1] == 5
    assert torchshm.is_shared(last)


def test_a_nested_batch_crosses():
    loader = DataLoader(
        Ragged(), batch_size=3, num_workers=1, collate_fn=functools.partial(collate, pad="nested")
    )
    _, last = loader
    assert [len(x) for x in last.unbind()] == [SIZE + 3, SIZE + 4, SIZE + 5]
    assert torchshm.is_shared(last.values())


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(collate)) is collate


def test_importing_torchshm_does_not_import_torch(folder):
    passes(
        """
        import sys, torchshm
        assert "torch" not in sys.modules
        torchshm.data.collate
        assert "torch" in sys.modules
        """,
        folder,
    )
