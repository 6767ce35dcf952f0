"""Figures of stores and pools for those who watch, which must not become part of what they watch.

A process that has joined a pool stays a member for its life, and keeps the pool's memory alive. So a store is looked at by a process of
its own, which ends when it is the only one left that has the store; other pools are looked at from outside, without joining.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchshm import _C, _pools
from torchshm._starting import connect
from torchshm._store import Store
from torchshm.errors import TorchshmError

_PATIENCE = 5.0  # s; for an answer of a process that looks, and so for its start

# What torchshm.data.blocks calls its stores, and how the names of statistics end there.
_OF_BLOCKS, _STATISTICS = "blocks-", ".statistics"

# Of Store.info(): what only goes up. Missing ones count as 0.
COUNTERS = (
    "saved",
    "removed",
    "expired",
    "loads",
    "restores",
    "restored_bytes",
    "spills",
    "spilled_total_bytes",
    "evictions",
    "spill_errors",
    "room_waits",
)


@dataclass
class StoreSample:
    """A store at one moment; ``figures`` is None when it can't be looked at, and ``why`` says so."""

    name: str
    at: float  # time.monotonic()
    service_pid: int | None = None
    figures: dict[str, Any] | None = None
    why: str = ""

    def number(self, key: str) -> int:
        """Give a figure; 0 where there is none."""
        return int((self.figures or {}).get(key) or 0)


@dataclass
class PoolSample:
    """A pool that is no store's."""

    pool_id: int
    at: float
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sample:
    """All that there is at one moment."""

    at: float
    stores: list[StoreSample] = field(default_factory=list)
    pools: list[PoolSample] = field(default_factory=list)


def rates(before: StoreSample | None, now: StoreSample) -> dict[str, float]:
    """Give what a second has brought between two looks at a store, by counter. Empty for a store that is new."""
    if before is None or before.figures is None or now.figures is None or now.at <= before.at:
        return {}
    if before.number("pool_id") != now.number("pool_id"):
        return {}
    return {
        key: max(0, now.number(key) - before.number(key)) / (now.at - before.at)
        for key in COUNTERS
        if key in now.figures
    }


def hit_rate(by_second: Mapping[str, float]) -> float | None:
    """Give the share of loads that found their value in memory. None when nothing was loaded."""
    loads = by_second.get("loads", 0)
    return None if loads <= 0 else max(0.0, 1 - by_second.get("restores", 0) / loads)


class _Look:
    """A process that is a client of one store, and tells its figures when it is asked."""

    def __init__(self, name: str) -> None:
        self.pool_id: int | None = None
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torchshm._figures", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who watches
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any] | None:
        """Give the figures; None when the process has ended or does not answer."""
        assert self._process.stdout is not None
        fd, until = self._process.stdout.fileno(), time.monotonic() + _PATIENCE
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return None
            read = os.read(fd, 1 << 16)
            if not read:
                return None
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        row: dict[str, Any] = json.loads(line)
        self.pool_id = row.get("pool_id")
        return row

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


class Watcher:
    """Looks at the stores of this user, or at one, and at other pools. Not for several threads at once."""

    def __init__(self, only: str | None = None) -> None:
        self._only = only
        self._looks: dict[str, _Look] = {}

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that look."""
        while self._looks:
            self._looks.popitem()[1].end()

    def sample(self) -> Sample:
        """Look once."""
        names = [self._only] if self._only is not None else sorted({*_C.store_names(), *self._looks})
        serving = {name: _service(name) for name in names}
        for name, status in serving.items():
            look = self._looks.get(name)
            if look is not None and status is not None and look.pool_id not in (None, status["pool_id"]):
                self._looks.pop(name).end()  # another store of that name
                look = None
            if look is None and status is not None:
                look = self._looks[name] = _Look(name)
            if look is not None:
                look.ask()
        out = Sample(time.monotonic())
        for name, status in serving.items():
            look = self._looks.get(name)
            row = None if look is None else look.answer()
            now = time.monotonic()
            if row is None or "why" in row:
                if look is not None:
                    self._looks.pop(name).end()
                why = "nobody serves it" if row is None else str(row["why"])
                out.stores.append(StoreSample(name, now, None if status is None else status["pid"], why=why))
            else:
                out.stores.append(StoreSample(name, now, None if status is None else status["pid"], row))
        if self._only is None:
            known = {store.number("pool_id") for store in out.stores}
            out.pools = list(_other_pools(known, {look.pid for look in self._looks.values()}))
        return out


def _service(name: str) -> dict[str, Any] | None:
    try:
        return _C.store_status(name)
    except (TorchshmError, ValueError):
        return None


def _other_pools(known: set[int], looking: set[int]) -> Iterable[PoolSample]:
    seen = set(known)
    for files in _pools.every_pool():
        if files.pool_id in seen or files.pid in looking:
            continue
        fds: list[int] = []
        try:
            for which in ("data", "control"):
                fds.append(os.open(files.paths[which], os.O_RDONLY | os.O_CLOEXEC))
            figures = _C.pool_stats(*fds)
        except (OSError, TorchshmError):  # gone, somebody else's, or just being made
            continue
        finally:
            for fd in fds:
                os.close(fd)
        seen.add(files.pool_id)
        yield PoolSample(files.pool_id, time.monotonic(), figures)


def _executions(store: Store) -> dict[str, Any]:
    """What plans of torchshm.data.blocks have done so far whose blocks lie in the store; by the beginning of their names."""
    found = {}
    for key in store:
        if key.endswith(_STATISTICS):
            with contextlib.suppress(KeyError):  # it has ended
                found[key.removesuffix(_STATISTICS)] = store.load(key)
    return found


def _look(name: str) -> None:
    """Tell a store's figures, a line for each line that is read. Without this process, as if it were not there."""
    try:
        store = connect(name, 0)
    except (TorchshmError, ValueError) as error:
        print(json.dumps({"why": str(error)}), flush=True)
        return
    loads = 0  # by this process, which are not what the store is used for
    for _ in sys.stdin:
        row = store.info()
        row["loads"] -= loads
        if name.startswith(_OF_BLOCKS):
            row["executions"] = _executions(store)
            loads += len(row["executions"])
        row["processes"] = [each for each in row["processes"] if each["pid"] != os.getpid()]
        row["leases"] = len(row["processes"])
        print(json.dumps(row), flush=True)
        if not row["processes"]:  # nobody else has it: it would be kept alive by being watched
            return


if __name__ == "__main__":
    _look(sys.argv[1])
