"""The workers as the executor sees them."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchshm.data.blocks._operators import Order
from torchshm.data.blocks._tasks import Kitchen
from torchshm.data.blocks._worker import worker

CREDIT = 2
"""Blocks that a task may make before it asks."""


@dataclass(eq=False)
class Doing:
    """A task that a worker is at."""

    order: Order
    owed: int = 0  # blocks that it has made since it was last told to go on

    @property
    def stuck(self) -> bool:
        """Whether it waits to be told so."""
        return self.owed >= CREDIT


class Hand:
    """A worker as the executor sees it."""

    def __init__(self, number: int, process: Any, link: Any) -> None:
        self.number, self.process, self.link = number, process, link
        # Its pipes and its sentinel do not tell of its death where it has left children that hold them too.
        self.death = os.pidfd_open(process.pid)
        self.doing: list[Doing] = []  # the last one; those before wait for it

    @property
    def stuck(self) -> bool:
        return bool(self.doing) and self.doing[-1].stuck

    @property
    def working(self) -> bool:
        return bool(self.doing) and not self.doing[-1].stuck

    def send(self, message: Any) -> None:
        """To the worker; that it has died is seen elsewhere."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.link.send(message)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()

    def ended(self, seconds: float) -> bool:
        """Whether it does, within that time."""
        return bool(multiprocessing.connection.wait([self.death], seconds))

    def close(self) -> None:
        """Forget one that has died."""
        self.link.close()
        os.close(self.death)


def hire(number: int, kitchen: Kitchen, inherited: Sequence[Any]) -> Hand:
    """A new worker, a child of this process. `inherited`: this process's ends of pipes, which the worker has by its fork alone."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(
        target=worker,
        args=(there, [here, *inherited], kitchen, os.getpid()),
        name=f"torchshm-blocks-{number}",
        daemon=True,
    )
    process.start()
    there.close()
    try:
        return Hand(number, process, here)
    except OSError:
        process.kill()
        process.join()
        raise
