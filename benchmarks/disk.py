"""The disk under a benchmark: which folder, and what dd and fio reach there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
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


def forget(path: Path, wait: bool = True) -> None:
    """Takes all files below `path` out of the page cache, so that reading them is the disk's work.

    Without `wait`, only what has been written out by now.
    """
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # removed meanwhile
            fd = os.open(file, os.O_RDONLY)
            if wait:
                os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _discarded(path: Path) -> bool:
    """Whether a store has files there that it will remove."""
    return any(file.suffix in (".part", ".spare") for file in path.rglob("*"))


def settle(path: Path) -> None:
    """Waits until what was removed below `path` is given back: on a file system with ``discard`` that keeps the disk busy for long."""
    deadline = time.monotonic() + 60
    while _discarded(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.sync()


@contextlib.contextmanager
def forgetting(path: Path, every: float = 0.05) -> Iterator[None]:
    """As on a machine whose memory is full: nothing below `path` stays in the page cache for longer than `every` seconds."""
    end = threading.Event()

    def work() -> None:
        while not end.wait(every):
            forget(path, wait=False)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class Dd:
    """dd past the page cache, with blocks of the objects' size."""

    def __init__(self, path: str) -> None:
        self._file = Path(path) / "dd"

    def write(self, nbytes: int, count: int) -> float:
        """GB/s to a new file of `count` blocks."""
        self._file.unlink(missing_ok=True)
        settle(self._file.parent)
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
    """fio past the page cache, random bytes: eight requests of 1 MiB at a time."""

    def __init__(self, path: str) -> None:
        self._file = Path(path) / "fio"

    def write(self, nbytes: int, count: int) -> float:
        """GB/s to a new file, as much as `count` values of `nbytes`."""
        self._file.unlink(missing_ok=True)
        settle(self._file.parent)
        return self._run("write", nbytes * count)

    def read(self, nbytes: int, count: int) -> float:
        """GB/s from what was written last."""
        return self._run("read", nbytes * count)

    def _run(self, what: str, nbytes: int) -> float:
        options = {
            "name": "spill",
            "filename": str(self._file),
            "rw": what,
            "direct": 1,
            "ioengine": "libaio",
            "iodepth": 8,
            "fallocate": "none",
            "bs": "1m",
            "size": f"{nbytes // MIB}m",
            "output-format": "json",
        }
        command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout[done.stdout.index("{") :])
        return float(report["jobs"][0][what]["bw_bytes"]) / 1e9
