"""Pickle: the bytes go through the pipe."""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from benchmarks.carriers.carrier import Bytes, Carrier


class Stock(Carrier):
    """What multiprocessing does by itself."""

    label: ClassVar[str] = "stock pickle"
    how: ClassVar[str] = "Connection.send of a numpy array: ForkingPickler, nothing registered"


class Protocol5(Carrier):
    """The best pickle can do: the array's bytes are neither copied into the pickle nor out of it."""

    label: ClassVar[str] = "pickle 5"
    how: ClassVar[str] = "pickle protocol 5, the buffer out of band through the same pipe"

    def send(self, link: Connection) -> None:
        buffers: list[pickle.PickleBuffer] = []
        link.send_bytes(pickle.dumps(self.source, protocol=5, buffer_callback=buffers.append))
        link.send_bytes(buffers[0].raw())

    def receive(self, link: Connection) -> Bytes:
        skeleton = link.recv_bytes()
        array: Any = pickle.loads(skeleton, buffers=[link.recv_bytes()])
        return array
