"""Checking pools that this process has not joined: what ``torchshm check`` does and prints."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchshm import _C, _pools
from torchshm.errors import TorchshmError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Checked:
    """One pool and what was found in it."""

    name: str  # pool id in hexadecimal digits; the control file's path where that can't be read
    members: list[tuple[int, str]] = field(default_factory=list)  # pid, name
    blocks: int = 0
    tickets: int = 0
    is_copy: bool = False
    violations: list[tuple[int, str]] = field(default_factory=list)  # number of the invariant, text
    error: str | None = None  # why it could not be opened

    @property
    def sound(self) -> bool:
        """Whether all invariants hold."""
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
            "violations": [{"invariant": number, "what": what} for number, what in self.violations],
            "error": self.error,
        }


def check_files(
    control: str | Path, data: str | Path, *, at_rest: bool = False, name: str | None = None
) -> Checked:
    """Check a pool by its two files: memory files under ``/proc/<pid>/fd``, or plain files that they were copied to.

    Raises
    ------
    OSError
        When a file can't be opened.
    """
    opened: list[int] = []
    try:
        for path in (data, control):
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        found = _C.check(opened[0], opened[1], at_rest)
    except TorchshmError as error:
        return Checked(name or str(control), error=str(error))
    finally:
        for fd in opened:
            os.close(fd)
    return Checked(
        name or f"{found['pool_id']:016x}",
        found["members"],
        found["blocks"],
        found["tickets"],
        found["is_copy"],
        found["violations"],
    )


def check_machine(pid: int | None = None, *, at_rest: bool = False) -> list[Checked]:
    """Check every pool of this user's processes, or those of one process."""
    checked: dict[int, Checked] = {}
    for files in _pools.every_pool() if pid is None else _pools.pools_of(Path(f"/proc/{pid}")):
        if files.pool_id in checked:
            continue
        name = f"{files.pool_id:016x}"
        try:
            for attempt in range(3):
                time.sleep(0.1 * attempt)  # a pool that is just being made can't be read yet
                found = check_files(files.paths["control"], files.paths["data"], at_rest=at_rest, name=name)
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

    lines = Table("pool", "members", "blocks", "messages", "result")
    for pool in pools:
        members = [f"{pid} {name}" if pid else "not signed yet" for pid, name in pool.members]
        if len(members) > 8:
            members[7:] = [f"and {len(members) - 7} more"]
        if pool.error is not None:
            result = "[red]not readable[/]"
        elif pool.violations:
            result = f"[red]{len(pool.violations)} violation{'s' if len(pool.violations) > 1 else ''}[/]"
        else:
            result = "[green]sound[/]"
        lines.add_row(
            escape(pool.name + (" (copy)" if pool.is_copy else "")),
            escape("\n".join(members)),
            str(pool.blocks),
            str(pool.tickets),
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
    return lines
