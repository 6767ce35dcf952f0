"""Children made by os.fork() in the middle of a test, whose exit status says whether all in them was true."""

from __future__ import annotations

import os
import traceback

import numpy as np

SYS_FORK = 57  # of x86-64; as a plain system call it runs no fork handlers


def forked(body, fork=os.fork):
    """Run body() in a forked child. Returns its pid; the exit status says whether all of it was true."""
    pid = fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def numbers(seed, size=40_000):
    return np.arange(float(size)) + seed
