"""A crew: many processes, forked together, that do the same at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.remote import RemoteFailed, serve


def end(links: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
    """Ends processes that end when their link does, by force where they do not."""
    for link in links:
        link.close()
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


class Crew:
    """``target(index, *args)`` in each of `count` forked processes. What it needs is imported here, before.

    Daemons have no children of their own.
    """

    def __init__(self, count: int, target: type, *args: Any, daemon: bool = True) -> None:
        context = multiprocessing.get_context("fork")
        self._links: list[Connection] = []
        self._processes = []
        for index in range(count):
            link, theirs = context.Pipe()
            self._links.append(link)
            process = context.Process(
                target=_begin, args=(theirs, list(self._links), target, (index, *args)), daemon=daemon
            )
            process.start()
            theirs.close()
            self._processes.append(process)
        self.gather(180.0)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def call(self, method: str, *args: Any, timeout: float = 300.0) -> list[Any]:
        """Every process's answer; they work at once.

        Raises
        ------
        RemoteFailed
            One of them raised, died, or was silent for `timeout` seconds.
        """
        self.begin(method, *args)
        return self.gather(timeout)

    def begin(self, method: str, *args: Any) -> None:
        """As `call`, but `gather` has the answers."""
        for link in self._links:
            link.send((method, args))

    def close(self) -> None:
        end(self._links, self._processes)

    def gather(self, timeout: float = 300.0) -> list[Any]:
        """The answers to `begin`."""
        answers = []
        for link, process in zip(self._links, self._processes, strict=True):
            try:
                if not link.poll(timeout):
                    raise RemoteFailed(f"no answer for {timeout:.0f} s")
                raised, value = link.recv()
            except (EOFError, OSError) as error:
                process.join(5)
                raise RemoteFailed(f"a process died (exit code {process.exitcode})") from error
            if raised:
                raise RemoteFailed(value)
            answers.append(value)
        return answers


def _begin(link: Connection, inherited: list[Connection], target: type, args: tuple[Any, ...]) -> None:
    for other in inherited:
        other.close()  # or closing it in the parent would not end that process
    serve(link, target, args)
    os._exit(0)
