"""What the DataLoader indexes. Items cost next to nothing, so that what is measured is the hand-over."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

# More items than any round asks for; a round stops by the clock.
LENGTH = 10_000_000

# Crops repeat after this many, more than the largest run of batches the checks look at.
PLACES = 4096


class Crops:
    """Crops of a field at places drawn once.

    Parameters
    ----------
    field : numpy.ndarray
        Shape (time, rows, columns).
    crop : tuple of int
        Time steps, rows and columns of a crop.
    """

    def __init__(self, field: np.ndarray, crop: tuple[int, int, int]) -> None:
        room = [have - want + 1 for have, want in zip(field.shape, crop, strict=True)]
        self.field = field
        self.crop = crop
        self.places = np.random.default_rng(0).integers(0, room, (PLACES, 3)).tolist()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> np.ndarray:
        """A view of the field, shape `crop`."""
        time, row, column = self.places[index % PLACES]
        steps, rows, columns = self.crop
        return self.field[time : time + steps, row : row + rows, column : column + columns]


class Whole(Generic[T]):
    """A dataset whose every item is the same object, whole: an xarray Dataset or a pandas frame."""

    def __init__(self, item: T) -> None:
        self.item = item

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> T:
        return self.item
