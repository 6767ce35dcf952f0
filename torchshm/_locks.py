"""Advisory locks of a store: for programs that agree to take them, whoever they are."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from torchshm import _C
from torchshm._size import parse_seconds

if TYPE_CHECKING:
    from torchshm._store import Store

_FOREVER = (1 << 63) - 1  # ns
_NAP = 50_000_000  # ns; a death rings no bell


class Lock:
    """A lock of a store, or of one of its keys, from :meth:`Store.lock`. A context manager.

    It is held by this object until :meth:`release`, until the object is collected, or until the process dies, however it dies. A
    forked child does not have what its parent holds. It is not re-entrant; another object for the same lock, or another thread with
    this one, waits as another process does. It can be pickled while it is not held.
    """

    def __init__(self, store: Store, key: str | None, shared: bool, timeout: float) -> None:
        self._store, self._key, self._shared, self._timeout = store, key, shared, timeout
        self._core: _C.Lock | None = None
        self._owner = 0

    def __repr__(self) -> str:
        of = (
            f"the store {self._store.name!r}"
            if self._key is None
            else f"{self._key!r} in {self._store.name!r}"
        )
        kind = "shared" if self._shared else "exclusive"
        return f"<torchshm lock of {of}, {kind}{', held' if self.held else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.held:
            raise TypeError(
                f"{self!r} can't be pickled while it is held: the other process could not have it too"
            )
        return Lock, (self._store, self._key, self._shared, self._timeout)

    @property
    def held(self) -> bool:
        """Whether this object holds the lock, in this process."""
        return self._core is not None and self._core.held

    def acquire(self, timeout: float | None = None) -> None:
        """Wait for the lock and take it.

        Parameters
        ----------
        timeout : float, optional
            Seconds; ``-1``: as long as it takes, ``0``: one try. Default: that of :meth:`Store.lock`.

        Raises
        ------
        TimeoutError
            When the time is up and somebody else has it.
        RuntimeError
            When this thread holds it by this object already.
        """
        store = self._store._core
        if self._core is None:
            self._core = store.lock(self._key or "")
        lock = self._core
        timeout = self._timeout if timeout is None else parse_seconds(timeout, "timeout")
        deadline = None if timeout < 0 else time.monotonic() + timeout
        while True:
            if lock.held and self._owner == threading.get_ident():
                raise RuntimeError(f"{self!r} is not re-entrant, and this thread holds it already")
            bell = store.bell(lock.bell)
            if lock.try_acquire(self._shared):
                self._owner = threading.get_ident()
                return
            left = _FOREVER if deadline is None else int((deadline - time.monotonic()) * 1e9)
            if left <= 0:
                raise TimeoutError(f"somebody else has held {self!r} for {timeout} s")
            store.wait(lock.bell, bell, min(left, _NAP))

    def release(self) -> None:
        """Let others have it.

        Raises
        ------
        RuntimeError
            When this object does not hold it: also in a forked child, where it was held in the parent.
        """
        if self._core is None or not self._core.release():
            left = self._core is not None and self._core.left_to_parent
            why = "is held by the process that this one was forked from" if left else "is not held"
            raise RuntimeError(f"{self!r} {why}, so it can't be released here")

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._core is None or not self._core.left_to_parent:  # a fork in the block
            self.release()
