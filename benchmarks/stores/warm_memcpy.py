"""The limit of saving: a copy to memory that the process has written to before."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from benchmarks.stores.named_store import Bytes, NamedStore


class WarmMemcpy(NamedStore):
    """Two private targets in turn, as many as a save and the removal of what was saved before it need."""

    label: ClassVar[str] = "warm memcpy"
    how: ClassVar[str] = "memcpy to one of two warm buffers: the limit"
    apart: ClassVar[bool] = False

    def serve(self, capacity: int) -> None:
        self._free: list[Bytes] = []
        self._used: dict[str, Bytes] = {}

    def attach(self, address: Any) -> None:
        pass

    def save(self, key: str, array: Bytes) -> None:
        if not self._free or self._free[-1].nbytes != array.nbytes:
            self._free = [np.ones_like(array), np.ones_like(array)]
        target = self._free.pop()
        np.copyto(target, array)
        self._used[key] = target

    def load(self, key: str) -> Bytes:
        return self._used[key]

    def remove(self, key: str) -> None:
        self._free.append(self._used.pop(key))
