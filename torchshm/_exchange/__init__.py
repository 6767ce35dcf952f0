"""Import and export: what :meth:`Store.import_from` and :meth:`Store.export_to` do, over any mapping that has ``keys`` and ``load``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torchshm._exchange import _arrays, _npy, _safetensors, _zarr
from torchshm._exchange._item import Contents, Item
from torchshm._exchange._place import written_beside
from torchshm.errors import KeyExistsError

if TYPE_CHECKING:
    from torchshm._store import Store


class Source(Protocol):
    """What can be exported: a Store, or a store's file."""

    def keys(self, prefix: str = ...) -> list[str]: ...
    def load(self, key: str, /) -> Any: ...
    def info(self) -> dict[str, Any]: ...


class _Format(NamedTuple):
    write: Callable[[Path, Iterator[tuple[str, Any]]], None]
    read: Callable[[Path, str | None], AbstractContextManager[Contents]]
    separator: str  # between the key of a dict, list or tuple and what is in it


_FORMATS = {
    "safetensors": _Format(_safetensors.write, _safetensors.read, "."),
    "npy": _Format(_npy.write_npy, _npy.read_npy, "."),
    "npz": _Format(_npy.write_npz, _npy.read_npz, "."),
    "zarr": _Format(_zarr.write, _zarr.read, "/"),
    "zarr.zip": _Format(_zarr.write_zip, _zarr.read_zip, "/"),
}

Tell = Callable[[str, int, int, int], None]
"""Called before a name is worked at: the name, its bytes (0: not known), how many are done, and how many there are."""


def format_of(path: Path, format: str | None) -> str:
    """The name of a format, as given or by the suffix of a path.

    Raises
    ------
    ValueError
        For one that is not known.
    """
    if format is not None:
        name = format.removeprefix(".").lower()
        if name not in _FORMATS:
            raise ValueError(f"format is one of {', '.join(_FORMATS)}, not {format!r}")
        return name
    for name in sorted(_FORMATS, key=len, reverse=True):
        if path.name.lower().endswith(f".{name}"):
            return name
    raise ValueError(
        f"the suffix of {path.name!r} is none of {', '.join(f'.{name}' for name in _FORMATS)}: give format="
    )


def export(
    source: Source,
    path: str | os.PathLike[str],
    keys: str | Iterable[str] | None = None,
    *,
    prefix: str = "",
    format: str | None = None,
    overwrite: bool = False,
    tell: Tell | None = None,
) -> list[str]:
    """Write values into a file; returns the keys that were written. :meth:`Store.export_to` says more."""
    target = Path(os.path.abspath(path))
    kind = format_of(target, format)
    how = _FORMATS[kind]
    asked = [keys] if isinstance(keys, str) else source.keys(prefix) if keys is None else list(keys)
    for key in asked:
        if not key.startswith(prefix):
            raise ValueError(f"{key!r} does not begin with the prefix {prefix!r}")
    if len(set(asked)) < len(asked):
        raise ValueError("a key is given twice")
    if not asked:
        raise KeyError(f"there is nothing to export{f' that begins with {prefix!r}' if prefix else ''}")
    written: list[str] = []

    def values() -> Iterator[tuple[str, Any]]:
        names: dict[str, str] = {}
        for i, key in enumerate(asked):
            if tell is not None:
                tell(key, 0, i, len(asked))
            try:
                value = _load(source, key)
            except KeyError:
                if keys is not None:
                    raise
                continue  # removed meanwhile
            name = key[len(prefix) :]
            if keys is not None and len(asked) == 1 and type(value) in _arrays.TREES:
                name = ""  # what is in it is all of the file
            for inner, array in _named(kind, name, value, how.separator):
                if inner in names:
                    raise ValueError(
                        f"{names[inner]!r} and {key!r} both have an array that the file would name {inner!r}"
                    )
                names[inner] = key
                yield inner, array
            written.append(key)
            value = array = None  # before the next one needs room

    with written_beside(target, overwrite) as made:
        if kind == "safetensors" and _spills(source):
            _safetensors.write(made, values(), aside=True)
        else:
            how.write(made, values())
    return written


