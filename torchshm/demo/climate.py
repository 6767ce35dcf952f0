"""The climate field: a century of June temperatures over North America, on a grid of ERA5's fineness."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

VARIABLE = "air_temperature"

# The A1B scenario of the Met Office Unified Model, 240 x 37 x 49, as Iris distributes it for its gallery.
SOURCE = "A1B_north_america.nc"


def interpolate(
    time_steps: int, grid: tuple[int, int], advance: Callable[[], None] = lambda: None
) -> xr.Dataset:
    """Read the field and bring it to `grid` by linear interpolation.

    Parameters
    ----------
    time_steps : int
        Number of time steps, at most 240.
    grid : tuple of int
        Latitudes and longitudes.
    advance : callable
        Called after each time step.

    Returns
    -------
    xarray.Dataset
        ``air_temperature`` in kelvin, float32, C-contiguous, with shape ``(time_steps, *grid)``. The time
        coordinate holds cftime objects of a 360-day calendar: they cannot live in shared memory, and have to
        arrive all the same.
    """
    import xarray as xr

    with xr.open_dataset(_folder("iris_sample_data") / "sample_data" / SOURCE) as stored:
        coarse = stored[[VARIABLE]].isel(time=slice(time_steps)).load()
    source = coarse[VARIABLE]
    latitude, latitude_weights = _refine(source["latitude"].values, grid[0])
    longitude, longitude_weights = _refine(source["longitude"].values, grid[1])
    field = np.empty((time_steps, *grid), np.float32)
    for step in range(time_steps):
        field[step] = latitude_weights @ source.values[step] @ longitude_weights.T
        advance()
    fine = {
        "latitude": ("latitude", latitude, source["latitude"].attrs),
        "longitude": ("longitude", longitude, source["longitude"].attrs),
    }
    along_time = coarse.drop_dims(["latitude", "longitude"])
    return along_time.assign({VARIABLE: (source.dims, field, source.attrs)}).assign_coords(fine)


def _refine(axis: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a finer axis, and the matrix (points, axis) that interpolates linearly from `axis` to it."""
    finer = np.linspace(axis[0], axis[-1], points, dtype=axis.dtype)
    weights = np.stack([np.interp(finer, axis, unit) for unit in np.eye(len(axis))], axis=1)
    return finer, weights.astype(np.float32)


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).parent
