"""What ``collections.abc`` makes of a mapping, for one that other processes change meanwhile."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import ItemsView, Iterator, MutableMapping, ValuesView
from typing import Any

from torchshm.errors import KeyExistsError

_NONE = object()


def _present(mapping: MutableMapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each name and its value; those that have gone since the names were listed are left out."""
    value: list[Any] = []  # handed on, and not kept until the next one is here
    for key in mapping:
        try:
            value.append(mapping[key])
        except KeyError:
            continue
        yield key, value.pop()


class _Items(ItemsView[str, Any]):
    _mapping: MutableMapping[str, Any]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return _present(self._mapping)


class _Values(ValuesView[Any]):
    _mapping: MutableMapping[str, Any]

    def __iter__(self) -> Iterator[Any]:
        for _, value in _present(self._mapping):
            yield value
            del value


class LiveMapping(MutableMapping[str, Any]):
    """A mapping whose names come and go while it is looked at."""

    @abstractmethod
    def save(self, key: str, value: Any) -> None:
        """Add a name that is not there.

        Raises
        ------
        KeyExistsError
            When it is there.
        """

    def items(self) -> ItemsView[str, Any]:
        """Names and values; those that are removed meanwhile are left out."""
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        """Values; those that are removed meanwhile are left out."""
        return _Values(self)

    def pop(self, key: str, default: Any = _NONE) -> Any:
        """Load a name's value and remove it; of several that do so at once, one gets it."""
        try:
            value = self[key]
            del self[key]
        except KeyError:
            if default is _NONE:
                raise
            return default
        return value

    def popitem(self) -> tuple[str, Any]:
        """Load and remove any name."""
        for key in self:
            try:
                return key, self.pop(key)
            except KeyError:
                continue
        raise KeyError("there is no name")

    def clear(self) -> None:
        """Remove all names that are there now. Nothing is loaded."""
        for key in self:
            try:
                del self[key]
            except KeyError:
                continue

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Load a name's value, or save this one where there is none; of several that do so at once, one saves."""
        while True:
            try:
                return self[key]
            except KeyError:
                pass
            try:
                self.save(key, default)
            except KeyExistsError:
                continue
            return default
