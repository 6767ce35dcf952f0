"""Batches of another size, cut from those that come: views along the first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch


def length(batch: Any) -> int:
    """How many samples a batch has: the length of its arrays along the first dimension.

    Raises
    ------
    ValueError
        When they differ, or when there is none.
    """
    lengths = {x.shape[0] for x in _leaves(batch) if _is_array(x)}
    if len(lengths) != 1:
        found = f"arrays of lengths {sorted(lengths)}" if lengths else "no array"
        raise ValueError(
            f"batch_size cuts batches along the first dimension of their arrays, and this one has {found}: subscribe without it"
        )
    return int(lengths.pop())


class Slices:
    """Takes batches as they come, gives batches of `size` samples."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._parts: list[Any] = []  # of the next one
        self._have = 0  # samples in them
        self._rest: tuple[Any, int, int] | None = None  # a batch, how much of it has been given, its length

    def add(self, batch: Any) -> None:
        """Only when take() has nothing more to give."""
        self._rest = batch, 0, length(batch)

    def take(self) -> list[Any]:
        """One batch of that size; or nothing, when there is not enough."""
        if self._rest is None:
            return []
        batch, begin, whole = self._rest
        end = min(begin + self._size - self._have, whole)
        self._rest = (batch, end, whole) if end < whole else None
        if end > begin:
            self._parts.append(batch if (begin, end) == (0, whole) else _cut(batch, begin, end, whole))
            self._have += end - begin
        return self.flush() if self._have == self._size else []

    def flush(self) -> list[Any]:
        """What is left of less than that size; or nothing."""
        parts, self._parts, self._have = self._parts, [], 0
        return parts if len(parts) < 2 else [_joined(parts)]


def _is_array(x: Any) -> bool:
    return isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim > 0


def _is_container(x: Any) -> bool:
    return isinstance(x, (Mapping, list, tuple))


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, Mapping):
        for each in x.values():
            yield from _leaves(each)
    elif isinstance(x, (list, tuple)):
        for each in x:
            yield from _leaves(each)
    else:
        yield x


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """The first tree with function(leaves at that place) for leaves. What comes a value to a sample, as strings do, is a leaf."""
    first = trees[0]
    if isinstance(first, Mapping):
        made = {key: _map(function, *(tree[key] for tree in trees)) for key in first}
        return made if type(first) is dict else type(first)(made)  # type: ignore[call-arg]
    if isinstance(first, (list, tuple)) and not _is_column(first):
        values = [_map(function, *each) for each in zip(*trees, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return function(*trees)


def _is_column(x: Any) -> bool:
    """A sequence with one plain value for each sample, such as default_collate makes of strings."""
    return len(x) > 0 and not any(
        _is_container(each) or isinstance(each, (np.ndarray, torch.Tensor)) for each in x
    )


def _cut(batch: Any, begin: int, end: int, whole: int) -> Any:
    def cut(x: Any) -> Any:
        sliced = _is_array(x) or (isinstance(x, (list, tuple)) and len(x) == whole)
        return x[begin:end] if sliced else x

    return _map(cut, batch)


def _joined(parts: list[Any]) -> Any:
    lengths = [length(part) for part in parts]

    def join(*xs: Any) -> Any:
        first = xs[0]
        if _is_array(first):
            return torch.cat(xs) if isinstance(first, torch.Tensor) else np.concatenate(xs)
        if isinstance(first, (list, tuple)) and [len(x) for x in xs] == lengths:
            return type(first)(value for x in xs for value in x)
        return first

    return _map(join, *parts)
