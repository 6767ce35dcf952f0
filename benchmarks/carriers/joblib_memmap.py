"""joblib's way: dump to a file in /dev/shm, load it memory-mapped."""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from benchmarks.carriers.carrier import Bytes, Carrier


class JoblibMemmap(Carrier):
    """What joblib.Parallel does with large arguments, one file per array."""

    label: ClassVar[str] = "joblib"
    how: ClassVar[str] = "joblib.dump into /dev/shm, its path sent, joblib.load(mmap_mode='r'), unlink"
    package: ClassVar[str | None] = "joblib"

    def open(self, bytes_in_flight: int) -> None:
        import joblib

        self._joblib = joblib
        self._folder = tempfile.mkdtemp(prefix="torchshm-benchmark-", dir="/dev/shm")
        self._number = 0

    def send(self, link: Connection) -> None:
        self._number += 1
        path = f"{self._folder}/{self._number}"
        self._joblib.dump(self.source, path)
        link.send(path)

    def receive(self, link: Connection) -> tuple[str, Bytes]:
        path = link.recv()
        return path, self._joblib.load(path, mmap_mode="r")

    def view(self, received: Any) -> Bytes:
        return received[1]

    def release(self, received: Any) -> None:
        os.unlink(received[0])

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
