"""The interface of a store: arrays saved under names in one process and loaded in another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class NamedStore(ABC):
    """One way of finding a uint8 array by name.

    `serve` runs in a process of its own, `attach` with what it returned in the processes that use the store. Where `apart` is not set
    one process does all. `load` and `save` are the timed part; what `load` returned is dropped within the loop.
    """

    label: ClassVar[str]
    """What charts and tables call it."""
    how: ClassVar[str]
    """What it does, in one line."""
    package: ClassVar[str | None] = None
    """The package it needs."""
    apart: ClassVar[bool] = True
    """False where the process that loads has to be the one that saved."""

    def serve(self, capacity: int) -> Any:
        """Starts what has to run, with room for `capacity` bytes; returns what `attach` needs."""
        return None

    def attach(self, address: Any) -> None:
        """Makes this process a client."""
        return

    @abstractmethod
    def save(self, key: str, array: Bytes) -> None:
        """Puts a copy of `array` under `key`, which is free."""

    @abstractmethod
    def load(self, key: str) -> Any:
        """What lies under `key`, without a copy; `view` makes an array of it."""

    def view(self, loaded: Any) -> Bytes:
        return loaded

    @abstractmethod
    def remove(self, key: str) -> None:
        """Frees what lies under `key`."""

    def close(self) -> None:
        """Ends what `serve` started."""
        return
