"""What share(report=True) tells: for each leaf of an object whether it was moved to the pool, and why not."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from torchshm import _C
from torchshm._leaves import Lazy, Piece, is_array, memory, parts
from torchshm._size import format_size

_LONG = 1 << 12  # bytes; what is shorter, and is left, has no line
_DEEP = 60

Block = tuple[int, int, int] | None
"""Pool, block and offset; None: in no pool."""


@dataclasses.dataclass(frozen=True)
class SharedLeaf:
    """One array, tensor, column or byte string of the object.

    Attributes
    ----------
    path : str
        How a program reaches it from the object, as in ``['temperature'].values``; empty for the object itself.
    kind : str
    nbytes : int
        Of its values. Of Python objects: of the references.
    outcome : {"moved", "there", "left"}
        Copied to the pool; in the pool before, and not copied; not in the pool.
    why : str
        It was left. Else empty.
    """

    path: str
    kind: str
    nbytes: int
    outcome: Literal["moved", "there", "left"]
    why: str = ""


class ShareReport:
    """The leaves of an object that was shared. Iterates over them; ``str()`` is a table.

    Attributes
    ----------
    leaves : list of SharedLeaf
    moved, there, left : int
        Bytes of the leaves with that outcome.
    pickled : int
        Bytes of the pickle that the rest of the object takes, ``left`` and all.
    """

    def __init__(self, leaves: list[SharedLeaf], pickled: int) -> None:
        self.leaves, self.pickled = leaves, pickled

    def __iter__(self) -> Iterator[SharedLeaf]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def _bytes(self, outcome: str) -> int:
        return sum(leaf.nbytes for leaf in self.leaves if leaf.outcome == outcome)

    @property
    def moved(self) -> int:
        return self._bytes("moved")

    @property
    def there(self) -> int:
        return self._bytes("there")

    @property
    def left(self) -> int:
        return self._bytes("left")

    def __repr__(self) -> str:
        return f"<ShareReport: {format_size(self.moved)} moved, {format_size(self.there)} there already, {format_size(self.left)} left>"

    def __str__(self) -> str:
        rows = [
            (leaf.path or "(itself)", leaf.kind, format_size(leaf.nbytes), _said(leaf))
            for leaf in self.leaves
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [f"{p:<{widths[0]}}  {k:<{widths[1]}}  {n:>{widths[2]}}  {said}" for p, k, n, said in rows]
        total = f"moved {format_size(self.moved)}, already there {format_size(self.there)}, left {format_size(self.left)}"
        return "\n".join([*lines, f"{total}; the pickle without them: {format_size(self.pickled)}"])


def _said(leaf: SharedLeaf) -> str:
    said = {"moved": "moved", "there": "already there", "left": "left"}[leaf.outcome]
    return f"{said}: {leaf.why}" if leaf.why else said


# ---- looking


@dataclasses.dataclass
class _Found:
    kind: str
    nbytes: int
    pieces: list[Piece]
    blocks: list[Block]
    why: str


def look(x: Any) -> dict[str, _Found]:
    """The leaves of an object by path, and where they lie now."""
    found: dict[str, _Found] = {}
    _look(x, "", found, set(), [], 0)
    return found


def _once(found: dict[str, _Found]) -> Iterator[tuple[str, _Found]]:
    """Without what is the same memory under another path."""
    seen = set()
    for path, leaf in found.items():
        key = (*leaf.pieces, leaf.nbytes)
        if not leaf.pieces or key not in seen:
            seen.add(key)
            yield path, leaf


def _look(x: Any, path: str, found: dict[str, _Found], seen: set[int], alive: list[Any], depth: int) -> None:
    if isinstance(x, (bytes, bytearray)):
        if len(x) >= _LONG:
            found[path] = _Found(
                type(x).__name__, len(x), [], [], "byte strings are part of the pickle, NumPy arrays are not"
            )
    elif isinstance(x, Lazy):
        found[path] = _Found("values", x.nbytes, [], [], x.why)
    elif is_array(x):
        pieces = list(memory(x))
        nbytes = _nbytes(x) or sum(n for _, n in pieces)
        if pieces or nbytes >= _LONG:
            blocks = [_block(address) for address, _ in pieces]
            found[path] = _Found(_kind(x), nbytes, pieces, blocks, "" if pieces else _why(x))
    elif id(x) not in seen and depth < _DEEP:
        seen.add(id(x))
        alive.append(x)
        try:
            for step, get, _ in parts(x):
                _look(get(), path + step, found, seen, alive, depth + 1)
        except Exception:
            pass  # of somebody's property; it is pickled all the same


def _nbytes(x: Any) -> int:
    try:
        return int(x.nbytes)
    except (AttributeError, RuntimeError):
        return 0  # sparse tensors, and some Arrow types


def _block(address: int) -> Block:
    place = _C.block_at(address)
    return None if place is None else place[:3]


def _kind(x: Any) -> str:
    if isinstance(x, np.ndarray):
        return f"{x.dtype} array"
    package = type(x).__module__.partition(".")[0]
    if type(x).__name__ == "MultiIndex":
        return "pandas MultiIndex"
    if package == "torch":
        return f"{str(x.dtype).removeprefix('torch.')} tensor"
    if package == "pyarrow":
        return f"Arrow {getattr(x, 'type', 'buffer')}"
    return f"{package} {getattr(x, 'dtype', '')}".strip()


def _why(x: Any) -> str:
    dtype = str(getattr(x, "dtype", ""))
    if isinstance(x, np.ndarray) and x.dtype.kind == "T":
        return "StringDType keeps its strings outside of the array"
    if dtype == "object" or (isinstance(x, np.ndarray) and x.dtype.hasobject):
        return "Python objects"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return f"a tensor on {x.device}, layout {x.layout}"
    return f"{type(x).__name__} of {dtype or 'this kind'} has its own pickle"


def compare(before: dict[str, _Found], after: dict[str, _Found], pickled: int) -> ShareReport:
    """The report, of how the argument was and how the result is."""
    leaves = []
    for path, was in _once(before):
        now = after.get(path)
        outcome: Literal["moved", "there", "left"] = "left"
        why = was.why
        if now is not None and now.blocks and all(now.blocks):
            outcome, why = ("there" if was.blocks == now.blocks else "moved"), ""
        elif now is not None and any(now.blocks):
            why = "a part of its memory pickles by itself"
        elif not why:
            why = "its type has its own pickle"
        leaves.append(SharedLeaf(path, was.kind, was.nbytes, outcome, why))
    return ShareReport(leaves, pickled)
