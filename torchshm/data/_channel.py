"""What a publisher and its subscribers say to each other, all of it in a store that both have.

Marks of the store, which go with the process that put them up::

    <channel>                     the publisher's: which run of it, and its control queue; the block of its counters
    <channel> <run> c<id>         a subscriber's, as long as it lives
    <channel> <run> a<id>         the publisher's answer to it: where it begins
    <channel> <run> <number>      an entry: a batch, or the end of something. Its header, then what _values.describe() wrote

Entries have consecutive numbers. Those from TAIL up to HEAD, two counters that the publisher alone writes, are there. A subscriber says in
the control queue that it has come, how far it has taken, and that it goes. No pickle is in any of this but in batches that need one.
"""

from __future__ import annotations

import enum
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from torchshm import _C, _pools
from torchshm._store import Store

HEAD, TAIL = 0, 1  # of the counters, int64
COUNTERS_BYTES = 64
_TAG = b"F"  # of texts; a store's own values begin with others
_HEADER = struct.Struct("<cBqqq")
_MESSAGE = struct.Struct("<BQqq")


class Kind(enum.IntEnum):
    """What an entry is."""

    BATCH = 0
    EPOCH = 1  # the end of one
    END = 2  # of the last one, or of publishing
    FAILED = 3  # the end as well, and why


class Said(enum.IntEnum):
    """What a message in the control queue says."""

    COME = 0
    TAKEN = 1
    GOING = 2
    NOTHING = 3  # wakes the publisher


class Header(NamedTuple):
    """What stands before an entry: `batches` were published before it in this run, `place` of them in this epoch."""

    kind: Kind
    epoch: int
    place: int
    batches: int

    def before(self, text: bytes) -> bytes:
        """The entry's text."""
        return _HEADER.pack(_TAG, *self) + text

    @classmethod
    def of(cls, text: bytes) -> tuple[Header, bytes]:
        """The header, and what follows."""
        tag, kind, *numbers = _HEADER.unpack_from(text)
        if tag != _TAG:
            raise ValueError("not an entry of a publisher")
        return cls(Kind(kind), *numbers), text[_HEADER.size :]


class Answer(NamedTuple):
    """Where a subscriber begins: at the entry of that number, which has about this header."""

    number: int

    def text(self, header: Header) -> bytes:
        return header.before(self.number.to_bytes(8, "little"))

    @classmethod
    def of(cls, text: bytes) -> tuple[Header, Answer]:
        header, rest = Header.of(text)
        return header, cls(int.from_bytes(rest[:8], "little"))


class Message(NamedTuple):
    """What a subscriber says: `number` of the entry that it takes next, its pid when it comes; how many batches it has missed."""

    said: Said
    subscriber: int = 0
    number: int = 0
    missed: int = 0
    label: bytes = b""

    def pack(self) -> bytes:
        return _MESSAGE.pack(*self[:4]) + self.label

    @classmethod
    def of(cls, data: bytes) -> Message:
        said, subscriber, number, missed = _MESSAGE.unpack_from(data)
        return cls(Said(said), subscriber, number, missed, data[_MESSAGE.size :])


class Keys:
    """Names of the marks of one run of a publisher."""

    def __init__(self, name: str, run: str) -> None:
        self.run = f"{publisher(name)}\0{run}\0"  # what all begin with

    def entry(self, number: int) -> str:
        return f"{self.run}{number}"

    def subscriber(self, subscriber: int) -> str:
        return f"{self.run}c{subscriber:x}"

    def answer(self, subscriber: int) -> str:
        return f"{self.run}a{subscriber:x}"

    def is_subscribers(self, key: str) -> bool:
        return key.startswith(self.run + "c")


class Greeting(NamedTuple):
    """The text of a publisher's mark."""

    run: str
    queue: bytes  # handle of the control queue
    pid: int
    slow: str

    def text(self) -> bytes:
        return _TAG + json.dumps([self.run, self.queue.hex(), self.pid, self.slow]).encode()

    @classmethod
    def of(cls, text: bytes) -> Greeting:
        run, queue, pid, slow = json.loads(text[1:])
        return cls(run, bytes.fromhex(queue), pid, slow)


def publisher(name: str) -> str:
    """The key of a publisher's mark."""
    return f"\0published\0{name}"


def alive(core: _C.Store, mark: str) -> bool:
    """Whether the process that put up a mark is there, and the mark."""
    try:
        return not core.find(mark)["abandoned"]
    except KeyError:
        return False


def private(store: Store) -> bool:
    """Whether nobody but this user can have put anything into a store: its memory is this user's, and closed to others."""
    for files in _pools.pools_of(Path("/proc/self").resolve()):
        if files.pool_id == store._core.pool_id:
            found = os.stat(files.paths["control"])
            return found.st_uid == os.geteuid() and found.st_mode & 0o077 == 0
    return False


def counters(block: Any) -> Any:
    """The counters in a publisher's block."""
    return block[:COUNTERS_BYTES].view("int64")
