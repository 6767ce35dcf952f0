"""A worker process: it does one task after another, and says what it has made."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any

from torchshm.data.blocks._recipes import Made, Outcome, Task
from torchshm.data.blocks._tasks import Kitchen

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG; of the executor's only thread


def worker(link: Any, others: Sequence[Any], kitchen: Kitchen, executor: int) -> None:
    """Work until the executor has gone. `others`: its ends of pipes, which this process has by its fork alone."""
    # At once, also in the middle of a task: nobody would remove what it saves after that.
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != executor:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # there are as many workers as the user wants cores to be busy
    with contextlib.suppress(_Gone):
        _Worker(link, kitchen).run()


class _Gone(BaseException):
    """The executor has."""


class _Worker:
    def __init__(self, link: Any, kitchen: Kitchen) -> None:
        self._link, self._kitchen = link, kitchen
        self._tasks: deque[tuple[Task, int]] = deque()
        self._credit = 0

    def run(self) -> None:
        while True:
            while not self._tasks:
                self._hear()
            task, self._credit = self._tasks.popleft()
            self._say(self._do(task))

    def _say(self, message: Made | Outcome) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise _Gone from None

    def _hear(self) -> None:
        try:
            message = self._link.recv()
        except (EOFError, OSError):
            raise _Gone from None
        if message is None:
            self._credit += 1
        else:
            self._tasks.append(message)

    def _tell(self, made: Made) -> None:
        """Says it, and waits where the task has made as much as it may."""
        self._say(made)
        self._credit -= 1
        while self._credit <= 0:
            self._hear()

    def _do(self, task: Task) -> Outcome:
        outcome = Outcome()
        begun = time.perf_counter()
        try:
            self._kitchen.run(task, self._tell, outcome)
        except Exception as error:
            outcome.error = failure(error, f"in {self._kitchen.label(task)}")
        outcome.seconds = time.perf_counter() - begun
        return outcome


def failure(error: BaseException, where: str = "") -> tuple[bytes, str]:
    """An exception for another process: pickled, if it can be, and its text."""
    text = "".join(traceback.format_exception(error)) + where
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        pickled = b""
    return pickled, text
