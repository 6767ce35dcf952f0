"""torchshm's reducers for numpy arrays."""

from __future__ import annotations

from typing import ClassVar

from benchmarks.carriers.carrier import Bytes, Carrier


class Plain(Carrier):
    """A numpy array that knows nothing of the pool: one copy into it."""

    label: ClassVar[str] = "torchshm"
    how: ClassVar[str] = "Connection.send of a numpy array after torchshm.register()"
    package: ClassVar[str | None] = "torchshm"
    min_bytes: ClassVar[int | None] = None

    def open(self, bytes_in_flight: int) -> None:
        import torchshm

        torchshm.register(min_bytes=self.min_bytes)


class Pooled(Plain):
    """An array that lies in the pool already: no copy."""

    label: ClassVar[str] = "torchshm, pooled"
    how: ClassVar[str] = "Connection.send of an array made by torchshm.empty, after torchshm.register()"

    def load(self, content: Bytes, window: int) -> None:
        import torchshm

        self.source = torchshm.empty(content.shape, content.dtype)
        self.source[:] = content


class Inline(Plain):
    """Every array travels inside the pickle."""

    label: ClassVar[str] = "torchshm, inline"
    how: ClassVar[str] = "a numpy array after torchshm.register(min_bytes=2**40): always inside the pickle"
    min_bytes: ClassVar[int | None] = 1 << 40


class PooledAlways(Plain):
    """Every array travels through the pool."""

    label: ClassVar[str] = "torchshm, through the pool"
    how: ClassVar[str] = "a numpy array after torchshm.register(min_bytes=0): always through the pool"
    min_bytes: ClassVar[int | None] = 0
