"""A worker process: it does one task after another, and says what it has made."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchshm.data.blocks import _random
from torchshm.data.blocks._recipes import GoOn, Made, Outcome, Task
from torchshm.data.blocks._tasks import Kitchen

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG; of the executor's only thread
_KEPT = 32 << 20  # bytes of freed memory that malloc keeps, and below which it has nothing apart
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def worker(link: Any, others: Sequence[Any], kitchen: Kitchen, executor: int) -> None:
    """Work until the executor has gone. `others`: its ends of pipes, which this process has by its fork alone."""
    # At once, also in the middle of a task: nobody would remove what it saves after that.
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != executor:
        return
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:
        other.close()
    # There are as many workers as the user wants cores to be busy.
    _random.when_torch_is_there(lambda torch: torch.set_num_threads(1))
    with contextlib.suppress(_Gone):
        _Worker(link, kitchen).run()


def _keep_memory() -> None:
    """Let malloc keep what functions free: they ask for as much with the next batch, and fresh pages take longer than most of them do.

    Batches of 1 MiB through three functions that add a number: 78 ms for 512 MiB in place of 551.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)


_PATIENT = 0.5  # s that a task waits to go on before it lets go of what it has loaded


class _Gone(BaseException):
    """The executor has."""


@dataclass
class _Doing:
    number: int
    credit: int  # blocks that it may make before it has to wait
    waited: float = 0.0  # s


class _Worker:
    """Does tasks; where one has made as much as it may, others are put in between until it may go on."""

    def __init__(self, link: Any, kitchen: Kitchen) -> None:
        self._link, self._kitchen = link, kitchen

    def run(self) -> None:
        while True:
            self._hear(None)

    def _say(self, message: Made | Outcome) -> None:
        try:
            self._link.send(message)
        except OSError:
            raise _Gone from None

    def _hear(self, stuck: _Doing | None) -> None:
        try:
            message = self._link.recv()
        except (EOFError, OSError):
            raise _Gone from None
        if isinstance(message, GoOn):
            if stuck is not None and message.number == stuck.number:  # else it came too late
                stuck.credit += message.blocks
        elif stuck is None:
            self._say(self._do(*message))
        else:
            with _random.kept():
                outcome = self._do(*message)
            self._say(outcome)

    def _do(self, task: Task, credit: int) -> Outcome:
        outcome = Outcome()
        begun = time.perf_counter()
        doing = _Doing(task.number, credit)

        def tell(made: Made) -> None:
            self._say(made)
            doing.credit -= 1
            since = time.perf_counter()
            while doing.credit <= 0:
                if not self._link.poll(_PATIENT):
                    self._kitchen.let_go()
                self._hear(doing)
            doing.waited += time.perf_counter() - since

        try:
            self._kitchen.run(task, tell, outcome)
        except Exception as error:
            outcome.error = failure(error, f"in {self._kitchen.label(task)}")
        outcome.seconds = time.perf_counter() - begun - doing.waited
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
