"""Checking pools that this process has not joined: what ``torchshm check`` does and prints."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchshm import _C, _persistence, _pools
from torchshm.errors import TorchshmError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Catalogue:
    """What a store's catalogue has."""

    store: str
    names: int
    marks: int
    cells: int
    on_disk: int  # of the names

    def describe(self) -> str:
        """Give one line for people."""
        return f"{self.store}: {self.names} names" + (f", {self.on_disk} on disk" if self.on_disk else "")

    def as_json(self) -> dict[str, Any]:
        """Give plain types for :mod:`json`."""
        return {
            "store": self.store,
            "names": self.names,
            "marks": self.marks,
            "cells": self.cells,
            "on_disk": self.on_disk,
        }


@dataclass
class Checked:
    """One pool, its store's catalogue where it has one, and what was found in them."""

    name: str  # pool id in hexadecimal digits; the control file's path where that can't be read
    members: list[tuple[int, str]] = field(default_factory=list)  # pid, name
    blocks: int = 0
    tickets: int = 0  # those of messages and of names
    messages: int = 0  # sent, and not received yet
    is_copy: bool = False
    catalogue: Catalogue | None = None
    violations: list[tuple[int, str]] = field(default_factory=list)  # number of the invariant, text
    compared: _persistence.Compared | None = None  # of a file, where its values were to be read
    error: str | None = None  # why it could not be opened

    @property
    def sound(self) -> bool:
        """Whether all invariants hold, and all values that were compared are as they were recorded."""
        if self.compared is not None and (self.compared.differing or self.compared.missing):
            return False
        return self.error is None and not self.violations

    def as_json(self) -> dict[str, Any]:
        """Give plain types for :mod:`json`."""
        return {
            "pool": self.name,
            "sound": self.sound,
            "copy": self.is_copy,
            "members": [{"pid": pid, "name": name} for pid, name in self.members],
            "blocks": self.blocks,
            "tickets": self.tickets,
            "messages": self.messages,
            "catalogue": None if self.catalogue is None else self.catalogue.as_json(),
            "violations": [{"invariant": number, "what": what} for number, what in self.violations],
            "data": None if self.compared is None else self.compared.as_json(),
            "error": self.error,
        }


def _catalogue(store: str, found: dict[str, Any]) -> Catalogue:
    return Catalogue(store, found["names"], found["marks"], found["cells"], len(found["spilled"]))


def _lost(found: dict[str, Any], store: str, pool_id: int, pids: list[int]) -> set[tuple[str, str]]:
    """Names that are on disk, and whose files are not: csrc/store/spill_file.h says where they should be.

    None, where this process can't look there: as another user, or from outside of a container.
    """
    if not found["spilled"]:
        return set()
    place = os.path.join(found["directory"], f"{store}-{pool_id:016x}")
    names = _names_in(place, pids)
    if names is None:
        return set()
    files = {(key, f"{file:016x}.spill") for key, file in found["spilled"]}
    return {(key, os.path.join(place, file)) for key, file in files if file not in names}


def _names_in(place: str, pids: list[int]) -> set[str] | None:
    """What is in a directory, which may be there for its members alone; nothing when it is gone for them as well."""
    gone = False
    for root in ("", *(f"/proc/{pid}/root" for pid in pids)):
        try:
            return set(os.listdir(root + place))
        except FileNotFoundError:
            gone = gone or (root != "" and os.path.isdir(root))
        except OSError:
            continue
    return set() if gone else None


def check_descriptors(
    data: int, control: int, catalogue: int | None = None, *, at_rest: bool = False, name: str = ""
) -> Checked:
    """Check a pool, and the catalogue that belongs to it, by their files. `name` is for one that can't be read."""
    checked = Checked(name)
    try:
        found = _C.check(data, control, at_rest)
        checked.name = f"{found['pool_id']:016x}"
        checked.members, checked.is_copy = found["members"], found["is_copy"]
        checked.blocks, checked.tickets = found["blocks"], found["tickets"]
        checked.messages = found["tickets"] - found["named_tickets"]
        checked.violations += found["violations"]
        if catalogue is not None:
            of_store = _C.check_catalogue(catalogue, data, control, at_rest)
            store, pool_id = _C.catalogue_name(catalogue)
            checked.catalogue = _catalogue(store, of_store)
            checked.violations += of_store["violations"]
            pids = [pid for pid, _ in checked.members]
            if not checked.is_copy and (lost := _lost(of_store, store, pool_id, pids)):
                # What was just being read back, or written anew, is found in the second look.
                now = _lost(_C.check_catalogue(catalogue, data, control, at_rest), store, pool_id, pids)
                checked.violations += [
                    (14, f"{key!r} is on disk only, and its file {path} is not there")
                    for key, path in sorted(lost & now)
                ]
    except (TorchshmError, ValueError) as error:
        checked.error = str(error)
    return checked


def check_files(
    control: str | Path,
    data: str | Path,
    catalogue: str | Path | None = None,
    *,
    at_rest: bool = False,
    name: str | None = None,
) -> Checked:
    """Check a pool by its files: memory files under ``/proc/<pid>/fd``, or plain files that they were copied to.

    Raises
    ------
    OSError
        When a file can't be opened.
    """
    opened: list[int] = []
    try:
        for path in (data, control, catalogue):
            if path is not None:
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        return check_descriptors(*opened, at_rest=at_rest, name=name or str(control))
    finally:
        for fd in opened:
            os.close(fd)


