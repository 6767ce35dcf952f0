"""Putting data into the pool: share, dumps, empty, pooled, and the way around it: inline."""

from __future__ import annotations

import contextlib
import multiprocessing.reduction
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from torchshm import _C, _arrow, _family, _reducers, _tensors

_MODES = {"r+": 0, "r": 1, "c": 2}


class _Pickler(multiprocessing.reduction.ForkingPickler):  # type: ignore[misc]
    """ForkingPickler with our reducers, registered or not."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dispatch_table.update(_reducers.reducers() | _tensors.reducers() | _arrow.reducers())


def dumps(x: Any, protocol: int | None = None) -> bytes:
    """Pickle an object, its large buffers in the pool.

    The result is small and is received once, by :func:`loads` or ``pickle.loads``, in any process of the family; again while
    somebody uses what it carries.

    Parameters
    ----------
    x : object
        Anything picklable.
    protocol : int, optional
        As for :func:`pickle.dumps`.
    """
    _family.ensure()
    return bytes(_Pickler.dumps(x, protocol))


def loads(b: bytes) -> Any:
    """Unpickle what :func:`dumps` made. The same as ``pickle.loads``.

    Raises
    ------
    StaleHandleError
        When what the bytes stood for has been received and released.
    StoreUnavailableError
        In a process outside the family.
    """
    return pickle.loads(b)


def share(x: Any, mode: str = "c") -> Any:
    """Return an equal object whose arrays lie in the pool, so that sending it costs nothing.

    Parameters
    ----------
    x : object
        Anything picklable; it makes a pickle round trip.
    mode : {"c", "r", "r+"}
        What writing to the arrays does, as in :class:`numpy.memmap`. ``"c"``: every process sees the one copy and its own writes.
        ``"r"``: read-only. ``"r+"``: writes are seen by all.

    Raises
    ------
    PoolFullError
        When there is no room.
    """
    if mode not in _MODES:
        raise ValueError(f"mode is 'c', 'r' or 'r+', not {mode!r}")
    _family.ensure()
    _C.set_sharing(True, _MODES[mode])
    try:
        pickled = _Pickler.dumps(x, pickle.HIGHEST_PROTOCOL)
    except BaseException:
        _C.undo_sharing()
        raise
    finally:
        _C.set_sharing(False, 0)
    return pickle.loads(pickled)


def empty(shape: int | tuple[int, ...], dtype: npt.DTypeLike = float) -> npt.NDArray[Any]:
    """Return an uninitialised array in the pool, seen and written by whoever it is sent to.

    Parameters
    ----------
    shape : int or tuple of int
    dtype : dtype
        Any without Python objects.

    Raises
    ------
    PoolFullError
        When there is no room.
    TypeError
        For dtypes that hold Python objects.
    """
    _family.ensure()
    return _C.empty(shape, np.dtype(dtype))


@contextlib.contextmanager
def pooled() -> Iterator[None]:
    """Let NumPy and torch allocate in the pool, in this thread and block: ``np.stack``, ``torch.cat``, arithmetic, ...

    What is made inside costs nothing to send. Not in the pool: object arrays, and what NumPy asks for zero-filled (``np.zeros``;
    use ``np.full``). NumPy's setting is a context variable: generators keep the setting of the code that runs them, new threads
    start without it, asyncio tasks created inside keep it. torch's belongs to the thread, and takes effect where torch has been
    imported before.
    """
    _family.ensure()
    before, tensors = _C.enter_pooled(), _tensors.enter(0)
    try:
        yield
    finally:
        _tensors.leave(tensors)
        _C.leave_pooled(before)


@contextlib.contextmanager
def inline() -> Iterator[None]:
    """Pickle plainly what this thread pickles inside the block: for bytes that many receive, or another machine.

    A ``multiprocessing.Queue`` pickles in a thread of its own, after ``put`` has returned: pickle there by hand.
    """
    _C.nest_inline(1)
    try:
        yield
    finally:
        _C.nest_inline(-1)


def stats() -> dict[str, Any]:
    """Figures about the pool of this process, read without locks; what the dead left is taken back first.

    Returns
    -------
    dict
        ``live_bytes``, ``warm_bytes`` (free, pages kept), ``committed_bytes``, ``limit_bytes``, ``warm_limit_bytes``,
        ``control_bytes``, ``blocks``, ``leases``, ``tickets`` (unreceived), ``named`` (kept by names of a store),
        ``reaped``, ``tickets_taken_back``, and ``processes``: a list of dicts with ``pid``, ``name``, ``held_blocks``,
        ``held_bytes``, ``allocations``, ``fallbacks``, ``grown_bytes``.
    """
    _family.ensure()
    return _C.stats()


def trim(keep: int = 0) -> int:
    """Give free pages back to the system until at most `keep` bytes are kept warm. Returns the bytes given back."""
    _family.ensure()
    return _C.trim(keep)
