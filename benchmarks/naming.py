"""Naming: what one store does in an arm's process, and its clock.

The process that serves and saves is another one, as for two programs that need not know each other; Ray, whose references do not
leave the driver by themselves, has one process for all.
"""

from __future__ import annotations

import time
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.exchange import content_of
from benchmarks.remote import Remote
from benchmarks.stores import STORES

NAMES = 16
"""Loaded in turn: none of them is still held when it is loaded again."""


class Host:
    """Serves a store and saves into it."""

    def __init__(self, store: str, capacity: int) -> None:
        self._store = STORES[store]()
        self._address = self._store.serve(capacity)

    def address(self) -> Any:
        return self._address

    def fill(self, prefix: str, names: int, nbytes: int) -> None:
        """Saves `names` arrays of `nbytes`, under `prefix` and a number."""
        content = content_of(nbytes)
        for number in range(names):
            self._store.save(f"{prefix}{number}", content)

    def drop(self, prefix: str, names: int) -> None:
        for number in range(names):
            self._store.remove(f"{prefix}{number}")

    def close(self) -> None:
        self._store.close()


class Naming:
    """A client of a store, and the process that serves it."""

    def __init__(self, store: str, capacity: int) -> None:
        self._host: Any
        self._remote = None
        if STORES[store].apart:
            self._store = STORES[store]()
            self._remote = Remote(Host, store, capacity)
            self._store.attach(self._call("address"))
        else:
            self._host = Host(store, capacity)
            self._store = self._host._store
        self._filled = ("", 0)
        self._saved = 0

    def fill(self, nbytes: int) -> None:
        """Has the other process save what `load` loads; the content of one is compared."""
        if self._filled[1]:
            self._call("drop", *self._filled)
        prefix = f"{nbytes}-"
        self._call("fill", prefix, NAMES, nbytes)
        self._filled = (prefix, NAMES)
        loaded = self._store.load(f"{prefix}0")
        if not np.array_equal(self._store.view(loaded), content_of(nbytes)):
            raise AssertionError("the array was loaded damaged")

    def load(self, loads: int) -> float:
        """Seconds per load, over all names in turn; nothing is read."""
        keys = list(islice(cycle(f"{self._filled[0]}{number}" for number in range(NAMES)), loads))
        load = self._store.load
        begin = time.perf_counter()
        for key in keys:
            load(key)
        return (time.perf_counter() - begin) / loads

    def save(self, nbytes: int, saves: int) -> float:
        """Seconds per save of an array of this process. Removing what was saved before is not counted."""
        return sum(self.burst(nbytes, saves)) / saves

    def burst(self, nbytes: int, saves: int) -> list[float]:
        """As `save`, the seconds of each."""
        content = content_of(nbytes)
        save, remove = self._store.save, self._store.remove
        seconds = []
        for _ in range(saves):
            key = f"saved-{self._saved}"
            self._saved += 1
            begin = time.perf_counter()
            save(key, content)
            seconds.append(time.perf_counter() - begin)
            remove(key)
        return seconds

    def keep(self, nbytes: int) -> float:
        """Seconds of one save of an array of this process; what was saved stays, so that the next one needs other memory."""
        content = content_of(nbytes)
        key = f"kept-{self._saved}"
        self._saved += 1
        begin = time.perf_counter()
        self._store.save(key, content)
        return time.perf_counter() - begin

    def close(self) -> None:
        if self._remote is not None:
            self._store.close()
            self._remote.close()
        else:
            self._host.close()

    def _call(self, method: str, *args: Any) -> Any:
        if self._remote is not None:
            return self._remote.call(method, *args)
        return getattr(self._host, method)(*args)
