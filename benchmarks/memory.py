"""What processes keep in memory, from /proc/<pid>/smaps."""

from __future__ import annotations

import re
from pathlib import Path

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)$")


def rollup(pid: int | str = "self") -> dict[str, int]:
    """Bytes of the whole process by the names of the kernel: ``Pss``, ``Anonymous``, ``Private_Dirty``..."""
    return _sizes(Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])


def pss_of_files(pid: int | str, name: str, what: str = "Pss") -> int:
    """Bytes of Pss, or of another size that the kernel names, in the mappings of files whose path has `name` in it."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps") as lines:
        for line in lines:
            mapping = _MAPPING.match(line)
            if mapping:
                inside = name in mapping[1]
            elif inside and line.startswith(f"{what}:"):
                total += int(line.split()[1]) << 10
    return total


def _sizes(lines: list[str]) -> dict[str, int]:
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
