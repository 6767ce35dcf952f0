"""The carrier's interface: what the sender does with a message and what the receiver does."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Carrier:
    """One way of carrying a uint8 array; the defaults send whatever `load` returned as it is.

    `open` runs in the sender before the receiver is forked from it, so that both have what it
    makes; `adopt` runs in the receiver, and `expect` there before each size. `send`, `receive` and
    `release` are the timed part.
    """

    label: ClassVar[str]
    """What charts and tables call it."""
    how: ClassVar[str]
    """What it does, in one line."""
    package: ClassVar[str | None] = None
    """The package it needs."""
    crosses: ClassVar[bool] = True
    """False where sender and receiver are one process."""

    def open(self, bytes_in_flight: int) -> None:
        """Registers, imports or maps; at most `bytes_in_flight` will be under way at once."""

    def adopt(self) -> None:
        """Warms the receiver's side."""

    def expect(self, nbytes: int, window: int) -> None:
        """Tells the receiver the size of what comes."""

    def load(self, content: Bytes, window: int) -> None:
        """Takes the array to be sent; `window` messages may be under way at once."""
        self.source: Any = content

    def send(self, link: Connection) -> None:
        link.send(self.source)

    def receive(self, link: Connection) -> Any:
        return link.recv()

    def view(self, received: Any) -> Bytes:
        """The received array as numpy sees it."""
        return received

    def release(self, received: Any) -> None:
        """Gives back what dropping the last reference does not."""

    def close(self) -> None:
        """Leaves nothing behind (in the sender)."""
