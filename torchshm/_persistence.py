"""What ``store.sync()`` records beside a persistent store's file, and what ``torchshm check --repair`` makes of it.

The record is a JSON file, ``PATH.synced``, written whole or not at all: a checksum (BLAKE2b, 16 bytes) for every name that was there. A
name whose value still has that checksum is what was synced, whatever else the loss of power has done to the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchshm import _C, _values
from torchshm.errors import StaleHandleError, TorchshmError

_VERSION = 1


def _record_path(path: str) -> str:
    return path + ".synced"


def _bytes(array: np.ndarray[Any, Any]) -> Any:
    """The memory of an array: itself where it is one run of bytes."""
    flat = array.T if array.flags.f_contiguous and not array.flags.c_contiguous else array
    return np.ascontiguousarray(flat).reshape(-1).view(np.uint8) if array.nbytes else b""


def _digest(core: _C.Store | _C.StoreFile, key: str) -> str:
    """The checksum of what a name stands for: its description, and every byte of its blocks."""
    raw = core.load(key, _values.MODES["r"])
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(raw, np.ndarray):
        digest.update(repr((raw.dtype.descr, raw.shape, raw.strides)).encode())
        digest.update(_bytes(raw))
        return digest.hexdigest()
    text, blocks = raw[:2]
    digest.update(text)
    for block, generation in blocks:
        digest.update(core.open(block, generation, _values.MODES["r"]).data)
    return digest.hexdigest()


def _write_whole(path: str, text: str) -> None:
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def sync(core: _C.Store) -> None:
    """Write everything out, and record what is there. A name that comes or changes meanwhile may not be recorded."""
    path = core.file
    if path is None:
        core.sync()  # says why not
        return
    names = {}
    for key in core.keys(""):
        with contextlib.suppress(KeyError, StaleHandleError):  # removed or replaced meanwhile
            names[key] = _digest(core, key)
    core.sync()
    record = {"version": _VERSION, "pool_id": core.pool_id, "synced": time.time(), "names": names}
    _write_whole(_record_path(path), json.dumps(record))


@dataclass
class Repaired:
    """What became of the names of a repaired file."""

    path: str
    kept: list[str] = field(default_factory=list)  # as they were synced
    unverified: list[str] = field(default_factory=list)  # kept, and nothing says that they are right
    lost: dict[str, str] = field(default_factory=dict)  # name: why
    damaged: str = ""  # where the file is that was there before

    def as_json(self) -> dict[str, Any]:
        """Give plain types for :mod:`json`."""
        return {
            "path": self.path,
            "kept": self.kept,
            "unverified": self.unverified,
            "lost": self.lost,
            "damaged": self.damaged,
        }


def _read_record(path: str, pool_id: int) -> dict[str, str]:
    try:
        with open(_record_path(path), encoding="ascii") as file:
            record = json.load(file)
        if record["version"] != _VERSION or record["pool_id"] != pool_id:
            return {}
        return dict(record["names"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{_record_path(path)} is damaged ({error}): which names are as store.sync() found them is not known",
            RuntimeWarning,
            stacklevel=3,
        )
        return {}


def _copy(old: _C.StoreFile, new: _C.Store, key: str) -> None:
    expires_in = old.find(key)["expires_in"]
    ttl = 0 if expires_in is None else max(1, int(expires_in * 1e9))
    raw = old.load(key, _values.MODES["r"])
    if isinstance(raw, np.ndarray) and new.save_array(key, raw, False, ttl, False, -1, 0):
        return
    text, blocks = raw[:2]
    refs: list[Any] = []
    for block, generation in blocks:
        data = old.open(block, generation, _values.MODES["r"])
        target = new.blank(data.nbytes)
        _C.copy_into(target, 0, data.__array_interface__["data"][0], data.nbytes)
        refs.append(target.base)
    new.save(key, text, refs, False, ttl, False, -1)


def repair(path: str | os.PathLike[str], *, unverified: bool = False) -> Repaired:
    """Put a file in the place of one that was in use when the machine went down, with the names that are as ``store.sync()`` found them.

    The old one is kept as ``PATH.damaged``. Needs as much room on the disk again as the names take.

    Parameters
    ----------
    path : path
    unverified : bool
        Keep also the names that were saved or changed after the last sync(), as far as they can be read at all.

    Raises
    ------
    OSError
        When a file can't be read or written.
    TorchshmError
        When the file can't be read at all, or is in use.
    """
    from torchshm import _store

    whole = os.path.abspath(os.fsdecode(path))
    os.close(os.open(whole, os.O_RDWR | os.O_CLOEXEC))
    old = _C.StoreFile.open_file(whole, True)
    figures = old.info()
    record = _read_record(whole, figures["pool_id"])
    result = Repaired(whole)
    fresh = whole + ".repaired"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    try:
        with _store.start(
            f"repair-{os.getpid()}", figures["limit_bytes"], figures["ttl"], file=fresh
        ) as store:
            for key in sorted(set(old.keys("")) | set(record)):
                _keep(old, store._core, key, record, unverified, result)
            sync(store._core)
        damaged = whole + ".damaged"
        os.chmod(fresh, os.stat(whole).st_mode & 0o777)
        os.rename(whole, damaged)
        os.rename(fresh, whole)
        os.rename(_record_path(fresh), _record_path(whole))
    except BaseException:
        for left in (fresh, _record_path(fresh)):
            with contextlib.suppress(OSError):
                os.unlink(left)
        raise
    result.damaged = damaged
    return result


def _keep(
    old: _C.StoreFile,
    new: _C.Store,
    key: str,
    record: dict[str, str],
    unverified: bool,
    result: Repaired,
) -> None:
    try:
        same = _digest(old, key) == record.get(key)
        if not same and not unverified:
            result.lost[key] = (
                "it has changed since the last sync()"
                if key in record
                else "it was saved after the last sync()"
            )
            return
        _copy(old, new, key)
    except KeyError:
        result.lost[key] = "it is not there any more"
    except MemoryError:
        raise
    except (TorchshmError, ValueError) as error:
        result.lost[key] = str(error)
    else:
        (result.kept if same else result.unverified).append(key)
