"""Bringing values back from disk while the program does something else."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable

from torchshm import _C

_SHARE = 4  # of the limit, a part: more at once would push out what is in use, or what was brought back first
_work: queue.SimpleQueue[tuple[_C.Store, list[str]]] = queue.SimpleQueue()
_thread: tuple[int, threading.Thread] | None = None  # in which process
_starting = threading.Lock()


def _bring_back(core: _C.Store, keys: Iterable[str]) -> None:
    room = core.limit // _SHARE
    for key in keys:
        try:
            found = core.find(key)
        except KeyError:
            continue
        if found["where"] == "memory":
            continue
        room -= found["bytes"]
        if room < 0:
            return
        with contextlib.suppress(KeyError):
            core.restore(key)


def _run() -> None:
    while True:
        core, keys = _work.get()
        with contextlib.suppress(Exception):  # load() meets it again, and says it
            _bring_back(core, keys)
        del core


def begin(core: _C.Store, keys: list[str]) -> None:
    """Bring these back, in this order, by a thread that this process has for it."""
    global _thread, _work, _starting
    if _thread is None or _thread[0] != os.getpid():
        if _thread is not None:
            # The parent's thread is not here, and its work is its own.
            _work, _starting = queue.SimpleQueue(), threading.Lock()
        with _starting:
            if _thread is None or _thread[0] != os.getpid():
                made = threading.Thread(target=_run, name="torchshm-prefetch", daemon=True)
                _thread = os.getpid(), made
                made.start()
    _work.put((core, keys))
