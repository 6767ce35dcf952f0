"""share_dataset: what is large in a Dataset, moved into the pool in place."""

from __future__ import annotations

import datetime
import logging
import sys
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePath
from types import MemberDescriptorType, ModuleType
from typing import Any, TypeVar

import numpy as np

import torchshm
from torchshm._size import parse_size
from torchshm.data._dict import SharedDict
from torchshm.data._list import SharedList
from torchshm.errors import PoolFullError

D = TypeVar("D")

_log = logging.getLogger("torchshm")
_PLAIN = {
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    datetime.date,
    datetime.datetime,
    datetime.timedelta,
}
_SAMPLES = 64  # items of a list that are looked at to tell how large it is
_LONG = 100  # items; arbitrary
_DEEPEST = 8  # levels of containers in an item
# Objects of these are not looked into.
_LIBRARIES = set(sys.stdlib_module_names).union(
    ("PIL", "dask", "datasets", "h5py", "netCDF4", "numpy", "pandas", "polars", "pyarrow"),
    ("torch", "torchshm", "torchvision", "xarray", "zarr"),
)


def share_dataset(dataset: D, min_bytes: int | str = "1MiB") -> D:
    """Move what is large in a Dataset into shared memory, in place, so that workers of any start method read one copy.

    Its attributes are walked, and those of the objects in it: a ``Subset``'s dataset, a ``ConcatDataset``'s, objects of the program's
    own classes, short containers of such. Replaced are

    - lists, tuples and dicts of 100 or more plain objects (numbers, text, bytes, arrays, tensors, containers of these) by
      :class:`SharedList` and :class:`SharedDict`. They can be read as before and not be changed, and each access makes the item
      anew;
    - arrays, tensors, and pandas objects by :func:`torchshm.share`'s, mode ``"c"``.

    Two attributes that were one object stay one object. Left alone are subclasses of list, tuple and dict, lists most of whose bytes
    are shared by their items, object arrays, what lies in shared memory or in a mapped file, modules and their parameters, and what
    can't be pickled. The logger ``torchshm`` tells what was replaced (INFO).

    Parameters
    ----------
    dataset : torch.utils.data.Dataset or any object
    min_bytes : int or str
        Leave what is smaller; of a list, as estimated from a sample of its items.

    Returns
    -------
    dataset
        The same object.

    Raises
    ------
    PoolFullError
        When there is no room. What was replaced until then stays so.
    """
    walk = _Walk(parse_size(min_bytes))
    walk.into(dataset, type(dataset).__name__)
    walk.replace()
    return dataset


class _Walk:
    """First all places that refer to something large are found, then it is replaced in all of them at once, and can go."""

    def __init__(self, least: int) -> None:
        self._least = least
        self._known: dict[int, Any] = {}  # by id; what is kept here keeps its id
        self._places: dict[int, list[tuple[Any, Any, str]]] = {}  # of what is large: owner, name there, path
        self._tuples: list[tuple[list[Any], list[tuple[Any, Any, str]]]] = []  # outer ones first
        self._of_tuple: dict[int, int] = {}
        self._private = _PrivateMemory()
        self._waiting: list[tuple[Any, str]] = []

    def into(self, owner: Any, path: str) -> None:
        """Look at what an object, a list or a dict refers to, and at what that does."""
        self._later(owner, path)
        while self._waiting:
            owner, path = self._waiting.pop()
            for name, where, value in list(_references(owner)):
                place = (owner, name, path + where)
                try:
                    self._look(value, place)
                except Exception as error:
                    _log.warning("%s is not looked into: %r", place[2], error)

    def _later(self, owner: Any, path: str) -> None:
        self._known[id(owner)] = owner
        self._waiting.append((owner, path))

    def _look(self, value: Any, place: tuple[Any, Any, str]) -> None:
        if isinstance(value, (type(None), bool, int, float, str, bytes, type, ModuleType)):
            return
        if id(value) in self._places:
            self._places[id(value)].append(place)
        elif id(value) in self._of_tuple:
            self._tuples[self._of_tuple[id(value)]][1].append(place)
        elif id(value) in self._known:
            return
        elif self._is_large(value, place[2]):
            self._known[id(value)] = value
            self._places[id(value)] = [place]
        elif type(value) is tuple:
            self._known[id(value)] = value
            cells = list(value)  # replaced in here, and made a tuple again
            self._of_tuple[id(value)] = len(self._tuples)
            self._tuples.append((cells, [place]))
            self._later(cells, place[2])
        elif _has_parts(value):
            self._later(value, place[2])

    def _is_large(self, value: Any, path: str) -> bool:
        kind, size = type(value), _size(value)
        if size < self._least:
            return False
        if kind not in (list, tuple, dict):
            return _is_data(value) and not torchshm.is_shared(value) and self._private.has(value)
        if len(value) < _LONG or size >= self._least * len(value):
            return False  # what is large in it is replaced there
        if kind is dict and not all(map(_is_key, value)):
            return False
        if not all(map(_is_plain, value.values() if kind is dict else value)):
            return False
        items = _Sum(self._private)
        if not items.add(value):
            return False
        if items.again >= self._least and 2 * items.again > items.bytes:
            _log.warning("%s stays as it is, %s: its items share %d bytes", path, _text(value), items.again)
            return False
        return True

    def replace(self) -> None:
        """Replace what was found."""
        for key, places in self._places.items():
            value = self._known.pop(key)
            made = _moved(value, places[0][2])
            if made is not value:
                for owner, name, _ in places:
                    _put(owner, name, made)
            del value
        changed = True
        while changed:  # one in two others may come after one of them
            changed = False
            for cells, places in reversed(self._tuples):
                owner, name, _ = places[0]
                if any(a is not b for a, b in zip(cells, _get(owner, name), strict=True)):
                    changed, made = True, tuple(cells)
                    for owner, name, _ in places:
                        _put(owner, name, made)


