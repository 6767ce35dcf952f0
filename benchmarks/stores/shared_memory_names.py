"""multiprocessing.shared_memory, a segment for each name."""

from __future__ import annotations

import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any, ClassVar

import numpy as np

from benchmarks.stores.named_store import Bytes, NamedStore


class SharedMemoryNames(NamedStore):
    """A fresh segment and a copy; opened and mapped by its name."""

    label: ClassVar[str] = "SharedMemory"
    how: ClassVar[str] = "a SharedMemory segment for each name, opened by name"

    def serve(self, capacity: int) -> str:
        self._prefix = f"bench-{os.getpid()}-"
        self._segments: dict[str, SharedMemory] = {}
        return self._prefix

    def attach(self, address: Any) -> None:
        self._prefix = address
        self._segments = {}

    def save(self, key: str, array: Bytes) -> None:
        segment = SharedMemory(self._prefix + key, create=True, size=array.nbytes)
        np.ndarray(array.shape, array.dtype, segment.buf)[:] = array
        self._segments[key] = segment

    def load(self, key: str) -> tuple[SharedMemory, Bytes]:
        segment = SharedMemory(self._prefix + key)
        # A tuple lets go of its last item first: the array has to go before the mapping.
        return segment, np.ndarray((segment.size,), np.uint8, segment.buf)

    def view(self, loaded: Any) -> Bytes:
        return loaded[1]

    def remove(self, key: str) -> None:
        segment = self._segments.pop(key)
        segment.close()
        segment.unlink()

    def close(self) -> None:
        for key in list(self._segments):
            self.remove(key)
