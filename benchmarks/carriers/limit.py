"""The limit: no general mechanism can do less than this."""

from __future__ import annotations

import mmap
from multiprocessing.connection import Connection
from typing import ClassVar

import numpy as np

from benchmarks.carriers.carrier import Bytes, Carrier


class Limit(Carrier):
    """A hand-made ring of warm shared blocks; the index of a block is the message.

    One memcpy and one small message: it knows the size, the dtype and the order of the messages
    beforehand, checks nothing, survives nothing, and is free to overwrite what a receiver keeps.
    """

    label: ClassVar[str] = "limit"
    how: ClassVar[str] = (
        "a ring of warm shared blocks, the index sent by Connection.send: one memcpy, one message"
    )

    def open(self, bytes_in_flight: int) -> None:
        self._memory = np.frombuffer(mmap.mmap(-1, bytes_in_flight), dtype=np.uint8)
        self._memory.fill(0)

    def adopt(self) -> None:
        self._memory[:: mmap.PAGESIZE].sum()

    def load(self, content: Bytes, window: int) -> None:
        self.source = content
        self.expect(content.nbytes, window)

    def expect(self, nbytes: int, window: int) -> None:
        self._ring = [self._memory[i * nbytes : (i + 1) * nbytes] for i in range(window)]
        self._slot = 0

    def send(self, link: Connection) -> None:
        np.copyto(self._ring[self._slot], self.source)
        link.send(self._slot)
        self._slot = (self._slot + 1) % len(self._ring)

    def receive(self, link: Connection) -> Bytes:
        return self._ring[link.recv()][:]
