"""share_dataset: what is large in a Dataset, moved into the pool in place."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import PurePath
from pickle import PicklingError
from types import ModuleType
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

    Two attributes that were one object stay one object. Left alone are subclasses of list, tuple and dict, object arrays, memory maps,
    modules and their parameters, and what can't be pickled. The logger ``torchshm`` tells what was replaced (INFO).

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

    def into(self, owner: Any, path: str) -> None:
        """Look at what an object, a list or a dict refers to."""
        self._known[id(owner)] = owner
        for name, where, value in list(_references(owner)):
            self._look(value, (owner, name, path + where))

    def _look(self, value: Any, place: tuple[Any, Any, str]) -> None:
        if isinstance(value, (type(None), bool, int, float, str, bytes, type, ModuleType)):
            return
        if id(value) in self._places:
            self._places[id(value)].append(place)
        elif id(value) in self._of_tuple:
            self._tuples[self._of_tuple[id(value)]][1].append(place)
        elif id(value) in self._known:
            return
        elif self._is_large(value):
            self._known[id(value)] = value
            self._places[id(value)] = [place]
        elif type(value) is tuple:
            self._known[id(value)] = value
            cells = list(value)  # replaced in here, and made a tuple again
            self._of_tuple[id(value)] = len(self._tuples)
            self._tuples.append((cells, [place]))
            self.into(cells, place[2])
        elif _has_parts(value):
            self.into(value, place[2])

    def _is_large(self, value: Any) -> bool:
        kind, size = type(value), _size(value)
        if size < self._least:
            return False
        if kind not in (list, tuple, dict):
            return _is_data(value) and not torchshm.is_shared(value)
        if len(value) < _LONG or size >= self._least * len(value):
            return False  # what is large in it is replaced there
        if kind is dict:
            return all(map(_is_key, value)) and all(map(_is_plain, value.values()))
        return all(map(_is_plain, value))

    def replace(self) -> None:
        """Replace what was found."""
        for key, places in self._places.items():
            value = self._known.pop(key)
            made = _moved(value, places[0][2])
            if made is not value:
                for owner, name, _ in places:
                    _put(owner, name, made)
            del value
        for cells, places in reversed(self._tuples):
            owner, name, _ = places[0]
            if any(a is not b for a, b in zip(cells, _get(owner, name), strict=True)):
                made = tuple(cells)
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
    except (PicklingError, TypeError, AttributeError, ValueError) as error:
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
        for name, value in getattr(owner, "__dict__", {}).items():
            yield name, f".{name}", value
        for name in _slots(type(owner)):
            if hasattr(owner, name):
                yield name, f".{name}", getattr(owner, name)


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") else name


def _get(owner: Any, name: Any) -> Any:
    if isinstance(owner, (list, dict)):
        return owner[name]
    attributes = getattr(owner, "__dict__", {})
    return attributes[name] if name in attributes else getattr(owner, name)


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, (list, dict)):
        owner[name] = value
    elif name in getattr(owner, "__dict__", {}):
        owner.__dict__[name] = value  # also of a frozen dataclass
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
        return value.device.type == "cpu" and value.layout == torch.strided and value.grad_fn is None
    return pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index))


def _size(value: Any, depth: int = 0) -> float:
    """Bytes, estimated from some items of what has many."""
    own = sys.getsizeof(value, 64)
    if isinstance(value, (list, tuple, set, frozenset, dict)) and len(value) and depth < _DEEPEST:
        step = -(-len(value) // _SAMPLES)
        parts = list(islice(value.items() if isinstance(value, dict) else value, 0, None, step))
        return own + len(value) / len(parts) * sum(_size(part, depth + 1) for part in parts)
    nbytes = getattr(value, "nbytes", None)
    if nbytes is None and hasattr(value, "memory_usage"):
        nbytes = np.sum(value.memory_usage())
    return max(own, float(nbytes)) if isinstance(nbytes, (int, np.integer)) else own
