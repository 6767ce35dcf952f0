"""Membership of the family's pool: made by the first process that needs it, inherited by its multiprocessing children.

A family is a tree of processes started by one another through :mod:`multiprocessing`: those that share its ``authkey``. A forked
child is a member by itself (the fork handlers of the core see to that). For spawn and forkserver the two memory files travel with
the preparation data that multiprocessing sends every child before anything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing.process
import multiprocessing.reduction
import multiprocessing.spawn
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from torchshm import _C, _pools
from torchshm._size import parse_size
from torchshm.errors import TorchshmError

STORES = 0  # in the place of a family, in the pools of stores
_lock = threading.Lock()
# Of pools that messages go to: a store's client makes room in them.
_stores: dict[int, _C.Store] = {}
_stock_preparation_data = multiprocessing.spawn.get_preparation_data
# Runs in the child before multiprocessing has set anything up. Never raises: a child without torchshm works as it always did.
_JOIN = """
try:
    import sys as _sys
    _before = _sys.path[:]
    _sys.path[:] = {path!r}
    try:
        from torchshm import _family as _f
        _f.join_from_parent(*{arguments!r}, fds={fds})
    finally:
        _sys.path[:] = _before
except ImportError:
    pass
"""


def digest() -> int:
    """Number that all processes of this family have in common, and strangers can't guess."""
    key = bytes(multiprocessing.process.current_process().authkey)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"torchshm").digest(), "little")


def ensure(limit: int | None = None) -> None:
    """Make this process a member of a pool, making the pool if its family has none.

    Parameters
    ----------
    limit : int, optional
        Bytes; of the pool that is made, or from now on of the one that is there.

    Raises
    ------
    TorchshmError
        When the system does not allow a pool (old kernel, no address space, file size limit).
    """
    if _C.is_member() and limit is None:
        return
    with _lock:
        if not _C.is_member():
            environ = os.environ
            size = parse_size(environ.get("TORCHSHM_LIMIT", "0")) if limit is None else limit
            _C.create(digest(), size, parse_size(environ.get("TORCHSHM_WARM", "0")))
            _C.set_ticket_age(int(environ.get("TORCHSHM_TICKET_AGE", "300")))
        elif limit is not None:
            _C.set_limit(limit)
        _hook_children()


def change_to(pool_id: int, store: _C.Store) -> None:
    """Let this process's data go to the pool of a store that it is a client of; its children inherit that.

    Arrays in the pool that it had before stay valid, and travel by reference as they did.
    """
    with _lock:
        if not _C.choose(pool_id):
            raise AssertionError("a client of a store is a member of its pool")
        _stores[pool_id] = store
        _hook_children()


def refer_to(pool_id: int) -> None:
    """Send by reference what lies in the pool of a store that this process is a client of; its children inherit the pool."""
    with _lock:
        if not _C.refer(pool_id):
            raise AssertionError("a client of a store is a member of its pool")
        _hook_children()


class _Inherited:
    """Travels in the preparation data; unpickling it joins the pool."""

    def __reduce__(self) -> tuple[Any, ...]:
        from torchshm import _reducers

        pools = _C.own_pools()
        origin = getattr(multiprocessing.process, "ORIGINAL_DIR", None) or ""
        path = [str(entry) or origin for entry in sys.path]
        names = {pool_id: core.name for pool_id, core in _stores.items()}
        arguments = ([pool[0] for pool in pools], _reducers.registered(), _C.min_bytes(), names)
        code = _JOIN.format(path=path, arguments=arguments, fds="_fds")
        fds = [multiprocessing.reduction.DupFd(fd) for pool in pools for fd in pool[1:]]
        return exec, (code, {"_fds": fds})


def _preparation_data(name: str) -> dict[str, Any]:
    data: dict[str, Any] = _stock_preparation_data(name)
    if _C.is_member() and multiprocessing.reduction.HAVE_SEND_HANDLE and _C.owns_descriptors():
        data["torchshm"] = _Inherited()
    return data


def _hook_children() -> None:
    multiprocessing.spawn.get_preparation_data = _preparation_data  # type: ignore[assignment]


def join_from_parent(
    pool_ids: list[int], registered: bool, min_bytes: int, stores: dict[int, str], *, fds: list[Any]
) -> None:
    """Join the parent's pool, and those it had before, in a child that was spawned, with the descriptors that came along.

    A forkserver whose preloaded modules called register() has a pool of its own; its children change to that of the parent.
    """
    from torchshm import _reducers

    owned = []
    try:
        owned = [fd.detach() for fd in fds]
        for pool_id, data, control in zip(pool_ids, owned[::2], owned[1::2], strict=True):
            if not _C.choose(pool_id):
                _C.attach(data, control, True)
            if pool_id in stores:
                # Without its service messages find room as in any other pool.
                with contextlib.suppress(TorchshmError):
                    core = _C.Store.connect(stores[pool_id], 0)
                    if core.pool_id == pool_id:
                        _stores[pool_id] = core
                _C.choose(pool_id)
        _C.set_min_bytes(min_bytes)
        if registered:
            _reducers.install()
        _hook_children()
    except Exception as error:  # whatever it is, the child must start as it always did
        warnings.warn(
            f"torchshm: this process can't join the pool of its parent ({error}); arrays that the parent sends through the pool "
            "can't be received here",
            RuntimeWarning,
            stacklevel=2,
        )
    finally:
        for fd in owned:
            os.close(fd)


def find(pool_id: int) -> bool:
    """Join a pool of this family that was made elsewhere in it: by a child that called register() when its parent had not.

    Looks through the memory files of this user's processes, once per unknown pool, and joins only where the family fits, or where
    the pool is a store's, which is for all processes of the user.
    """
    return any(files.pool_id == pool_id and _join_path(pool_id, files.paths) for files in _pools.every_pool())


def _join_path(pool_id: int, paths: dict[str, Path]) -> bool:
    owned = []
    try:
        for kind in ("data", "control"):
            owned.append(os.open(paths[kind], os.O_RDWR | os.O_CLOEXEC))
        if _C.peek_family(owned[1]) not in (digest(), STORES):
            return False
        _C.attach(owned[0], owned[1])
    except (OSError, TorchshmError):
        return False
    finally:
        for fd in owned:
            os.close(fd)
    _hook_children()
    return True
