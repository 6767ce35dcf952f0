"""multiprocessing.shared_memory, one segment per array."""

from __future__ import annotations

from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, ClassVar

import numpy as np

from benchmarks.carriers.carrier import Bytes, Carrier


class SharedMemoryEach(Carrier):
    """The sender makes a segment and copies; the receiver attaches, and unlinks when done."""

    label: ClassVar[str] = "SharedMemory"
    how: ClassVar[str] = "one multiprocessing.shared_memory segment per array, its name sent, unlink"

    def open(self, bytes_in_flight: int) -> None:
        # The resource tracker has to run before the fork: both ends must tell the same one.
        segment = SharedMemory(create=True, size=1)
        segment.close()
        segment.unlink()

    def send(self, link: Connection) -> None:
        source = self.source
        segment = SharedMemory(create=True, size=source.nbytes)
        np.copyto(np.ndarray(source.shape, source.dtype, buffer=segment.buf), source)
        link.send((segment.name, source.dtype, source.shape))
        segment.close()

    def receive(self, link: Connection) -> list[Any]:
        name, dtype, shape = link.recv()
        segment = SharedMemory(name)
        return [segment, np.ndarray(shape, dtype, buffer=segment.buf)]

    def view(self, received: Any) -> Bytes:
        return received[1]

    def release(self, received: Any) -> None:
        del received[1]
        received[0].close()
        received[0].unlink()
