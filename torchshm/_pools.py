"""The pools of this user's processes, found by the memory files they hold open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MEMORY_FILE = re.compile(r"/memfd:torchshm-([0-9a-f]{16})-(data|control) ")
_CATALOGUE = re.compile(r"/memfd:torchshm-[A-Za-z0-9._-]+-catalogue ")


@dataclass
class Files:
    """Paths under ``/proc`` of a pool's two memory files, in one process that holds them open.

    ``catalogues`` are those that the process has, of this pool or of others.
    """

    pid: int
    pool_id: int
    paths: dict[str, Path] = field(default_factory=dict)
    catalogues: list[Path] = field(default_factory=list)


def pools_of(process: Path) -> list[Files]:
    """Give the pools of one process, a folder of ``/proc``. None when it is gone or somebody else's."""
    found: dict[int, Files] = {}
    catalogues: list[Path] = []
    try:
        for fd in (process / "fd").iterdir():
            try:
                target = os.readlink(fd)
            except FileNotFoundError:  # closed since
                continue
            if _CATALOGUE.match(target):
                catalogues.append(fd)
            elif match := _MEMORY_FILE.match(target):
                pool_id = int(match[1], 16)
                files = found.setdefault(pool_id, Files(int(process.name), pool_id, catalogues=catalogues))
                files.paths[match[2]] = fd
    except OSError:
        return []
    return [files for files in found.values() if len(files.paths) == 2]


def every_pool() -> Iterator[Files]:
    """Give the pools of every process; a pool comes once for each process that holds it."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            yield from pools_of(process)
