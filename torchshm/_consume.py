"""Replacing the arrays that an object holds by shared ones, in place and one by one, so that their memory goes back meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import Any

from torchshm._leaves import ATOMS, Piece, Put, is_array, is_table, memory, parts

_DEEP = 60
_TRIM = 64 << 20  # bytes freed; looking through a heap of many small objects takes milliseconds. Arbitrary

Share = Callable[[Any], Any]


class _Place:
    """Where an array is held, perhaps by several; the array itself is not held here."""

    def __init__(self, get: Callable[[], Any], pieces: list[Piece]) -> None:
        self.get, self.pieces = get, pieces
        self.puts: list[Put] = []
        self.stays = False  # somebody holds it who can't be given another

    def add(self, put: Put | None) -> None:
        if put is None:
            self.stays = True
        else:
            self.puts.append(put)

    def replace(self, share: Share) -> None:
        """Replace it for all that hold it, or for none of them: then it is shared at the end with the rest."""
        x = self.get()
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(x, torch.Tensor):
            if type(x) in (torch.Tensor, torch.nn.Parameter):  # others may have more than their data
                x.data = share(x.detach())
        elif not self.stays:
            self._put(x, share(x))

    def _put(self, old: Any, new: Any) -> None:
        for i, put in enumerate(self.puts):
            try:
                put(new)
            except Exception:  # read-only here, whatever that raises
                for each in self.puts[: i + 1]:
                    with contextlib.suppress(Exception):
                        each(old)
                return


def replace(x: Any, share: Share) -> None:
    """Replace what `x` holds by what share() makes of it. What overlaps another array, and `x` itself, stay."""
    places: list[_Place] = []
    _find(x, places, {}, [], 0)
    torn = _overlapping(places)
    # From the heap's end, where free memory goes back by itself.
    alone = sorted(
        (p for p in places if p.puts and p not in torn), key=lambda p: p.pieces[0][0], reverse=True
    )
    freed = 0
    for place in alone:
        place.replace(share)
        freed += sum(n for _, n in place.pieces)
        if freed >= _TRIM:
            _trim()
            freed = 0
    _trim()


def _overlapping(places: list[_Place]) -> set[_Place]:
    """Those that share memory with another one."""
    found: set[_Place] = set()
    reached, last = 0, None
    pieces = sorted(((at, n, each) for each in places for at, n in each.pieces), key=lambda piece: piece[:2])
    for low, n, place in pieces:
        if low < reached and last is not None and last is not place:
            found |= {last, place}
        if low + n > reached:
            reached, last = low + n, place
    return found


def _trim() -> None:
    """Let the C library give free pages back from the middle of its heap too."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library


def _find(x: Any, places: list[_Place], seen: dict[int, _Place | None], alive: list[Any], depth: int) -> None:
    """Note where arrays are held. `seen`: by the ids of what lives as long as its holder does."""
    if id(x) in seen or depth > _DEEP:
        return
    seen[id(x)] = None
    alive.append(x)
    try:
        for _, get, put in parts(x):
            _find_part(get, put, places, seen, alive, depth)
    except Exception:
        pass  # of somebody's property; it is shared at the end


def _find_part(
    get: Callable[[], Any],
    put: Put | None,
    places: list[_Place],
    seen: dict[int, _Place | None],
    alive: list[Any],
    depth: int,
) -> None:
    part = get()
    if not _is_whole(part):
        _find(part, places, seen, alive, depth + 1)
    else:
        made_for_this_call = get() is not part  # a column of polars: the next one may have its id
        place = None if made_for_this_call else seen.get(id(part))
        if place is None:
            pieces = _pieces(part)
            if not pieces:
                return
            place = _Place(get, pieces)
            places.append(place)
            if not made_for_this_call:
                seen[id(part)] = place
        place.add(put)


def _is_whole(x: Any) -> bool:
    """Whether it is replaced as one: arrays, and what can't be changed and holds nothing but some."""
    if isinstance(x, tuple):
        return any(map(is_array, x)) and all(is_array(each) or isinstance(each, ATOMS) for each in x)
    return is_array(x) or is_table(x)


def _pieces(x: Any) -> list[Piece]:
    found = memory(x) if is_array(x) else (piece for _, get, _ in parts(x) for piece in memory(get()))
    return sorted(found)