def _moved(value: Any, path: str) -> Any:
    before = _text(value)
    made: Any
    try:
        if type(value) is dict:
            made = SharedDict(value)
        elif type(value) in (list, tuple):
            made = SharedList(value).seal()
        else:
            made = torchshm.share(value)
    except PoolFullError:
        raise
    except Exception as error:
        _log.warning("%s stays as it is, %s: %s", path, before, error)
        return value
    _log.info("%s: %s is now %s", path, before, _text(made))
    return made


def _text(value: Any) -> str:
    size = value.nbytes if isinstance(value, (SharedList, SharedDict)) else _size(value)
    count = f" of {len(value):,}" if isinstance(value, (list, tuple, dict, SharedList, SharedDict)) else ""
    return f"a {type(value).__name__}{count}, {size / 1e6:.1f} MB"


# ---- owners: objects, lists and dicts


def _references(owner: Any) -> Iterator[tuple[Any, str, Any]]:
    if isinstance(owner, list):
        for i, value in enumerate(owner):
            yield i, f"[{i}]", value
    elif isinstance(owner, dict):
        for key, value in owner.items():
            yield key, f"[{key!r}]", value
    else:
        for name, value in _attributes(owner).items():
            yield name, f".{name}", value
        for name, member in _slots(type(owner)):
            try:
                value = member.__get__(owner)
            except AttributeError:
                continue
            yield name, f".{name}", value


def _attributes(owner: Any) -> dict[str, Any]:
    """Without asking a __getattr__ of the program's."""
    try:
        found = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def _slots(kind: type) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        for name, member in base.__dict__.items():
            if isinstance(member, MemberDescriptorType):
                yield name, member


def _get(owner: Any, name: Any) -> Any:
    if isinstance(owner, (list, dict)):
        return owner[name]
    attributes = _attributes(owner)
    return attributes[name] if name in attributes else object.__getattribute__(owner, name)


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, (list, dict)):
        owner[name] = value
    elif name in (attributes := _attributes(owner)):
        attributes[name] = value  # also of a frozen dataclass
    else:
        object.__setattr__(owner, name, value)


def _has_parts(value: Any) -> bool:
    kind = type(value)
    if kind in (list, dict):
        return True
    if isinstance(value, (list, tuple, dict, set, frozenset)) or (
        not hasattr(value, "__dict__") and not hasattr(kind, "__slots__")
    ):
        return False
    torch = sys.modules.get("torch")
    if torch is not None:
        if isinstance(value, (torch.nn.Module, torch.Tensor)):
            return False
        if isinstance(value, (torch.utils.data.Dataset, torch.utils.data.Sampler)):
            return True
    return kind.__module__.partition(".")[0] not in _LIBRARIES


# ---- what is moved


