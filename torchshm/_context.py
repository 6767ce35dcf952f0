"""Contexts of multiprocessing whose queues and events lie in the pool."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import warnings
from typing import Any

from torchshm import _family, _queue
from torchshm.errors import TorchshmError


class _Mixin:
    """Over a context of the standard library: what is made in shared memory here. All else is the standard's."""

    def _made(self, kind: str, *arguments: Any) -> Any:
        try:
            _family.ensure()
            return getattr(_queue, kind)(*arguments, ctx=self)
        except TorchshmError as error:
            _warn(error)
        return getattr(super(), kind)(*arguments)

    def Queue(self, maxsize: int = 0) -> Any:
        """Return a queue in shared memory, with the API of :class:`multiprocessing.Queue`."""
        return self._made("Queue", maxsize)

    def JoinableQueue(self, maxsize: int = 0) -> Any:
        """Return a queue in shared memory, with the API of :class:`multiprocessing.JoinableQueue`."""
        return self._made("JoinableQueue", maxsize)

    def SimpleQueue(self) -> Any:
        """Return a queue in shared memory, with the API of :class:`multiprocessing.SimpleQueue`."""
        return self._made("SimpleQueue")

    def Event(self) -> Any:
        """Return an event in shared memory, with the API of :class:`multiprocessing.Event`."""
        return self._made("Event")

    def get_context(self, method: str | None = None) -> Any:
        """Return this context, or that of another start method."""
        return self if method is None else get_context(method)


_warned = False


def _warn(error: TorchshmError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"torchshm: the standard library's queues are used in the place of those in shared memory: {error}",
            RuntimeWarning,
            stacklevel=5,
        )


def _class(base: type) -> type:
    return type(base.__name__, (_Mixin, base), {"__doc__": base.__doc__, "__module__": __name__})


ForkContext = _class(multiprocessing.context.ForkContext)
SpawnContext = _class(multiprocessing.context.SpawnContext)
ForkServerContext = _class(multiprocessing.context.ForkServerContext)
_contexts = {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}


def get_context(method: str | None = None) -> Any:
    """Return a context of :mod:`multiprocessing` whose queues and events lie in shared memory.

    ``Queue``, ``SimpleQueue``, ``JoinableQueue`` and ``Event`` of it have the API of the standard ones. They have no pipe, no lock
    and no feeder thread: a message costs a copy into memory that all have mapped, no process that is killed stops another, and what a
    queue still holds when the last process has dropped it comes back at once. All else (``Process``, ``Pool``, ``Manager``,
    ``Lock``, ...) is the standard's, over these queues where it uses queues. Where this system allows no pool, the queues are the
    standard ones, with one warning.

    Parameters
    ----------
    method : {"fork", "spawn", "forkserver"}, optional
        How processes are started. Default: as :func:`multiprocessing.get_context` has it.

    Returns
    -------
    multiprocessing.context.BaseContext
        For ``DataLoader(multiprocessing_context=...)``, ``ProcessPoolExecutor(mp_context=...)`` and for use by itself.

    Raises
    ------
    ValueError
        When there is no such method.

    Examples
    --------
    >>> context = torchshm.get_context("fork")
    >>> queue = context.Queue()
    >>> context.Process(target=queue.put, args=({"answer": 42},)).start()
    >>> queue.get()
    {'answer': 42}
    """
    if method is None:
        method = multiprocessing.get_start_method()
    if method not in _contexts:
        raise ValueError(f"cannot find context for {method!r}: it is 'fork', 'spawn' or 'forkserver'")
    return _contexts[method]
