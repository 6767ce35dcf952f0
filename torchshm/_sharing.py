"""Putting data into the pool: share, dumps, empty, pooled, and the way around it: inline."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing.reduction
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from torchshm import _C, _arrow, _consume, _family, _reducers, _share_report, _tensors

_MODES = {"r+": 0, "r": 1, "c": 2}


class _Pickler(multiprocessing.reduction.ForkingPickler):  # type: ignore[misc]
    """ForkingPickler with our reducers, registered or not."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not _reducers.registered():
            self.dispatch_table.update(_reducers.reducers() | _tensors.reducers())
        # Registered or not: register() may not have noticed an import.
        self.dispatch_table.update(_arrow.reducers())


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


def share(x: Any, mode: str = "c", *, report: bool = False, consume: bool = False) -> Any:
    """Return an equal object whose arrays lie in the pool, so that sending it costs nothing.

    Parameters
    ----------
    x : object
        Anything picklable; it makes a pickle round trip. Buffers that it pickles out of band (PEP 574) go to the pool as well. What is
        lazy in an xarray object stays lazy.
    mode : {"c", "r", "r+"}
        What writing to the arrays does, as in :class:`numpy.memmap`. ``"c"``: every process sees the one copy and its own writes.
        ``"r"``: read-only. ``"r+"``: writes are seen by all.
    report : bool
        Return the object and a :class:`ShareReport`: what of it was moved, what lay there already, what was left and why.
    consume : bool
        Replace, one by one, the arrays that `x` holds by the shared ones, so that their memory goes back meanwhile: the peak is `x` and
        its largest array, not twice `x`. Arrays that something else refers to stay, and those that also lie where nothing can be
        replaced, as in a tuple that holds a dict. For lists, dicts, attributes, xarray variables, the blocks of a pandas frame, the
        columns of a polars frame; an Arrow table in one of them is replaced as a whole. The argument itself is not replaced: of a
        lone array or table there are two until the caller drops it.

    Returns
    -------
    object, or tuple of object and ShareReport

    Raises
    ------
    PoolFullError
        When there is no room. With `consume`, a part of `x` may lie in the pool by then.
    """
    if mode not in _MODES:
        raise ValueError(f"mode is 'c', 'r' or 'r+', not {mode!r}")
    _family.ensure()
    if not report and not consume:
        return _share(x, mode)[0]
    before = _share_report.look(x) if report else {}
    if consume:
        _consume.replace(x, lambda part: _share(part, mode)[0])
    shared, pickled = _share(x, mode)
    return (shared, _share_report.compare(before, _share_report.look(shared), pickled)) if report else shared


def _share(x: Any, mode: str) -> tuple[Any, int]:
    """The shared object, and the bytes of its pickle."""
    buffers: list[Any] = []
    file = io.BytesIO()
    sharing = _C.Sharing(_MODES[mode])
    try:
        try:
            _Pickler(file, pickle.HIGHEST_PROTOCOL, True, functools.partial(_out_of_band, buffers)).dump(x)
            pickled = file.getbuffer()
            carried = _Pickler.dumps(buffers, pickle.HIGHEST_PROTOCOL) if buffers else None
        finally:
            sharing.end()
        if carried is None:
            return pickle.loads(pickled), len(pickled)
        return pickle.loads(pickled, buffers=map(memoryview, pickle.loads(carried))), len(pickled)
    except BaseException:
        sharing.give_up()
        raise


def _out_of_band(buffers: list[Any], buffer: pickle.PickleBuffer) -> bool:
    """Whether a PickleBuffer goes into the pickle; else it goes to the pool with the others."""
    try:
        raw = buffer.raw()
    except BufferError:
        return True
    if raw.nbytes == 0 or _C.is_inline():
        return True
    buffers.append(np.frombuffer(raw, np.uint8))
    return False


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
        ``control_bytes``, ``blocks``, ``leases``, ``tickets`` (unreceived) and ``ticket_bytes`` (of the blocks that they keep),
        ``named`` (kept by names of a store), ``reaped``, ``tickets_taken_back``, and ``processes``: a list of dicts with ``pid``,
        ``name``, ``held_blocks``, ``held_bytes``, ``allocations``, ``fallbacks``, ``grown_bytes``.
    """
    _family.ensure()
    return _C.stats()


def trim(keep: int = 0) -> int:
    """Give free pages back to the system until at most `keep` bytes are kept warm. Returns the bytes given back."""
    _family.ensure()
    return _C.trim(keep)
