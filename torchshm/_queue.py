"""Queues and events between processes, in the pool: what the contexts of :mod:`torchshm._context` make."""

from __future__ import annotations

import copyreg
import multiprocessing.context
import multiprocessing.process
import multiprocessing.util
import pickle
import types
from collections import ChainMap
from multiprocessing.reduction import ForkingPickler
from queue import Empty, Full
from typing import Any, ClassVar

from torchshm import _C

_FOREVER = -1
_LOOK = 100_000_000  # ns; how often a taker that has closed its sending end looks for its parent


class _Pickler(pickle.Pickler):
    """What ForkingPickler does, with its table made once and the pickler kept: most of the time that a small message takes."""

    dispatch_table: ClassVar[Any] = ChainMap(  # type: ignore[misc]
        ForkingPickler._extra_reducers,  # type: ignore[attr-defined]
        copyreg.dispatch_table,
    )


# Of these nothing is reduced.
_PLAIN = frozenset({bytes, str, int, float, bool, type(None)})
# Those that nobody is using. One that failed is not used again; in a thread, or in a reducer that sends, there may be several.
_spare: list[tuple[list[bytes], _Pickler]] = []


def _dumps(obj: Any) -> bytes:
    if type(obj) in _PLAIN:
        return pickle.dumps(obj)
    try:
        parts, pickler = _spare.pop()
    except IndexError:
        parts = []
        pickler = _Pickler(types.SimpleNamespace(write=parts.append))
    pickler.dump(obj)
    pickler.clear_memo()
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    parts.clear()
    _spare.append((parts, pickler))
    return data


_loads = pickle.loads


def _nanoseconds(block: bool, timeout: float | None) -> int:
    if not block:
        return 0
    if timeout is None:
        return _FOREVER
    return min(int(timeout * 1e9), 1 << 62) if timeout > 0 else 0


class _End:
    """One end of a queue, with what the standard library uses of a connection."""

    def __init__(self, core: _C.Queue) -> None:
        self._core = core
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.closed:
            raise OSError("handle is closed")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Reader(_End):
    """The taking end. Works in :func:`multiprocessing.connection.wait`."""

    def __init__(self, core: _C.Queue) -> None:
        super().__init__(core)
        self._draining = False
        self._alone = False  # the other end is closed in this process
        self._plain = True  # neither of them

    def _get(self, get: Any, *arguments: Any) -> Any:
        self._check()
        if self._draining:  # somebody else may have taken it since poll() said that it is there
            try:
                return get(*arguments, 0)
            except Empty:
                return None
        if not self._alone:
            return get(*arguments, _FOREVER)
        # Who has closed its own sending end relies on others to send, and these may all be gone.
        parent = multiprocessing.process.parent_process()
        while True:
            try:
                return get(*arguments, _LOOK)
            except Empty:
                self._check()
                if parent is not None and not parent.is_alive() and self._core.empty():
                    raise EOFError("the process that was to send has gone") from None

    def recv(self) -> Any:
        """Take and unpickle the first message, waiting for it."""
        return self._get(self._core.get, _loads)

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Take the bytes of the first message, waiting for it."""
        data: bytes = self._get(self._core.get_bytes)
        if maxlength is not None and data is not None and len(data) > maxlength:
            raise OSError("bad message length")
        return data

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether a message is there, within `timeout` seconds."""
        self._check()
        return self._core.wait_for_message(_nanoseconds(True, timeout))

    def fileno(self) -> int:
        """Descriptor that is readable while the queue is not empty."""
        self._check()
        return self._core.fileno()


class Writer(_End):
    """The sending end."""

    def __init__(self, core: _C.Queue, reader: Reader) -> None:
        super().__init__(core)
        self._reader = reader

    def close(self) -> None:
        """Use it no more in this process."""
        super().close()
        self._reader._alone, self._reader._plain = True, False

    def send(self, obj: Any) -> None:
        """Pickle and send."""
        self._check()
        self._core.put(_dumps, obj, _FOREVER)

    def send_bytes(self, data: Any, offset: int = 0, size: int | None = None) -> None:
        """Send what a taker reads as these bytes."""
        self._check()
        view = memoryview(data).cast("B")
        self._core.put_bytes(view[offset:] if size is None else view[offset : offset + size], _FOREVER)


