"""torchdata's loaders: DataLoader2 with both reading services, and StatefulDataLoader."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from parity import described

import torchshm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that torchdata will end
    dataloader2 = pytest.importorskip("torchdata.dataloader2", reason="needs torchdata 0.9")
    from torchdata.datapipes.iter import IterableWrapper
    from torchdata.stateful_dataloader import StatefulDataLoader

from torchshm.data import ReadingService, collate

SIZE = 3000
pytestmark = pytest.mark.filterwarnings("ignore")


def array(i):
    return np.full(SIZE, float(i))


def field(i):
    return xr.Dataset({"t": (("y", "x"), np.full((60, 70), float(i)))}, {"x": np.arange(70), "when": i})


def table(i):
    return pd.DataFrame({"a": np.full(SIZE, i), "b": [f"{i}"] * SIZE})


def tensor(i):
    return torch.full((SIZE,), float(i))


SAMPLES = {"numpy": array, "xarray": field, "pandas": table, "tensors": tensor}


def load(make, service):
    loader = dataloader2.DataLoader2(
        IterableWrapper(range(8)).sharding_filter().map(make), reading_service=service
    )
    try:
        return sorted(repr(described(x)) for x in loader), [torchshm.is_shared(leaf(x)) for x in loader]
    finally:
        loader.shutdown()


def leaf(x):
    return x.t.values if isinstance(x, xr.Dataset) else x.a.values if isinstance(x, pd.DataFrame) else x


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader2(kind, method):
    def service(of):
        return of(num_workers=2, multiprocessing_context=method)

    torchshm.unregister()
    stock, _ = load(SAMPLES[kind], service(dataloader2.MultiProcessingReadingService))
    try:
        ours, shared = load(SAMPLES[kind], service(ReadingService))  # registers
        plain, shared_too = load(SAMPLES[kind], service(dataloader2.MultiProcessingReadingService))
    finally:
        torchshm.unregister()
    assert ours == plain == stock
    assert all(shared) and all(shared_too) and len(shared) == 8


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return array(index)


def interrupted(workers, shuffle, collate_fn):
    """The first of all batches, a loader's first five, and those of a second one that gets its state."""

    def loader():
        return StatefulDataLoader(
            Numbers(),
            batch_size=2,
            shuffle=shuffle,
            num_workers=workers,
            generator=torch.Generator().manual_seed(1),
            collate_fn=collate_fn,
        )

    whole = [x[:, 0].tolist() for x in loader()]
    first, second = loader(), loader()
    seen = [x[:, 0].tolist() for x, _ in zip(first, range(5), strict=False)]
    second.load_state_dict(first.state_dict())
    return whole, seen, [x[:, 0].tolist() for x in second]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_where_it_was(workers, numpy, shuffle):
    torchshm.unregister()
    stock = interrupted(workers, shuffle, None)
    torchshm.register()
    try:
        whole, seen, rest = interrupted(workers, shuffle, functools.partial(collate, numpy=numpy))
    finally:
        torchshm.unregister()
    assert (whole, seen, rest) == stock
    assert shuffle or (len(rest) > 5 and whole[-len(rest) :] == rest)
