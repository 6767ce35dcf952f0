"""Ray's object store, which has references and no names.

What it puts into pages for the first time takes five times as long as into pages that it has used before (64 MiB: 21 ms and 4.5 ms).
Since it frees in the background, a loop of puts walks through its memory, by default 30 % of the machine's, before it meets used pages
again: which of both is measured has to be chosen.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from benchmarks.stores.named_store import Bytes, NamedStore
from benchmarks.units import MIB


class RayReferences(NamedStore):
    """ray.put, and ray.get of a reference that the driver holds: finding it by a name is not counted, which is to Ray's advantage."""

    label: ClassVar[str] = "Ray"
    how: ClassVar[str] = (
        "ray.put, and ray.get of a reference that is held; the memory that ray.init takes by itself"
    )
    package: ClassVar[str | None] = "ray"
    apart: ClassVar[bool] = False
    memory: ClassVar[int | None] = None

    def serve(self, capacity: int) -> None:
        import ray

        self._ray = ray
        ray.init(
            num_cpus=1,
            object_store_memory=self.memory,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        self._references: dict[str, Any] = {}

    def save(self, key: str, array: Bytes) -> None:
        self._references[key] = self._ray.put(array)

    def load(self, key: str) -> Bytes:
        return self._ray.get(self._references[key])

    def remove(self, key: str) -> None:
        del self._references[key]

    def close(self) -> None:
        self._ray.shutdown()


class WarmRay(RayReferences):
    """Ray with little memory, all of which it has used before."""

    label: ClassVar[str] = "Ray, warm"
    how: ClassVar[str] = "ray.put into 512 MiB that have been used before"
    memory: ClassVar[int | None] = 512 * MIB

    def serve(self, capacity: int) -> None:
        super().serve(capacity)
        filler = np.ones(64 * MIB, np.uint8)
        for _ in range(16):
            self.save("filler", filler)
            self.remove("filler")
