"""A real child process that calls functions for a test, with a pipe to it."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import traceback
from typing import Any

import torchshm

# What functions that run in a peer leave behind for a later call.
kept: dict[str, Any] = {}


class PeerError(Exception):
    """An exception in a peer, with its traceback as text."""


def keep(name: str, value: Any) -> None:
    kept[name] = value


def kept_value(name: str) -> Any:
    return kept[name]


def give(value: Any) -> Any:
    return value


def _forget() -> None:
    kept.clear()
    gc.collect()
    gc.freeze()  # the next one is quick


def _serve(pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        except BaseException as error:
            pipe.send((False, (type(error), str(error), traceback.format_exc())))
            continue
        if message is None:
            return
        function, arguments = message
        del message
        try:
            answer = True, function(*arguments)
        except BaseException as error:
            answer = False, (type(error), str(error), traceback.format_exc())
        del function, arguments
        try:
            pipe.send(answer)
        except BaseException as error:
            pipe.send((False, (type(error), str(error), traceback.format_exc())))
        del answer


class Peer:
    """A child started by `method`. Use as a context manager, or kill it."""

    def __init__(self, method: str = "spawn") -> None:
        context = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, function: Any, *arguments: Any) -> None:
        """Start a call without waiting for its end."""
        self.pipe.send((function, arguments))

    def answer(self) -> Any:
        done, value = self.pipe.recv()
        if not done:
            kind, text, trace = value
            if issubclass(kind, torchshm.TorchshmError):
                raise kind(text)
            raise PeerError(trace)
        return value

    def call(self, function: Any, *arguments: Any) -> Any:
        """What `function(*arguments)` returns in the peer; its exceptions are raised here."""
        self.ask(function, *arguments)
        return self.answer()

    def forget(self) -> None:
        self.call(_forget)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: Any) -> None:
        # Not by closing the pipe: peers that were forked later hold it open too.
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.kill()
        self.pipe.close()
