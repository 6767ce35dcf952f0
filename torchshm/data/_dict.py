"""SharedDict: a mapping that is looked up in shared memory."""

from __future__ import annotations

import multiprocessing.reduction
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np

import torchshm
from torchshm import _C
from torchshm.data import _items

K = TypeVar("K")
V = TypeVar("V")


class SharedDict(Mapping[K, V]):
    """A mapping whose keys and pickled values lie in shared memory, once for all processes. It can't be changed.

    Values are read as the items of a :class:`SharedList` are. Keys are looked up in a hash table that lies there as well.

    Parameters
    ----------
    items : mapping or iterable of pairs
        Taken one at a time. Of equal keys the last one's value counts, at the place of the first, as in ``dict``. Keys are str, bytes,
        int, or tuples of these; bools become the ints that they are equal to.
    mode : {"c", "r"}
        As of :class:`SharedList`.

    Raises
    ------
    TypeError
        For other keys.
    pickle.PicklingError, PoolFullError
        As of :class:`SharedList`.

    Examples
    --------
    >>> captions = SharedDict({"cat.jpg": "a cat", "dog.jpg": "a dog"})
    >>> captions["cat.jpg"]
    'a cat'
    """

    __slots__ = ("__weakref__", "_list", "_mode", "_slots")
    __hash__ = None  # type: ignore[assignment]

    _list: _C.ItemList
    _slots: _items.Words

    def __init__(self, items: Mapping[K, V] | Iterable[tuple[K, V]] = (), mode: str = "c") -> None:
        if mode not in ("c", "r"):
            raise ValueError(f"mode is 'c' or 'r', not {mode!r}")
        self._mode = mode
        self._list = _C.ItemList()
        _items.open_list(self._list)
        append = self._list._append_keyed
        for key, value in items.items() if isinstance(items, Mapping) else items:
            append(_encoded(key), value)
        slots = torchshm.empty(1 << max(3, (len(self._list) * 3 // 2).bit_length()), np.uint64)
        slots[:] = 0
        self._list._tabulate(slots)
        self._slots = _items.alias(slots, "r")
        _items.seal(self._list, mode)

    def _number(self, key: Any) -> int:
        try:
            encoded = _encoded(key)
        except TypeError:
            hash(key)  # an unhashable key is the caller's mistake, as with a dict
            try:
                encoded = _encoded(_plain(key))
            except TypeError:
                return -1
        return self._list._find(self._slots, encoded)

    def __getitem__(self, key: K) -> V:
        number = self._number(key)
        if number < 0:
            raise KeyError(key)
        return cast("V", self._list[number])

    def __contains__(self, key: object) -> bool:
        return self._number(key) >= 0

    def __len__(self) -> int:
        return len(self._list)

    def __iter__(self) -> Iterator[K]:
        key = self._list._key
        return (cast("K", _decoded(key(number))) for number in range(len(self._list)))

    def __reversed__(self) -> Iterator[K]:
        key = self._list._key
        return (cast("K", _decoded(key(number))) for number in reversed(range(len(self._list))))

    def __repr__(self) -> str:
        shown = [f"{_decoded(self._list._key(i))!r}: {self._list[i]!r}" for i in range(min(3, len(self)))]
        if len(self) > 3:
            shown.append("...")
        return f"<SharedDict of {len(self):,}: {{{', '.join(shown)}}}>"

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that the mapping keeps."""
        chunks, _, index, _ = self._list._parts()
        return sum(chunk.nbytes for chunk in chunks) + cast("int", index.nbytes) + self._slots.nbytes

    def copy(self) -> SharedDict[K, V]:
        """The mapping itself, which can't be changed."""
        return self

    def __copy__(self) -> SharedDict[K, V]:
        return self

    def __deepcopy__(self, memo: Any) -> SharedDict[K, V]:
        return self

    def __reduce__(self) -> Any:
        chunks, _, index, _ = self._list._parts()
        return _rebuild, (type(self), chunks, index, self._slots, self._mode)


def _rebuild(
    cls: type[SharedDict[Any, Any]], chunks: Any, index: _items.Words, slots: _items.Words, mode: str
) -> SharedDict[Any, Any]:
    made = cls.__new__(cls)
    made._mode = mode
    made._list = _C.ItemList()
    made._list._seal_as(*_items.received(chunks, mode), index)
    made._slots = slots
    return made


def _reduce_pooled(items: SharedDict[Any, Any]) -> Any:
    """As `_list.reduce_pooled`."""
    rebuild, (cls, chunks, index, slots, mode) = items.__reduce__()
    pooled = tuple(map(_items.Pooled, chunks))
    return rebuild, (cls, pooled, _items.Pooled(index), _items.Pooled(slots), mode)


multiprocessing.reduction.ForkingPickler.register(SharedDict, _reduce_pooled)


# ---- keys as bytes: equal keys give equal bytes, and the bytes give the key


def _encoded(key: Any) -> bytes:
    kind = type(key)
    if kind is str:
        return b"s" + key.encode("utf-8", "surrogatepass")
    if kind is int:
        return b"i" + key.to_bytes((key.bit_length() >> 3) + 1, "little", signed=True)
    if kind is bytes:
        return b"b" + key
    if kind is tuple:
        parts = [_encoded(part) for part in key]
        return b"t" + b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    if kind is bool:
        return _encoded(int(key))
    if isinstance(key, (np.integer, np.str_, np.bytes_)):
        return _encoded(key.item())
    raise TypeError(f"a key of a SharedDict is a str, bytes, an int or a tuple of these, not {kind.__name__}")


def _plain(key: Any) -> Any:
    """The key that another one is equal to, as members of an IntEnum, 1.0 and namedtuples are, if there is one."""
    if isinstance(key, tuple):
        return tuple(map(_plain, key))
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, bytes):
        return bytes.__getitem__(key, slice(None))
    if isinstance(key, int):
        return int.__index__(key)
    if isinstance(key, np.bool_):
        return int(key)
    if isinstance(key, (numbers.Number, np.number)):
        try:
            real = int(cast("Any", key).real)
        except (AttributeError, ArithmeticError, ValueError, TypeError):
            return key
        return real if real == key else key
    return key


def _decoded(key: bytes) -> Any:
    kind, rest = key[:1], key[1:]
    if kind == b"s":
        return rest.decode("utf-8", "surrogatepass")
    if kind == b"i":
        return int.from_bytes(rest, "little", signed=True)
    if kind == b"b":
        return rest
    parts, at = [], 0
    while at < len(rest):
        length = int.from_bytes(rest[at : at + 4], "little")
        parts.append(_decoded(rest[at + 4 : at + 4 + length]))
        at += 4 + length
    return tuple(parts)
