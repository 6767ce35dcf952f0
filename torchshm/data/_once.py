"""once: what all ranks and workers of a node need, made by one of them."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torchshm import _family, _reducers
from torchshm._starting import connect
from torchshm._store import Store
from torchshm.data import _job
from torchshm.errors import TorchshmError

T = TypeVar("T")

_SILENT = 2.0  # s of waiting before a word about it
_LINE_EVERY = 60.0  # s at most, between lines; on a terminal it changes in place
_TERMINAL_EVERY = 0.5
_TOLD_EVERY = 0.1  # s between what a maker says
_WORTH_SAYING = 1_000_000  # bytes
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "LOCAL_RANK")

_making = threading.local()


def once(
    key: str,
    fn: Callable[..., T],
    *,
    store: Store | str | None = None,
    timeout: float | None = None,
    ttl: float | None = None,
    mode: str | None = "c",
    allow_pickle: bool = True,
    total_bytes: int | None = None,
) -> T:
    """Return what `fn` makes, made once for all ranks and DataLoader workers of this job on this node.

    It calls :func:`torchshm.register`, so that the arrays go to workers without a copy.

    One process runs ``fn()`` and puts the result into shared memory. The others wait, and all, that process too, get the same memory
    without a copy. It needs no torch.distributed, and no service: the first process to come serves the others.

    Parameters
    ----------
    key : str
        The same key means the same value: another `fn` under it is not noticed, and not run. :func:`torchshm.key` makes one of what
        the value depends on.
    fn : callable
        Returns arrays, tensors, lists, tuples and dicts of those, or anything picklable, of which arrays and buffers are not copied.
        If it has a parameter ``progress``, it gets a function to be called with the fraction done, 0 to 1.
    store : Store or str, optional
        Another store, or its name. Default: :func:`node_store`.
    timeout : float, optional
        Seconds to wait for another process's `fn`. Default: as long as it works.
    ttl : float, optional
        Seconds after which it is forgotten and made anew by who asks next. Default: it stays while any process of the job lives.
    mode : {"c", "r", "r+"}, optional
        What writing to the arrays does: it stays private to this process, is an error, or is seen by all. ``None``: as
        :meth:`Store.load`.
    allow_pickle : bool
        Whether what needs a pickle may be unpickled; in the job's own store only processes of this user can have put it there.
    total_bytes : int, optional
        Size of what `fn` makes, for those who wait to see how far it is.

    Raises
    ------
    TimeoutError
        When the time is up and another process is still at it.
    PoolFullError
        When what `fn` made does not fit into the store. `fn` is then run by the next one who waits, who gets the error too.
    ValueError
        For a `mode` that is none, and as :meth:`Store.load`.
    RuntimeError
        When `fn` asks for its own key.

    Notes
    -----
    What `fn` raises is raised in the process that ran it; then one of those who wait runs theirs. When the process that runs it
    dies, however it dies, another one runs it within a fraction of a second. So `fn` is completed once, but may be begun more often.

    Who has waited for two seconds says so on stderr, one process for all with the same stderr: ``rank 3 waits for rank 0 to make
    'tokens': 41 %, 2.1 GB``. It goes to the logger ``torchshm`` instead if that has a level or shows INFO.
    """
    home = _job.node_store() if store is None else connect(store) if isinstance(store, str) else store
    running = _making.__dict__.setdefault("keys", set())
    if (home.name, key) in running:
        raise RuntimeError(f"what makes {key!r} asks for {key!r}, and would wait for itself")
    maker = _Maker(home, key, total_bytes)

    def make() -> T:
        running.add((home.name, key))
        try:
            _job.keep_served(home)
            maker.tell(None)
            return fn(progress=maker.progress) if _takes_progress(fn) else fn()
        finally:
            maker.end()
            running.discard((home.name, key))

    with contextlib.closing(_Waiter(home, key)) as waiter:
        value: T = home._get_or_create(
            key,
            make,
            -1 if timeout is None else timeout,
            ttl=ttl,
            mode=mode,
            allow_pickle=allow_pickle,
            waiting=waiter.look,
        )
    if not _reducers.registered():
        _reducers.register()
    _family.refer_to(home._core.pool_id)
    return value


def _takes_progress(fn: Callable[..., Any]) -> bool:
    try:
        return "progress" in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some built-in functions
        return False


# ---- who


def _who() -> str:
    """This process, as its user knows it."""
    torch = sys.modules.get("torch")
    rank = next((os.environ[name] for name in _RANKS if os.environ.get(name)), None)
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
    name = f"process {os.getpid()}" if rank is None else f"rank {rank}"
    worker = None if torch is None else torch.utils.data.get_worker_info()
    return name if worker is None else f"{name} (worker {worker.id})"


def _private_bytes(pid: int) -> int:
    """Anonymous memory of a process; 0 where that can't be seen."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


