"""Reading a persistent store's file with no service: :func:`torchshm.open`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torchshm import _C, _values
from torchshm._arguments import POLICIES
from torchshm.errors import StoreUnavailableError

_MODES = ("r", "c")


def _checked(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a key is a str, not {type(key).__name__}")
    return key


class StoreFile(Mapping[str, Any]):
    """The names and values in a persistent store's file, from :func:`torchshm.open`.

    Values are views of the file: what several processes load of it is in memory once, and is read from the disk when it is first
    touched. They stay valid after :meth:`close`. A StoreFile may be used from any thread and after a fork; pickled, it opens the same
    path where it is unpickled.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(os.fsdecode(path))
        self._held: _C.StoreFile | None = _open(self._path)

    @property
    def path(self) -> str:
        """Where the file is, from the root."""
        return self._path

    @property
    def _core(self) -> _C.StoreFile:
        if self._held is None:
            raise StoreUnavailableError(f"{self._path} is closed; torchshm.open() opens it again")
        return self._held

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreFile, (self._path,)

    def __repr__(self) -> str:
        return f"<torchshm.StoreFile {self._path!r}{', closed' if self._held is None else ''}>"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def load(self, key: str, *, mode: str | None = None, allow_pickle: bool = False) -> Any:
        """Return what a name stands for, without a copy.

        Parameters
        ----------
        key : str
        mode : {"r", "c"}, optional
            What writing does. ``"r"``: an error; tensors, which can't be read-only, are ``"c"``. ``"c"``: it stays private to what
            this call returns. Default: arrays ``"r"``, tensors ``"c"``, what is in pickled objects ``"c"``.
        allow_pickle : bool
            Also load objects that need unpickling, which runs code that the saver chose.

        Raises
        ------
        KeyError
            When there is no such name.
        ValueError
            For an object that needs ``allow_pickle=True``, and for other modes.
        """
        if mode is not None and mode not in _MODES:
            raise ValueError(f"mode is 'r' or 'c', not {mode!r}: {_WRITERS}")
        core = self._core
        raw = core.load(_checked(key), _values.MODES[mode or "r"])
        if type(raw) is not tuple:
            return raw
        return _values.rebuild(core, key, raw[0], raw[1], mode, allow_pickle)

    def export_to(
        self,
        path: str | os.PathLike[str],
        keys: str | Iterable[str] | None = None,
        *,
        prefix: str = "",
        format: str | None = None,
        overwrite: bool = False,
    ) -> list[str]:
        """Write arrays and tensors into a file of another library, as :meth:`Store.export_to` does."""
        from torchshm import _exchange

        return _exchange.export(self, path, keys, prefix=prefix, format=format, overwrite=overwrite)

    def contains(self, key: str) -> bool:
        """Whether there is such a name."""
        return self._core.contains(_checked(key))

    def keys(self, prefix: str = "") -> list[str]:  # type: ignore[override]
        """All names that begin with `prefix`, sorted. Takes time with the number of names in the file."""
        return self._core.keys(prefix)

    def info(self, key: str | None = None) -> dict[str, Any]:
        """Figures about a name, or about the file.

        Returns
        -------
        dict
            Of a name: ``kind`` ("array", "values" or "object"), ``bytes`` (of its blocks), ``blocks``, ``created`` (seconds since 1970),
            ``expires_in`` (seconds, or None), ``pid`` of who saved it, ``policy``. Of the file: ``name`` of the store, ``created``,
            ``pool_id``, ``ttl``, ``policy``, ``patience`` (seconds to wait for room), ``limit_bytes``, ``data_bytes`` (the part of the
            data region that was ever used), ``data_size`` (of the data region: most that the limit may become), ``file_bytes`` (its
            length; it has holes), ``trusted`` (False: the machine went down while it was in use).
        """
        if key is None:
            figures = self._core.info()
            return {**figures, "policy": POLICIES[figures["policy"]]}
        found = self._core.find(_checked(key))
        found["policy"] = POLICIES[found["policy"]]
        del found["cell"], found["life"]
        return {"kind": _values.kind_of(found.pop("text")), **found}

    def __getitem__(self, key: str) -> Any:
        return self.load(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.contains(key)

    def __len__(self) -> int:
        return self._core.size()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __bool__(self) -> bool:
        return True  # also an empty one

    def close(self) -> None:
        """Stop using the file. It can be served again when all that was loaded is gone, too."""
        self._held = None

    def __enter__(self) -> StoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_WRITERS = "a file that is opened this way is only read; torchshm.start(name, file=path) serves it to those who write"


def _open(path: str) -> _C.StoreFile:
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # the system's own errors, by their names
    return _C.StoreFile.open_file(path)


def open_file(path: str | os.PathLike[str], mode: str = "r") -> StoreFile:
    """Open a persistent store's file for reading, with no service.

    Nothing is written: a read-only mount and another user's file will do, if it may be read. Opening takes no longer for more names.
    While somebody has it open the file can't be served.

    Parameters
    ----------
    path : path
        What :func:`torchshm.start` was given as `file`, or what :meth:`Store.snapshot` has written.
    mode : {"r"}

    Returns
    -------
    StoreFile
        A read-only mapping.

    Raises
    ------
    OSError
        When the file can't be opened.
    StoreUnavailableError
        When it is being served, or living processes still use it.
    TorchshmError
        When it is another version's or is damaged, or the machine went down while it was in use.
    ValueError
        When it is no store's file, and for other modes.
    """
    if mode != "r":
        raise ValueError(f"mode is 'r', not {mode!r}: {_WRITERS}")
    return StoreFile(path)
