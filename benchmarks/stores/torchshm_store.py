"""torchshm's store."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from benchmarks.stores.named_store import Bytes, NamedStore


class TorchshmStore(NamedStore):
    """Store.save and Store.load; the service and the saver are another process."""

    label: ClassVar[str] = "torchshm"
    how: ClassVar[str] = "Store.save and Store.load by name"
    package: ClassVar[str | None] = "torchshm"

    def serve(self, capacity: int) -> str:
        import torchshm

        self.client = torchshm.start(f"bench-{os.getpid()}", limit=capacity)
        return self.client.name

    def attach(self, address: Any) -> None:
        import torchshm

        self.client = torchshm.connect(address)

    def save(self, key: str, array: Bytes) -> None:
        self.client.save(key, array)

    def load(self, key: str) -> Bytes:
        return self.client.load(key)

    def remove(self, key: str) -> None:
        self.client.remove(key)

    def close(self) -> None:
        self.client.close()