def check_file(path: str | Path, *, at_rest: bool = False, data: bool = False) -> Checked:
    """Check the tables of a persistent store by its file, whether it is being served or not.

    Parameters
    ----------
    path : path
    at_rest : bool
        Nobody is inside an operation and the dead were taken back: be exact.
    data : bool
        Read the values too, of a file that nobody uses, and compare them with what the last sync() has recorded.

    Raises
    ------
    OSError
        When the file can't be opened.
    """
    checked = Checked(str(path))
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    try:
        found, of_store, store = _C.check_file(str(path), at_rest)
    except (TorchshmError, ValueError) as error:
        checked.error = str(error)
        return checked
    checked.members = found["members"]
    checked.blocks, checked.tickets = found["blocks"], found["tickets"]
    checked.messages = found["tickets"] - found["named_tickets"]
    checked.catalogue = _catalogue(store, of_store)
    checked.violations += found["violations"] + of_store["violations"]
    if data:
        try:
            checked.compared = _persistence.compare(path)
        except (TorchshmError, ValueError) as error:
            checked.error = f"its values were not compared: {error}"
    return checked


def check_store(name: str, *, at_rest: bool = False) -> Checked:
    """Check the store of that name that some living process has, whether it is being served or not.

    Raises
    ------
    StoreUnavailableError
        When no process has it.
    """
    files = _C.store_files(name)
    try:
        return check_descriptors(*files, at_rest=at_rest, name=name)
    finally:
        for fd in files:
            os.close(fd)


def _catalogue_of(files: _pools.Files) -> Path | None:
    """Find the catalogue that belongs to a pool, in a process that has both."""
    for path in files.catalogues:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _C.catalogue_name(fd)[1] == files.pool_id:
                return path
        except (TorchshmError, ValueError):  # one that is being made, or of another version
            continue
        finally:
            os.close(fd)
    return None


def check_machine(pid: int | None = None, *, at_rest: bool = False) -> list[Checked]:
    """Check every pool of this user's processes, or those of one process."""
    checked: dict[int, Checked] = {}
    for files in _pools.every_pool() if pid is None else _pools.pools_of(Path(f"/proc/{pid}")):
        known = checked.get(files.pool_id)
        # A worker may be a member of a store's pool and not have its catalogue.
        catalogue = _catalogue_of(files) if known is None or known.catalogue is None else None
        if known is not None and catalogue is None:
            continue
        name = f"{files.pool_id:016x}"
        paths = (files.paths["control"], files.paths["data"], catalogue)
        try:
            for attempt in range(3):
                time.sleep(0.1 * attempt)  # a pool that is just being made can't be read yet
                found = check_files(*paths, at_rest=at_rest, name=name)
                if found.error is None:
                    break
        except OSError:  # that process is gone; another may hold the pool
            continue
        checked[files.pool_id] = found
    return list(checked.values())


def table(pools: list[Checked]) -> Table:
    """Give a line for each pool."""
    from rich.markup import escape
    from rich.table import Table

    lines = Table("pool", "members", "blocks", "messages", "store", "result")
    for pool in pools:
        members = [f"{pid} {name}" if pid else "not signed yet" for pid, name in pool.members]
        if len(members) > 8:
            members[7:] = [f"and {len(members) - 7} more"]
        if pool.error is not None:
            result = "[red]not readable[/]"
        elif pool.violations:
            result = f"[red]{len(pool.violations)} violation{'s' if len(pool.violations) > 1 else ''}[/]"
        elif pool.compared is not None and pool.compared.differing:
            result = "[red]values differ[/]"
        elif not pool.sound:
            result = "[red]not compared[/]"
        else:
            result = "[green]sound[/]"
        lines.add_row(
            escape(pool.name + (" (copy)" if pool.is_copy else "")),
            escape("\n".join(members)),
            str(pool.blocks),
            str(pool.messages),
            "" if pool.catalogue is None else escape(pool.catalogue.describe()),
            result,
        )
    return lines


def remarks(pools: list[Checked]) -> list[str]:
    """Give a line for each violation."""
    lines = []
    for pool in pools:
        if pool.error is not None:
            lines.append(f"{pool.name}: {pool.error}")
        lines += [f"{pool.name}: invariant {number}: {what}" for number, what in pool.violations]
        if pool.compared is not None:
            lines += _of_values(pool.name, pool.compared)
    return lines


def _of_values(name: str, compared: _persistence.Compared) -> list[str]:
    lines = [f"{name}: {key!r}: {how}" for key, how in compared.differing.items()]
    lines += [
        f"{name}: {key!r}: the last sync() has not recorded what it is now" for key in compared.unrecorded
    ]
    lines += [
        f"{name}: {key!r}: recorded by the last sync(), and removed or expired since" for key in compared.gone
    ]
    if compared.missing:
        return [*lines, f"{name}: no values were compared: {compared.missing}"]
    return [*lines, f"{name}: {compared.same} names are as the last sync() has recorded them"]
