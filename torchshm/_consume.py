"""Replacing the arrays that an object holds by shared ones, in place and one by one, so that their memory goes back meanwhile."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from torchshm._leaves import Put, is_array, is_table, memory, parts

_DEEP = 60
_TRIM = 64 << 20  # bytes freed; looking through a heap of many small objects takes milliseconds. Arbitrary

Share = Callable[[Any], Any]


class _Place:
    """Where an array is held, perhaps by several; the array itself is not held here."""

    def __init__(self, get: Callable[[], Any], low: int, high: int) -> None:
        self.get, self.low, self.high = get, low, high
        self.puts: list[Put] = []

    def replace(self, share: Share) -> None:
        x = self.get()
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(x, torch.Tensor):
            if type(x) in (torch.Tensor, torch.nn.Parameter):  # others may have more than their data
                x.data = share(x.detach())
            return
        new = share(x)
        for put in self.puts:
            try:
                put(new)
            except (AttributeError, TypeError, ValueError):
                return  # read-only here: it stays, and is shared at the end with the rest


def replace(x: Any, share: Share) -> None:
    """Replace what `x` holds by what share() makes of it. What overlaps another array, and `x` itself, stay."""
    places: dict[int, _Place] = {}
    _find(x, places, set(), [], 0)
    ordered = sorted(places.values(), key=lambda place: place.low)
    reached = 0
    alone = []
    for i, place in enumerate(ordered):
        after = ordered[i + 1].low if i + 1 < len(ordered) else place.high
        if reached <= place.low and place.high <= after:
            alone.append(place)
        reached = max(reached, place.high)
    freed = 0
    for place in reversed(alone):  # from the heap's end, where free memory goes back by itself
        place.replace(share)
        freed += place.high - place.low
        if freed >= _TRIM:
            _trim()
            freed = 0
    _trim()


def _trim() -> None:
    """Let the C library give free pages back from the middle of its heap too."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library


def _find(x: Any, places: dict[int, _Place], seen: set[int], alive: list[Any], depth: int) -> None:
    """Note the places of arrays by the ids of the arrays; those live as long as their places hold them."""
    if id(x) in seen or depth > _DEEP:
        return
    seen.add(id(x))
    alive.append(x)
    for _, get, put in parts(x):
        part = get()
        if not _is_whole(part):
            _find(part, places, seen, alive, depth + 1)
        elif put is not None:
            if id(part) not in places:
                reach = _reach(part)
                if reach is None:
                    continue
                places[id(part)] = _Place(get, *reach)
            places[id(part)].puts.append(put)


def _is_whole(x: Any) -> bool:
    """Whether it is replaced as one: arrays, and what can't be changed and holds some."""
    return is_array(x) or is_table(x) or (isinstance(x, tuple) and any(map(is_array, x)))


def _reach(x: Any) -> tuple[int, int] | None:
    pieces = list(memory(x)) if is_array(x) else [piece for _, get, _ in parts(x) for piece in memory(get())]
    return (min(at for at, _ in pieces), max(at + n for at, n in pieces)) if pieces else None
