"""Ranks of a job: processes forked by a script that has no store itself, and a directory of stores of their own."""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from pathlib import Path

from scripts import passes

CREW = """
import contextlib, ctypes, os, signal, sys, time
import numpy as np
import torchshm
from torchshm.data import _job, node_store, once

PR_SET_PDEATHSIG = 1
stores = os.path.join(os.environ["XDG_RUNTIME_DIR"], "torchshm")


class Rank:
    '''A forked process that runs a function, then waits; it writes what the function returns.'''

    def __init__(self, function, *arguments):
        self.said, theirs = os.pipe()
        waits, self.end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.said), os.close(self.end)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a script that fails leaves nobody behind
            try:
                os.write(theirs, (str(function(*arguments)) + "\\n").encode())
                os.read(waits, 1)
                sys.exit()
            except SystemExit:
                raise
            except BaseException as error:
                os.write(theirs, (type(error).__name__ + "\\n").encode())
                os._exit(1)
        os.close(theirs), os.close(waits)
        self.lines = os.fdopen(self.said)

    def says(self):
        return self.lines.readline().strip()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def leave(self):
        with contextlib.suppress(BrokenPipeError):  # it is dead
            os.write(self.end, b".")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def value():
    return float(once("a", lambda: np.full(50_000, float(os.getpid()))).sum()) / 50_000


def pool_id():
    return node_store()._core.pool_id


def both():
    return pool_id(), value()
"""


def crew(script: str, folder: Path, **environment: str) -> str:
    """Run a script that has a ``Rank``; what it prints."""
    stores = tempfile.mkdtemp(prefix="job", dir="/tmp")  # short: sockets allow 107 bytes
    try:
        return passes(CREW + textwrap.dedent(script), folder, XDG_RUNTIME_DIR=stores, **environment)
    finally:
        shutil.rmtree(stores)
