"""Ray's object store, which has references and no names."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmarks.stores.named_store import Bytes, NamedStore


class RayReferences(NamedStore):
    """ray.put, and ray.get of a reference that the driver holds: finding it by a name is not counted, which is to Ray's advantage."""

    label: ClassVar[str] = "Ray"
    how: ClassVar[str] = "ray.put, and ray.get of a reference that is held"
    package: ClassVar[str | None] = "ray"
    apart: ClassVar[bool] = False

    def serve(self, capacity: int) -> None:
        import ray

        self._ray = ray
        ray.init(
            num_cpus=1,
            object_store_memory=capacity,
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
