"""One kind of batch: its loader, the check of what arrives, and what the program does with it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torchshm.demo import collate
from torchshm.demo.climate import VARIABLE
from torchshm.demo.datasets import Crops, Whole
from torchshm.demo.settings import Settings

FIELDS_FILE = "fields.nc"
FLIGHTS_FILE = "flights.pickle"

# Way -> what the program writes for it.
WAYS = {
    "stock": "stock PyTorch",
    "register": "register()",
    "pooled": "and collate in pooled()",
    "share": "and share() beforehand",
}

# Case -> the ways it is measured in, stock first.
CASES = {
    "numpy": ("stock", "register", "pooled"),
    "tensor": ("stock", "register"),
    "xarray": ("stock", "register", "share"),
    "pandas": ("stock", "register"),
    "train": ("stock", "register", "pooled"),
}


class NumpyCase:
    """Batches of crops of the climate field, stacked in the worker. The program only receives them."""

    prefetch = 2

    def __init__(self, data: Path, way: str, settings: Settings) -> None:
        import xarray as xr

        self.settings = settings
        self.dataset = Crops(xr.load_dataset(data / FIELDS_FILE)[VARIABLE].values, settings.crop)
        self.collate: Any = collate.stack_pooled if way == "pooled" else collate.stack
        self.batch_bytes = self._expected(0).nbytes

    def loader(self) -> Any:
        """A fresh DataLoader; it goes through the dataset in order and has no end that a round reaches."""
        return _loader(self.dataset, self.settings.batch_size, self.collate, self.prefetch, self.settings)

    def check(self, batch: Any, index: int) -> None:
        """Raise AssertionError unless the `index`-th batch has arrived as the dataset has it."""
        expected = self._expected(index)
        np.testing.assert_array_equal(batch, expected, strict=True)
        _check_flags(batch)

    def array(self, batch: Any) -> np.ndarray:
        """The largest array in `batch`."""
        return batch

    def consumer(self, losses: list[float]) -> Callable[[Any], None]:
        """What the program does with each batch of a run; training appends to `losses`."""
        return lambda batch: None

    def _expected(self, index: int) -> np.ndarray:
        size = self.settings.batch_size
        return np.stack([self.dataset[i] for i in range(index * size, (index + 1) * size)])


class TensorCase(NumpyCase):
    """The same crops as PyTorch's default_collate has them: batches are tensors."""

    def __init__(self, data: Path, way: str, settings: Settings) -> None:
        super().__init__(data, way, settings)
        self.collate = None

    def check(self, batch: Any, index: int) -> None:
        """Raise AssertionError unless the `index`-th batch has arrived as the dataset has it."""
        import torch

        assert type(batch) is torch.Tensor, type(batch)
        super().check(batch.numpy(), index)

    def array(self, batch: Any) -> np.ndarray:
        """The memory of the tensor."""
        return batch.numpy()


class TrainCase(NumpyCase):
    """The same batches, and a model trains on them."""

    def consumer(self, losses: list[float]) -> Callable[[Any], None]:
        """A model with fresh weights, the same ones each time."""
        import torch

        from torchshm.demo.model import Forecast

        # The workers have the other cores. Two OpenMP threads that wait for each other on a busy machine took
        # 200 ms for a step of 13 ms.
        torch.set_num_threads(1)
        model = Forecast()
        return lambda batch: losses.append(model.step(batch))


class XarrayCase:
    """The whole climate field as an xarray Dataset, cftime coordinates and all."""

    prefetch = 1  # each one in flight is 392 MB, more than once with stock PyTorch

    def __init__(self, data: Path, way: str, settings: Settings) -> None:
        import xarray as xr

        self.settings = settings
        item = xr.load_dataset(data / FIELDS_FILE)
        if way == "share":
            import torchshm

            shared = torchshm.share(item)
            xr.testing.assert_identical(shared, item)
            item = shared
        self.dataset = Whole(item)
        self.batch_bytes = int(item.nbytes)

    def loader(self) -> Any:
        """A fresh DataLoader; it goes through the dataset in order and has no end that a round reaches."""
        return _loader(self.dataset, None, collate.same, self.prefetch, self.settings)

    def check(self, batch: Any, index: int) -> None:
        """Raise AssertionError unless the Dataset has arrived as it is: values, coordinates, attributes."""
        import xarray as xr

        xr.testing.assert_identical(batch, self.dataset.item)
        _check_flags(self.array(batch))

    def array(self, batch: Any) -> np.ndarray:
        """The largest array in `batch`."""
        return batch[VARIABLE].values

    def consumer(self, losses: list[float]) -> Callable[[Any], None]:
        """The program only receives."""
        return lambda batch: None


class PandasCase:
    """The whole frame of flights."""

    prefetch = 2

    def __init__(self, data: Path, way: str, settings: Settings) -> None:
        self.settings = settings
        with open(data / FLIGHTS_FILE, "rb") as file:
            frame = pickle.load(file)
        self.dataset = Whole(frame)
        self.batch_bytes = int(frame.memory_usage(deep=True).sum())

    def loader(self) -> Any:
        """A fresh DataLoader; it goes through the dataset in order and has no end that a round reaches."""
        return _loader(self.dataset, None, collate.same, self.prefetch, self.settings)

    def check(self, batch: Any, index: int) -> None:
        """Raise AssertionError unless the frame has arrived as it is: values, index, dtypes, categories."""
        import pandas as pd

        pd.testing.assert_frame_equal(batch, self.dataset.item, check_exact=True, check_column_type="exact")

    def array(self, batch: Any) -> np.ndarray:
        """One of the 19 columns."""
        return batch["distance"].to_numpy()

    def consumer(self, losses: list[float]) -> Callable[[Any], None]:
        """The program only receives."""
        return lambda batch: None


Case = NumpyCase | TrainCase | XarrayCase | PandasCase


def build(name: str, data: Path, way: str, settings: Settings) -> Case:
    """Load the data of a case and prepare it for one way of handing it over.

    Parameters
    ----------
    name : str
        A key of `CASES`.
    data : pathlib.Path
        Folder of `FIELDS_FILE` and `FLIGHTS_FILE`.
    way : str
        A key of `WAYS`. Any but ``"stock"`` needs ``torchshm.register()`` before the loader is made.
    settings : Settings
        Sizes, workers, start method.
    """
    kinds: dict[str, type[Case]] = {
        "numpy": NumpyCase,
        "tensor": TensorCase,
        "train": TrainCase,
        "xarray": XarrayCase,
        "pandas": PandasCase,
    }
    return kinds[name](data, way, settings)


def _check_flags(array: np.ndarray) -> None:
    if not (type(array) is np.ndarray and array.flags.writeable and array.flags.c_contiguous):
        raise AssertionError(f"{type(array)} with\n{array.flags}")


def _loader(dataset: Any, batch_size: int | None, collate_fn: Any, prefetch: int, settings: Settings) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=settings.workers,
        prefetch_factor=prefetch,
        multiprocessing_context=settings.start_method,
    )