def _is_key(key: Any) -> bool:
    return type(key) in (str, int, bytes) or (type(key) is tuple and all(map(_is_key, key)))


def _is_plain(value: Any, depth: int = 0) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if depth == _DEEPEST:
        return False
    if kind in (list, tuple, set, frozenset) or (isinstance(value, tuple) and hasattr(kind, "_fields")):
        return all(_is_plain(part, depth + 1) for part in value)
    if kind is dict:
        return all(_is_plain(part, depth + 1) for pair in value.items() for part in pair)
    return isinstance(value, (np.generic, PurePath)) or _is_data(value)


def _is_data(value: Any) -> bool:
    """Arrays, tensors and frames, as far as their bytes are in memory and nowhere else."""
    if type(value) is np.ndarray:
        base = value.base
        while isinstance(base, np.ndarray):
            if isinstance(base, np.memmap):
                return False
            base = base.base
        return not value.dtype.hasobject
    torch, pandas = sys.modules.get("torch"), sys.modules.get("pandas")
    if torch is not None and type(value) is torch.Tensor:
        return (
            value.device.type == "cpu"
            and value.layout == torch.strided
            and not value.is_nested
            and value.grad_fn is None
        )
    return pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index))


def _size(value: Any, depth: int = 0) -> float:
    """Bytes, estimated from some items of what has many."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        own = sys.getsizeof(value)
        if not len(value) or depth >= _DEEPEST:
            return own
        step = -(-len(value) // _SAMPLES)
        parts = list(islice(value.items() if isinstance(value, dict) else value, 0, None, step))
        return own + len(value) / len(parts) * sum(_size(part, depth + 1) for part in parts)
    if type(value) in _PLAIN:
        return sys.getsizeof(value)
    return _bytes(value) if _is_data(value) else 64


def _bytes(data: Any) -> int:
    nbytes = data.memory_usage() if hasattr(data, "memory_usage") else data.nbytes
    return int(np.sum(nbytes))


class _Sum:
    """The bytes of the items of a list, and how many of them are those of an object that others refer to as well."""

    def __init__(self, private: _PrivateMemory) -> None:
        self.bytes = self.again = 0
        self._private = private
        self._seen: dict[int, int] = {}  # by id; all of them are kept by the list
        self._owners: dict[int, int] = {}  # of arrays: bytes not yet counted

    def add(self, value: Any) -> bool:
        """Count an object; whether all arrays in it are of private memory."""
        before, key = self.bytes, id(value)
        if key in self._seen:
            self.bytes += self._seen[key]
            self.again += self._seen[key]
            return True
        kind, good = type(value), True
        if isinstance(value, (list, tuple, set, frozenset)):
            self.bytes += sys.getsizeof(value)
            good = all(map(self.add, value))
        elif kind is dict:
            self.bytes += sys.getsizeof(value)
            good = all(map(self.add, value)) and all(map(self.add, value.values()))
        elif kind in (str, bytes, bytearray):
            self.bytes += len(value)
        elif _is_data(value):
            self.bytes += _bytes(value)
            good = self._private.has(value)
            if kind is np.ndarray and value.base is not None:
                self._add_view(value)
        else:
            self.bytes += 16
        if self.bytes - before >= 1024:
            self._seen[key] = self.bytes - before
        return good

    def _add_view(self, array: np.ndarray[Any, Any]) -> None:
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        left = self._owners.get(id(owner), owner.nbytes)
        self.again += max(0, array.nbytes - left)
        self._owners[id(owner)] = max(0, left - array.nbytes)


class _PrivateMemory:
    """The ranges of this process's memory that nobody else sees and that are of no file."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        with open("/proc/self/maps") as lines:
            for line in lines:
                extent, rights, _, _, inode = line.split(maxsplit=5)[:5]
                if rights[3] == "p" and inode == "0":
                    start, _, end = extent.partition("-")
                    self._starts.append(int(start, 16))
                    self._ends.append(int(end, 16))

    def has(self, data: Any) -> bool:
        """Whether an array or a tensor lies there; of frames it is taken for granted."""
        if isinstance(data, np.ndarray):
            address = data.__array_interface__["data"][0]
        elif hasattr(data, "data_ptr"):
            address = data.data_ptr()
        else:
            return True
        i = bisect_right(self._starts, address) - 1
        return address == 0 or data.nbytes == 0 or (i >= 0 and address < self._ends[i])