def _load(source: Source, key: str) -> Any:
    try:
        return source.load(key)
    except ValueError as error:
        raise TypeError(f"{key!r} can't be exported: {error}; {_arrays.ELSEWHERE}") from None


def _spills(source: Source) -> bool:
    """Whether there is more in a store than fits into its memory, so that not all of it can be held at a time."""
    return bool(source.info().get("spilled_bytes"))


def _named(kind: str, name: str, value: Any, separator: str) -> Iterator[tuple[str, Any]]:
    if kind == "safetensors" and name == _safetensors.METADATA and _is_metadata(value):
        return iter([(name, value)])
    return _arrays.arrays_of(name, value, separator)


def _is_metadata(value: Any) -> bool:
    return type(value) is dict and all(type(key) is type(text) is str for key, text in value.items())


def import_(
    store: Store,
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    key: str | None = None,
    format: str | None = None,
    framework: str | None = None,
    overwrite: bool = False,
    ttl: float | None = None,
    policy: str | None = None,
    tell: Tell | None = None,
) -> list[str]:
    """Save what a file holds; returns the keys. :meth:`Store.import_from` says more."""
    source = Path(os.path.abspath(path))
    kind = format_of(source, format)
    if framework not in (None, "np", "pt"):
        raise ValueError(f"framework is 'np' or 'pt', not {framework!r}")
    if key is not None and prefix:
        raise ValueError("key= and prefix= exclude one another: with a key all of the file is one value")
    how: dict[str, Any] = {"ttl": ttl, "overwrite": overwrite}
    if policy is not None:
        how["policy"] = policy
    with _FORMATS[kind].read(source, framework) as contents:
        items, metadata = contents
        twice = len({item.name for item in items}) < len(items)
        if twice:
            raise ValueError(f"{source} has several arrays of one name")
        wanted = [prefix + item.name for item in items] if key is None else [key]
        if key is None and metadata and kind == "safetensors":
            wanted.append(prefix + _safetensors.METADATA)
        for each in wanted:
            if not each or each[0] == "\0":
                raise ValueError(f"{source} has an array named {each!r}, which is no key: give a prefix")
            if not overwrite and each in store:
                raise KeyExistsError(
                    f"{each} is a name in this store already; import with another prefix, or with overwrite=True"
                )
        with _undone_on_error(store) as save:
            if key is not None:
                if kind == "npy":
                    save(key, _read(store, items[0], 0, 1, tell), how)
                else:
                    parts = enumerate(items)
                    save(key, {item.name: _read(store, item, i, len(items), tell) for i, item in parts}, how)
                return wanted
            for i, item in enumerate(items):
                save(wanted[i], _read(store, item, i, len(items), tell), how)
            if len(wanted) > len(items):
                save(wanted[-1], metadata, how)
    return wanted


def _read(store: Store, item: Item, done: int, of: int, tell: Tell | None) -> Any:
    if tell is not None:
        tell(item.name, item.nbytes, done, of)
    with store.storage():
        return item.read()


@contextlib.contextmanager
def _undone_on_error(store: Store) -> Iterator[Callable[[str, Any, dict[str, Any]], None]]:
    """Yield what saves; after an error the names that it has made go. Those that it has replaced stay replaced."""
    made: list[tuple[str, Any]] = []

    def mark(key: str) -> Any:
        figures = store.info(key)
        return figures["created"], figures["pid"]

    def save(key: str, value: Any, how: dict[str, Any]) -> None:
        new = not how["overwrite"] or key not in store
        store.save(key, value, **how)
        if new:
            with contextlib.suppress(KeyError):
                made.append((key, mark(key)))

    try:
        yield save
    except BaseException:
        for key, when in made:
            with contextlib.suppress(KeyError):
                if mark(key) == when:  # and not saved again by somebody else
                    store.remove(key)
        raise
