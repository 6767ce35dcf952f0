"""What ``store.sync()`` records beside a persistent store's file, and what ``torchshm check --repair`` and ``--data`` make of it.

The record is a JSON file, ``PATH.synced``, written whole or not at all: a checksum (BLAKE2b, 16 bytes) for every name that was there. A
name whose value still has that checksum is what was synced, whatever else the loss of power has done to the file.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import struct
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchshm import _C, _values
from torchshm._exchange._place import written_beside
from torchshm._size import nanoseconds
from torchshm.errors import StaleHandleError, TorchshmError

_VERSION = 1
_POOL_ID = (88, "<Q")  # where the superblock has it (csrc/store/file_layout.h), and how
_TURN = "\0sync"  # the lock of those who write the record
_NAP = 50_000_000  # ns; a death rings no bell
_LINE = 64  # bytes
_SLACK = 16 << 20  # bytes; for what little a store takes by itself


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


def _own(fd: int, like: os.stat_result) -> None:
    """Let those have it who have the store's file: it lists all names. Nobody else, where its group can't be given."""
    mode = like.st_mode & 0o777
    here = os.fstat(fd)
    if here.st_gid != like.st_gid:
        try:
            os.fchown(fd, -1, like.st_gid)
        except OSError:
            mode &= ~0o070
    if here.st_uid != like.st_uid:
        with contextlib.suppress(OSError):
            os.fchown(fd, like.st_uid, -1)
    os.fchmod(fd, mode)


def _write_whole(path: str, text: str, like: os.stat_result) -> None:
    part = f"{path}.{os.getpid()}.part"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            _own(file.fileno(), like)
            file.write(text.encode("ascii"))
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


@contextlib.contextmanager
def _in_turn(core: _C.Store) -> Iterator[None]:
    """One after another, in all processes and threads: an older record must not replace a newer one."""
    turn = core.lock(_TURN)
    while True:
        bell = core.bell(turn.bell)
        if turn.try_acquire(False):
            break
        core.wait(turn.bell, bell, _NAP)
    try:
        yield
    finally:
        turn.release()


def _still_there(core: _C.Store, path: str) -> os.stat_result:
    """Look at the store's file by its path: what is written to one that is gone, or recorded beside another one, nobody finds."""
    at, form = _POOL_ID
    with contextlib.suppress(FileNotFoundError, struct.error), open(path, "rb") as file:
        file.seek(at)
        if struct.unpack(form, file.read(struct.calcsize(form)))[0] == core.pool_id:
            return os.fstat(file.fileno())
    raise TorchshmError(
        f"the file of the store {core.name} is not at {path.removesuffix(' (deleted)')} any more: it was removed, or another one was put "
        "in its place, so what is saved is lost when its processes end. store.snapshot(path) writes all of it to another file"
    )


def sync(core: _C.Store) -> None:
    """Write everything out, and record what is there. A name that comes or changes meanwhile may not be recorded."""
    if core.file is None:
        core.sync()  # says why not
        return
    with _in_turn(core):
        _still_there(core, core.file)  # before the work
        begun = time.time()
        names = {}
        for key in core.keys(""):
            with contextlib.suppress(KeyError, StaleHandleError):  # removed or replaced meanwhile
                names[key] = _digest(core, key)
        core.sync()
        path = core.file
        record = {"version": _VERSION, "pool_id": core.pool_id, "synced": begun, "names": names}
        _write_whole(_record_path(path), json.dumps(record), _still_there(core, path))


@dataclass
class _Record:
    """What the last sync() has said about a file."""

    names: dict[str, str] = field(default_factory=dict)  # and their checksums
    synced: float = 0.0  # when it began
    missing: str = ""  # why there is none


def _read_record(path: str, pool_id: int) -> _Record:
    where = _record_path(path)
    try:
        with open(where, encoding="ascii") as file:
            record = json.load(file)
        if record["version"] != _VERSION:
            return _Record(missing=f"{where} was written by another version of torchshm")
        if record["pool_id"] != pool_id:
            return _Record(missing=f"no sync() of this file was recorded: {where} is of another one")
        return _Record(dict(record["names"]), float(record["synced"]))
    except FileNotFoundError:
        return _Record(missing="no sync() was ever recorded")
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{where} is damaged ({error}): which names are as store.sync() found them is not known",
            RuntimeWarning,
            stacklevel=3,
        )
        return _Record(missing=f"{where} is damaged, in which sync() has recorded it")


@dataclass
class Compared:
    """How the values of a file compare with what sync() has recorded of them."""

    same: int = 0  # of the names
    differing: dict[str, str] = field(default_factory=dict)  # name: how
    unrecorded: list[str] = field(default_factory=list)  # saved after the last sync()
    gone: list[str] = field(default_factory=list)  # recorded, and removed or expired since
    missing: str = ""  # why there is nothing to compare with

    def as_json(self) -> dict[str, Any]:
        """Give plain types for :mod:`json`."""
        return {
            "same": self.same,
            "differing": self.differing,
            "unrecorded": self.unrecorded,
            "gone": self.gone,
            "missing": self.missing or None,
        }