# ---- those who make


class _Maker:
    """Says in the text of its mark who makes a value and how far that is."""

    def __init__(self, store: Store, key: str, total: int | None) -> None:
        self._store, self._key, self._total = store, key, total
        self._start: dict[str, Any] | None = None
        self._told = -math.inf
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._over = False

    def progress(self, fraction: float) -> None:
        """Tell those who wait; as often as one likes."""
        if time.monotonic() - self._told >= _TOLD_EVERY:
            self.tell(min(max(float(fraction), 0.0), 1.0))

    def tell(self, fraction: float | None) -> None:
        # A mark belongs to who has put it up: not to a child, which may die sooner, nor to a thread that goes on when fn is over.
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._over:
                return
            if self._start is None:
                self._start = {
                    "who": _who(),
                    "live": self._store.info()["live_bytes"],
                    "private": _private_bytes(self._pid),
                    "total": self._total,
                }
            text = json.dumps({**self._start, "fraction": fraction}).encode()
            with contextlib.suppress(TorchshmError):  # nobody is worse off for it
                self._store._tell_of_making(self._key, text)
            self._told = time.monotonic()

    def end(self) -> None:
        with self._lock:
            self._over = True


# ---- those who wait


class _Waiter:
    """Says on stderr for whom this process waits, when that takes long. Costs nothing before."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._began: float | None = None
        self._next = 0.0
        self._pause = _SILENT
        self._speaker: Any = None  # the lock of the one process that speaks
        self._in_place = False

    def look(self, mark: dict[str, Any]) -> None:
        """Called with the maker's mark, every now and then while waiting."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._next = now, now + _SILENT
        if now < self._next:
            return
        if self._to_logger():
            logging.getLogger("torchshm").info("%s", self._line(mark))
        elif self._speaks():
            self._write(self._line(mark))
        self._pause = _TERMINAL_EVERY if self._in_place else min(2 * self._pause, _LINE_EVERY)
        self._next = now + self._pause

    def close(self) -> None:
        if self._in_place:
            self._in_place = False
            self._out("\r\x1b[K")
        if self._speaker is not None:
            self._speaker.release()
            self._speaker = None

    def _to_logger(self) -> bool:
        logger = logging.getLogger("torchshm")
        return logger.level != logging.NOTSET or logger.isEnabledFor(logging.INFO)

    def _speaks(self) -> bool:
        """Whether this process is the one that writes, of those that wait for this key and have this stderr."""
        if self._speaker is None:
            try:
                there = os.fstat(sys.stderr.fileno())
                stream = f"{there.st_dev}:{there.st_ino}"
            except (AttributeError, OSError, ValueError):  # a notebook's
                stream = f"pid {os.getpid()}"
            lock = self._store.lock(f"once: {stream}: {self._key}", timeout=0)
            try:
                lock.acquire()
            except (TimeoutError, TorchshmError):
                return False
            self._speaker = lock
        return True

    def _line(self, mark: dict[str, Any]) -> str:
        try:
            said = json.loads(mark["text"] or b"{}")
        except ValueError:
            said = {}
        line = f"torchshm: {_who()} waits for {said.get('who') or 'process {}'.format(mark['pid'])}"
        if not said:  # a maker that says nothing
            return f"{line} to make {self._key!r}"
        # It makes in private memory what is then copied, or in the store's own.
        private = _private_bytes(mark["pid"]) - said["private"]
        made = max(private, self._store.info()["live_bytes"] - said["live"])
        fraction = said["fraction"]
        if fraction is None and said["total"]:
            fraction = min(max(made / said["total"], 0), 1)
        parts = [] if fraction is None else [f"{100 * fraction:.0f} %"]
        if made >= _WORTH_SAYING:
            parts.append(f"{made / 1e9:.1f} GB" if made >= 1e8 else f"{made / 1e6:.0f} MB")
        return f"{line} to make {self._key!r}{': ' if parts else ''}{', '.join(parts)}"

    def _write(self, line: str) -> None:
        self._in_place = bool(getattr(sys.stderr, "isatty", bool)())
        self._out(f"\r\x1b[K{line}" if self._in_place else f"{line}\n")

    @staticmethod
    def _out(text: str) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr, or closed
            sys.stderr.write(text)
            sys.stderr.flush()
