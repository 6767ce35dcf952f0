"""One client in the soak of a store that is too small: what it saves, what it may find, and what is noted of both outside the store.

The notes are a file that all map. Each key has one process that writes to it; before a change it notes the version that it begins, after
it the one that is done. Who loads the key looks at what was done before and what had begun afterwards: anything in between is right.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import random
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from soak import WrongBytes
from store_soak import connect

import torchshm

KIB, MIB = 1 << 10, 1 << 20
SIZES = [64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB]
PINNED, PINNED_SIZE = 8, 64 * KIB
WRITTEN, WRITTEN_SIZES = 4, [64 * KIB, MIB]  # keys of each process that it writes to in place
DROPPED, DROPPED_SIZE = 4, 512 * KIB  # of each process, that may go
KEPT = 3  # values up to 1 MiB that a process holds on to
HEADER = 32  # bytes: key, version, size, none
TALLIES = [
    "operations",
    "loads",
    "MiB verified",
    "saves",
    "removes",
    "not there",
    "writes in place",
    "private copies written",
    "prefetches",
    "loads of pinned names",
    "dropped names that had gone",
    "errors while the disk was full",
]
COUNTED = {what: i for i, what in enumerate(TALLIES)}


@dataclass(frozen=True)
class Setting:
    """What all processes know."""

    name: str
    folder: str
    limit: int
    times: int
    processes: int

    @property
    def sizes(self) -> list[int]:
        # All processes may need room for one at once, while each holds another.
        return [size for size in SIZES if size <= self.limit // (2 * self.processes)]

    @property
    def keys(self) -> int:
        mean = sum(self.sizes) / len(self.sizes)
        return self.processes * -(-int(self.times * self.limit / mean) // self.processes)

    @property
    def all_keys(self) -> int:
        """Of all processes together, and then those of each: to write to in place, and those that may go."""
        return self.keys + self.processes * (WRITTEN + DROPPED)

    def is_written(self, key: int) -> bool:
        return key >= self.keys and (key - self.keys) % (WRITTEN + DROPPED) < WRITTEN

    def removes(self, key: int, version: int) -> bool:
        """Whether that version of a key is that it is not there."""
        return version == 0 or (key < self.keys and version > 1 and (key * 7 + version * 13) % 11 == 0)

    def size(self, key: int) -> int:
        if key < self.keys:
            return self.sizes[(key // self.processes) % len(self.sizes)]
        return WRITTEN_SIZES[key % len(WRITTEN_SIZES)] if self.is_written(key) else DROPPED_SIZE


class Notes:
    """What has begun, what is done, by key and version; how far everybody is; whether the disk is full."""

    def __init__(self, setting: Setting) -> None:
        self.keys = setting.all_keys
        rows, path = setting.processes, Path(setting.folder) / "notes"
        size = 3 * self.keys + rows * len(TALLIES) + 2
        words = np.memmap(path, "i8", "r+" if path.exists() else "w+", shape=(size,))
        self.begun, self.done, self.issued = words[: 3 * self.keys].reshape(3, self.keys)
        self.tallies = words[3 * self.keys : -2].reshape(rows, len(TALLIES))
        self.full, self.stop = words[-2:-1], words[-1:]


class Contents:
    """What a version of a key is: a part of random bytes, elsewhere for each, after a header that says which."""

    def __init__(self) -> None:
        self._bytes = np.random.default_rng(8).integers(0, 256, SIZES[-1] + (1 << 20), np.uint8)

    def body(self, key: int, version: int, size: int) -> np.ndarray:
        at = (key * 40_503 + version * 9_973) % (1 << 20)
        return self._bytes[at : at + size - HEADER]

    def write(self, target: np.ndarray, key: int, version: int) -> None:
        target[:HEADER].view("i8")[:] = key, version, len(target), 0
        target[HEADER:] = self.body(key, version, len(target))

    def new(self, key: int, version: int, size: int) -> np.ndarray:
        made = np.empty(size, np.uint8)
        self.write(made, key, version)
        return made

    def version(self, found: np.ndarray, key: int, size: int) -> int:
        """Which one it is, after a look at every byte."""
        if found.dtype != np.uint8 or found.shape != (size,):
            raise WrongBytes(f"key {key}: {found.dtype} {found.shape} in the place of {size} bytes")
        its_key, version, its_size, _ = map(int, found[:HEADER].view("i8"))
        if (its_key, its_size) != (key, size):
            raise WrongBytes(f"key {key} of {size} bytes says that it is key {its_key} of {its_size} bytes")
        body = self.body(key, version, size)
        if not np.array_equal(found[HEADER:], body):
            at = int(np.argmin(found[HEADER:] == body))
            raise WrongBytes(f"key {key}, version {version}: wrong from byte {HEADER + at} of {size}")
        return version


class Worker:
    """One client at work, until it is told to stop or killed."""

    def __init__(self, setting: Setting, slot: int, seed: int) -> None:
        self.setting, self.slot, self.chance = setting, slot, random.Random(seed)
        stack = open(Path(setting.folder) / f"{slot}.stack", "w")  # noqa: SIM115 - as long as the process
        faulthandler.register(signal.SIGUSR1, stack)
        self.notes, self.contents = Notes(setting), Contents()
        self.store = connect(setting.name)
        self.own = range(slot, setting.keys, setting.processes)
        first = setting.keys + slot * (WRITTEN + DROPPED)
        self.written = range(first, first + WRITTEN)
        self.dropped = range(first + WRITTEN, first + WRITTEN + DROPPED)
        self.kept: deque[tuple[int, int, np.ndarray]] = deque()
        self.writing: tuple[int, np.ndarray] | None = None
        self.order = self.cyclic() if slot % 2 == 0 else self.zipf()

    def cyclic(self) -> Iterator[int]:
        keys = self.setting.keys
        return itertools.cycle(
            (key + keys * self.slot // self.setting.processes) % keys for key in range(keys)
        )

    def zipf(self) -> Iterator[int]:
        keys = list(range(self.setting.keys))
        random.Random(8).shuffle(keys)  # all have the same favourites
        weights = list(itertools.accumulate(1 / rank for rank in range(1, len(keys) + 1)))
        while True:
            yield self.chance.choices(keys, cum_weights=weights)[0]

    def count(self, what: str, more: int = 1) -> None:
        self.notes.tallies[self.slot, COUNTED[what]] += more

    @staticmethod
    def key_name(key: int) -> str:
        return f"key-{key}"

    @contextlib.contextmanager
    def may_need_the_disk(self, key: int) -> Iterator[None]:
        """Errors that name the key, or say that there is no room, are right while the disk is full."""
        before = int(self.notes.full[0])
        try:
            yield
        except (torchshm.PoolFullError, torchshm.TorchshmError, OSError) as error:
            full = before % 2 == 1 or int(self.notes.full[0]) != before
            named = isinstance(error, torchshm.PoolFullError) or self.key_name(key) in str(error)
            if not full or not named or isinstance(error, KeyError):
                raise
            self.count("errors while the disk was full")
            raise NeedsDisk from error

    # -- keys

    def find(self, key: int, mode: str | None = None) -> tuple[int, np.ndarray | None]:
        """The version that is there, and its bytes; of a key that is not there, the version that says so."""
        done = int(self.notes.done[key])
        try:
            with self.may_need_the_disk(key):
                found = self.store.load(self.key_name(key), mode=mode)
        except KeyError:
            found = None
        begun = int(self.notes.begun[key])
        self.count("loads")
        if found is None:
            self.count("not there")
            gone = [version for version in range(done, begun + 1) if self.setting.removes(key, version)]
            if not gone:
                raise WrongBytes(f"key {key} is not there, and was saved: versions {done} to {begun}")
            return gone[-1], None
        version = self.contents.version(found, key, self.setting.size(key))
        self.count("MiB verified", found.nbytes >> 20)
        if not done <= version <= begun or self.setting.removes(key, version):
            raise WrongBytes(f"key {key} has version {version}, and was last {done} to {begun}")
        return version, found

    def keep(self, key: int, version: int, found: np.ndarray | None) -> None:
        """Holds on to small values for a while: they stay as they were, whatever becomes of the name."""
        if found is not None and found.nbytes <= MIB and self.chance.random() < 0.3:
            self.kept.append((key, version, found))
        while len(self.kept) > KEPT:
            key, version, found = self.kept.popleft()
            if self.contents.version(found, key, self.setting.size(key)) != version:
                raise WrongBytes(f"key {key}: version {version} was held, and is another now")

    def change(self, key: int, policy: str | None = None) -> None:
        """The next version of a key."""
        notes = self.notes
        version = int(notes.issued[key]) + 1
        notes.issued[key] = version
        value = (
            None
            if self.setting.removes(key, version)
            else self.contents.new(key, version, self.setting.size(key))
        )
        notes.begun[key] = version
        try:
            if value is None:
                with contextlib.suppress(KeyError):
                    self.store.remove(self.key_name(key))
                self.count("removes")
            else:
                with self.may_need_the_disk(key):
                    self.store.save(self.key_name(key), value, overwrite=True, policy=policy)
                self.count("saves")
        except NeedsDisk:
            notes.begun[key] = notes.done[key]  # it has not happened, and nobody may ever see it
            raise
        notes.done[key] = version

    def take_over(self) -> None:
        """After the death of who had this place: what it was at has happened or not."""
        for key in self.own:
            while True:
                with contextlib.suppress(NeedsDisk):
                    self.settle(key)
                    break
        for key in self.written:  # what was written halfway is no version
            if self.notes.issued[key]:
                self.notes.begun[key] = self.notes.issued[key] = self.notes.issued[key] + 1
                self.save_written(key)

    def settle(self, key: int) -> None:
        if self.notes.begun[key] != self.notes.done[key]:
            version, _ = self.find(key)
            self.notes.done[key] = version
            self.notes.begun[key] = version
        elif self.notes.issued[key] == 0:
            self.change(key, self.policy(key))

    def save_written(self, key: int) -> None:
        version = int(self.notes.issued[key])
        while True:
            with contextlib.suppress(NeedsDisk), self.may_need_the_disk(key):
                value = self.contents.new(key, version, self.setting.size(key))
                self.store.save(self.key_name(key), value, overwrite=True, policy=self.policy(key))
                break
        self.notes.done[key] = version

    @staticmethod
    def policy(key: int) -> str | None:
        return "spill" if key % 3 == 0 else None

    # -- steps

    def write_in_place(self) -> None:
        """Through a mapping for writing, which may stay for a few steps; then a look through another."""
        if self.writing is None:
            key = self.chance.choice(self.written)
            if self.notes.issued[key] == 0:
                self.notes.begun[key] = self.notes.issued[key] = 1
                self.save_written(key)
            _, found = self.find(key, "r+")
            assert found is not None
            self.writing = key, found
            if self.chance.random() < 0.5:
                return
        (key, target), self.writing = self.writing, None
        version = int(self.notes.issued[key]) + 1
        self.notes.begun[key] = self.notes.issued[key] = version
        self.contents.write(target, key, version)
        self.notes.done[key] = version
        del target
        self.count("writes in place")
        self.find(key)

    def write_privately(self, key: int) -> None:
        """A copy-on-write view; the value itself stays as it is."""
        _, found = self.find(key, "c")
        if found is not None and found.nbytes <= 4 * MIB:
            found[:] = 0
            del found
            self.count("private copies written")
            self.find(key)

    def pinned(self) -> None:
        """These are in memory, and need no disk: no error is right."""
        number = self.chance.randrange(PINNED)
        found = self.store.load(f"pinned-{number}")
        if self.contents.version(found, -1 - number, PINNED_SIZE) != 1:
            raise WrongBytes(f"pinned-{number} has another version")
        self.count("loads of pinned names")

    def may_go(self) -> None:
        """Names that the store may drop: there with the right bytes, or not there."""
        key = self.chance.choice(self.dropped)
        if self.chance.random() < 0.5:
            version = int(self.notes.issued[key]) + 1
            self.notes.begun[key] = self.notes.issued[key] = version
            with self.may_need_the_disk(key):
                value = self.contents.new(key, version, DROPPED_SIZE)
                self.store.save(self.key_name(key), value, overwrite=True, policy="drop")
            self.notes.done[key] = version
            return
        try:
            found = self.store.load(self.key_name(key))
        except KeyError:
            self.count("dropped names that had gone")
            return
        version = self.contents.version(found, key, DROPPED_SIZE)
        if not int(self.notes.done[key]) <= version <= int(self.notes.begun[key]):
            raise WrongBytes(f"key {key}, that may be dropped, has the old version {version}")

    def step(self) -> None:
        what, chance = self.chance.random(), self.chance
        if what < 0.62:
            key = next(self.order)
            self.keep(key, *self.find(key))
        elif what < 0.78:
            gone = [key for key in self.own if self.setting.removes(key, int(self.notes.done[key]))]
            key = chance.choice(gone if gone and chance.random() < 0.7 else self.own)
            self.change(key, self.policy(key))
        elif what < 0.84 or self.writing is not None:
            self.write_in_place()
        elif what < 0.88:
            self.write_privately(next(self.order))
        elif what < 0.91:
            ahead = [next(self.order) for _ in range(3)]
            with contextlib.suppress(KeyError), self.may_need_the_disk(ahead[0]):
                self.store.prefetch([self.key_name(key) for key in ahead])
            self.count("prefetches")
            for key in ahead:
                self.find(key)
        elif what < 0.95:
            self.pinned()
        elif what < 0.98:
            self.may_go()
        else:
            self.look_around()

    def look_around(self) -> None:
        """Names and figures, which need nothing of the values."""
        key = next(self.order)
        with contextlib.suppress(KeyError):
            if self.store.info(self.key_name(key))["where"] not in ("memory", "disk"):
                raise WrongBytes(f"key {key} is in no known place")
        if len(self.store) > self.notes.keys + PINNED or len(self.store.keys("pinned-")) != PINNED:
            raise WrongBytes(f"{len(self.store)} names, {self.store.keys('pinned-')}")

    def run(self) -> None:
        self.take_over()
        while not self.notes.stop[0]:
            with contextlib.suppress(NeedsDisk):
                self.step()
            self.count("operations")

    def verify_all(self) -> dict[str, int]:
        """At rest: every key has the version that was done last."""
        found_there = 0
        for key in range(self.setting.all_keys):
            written, halfway = self.setting.is_written(key), self.notes.begun[key] != self.notes.done[key]
            if (key >= self.setting.keys and not written) or (written and halfway):
                continue  # it may have gone; its writer was killed in the middle
            version, found = self.find(key)
            found_there += found is not None
            if version != int(self.notes.done[key]) and not halfway:
                raise WrongBytes(f"in the end key {key} has version {version}")
            del found
        return {"keys": self.setting.keys, "there": found_there}


class NeedsDisk(Exception):
    """An operation was refused for the disk is full, as it may be."""


def save_pinned(store: torchshm.Store) -> None:
    """What never leaves memory."""
    contents = Contents()
    for number in range(PINNED):
        store.save(f"pinned-{number}", contents.new(-1 - number, 1, PINNED_SIZE), policy="pin")


def waited(condition: Any, seconds: float) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
