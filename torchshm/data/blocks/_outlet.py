"""Outlet: blocks on their way to the consumers, and the names by which these find them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from torchshm._store import Store
from torchshm.data.blocks._operators import Block


def alive(prefix: str) -> str:
    """The lock that the executor holds as long as it lives."""
    return f"{prefix}alive"


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
        self, store: Store, say: Any, prefix: str, shards: int, equal: bool, ahead: int, drop: Any
    ) -> None:
        self._say = say
        self._store, self._prefix, self._equal, self._ahead, self._drop = store, prefix, equal, ahead, drop
        self._shards: list[deque[_Announced]] = [deque() for _ in range(shards)]
        self._numbers = [0] * shards
        self._next = 0
        self._last: list[str] = []
        self._ended = False

    def push(self, block: Block) -> None:
        if len(self._shards) > 1 and self._equal:
            share = block.rows // len(self._shards)
            for shard in range(len(self._shards)):
                if share:
                    self._announce(shard, block, shard * share, (shard + 1) * share)
            if not share:
                block.uses += 1
                self._drop(block)
            return
        self._announce(self._next, block, 0, block.rows)
        self._next = (self._next + 1) % len(self._shards)

    def _announce(self, shard: int, block: Block, begin: int, end: int) -> None:
        block.uses += 1
        name = announcement(self._prefix, shard, self._numbers[shard])
        self._numbers[shard] += 1
        self._shards[shard].append(_Announced(block, name))
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
            name = announcement(self._prefix, shard, number)
            self._last.append(name)
            self._say(name, value)

    def look(self) -> None:
        for shard in self._shards:
            while shard and not self._store.contains(shard[0].name):
                self._drop(shard.popleft().block)

    def full(self) -> bool:
        """Whether consumers have enough to do: none of them has less than it should."""
        return min(map(len, self._shards)) >= self._ahead

    def wanting(self) -> bool:
        """Whether a consumer has nothing."""
        return not self._ended and not all(self._shards)

    def waiting(self) -> bool:
        return any(self._shards)

    def over(self) -> bool:
        return self._ended

    def empty(self) -> bool:
        """Whether the consumers have everything, and know that it was all."""
        return not any(self._shards) and not any(map(self._store.contains, self._last))
