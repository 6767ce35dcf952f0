"""What the executor tells its workers to do, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Read:
    """A task of the stage's source."""

    number: int


@dataclass(frozen=True)
class Part:
    """Rows of a block."""

    key: str
    begin: int
    end: int


@dataclass(frozen=True)
class Gather:
    """Rows of several blocks, one after the other."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Deal:
    """The order of all rows of a window, drawn once for all who gather them."""

    rows: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Shuffled:
    """Rows `begin` to `end` of all in the order that `order` has; as blocks that begin and end where `cuts` says, or as one."""

    keys: tuple[str, ...]
    rows: tuple[int, ...]
    order: str
    begin: int
    end: int
    cuts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Merge:
    """All rows of the blocks in an order of their own."""

    keys: tuple[str, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Zipped:
    """Rows of two sides, as many of each."""

    left: tuple[Part, ...]
    right: tuple[Part, ...]


Recipe = Read | Gather | Deal | Shuffled | Merge | Zipped


@dataclass(frozen=True)
class Task:
    number: int
    attempt: int
    stage: int
    recipe: Recipe
    seed: tuple[int, ...]
    prefix: str  # of the names of its blocks
    plain: bool = False  # without the stage's functions
    whole: bool = False  # one block, whatever its size
    target: int = 0
    skip: int = 0  # so many of its blocks have been made by attempts before


@dataclass(frozen=True)
class GoOn:
    """To a task that has made as many blocks as it might: it may make more."""

    number: int
    blocks: int


@dataclass(frozen=True)
class Made:
    """A block that a task has made."""

    key: str
    rows: int
    nbytes: int


@dataclass
class Outcome:
    """What a task has cost. Blocks are told as they are made."""

    seconds: float = 0.0
    rows_in: int = 0
    bytes_in: int = 0
    error: tuple[bytes, str] | None = None  # pickled, and the text of its traceback
