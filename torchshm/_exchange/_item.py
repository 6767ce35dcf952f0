"""What a reader finds in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Item(NamedTuple):
    """An array in a file; `read` makes it, in the memory that this thread allocates in."""

    name: str
    nbytes: int
    read: Callable[[], Any]


class Contents(NamedTuple):
    """All of a file."""

    items: list[Item]
    metadata: dict[str, str] | None = None