def compare(path: str | os.PathLike[str]) -> Compared:
    """Read every value of a file that nobody uses, and compare it with what the last sync() has recorded. Changes nothing.

    Raises
    ------
    OSError
        When a file can't be read.
    TorchshmError
        When the file can't be read at all, or is in use.
    """
    whole = os.path.realpath(os.fsdecode(path))
    os.close(os.open(whole, os.O_RDONLY | os.O_CLOEXEC))
    file = _C.StoreFile.open_file(whole, True)
    record = _read_record(whole, file.info()["pool_id"])
    compared = Compared(missing=record.missing)
    keys = file.keys("")
    for key in keys:
        try:
            digest = _digest(file, key)
            later = file.find(key)["created"] > record.synced
        except (TorchshmError, ValueError, KeyError) as error:
            compared.differing[key] = f"it can't be read: {error}"
            continue
        if digest == record.names.get(key):
            compared.same += 1
        elif later or key not in record.names:
            compared.unrecorded.append(key)
        else:
            compared.differing[key] = (
                "its bytes are not those that sync() has recorded: they were written to in place, or are damaged"
            )
    compared.gone = sorted(set(record.names) - set(keys))
    return compared


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


def _bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses that an array begins and ends at."""
    reach = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    address = array.__array_interface__["data"][0]
    return address + sum(x for x in reach if x < 0), address + sum(x for x in reach if x > 0) + array.itemsize


class _Runs:
    """The memory of a file that names have, in runs that do not overlap: what several names share is one run, and copied once."""

    def __init__(self) -> None:
        self._spans: set[tuple[int, int]] = set()
        self._runs: list[tuple[int, int]] = []
        self._copies: dict[int, np.ndarray[Any, Any]] = {}

    def add(self, first: int, last: int) -> None:
        if first < last:
            self._spans.add((first, last))

    def join(self) -> int:
        """No more are added. The bytes in all."""
        for first, last in sorted(self._spans):
            if self._runs and first < self._runs[-1][1]:
                self._runs[-1] = (self._runs[-1][0], max(last, self._runs[-1][1]))
            else:
                self._runs.append((first, last))
        return sum(last - first + _LINE for first, last in self._runs)

    def forget_copies(self) -> None:
        """Hold them no longer."""
        self._copies.clear()

    def copied(self, new: _C.Store, first: int) -> tuple[np.ndarray[Any, Any], int]:
        """The copy in `new` of the run that an address is in, and where in it that is."""
        start, last = self._runs[bisect.bisect_right(self._runs, first, key=lambda run: run[0]) - 1]
        ahead = start % _LINE  # what is aligned stays so
        if start not in self._copies:
            self._copies[start] = new.blank(ahead + last - start)
            _C.copy_into(self._copies[start], ahead, start, last - start)
        return self._copies[start], ahead + first - start


def _look_at(old: _C.StoreFile, key: str, runs: _Runs) -> None:
    """Take up the memory of a name. What is damaged raises."""
    old.find(key)
    raw = old.load(key, _values.MODES["r"])
    if isinstance(raw, np.ndarray):
        if raw.nbytes:
            runs.add(*_bounds(raw))
        return
    for block, generation in raw[1]:
        runs.add(*_bounds(old.open(block, generation, _values.MODES["r"])))


def _copy(old: _C.StoreFile, new: _C.Store, key: str, runs: _Runs) -> None:
    """Copy a name, kept."""
    found = old.find(key)
    left = found["expires_in"]
    ttl = 0 if left is None else max(1, int(left * 1e9))
    raw = old.load(key, _values.MODES["r"])
    if isinstance(raw, np.ndarray):
        if raw.nbytes:
            copy, at = runs.copied(new, raw.__array_interface__["data"][0])
            raw = np.ndarray(raw.shape, raw.dtype, copy, at, raw.strides)
        if not new.save_array(key, raw, False, ttl, False, _values.KEEP, 0):
            raise TorchshmError(f"the entry of {key!r} is damaged")
        return
    text, blocks = raw[:2]
    refs: list[Any] = []
    for block, generation in blocks:
        data = old.open(block, generation, _values.MODES["r"])
        copy, at = runs.copied(new, data.__array_interface__["data"][0])
        if at or copy.nbytes != data.nbytes:  # damaged: it overlaps another block
            copy = new.blank(data.nbytes)
            _C.copy_into(copy, 0, data.__array_interface__["data"][0], data.nbytes)
        refs.append(copy.base)
    new.save(key, text, refs, False, ttl, False, _values.KEEP)


def repair(path: str | os.PathLike[str], *, unverified: bool = False) -> Repaired:
    """Put a file in the place of one that was in use when the machine went down, with the names that are as ``store.sync()`` found them.

    The old one is kept as ``PATH.damaged``, or ``PATH.damaged-2`` and so on where there is one, with its record beside it: it can be
    repaired again, otherwise. Needs as much room on the disk again as the names take. Of a file that is in order all names are kept.

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
        When the file can't be read at all, or is in use; or when no name would be kept. Nothing is changed then.
    """
    whole = os.path.realpath(os.fsdecode(path))
    os.close(os.open(whole, os.O_RDWR | os.O_CLOEXEC))
    before = os.stat(whole)
    old = _C.StoreFile.open_file(whole, True)
    figures = old.info()
    record = _read_record(whole, figures["pool_id"])
    result = Repaired(whole)
    runs = _Runs()
    there = old.keys("")
    for key in there if figures["trusted"] else sorted({*there, *record.names}):
        _choose(old, key, record, figures["trusted"], unverified, runs, result)
    _refuse_if_empty(result, there, unverified)
    with written_beside(Path(whole), True, own_mode=True) as made:
        _fill(made, old, runs, result)
        _refuse_if_empty(result, there, unverified)
        text = Path(_record_path(str(made))).read_text("ascii")
        fd = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _own(fd, before)
        finally:
            os.close(fd)
        now = os.stat(whole)
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            raise TorchshmError(f"{whole} was replaced by another file meanwhile, which is left as it is")
        result.damaged = _set_aside(whole)
    _write_whole(_record_path(whole), text, before)
    return result


def _refuse_if_empty(result: Repaired, there: list[str], unverified: bool) -> None:
    if result.kept or result.unverified or not result.lost or (unverified and not there):
        return
    reasons = Counter(result.lost.values()).most_common(3)
    raise TorchshmError(
        f"of {len(result.lost)} names in {result.path} none would be kept: {'; '.join(why for why, _ in reasons)}. It is as it was"
        + ("" if unverified else "; --unverified (unverified=True) keeps what can be read")
    )


def _choose(
    old: _C.StoreFile,
    key: str,
    record: _Record,
    trusted: bool,
    unverified: bool,
    runs: _Runs,
    result: Repaired,
) -> None:
    try:
        same = trusted or _digest(old, key) == record.names.get(key)
        if same or unverified:
            _look_at(old, key, runs)
            (result.kept if same else result.unverified).append(key)
        elif record.missing:
            result.lost[key] = record.missing
        elif key in record.names:
            result.lost[key] = "it has changed since the last sync()"
        else:
            result.lost[key] = "the last sync() has not recorded it"
    except KeyError:
        result.lost[key] = "it is not there any more"
    except MemoryError:
        raise
    except (TorchshmError, ValueError) as error:
        result.lost[key] = str(error)


@contextlib.contextmanager
def _served(made: Path, limit: int, ttl: int = 0, policy: int = -1, patience: int = -1) -> Iterator[_C.Store]:
    core = _C.Store.start(
        f"repair-{os.getpid()}", limit, ttl, policy=policy, patience=patience, file=str(made)
    )
    try:
        yield core
    finally:
        core.stop()


def _fill(made: Path, old: _C.StoreFile, runs: _Runs, result: Repaired) -> None:
    """Make a file of what is to be kept, with the settings of the old one."""
    figures = old.info()
    # A name may have a block for its text, and each run takes whole pages.
    room = runs.join() + ((len(result.kept) + len(result.unverified)) << 13)
    room = max(figures["data_size"] // 2, room + room // 8 + _SLACK)
    with _served(made, room) as new:
        for keys in (result.kept, result.unverified):
            for key in list(keys):
                try:
                    _copy(old, new, key, runs)
                except MemoryError:
                    raise
                except (TorchshmError, ValueError, KeyError) as error:
                    keys.remove(key)
                    result.lost[key] = str(error)
        runs.forget_copies()
        # Only now: a copy that may be dropped would make room for the next one.
        for key in (*result.kept, *result.unverified):
            if (policy := old.find(key)["policy"]) != _values.KEEP:
                new.set_policy(key, policy)
    # Only now: a name without a ttl would have got the store's, and the limit may be below what there is.
    with _served(
        made,
        min(figures["limit_bytes"], 2 * room),
        nanoseconds(figures["ttl"] or 0),
        figures["policy"],
        nanoseconds(figures["patience"]),
    ) as new:
        sync(new)


def _set_aside(whole: str) -> str:
    """Give a file and its record further names that nothing has. It keeps the first one, where the file system has links."""
    for number in itertools.count(1):
        aside = f"{whole}.damaged{'' if number == 1 else f'-{number}'}"
        if os.path.lexists(aside) or os.path.lexists(_record_path(aside)):
            continue
        # The record first: a file that has been set aside is never without.
        with contextlib.suppress(FileNotFoundError):
            _link(_record_path(whole), _record_path(aside))
        try:
            os.link(whole, aside)
        except OSError:
            if os.path.lexists(aside):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_record_path(aside))
                continue
            os.rename(whole, aside)
        return aside
    raise AssertionError


def _link(path: str, other: str) -> None:
    try:
        os.link(path, other)
    except FileNotFoundError:
        raise
    except OSError:
        with open(path, encoding="ascii") as file:
            _write_whole(other, file.read(), os.fstat(file.fileno()))
