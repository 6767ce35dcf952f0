"""The stores that blocks lie in: one of each process that runs plans, for as long as it lives, and each spill directory.

A process is a member of only so many pools, and leaves none of them: so its executions follow one another in one store, whose limit is the
sum of theirs, and where each has a prefix of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import multiprocessing.util
import os
import shutil
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field

import torchshm
from torchshm._starting import connect
from torchshm._store import Store
from torchshm.data._job import tidy, tidy_dead

PATIENCE = 600.0
"""Seconds that a worker waits for room: the executor sees to it that it comes."""
_TRIES, _DYING = 20, 0.1  # s between them
_WARM = 10.0  # s for which memory is kept for a next execution: fresh pages cost as much as what is done with them
# With the machine's name: on a shared file system locks may be each machine's own.
_PREFIX, _OWNER = f"torchshm-blocks-{os.uname().nodename}-", "owner"
_numbers = itertools.count()


@dataclass
class Home:
    """This process's store for a spill directory, and the bytes that each execution in it may take."""

    store: Store
    directory: str
    lock: int  # a descriptor; open as long as this process lives, or one of its forked children
    shares: dict[str, int] = field(default_factory=dict)
    cooling: threading.Timer | None = None
    closed: bool = False

    def enter(self, memory: int, prefix: str | None = None) -> str:
        """The prefix of a new execution."""
        with _lock:
            prefix = prefix or f"r{next(_numbers)}."
            self.shares[prefix] = memory
            self._set_limit()
            self._stay_warm()
        return prefix

    def leave(self, prefix: str) -> None:
        """Remove everything of an execution, and give its memory back."""
        with _lock:
            if self.shares.pop(prefix, None) is None:
                return
            for key in self.store.keys(prefix):
                with contextlib.suppress(KeyError):
                    self.store.remove(key)
            self._set_limit()
            if not self.shares and self.cooling is None:
                self.cooling = threading.Timer(_WARM, self.cool)
                self.cooling.daemon = True
                try:
                    self.cooling.start()
                except RuntimeError:  # the interpreter is about to end, and there will be no next one
                    self.cooling = None
                    self.store._core.trim(0)

    def cool(self) -> None:
        """Give back what was kept for a next execution, if there is none."""
        with _lock:
            self._stay_warm()
            if not self.shares and not self.closed:
                self.store._core.trim(0)

    def close(self) -> None:
        """End the store."""
        with _lock:
            self._stay_warm()
            self.closed = True
        with contextlib.suppress(Exception):
            self.store.close()

    def _stay_warm(self) -> None:
        if self.cooling is not None:
            self.cooling.cancel()
            self.cooling = None

    def _set_limit(self) -> None:
        if self.shares:
            self.store._core.set_limit(sum(self.shares.values()))


_lock = threading.RLock()
_homes: dict[tuple[str, str | None], Home] = {}
_connected: dict[str, Store] = {}


def _in_child() -> None:
    """A forked child runs its own, and goes on as a client of those that it knows."""
    global _lock
    _lock = threading.RLock()
    for home in _homes.values():
        _connected[home.store.name] = home.store
    _homes.clear()


os.register_at_fork(after_in_child=_in_child)


def home(parent: str | None, memory: int, name: str | None = None) -> Home:
    """The store of this process whose values go to a directory in `parent`, that of temporary files by default; of that name."""
    place = os.path.abspath(parent or tempfile.gettempdir())
    with _lock:
        found = _homes.get((place, name))
        if found is None:
            tidy_dead("blocks-")
            os.makedirs(place, exist_ok=True)
            _sweep(place)
            directory, lock = _make_directory(place)
            try:
                with warnings.catch_warnings():
                    # Where temporary files go is often tmpfs, and nobody has chosen it.
                    if parent is None:
                        warnings.simplefilter("ignore", RuntimeWarning)
                    store = torchshm.start(
                        name or f"blocks-{os.getpid()}-{os.urandom(3).hex()}",
                        memory,
                        spill=directory,
                        spill_sync=False,
                        policy="spill",
                        timeout=PATIENCE,
                    )
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)
                raise
            found = _homes[place, name] = Home(store, directory, lock)
            multiprocessing.util.Finalize(None, _close, args=((place, name), os.getpid()), exitpriority=-10)
        return found


def _make_directory(place: str) -> tuple[str, int]:
    """A new directory there, and the descriptor whose lock says that it is in use."""
    made = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place)
    lock = os.open(os.path.join(made, _OWNER), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: nobody else takes them there either
        fcntl.flock(lock, fcntl.LOCK_EX)
    directory = os.path.join(place, os.path.basename(made)[1:])
    os.rename(made, directory)  # locked before anybody can find it
    return directory, lock


def _sweep(place: str) -> None:
    """Remove the directories of programs that were killed together with all of their processes."""
    for directory in glob.glob(os.path.join(place, f"{_PREFIX}*")):
        try:
            lock = os.open(os.path.join(directory, _OWNER), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another user's, or being removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            pass  # it is in use
        finally:
            os.close(lock)


def tidy_after(store: str, directory: str) -> None:
    """Remove what a process has left that served the store and has died, when its workers have ended."""
    tidy(store)
    for _ in range(_TRIES):  # others of the store may be leaving it, and removing what is theirs
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):
            break
        time.sleep(_DYING)


def _close(place: tuple[str, str | None], owner: int) -> None:
    if os.getpid() != owner:
        return
    found = _homes.pop(place, None)
    if found is not None:
        found.close()
        tidy(found.store.name)
        shutil.rmtree(found.directory, ignore_errors=True)
        os.close(found.lock)


def client(name: str, timeout: float) -> Store:
    """A client of another process's store, or of this one's."""
    with _lock:
        for each in _homes.values():
            if each.store.name == name:
                return each.store
        found = _connected.get(name)
    if found is None:  # without the lock: others need not wait for a store that comes late
        made = connect(name, timeout)
        with _lock:
            found = _connected.setdefault(name, made)
    return found
