"""Climate fields: an xarray Dataset that goes whole through a DataLoader worker."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.epochs import Epochs

LATITUDES, LONGITUDES = 700, 1400


def make_fields(times: int) -> Any:
    """A Dataset with one float32 variable of `times` x 700 x 1400 and its coordinates."""
    import xarray

    values = np.random.default_rng(0).random((times, LATITUDES, LONGITUDES), dtype=np.float32)
    return xarray.Dataset(
        {"temperature": (("time", "latitude", "longitude"), values)},
        {
            "time": np.datetime64("2024-01-01", "ns") + np.arange(times) * np.timedelta64(3600, "s"),
            "latitude": np.linspace(90, -90, LATITUDES),
            "longitude": np.linspace(0, 360, LONGITUDES, endpoint=False),
        },
    )


class Samples:
    """A dataset whose only sample is `fields`."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.fields


def only(samples: list[Any]) -> Any:
    """The collate function: the sample itself."""
    return samples[0]


class SampleLoader:
    """A DataLoader with one worker that delivers `sample`; `variant` is "stock", "torchshm" or "shared"."""

    def __init__(self, variant: str, sample: Any) -> None:
        self._expected = sample
        if variant != "stock":
            import torchshm

            torchshm.register()
            if variant == "shared":
                sample = torchshm.share(sample)
        self._epochs = Epochs(Samples(sample), only, lambda batch: None, workers=1, batch_size=1)

    def check(self) -> None:
        """Gets the sample and compares it.

        Raises
        ------
        AssertionError
            It is not equal to what the worker was given.
        """
        if not self._epochs.first().equals(self._expected):
            raise AssertionError("the sample arrived damaged")

    def run(self, batches: int) -> tuple[float, float, float]:
        """Seconds, minor faults and processor seconds per sample."""
        return self._epochs.run(batches)


class FieldsLoader(SampleLoader):
    """Of a Dataset of so many time steps."""

    def __init__(self, variant: str, times: int) -> None:
        super().__init__(variant, make_fields(times))
