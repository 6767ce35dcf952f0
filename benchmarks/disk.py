"""The disk under a benchmark: which folder, and what dd and fio reach there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.units import MIB

FOLDER = "TORCHSHM_BENCH_DISK"
_DD = re.compile(r"(\d+) bytes .* copied, ([\d.e+-]+) s")


@contextlib.contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """An empty folder, in ``$TORCHSHM_BENCH_DISK``, else in the tree's ``build``, which is on a disk as /tmp may not be."""
    chosen = os.environ.get(FOLDER)
    parent = Path(chosen) if chosen else Path(__file__).parents[1] / "build"
    parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def forget(path: Path) -> None:
    """Takes all files below `path` out of the page cache, so that reading them is the disk's work."""
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class Dd:
    """dd past the page cache, with blocks of the objects' size."""

    def __init__(self, path: str) -> None:
        self._file = Path(path) / "dd"

    def write(self, nbytes: int, count: int) -> float:
        """GB/s to a new file of `count` blocks."""
        self._file.unlink(missing_ok=True)
        return self._run("if=/dev/zero", f"of={self._file}", "oflag=direct", nbytes, count)

    def read(self, nbytes: int, count: int) -> float:
        """GB/s from what was written last."""
        return self._run(f"if={self._file}", "of=/dev/null", "iflag=direct", nbytes, count)

    @staticmethod
    def _run(source: str, target: str, flag: str, nbytes: int, count: int) -> float:
        command = ["dd", source, target, flag, f"bs={nbytes}", f"count={count}"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
        )
        found = _DD.search(done.stderr)
        if found is None or int(found[1]) != nbytes * count:
            raise RuntimeError(f"dd said: {done.stderr}")
        return int(found[1]) / float(found[2]) / 1e9


class Fio:
    """fio past the page cache, one request of the objects' size at a time, random bytes."""

    def __init__(self, path: str) -> None:
        self._file = Path(path) / "fio"

    def write(self, nbytes: int, count: int) -> float:
        """GB/s to a new file of `count` blocks."""
        self._file.unlink(missing_ok=True)
        return self._run("write", nbytes, count)

    def read(self, nbytes: int, count: int) -> float:
        """GB/s from what was written last."""
        return self._run("read", nbytes, count)

    def _run(self, what: str, nbytes: int, count: int) -> float:
        done = subprocess.run(
            [
                "fio",
                "--name=spill",
                f"--filename={self._file}",
                f"--rw={what}",
                "--direct=1",
                "--ioengine=psync",
                "--fallocate=none",
                f"--bs={nbytes // MIB}m",
                f"--size={nbytes * count // MIB}m",
                "--output-format=json",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        report = json.loads(done.stdout[done.stdout.index("{") :])
        return float(report["jobs"][0][what]["bw_bytes"]) / 1e9
