"""The pools of this user's processes, found by the memory files they hold open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MEMORY_FILE = re.compile(r"/memfd:torchshm-([0-9a-f]{16})-(data|control) ")


@dataclass
class Files:
    """Paths under ``/proc`` of a pool's two memory files, in one process that holds them open."""

    pid: int
    pool_id: int
    paths: dict[str, Path] = field(default_factory=dict)


def pools_of(process: Path) -> list[Files]:
    """Give the pools of one process, a folder of ``/proc``. None when it is gone or somebody else's."""
    found: dict[int, Files] = {}
    try:
        for fd in (process / "fd").iterdir():
            try:
                match = _MEMORY_FILE.match(os.readlink(fd))
            except FileNotFoundError:  # closed since
                continue
            if match:
                pool_id = int(match[1], 16)
                found.setdefault(pool_id, Files(int(process.name), pool_id)).paths[match[2]] = fd
    except OSError:
        return []
    return [files for files in found.values() if len(files.paths) == 2]


def every_pool() -> Iterator[Files]:
    """Give the pools of every process; a pool comes once for each process that holds it."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            yield from pools_of(process)
