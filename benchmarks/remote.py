"""A remote: an object that lives in a fresh process of its own and is called from here.

Every arm gets one, so that what an arm registers, maps or warms never reaches another arm.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any


class RemoteFailed(Exception):
    """The arm raised, died or stopped answering; the text says which."""


class Remote:
    """`target(*args)` constructed in a spawned process."""

    def __init__(self, target: type, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        # Not a daemon: the arms start workers of their own.
        self._process = context.Process(target=serve, args=(theirs, target, args))
        self._process.start()
        theirs.close()
        self._ready = False

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *args: Any, timeout: float = 180.0) -> Any:
        """Calls ``target(*args).method(*args)`` there.

        Raises
        ------
        RemoteFailed
            The method raised, or its process died or was silent for `timeout` seconds.
        """
        if not self._ready:
            self._answer(timeout)
            self._ready = True
        try:
            self._link.send((method, args))
        except OSError as error:
            raise RemoteFailed(f"its process is gone: {error}") from error
        return self._answer(timeout)

    def close(self) -> None:
        """Ends the process, by force where it does not go by itself."""
        self._link.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, timeout: float) -> Any:
        try:
            if not self._link.poll(timeout):
                self._process.kill()
                raise RemoteFailed(f"no answer for {timeout:.0f} s")
            raised, value = self._link.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise RemoteFailed(f"its process died (exit code {self._process.exitcode})") from error
        if raised:
            raise RemoteFailed(value)
        return value


def serve(link: Connection, target: type, args: tuple[Any, ...]) -> None:
    """Answers calls until the caller closes the link or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the caller, and with it this link
    try:
        served = target(*args)
    except Exception:
        link.send((True, traceback.format_exc()))
        return
    link.send((False, None))
    while True:
        try:
            method, arguments = link.recv()
        except (EOFError, OSError):
            break
        try:
            reply = (False, getattr(served, method)(*arguments))
        except Exception:
            reply = (True, traceback.format_exc())
        link.send(reply)
    if hasattr(served, "close"):
        served.close()
