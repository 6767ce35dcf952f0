"""Outlet: blocks on their way to the consumers, and the names by which these find them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchshm._store import Store
from torchshm.data.blocks._operators import Block, Release


def alive(prefix: str) -> str:
    """The lock that the executor holds as long as it lives."""
    return f"{prefix}alive"


def begun(prefix: str) -> str:
    """The name by which an executor says that it holds that lock."""
    return f"{prefix}begun"


def farewell(prefix: str, shard: int) -> str:
    """The name by which a consumer says that it wants nothing more of an epoch; the prefix is that of its announcements."""
    return f"{prefix}.{shard}.left"


def announcement(prefix: str, shard: int, number: int) -> str:
    """The name under which a consumer finds which block comes next; the prefix is the execution's, and the epoch."""
    return f"{prefix}.{shard}.{number}"


@dataclass
class _Announced:
    block: Block
    name: str


class Outlet:
    """Announces blocks to consumers, in order, and sees which of them they have taken."""

    def __init__(
        self,
        store: Store,
        say: Callable[[str, dict[str, Any]], None],
        prefix: str,
        shards: int,
        equal: bool,
        ahead: int,
        release: Release,
    ) -> None:
        self._store, self._say, self._prefix, self._release = store, say, prefix, release
        self._equal, self._ahead = equal and shards > 1, ahead
        # None: its consumer has left.
        self._shards: list[deque[_Announced] | None] = [deque() for _ in range(shards)]
        self._numbers = [0] * shards
        self._next = 0
        self._last: dict[int, str] = {}  # of each shard, what ends it
        self._ended = False

    def push(self, block: Block) -> None:
        block.uses += 1
        shards = len(self._shards)
        if self._equal:
            share = block.rows // shards
            for shard in range(shards):
                if share:
                    self._announce(shard, block, shard * share, (shard + 1) * share)
        else:
            self._announce(self._next, block, 0, block.rows)
            self._next = (self._next + 1) % shards
        block.drop(self._release)

    def _announce(self, shard: int, block: Block, begin: int, end: int) -> None:
        waiting = self._shards[shard]
        if waiting is None or shard in self._last:  # it has left, or was told of an error
            return
        block.uses += 1
        name = announcement(self._prefix, shard, self._numbers[shard])
        self._numbers[shard] += 1
        waiting.append(_Announced(block, name))
        self._say(name, {"key": block.key, "begin": begin, "end": end})

    def end(self) -> None:
        self._ended = True

    def close(self, statistics: dict[str, Any]) -> None:
        self._to_all({"over": True, "statistics": statistics})

    def fail(self, pickled: bytes, text: str) -> None:
        self._ended = True
        self._to_all({"error": pickled, "text": text})

    def _to_all(self, value: dict[str, Any]) -> None:
        for shard, number in enumerate(self._numbers):
            if self._shards[shard] is not None:
                self._last[shard] = announcement(self._prefix, shard, number)
                self._say(self._last[shard], value)

    def look(self) -> None:
        """See what was taken, and who has left."""
        for shard, waiting in enumerate(self._shards):
            if waiting is None:
                continue
            while waiting and not self._store.contains(waiting[0].name):
                waiting.popleft().block.drop(self._release)
            if self._store.contains(farewell(self._prefix, shard)):
                self._shards[shard] = None
                for each in waiting:
                    self._remove(each.name)
                    each.block.drop(self._release)
                self._remove(self._last.pop(shard, None))
                self._remove(farewell(self._prefix, shard))

    def _remove(self, name: str | None) -> None:
        if name is not None:
            with contextlib.suppress(KeyError):
                self._store.remove(name)

    def _there(self) -> list[deque[_Announced]]:
        return [waiting for waiting in self._shards if waiting is not None]

    def blocks(self) -> list[Block]:
        """Those that wait to be taken."""
        return [each.block for waiting in self._there() for each in waiting]

    def full(self) -> bool:
        """Whether consumers have enough to do: none of them has less than it should."""
        return min(map(len, self._there()), default=self._ahead) >= self._ahead

    def wanting(self) -> bool:
        """Whether a consumer has nothing."""
        return not self._ended and not all(self._there())

    def waiting(self) -> bool:
        return any(self._there())

    def left(self) -> bool:
        """Whether all consumers have."""
        return not self._there()

    def over(self) -> bool:
        return self._ended

    def empty(self) -> bool:
        """Whether the consumers have everything, and know that it was all."""
        return not self.waiting() and not any(map(self._store.contains, self._last.values()))
