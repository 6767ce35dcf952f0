"""Ray's object store (Plasma)."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, ClassVar

from benchmarks.carriers.carrier import Bytes, Carrier


class RayStore(Carrier):
    """put and get in one driver: what handing the reference to another process costs is not counted,
    which is to Ray's advantage."""

    label: ClassVar[str] = "Ray"
    how: ClassVar[str] = "ray.put and ray.get in one driver (the reference does not cross a process)"
    package: ClassVar[str | None] = "ray"
    crosses: ClassVar[bool] = False

    def open(self, bytes_in_flight: int) -> None:
        import ray

        self._ray = ray
        ray.init(
            num_cpus=1,
            object_store_memory=8 * bytes_in_flight,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        self._sent: list[Any] = []

    def send(self, link: Connection) -> None:
        self._sent.append(self._ray.put(self.source))

    def receive(self, link: Connection) -> Bytes:
        return self._ray.get(self._sent.pop(0))

    def close(self) -> None:
        self._ray.shutdown()