class _NoLock:
    """In the place of a lock that nothing here needs. Nobody can die with it."""

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = reader

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Who acquires it without ``with``, as ``multiprocessing.Pool`` does at its end, drains what is there."""
        if self._reader is not None:
            self._reader._draining, self._reader._plain = True, False
        return True

    def release(self) -> None:
        if self._reader is not None:
            self._reader._draining, self._reader._plain = False, not self._reader._alone

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: Any) -> None:
        pass


class _Shared:
    """What queues and events have in common: they travel to children as the standard ones do, and only then."""

    def _attach(self, core: _C.Queue) -> None:
        self._core = core
        self._close_at_exit()
        multiprocessing.util.register_after_fork(self, _Shared._close_at_exit)

    def _close_at_exit(self) -> None:
        # What a process has begun to fill is closed when it ends well; else it comes back with the queue.
        multiprocessing.util.Finalize(self, self._core.close_parcel, exitpriority=0)

    def __getstate__(self) -> Any:
        multiprocessing.context.assert_spawning(self)
        return self._core.handle()

    def __setstate__(self, state: Any) -> None:
        self._attach(_C.Queue(state))


class SimpleQueue(_Shared):
    """A :class:`multiprocessing.SimpleQueue` in shared memory."""

    def __init__(self, *, ctx: Any = None) -> None:
        self._attach(_C.Queue(0))

    def _attach(self, core: _C.Queue) -> None:
        super()._attach(core)
        self._reader = Reader(core)
        self._writer = Writer(core, self._reader)
        self._poll = self._reader.poll
        self._rlock, self._wlock = _NoLock(self._reader), _NoLock()

    def put(self, obj: Any) -> None:
        """Pickle and send; what can't be pickled raises here."""
        self._writer.send(obj)

    def get(self) -> Any:
        """Take the first message, waiting for it."""
        return self._reader.recv()

    def empty(self) -> bool:
        """Whether nothing is there, at this moment."""
        return not self._poll()

    def close(self) -> None:
        """Use it no more in this process."""
        self._reader.close()
        self._writer.close()
        self._core.close_parcel()

    __class_getitem__: Any = classmethod(types.GenericAlias)


class Queue(_Shared):
    """A :class:`multiprocessing.Queue` in shared memory: no feeder thread, no pipe, no lock.

    A message is pickled and sent in :meth:`put`, so what can't be pickled raises there, and nothing is lost when the process ends
    right afterwards. A process that is killed at any moment has sent a message or has not, and stops nobody.

    Parameters
    ----------
    maxsize : int
        Most messages in it; 0 or less: as many as the pool has room for, at most 4,194,304.
    """

    def __init__(self, maxsize: int = 0, *, ctx: Any = None) -> None:
        self._maxsize = max(maxsize, 0)
        self._attach(_C.Queue(self._maxsize))

    def _attach(self, core: _C.Queue) -> None:
        super()._attach(core)
        self._closed = False
        self._ignore_epipe = False
        self._reader = Reader(core)
        self._writer = Writer(core, self._reader)
        self._rlock, self._wlock, self._sem = _NoLock(self._reader), _NoLock(), _NoLock()
        self._send, self._take = core.put, core.get

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._maxsize

    def __setstate__(self, state: Any) -> None:
        handle, self._maxsize = state
        super().__setstate__(handle)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Pickle and send.

        Parameters
        ----------
        obj : object
        block : bool
            Wait for room in a full queue.
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        queue.Full
        ValueError
            After :meth:`close`.
        PoolFullError
            When there is no room in the pool.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if not self._send(
            _dumps, obj, _FOREVER if block and timeout is None else _nanoseconds(block, timeout)
        ):
            raise Full

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first message.

        Parameters
        ----------
        block : bool
            Wait for one.
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        queue.Empty
        ValueError
            After :meth:`close`.
        """
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if block and timeout is None:
            return self._take(_loads, _FOREVER) if self._reader._plain else self._reader.recv()
        return self._take(_loads, _nanoseconds(block, timeout))

    def put_nowait(self, obj: Any) -> None:
        """Send, or raise :exc:`queue.Full`."""
        self.put(obj, False)

    def get_nowait(self) -> Any:
        """Take, or raise :exc:`queue.Empty`."""
        return self.get(False)

    def qsize(self) -> int:
        """How many messages are there, at this moment."""
        return self._core.size()

    def empty(self) -> bool:
        """Whether nothing is there, at this moment."""
        return self._core.empty()

    def full(self) -> bool:
        """Whether it holds `maxsize` messages, at this moment."""
        return self._core.full()

    def close(self) -> None:
        """Use it no more in this process."""
        self._closed = True
        self._core.close_parcel()

    def join_thread(self) -> None:
        """Nothing to wait for: what was put has been sent. Only after :meth:`close`, as the standard one."""
        assert self._closed, f"Queue {self!r} not closed"

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread."""

    __class_getitem__: Any = classmethod(types.GenericAlias)


class JoinableQueue(Queue):
    """A :class:`multiprocessing.JoinableQueue` in shared memory. All processes together count what was put and what is done."""

    def task_done(self) -> None:
        """Say that one message that was taken has been worked on.

        Raises
        ------
        ValueError
            When all that were put are done already.
        """
        if not self._core.task_done():
            raise ValueError("task_done() called too many times")

    def join(self) -> None:
        """Wait until all that was put is done."""
        self._core.wait_until_done(_FOREVER)


class Event(_Shared):
    """A :class:`multiprocessing.Event` in shared memory."""

    def __init__(self, *, ctx: Any = None) -> None:
        self._attach(_C.Queue(1))

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._core.flag()

    def set(self) -> None:
        """Set it, and wake all who wait."""
        self._core.set_flag(True)

    def clear(self) -> None:
        """Unset it."""
        self._core.set_flag(False)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; whether it was."""
        return self._core.wait_for_flag(_nanoseconds(True, timeout))

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} at {id(self):#x} {'set' if self.is_set() else 'unset'}>"
