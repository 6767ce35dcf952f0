"""The job that a process belongs to, and the job's store on this node, found or started.

Where files are: the store's socket and lock lie in the directory of stores (docs/store.md). The service runs in a thread of whichever
process came first. When that process ends, the next one that comes finds the store in those that still have it, and serves it on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing.process
import multiprocessing.util
import os
import threading
import time
from pathlib import Path

from torchshm import _C, _family
from torchshm._starting import start
from torchshm._store import Store
from torchshm.errors import KeyExistsError, StoreUnavailableError

_PREFIX = "job-"
_PATIENCE = 30.0  # s for a service to answer
_PAUSE = 0.002  # s; a service that has its lock but no socket yet
_INHERITED = "torchshm_job"

_lock = threading.RLock()
_stores: dict[str, Store] = {}


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


# ---- the name


def _identity() -> tuple[str, ...]:
    """What tells this job from every other one of the user on this node: who launched it, and what that one calls it."""
    get = os.environ.get
    run, rank = get("TORCHELASTIC_RUN_ID"), get("RANK") or get("LOCAL_RANK")  # Lightning sets the latter only
    address = (get("MASTER_ADDR", ""), get("MASTER_PORT", ""))
    if run is not None and rank is not None:
        # The run id is "none" unless the user gives one; the agent's own directory is made anew for each launch.
        of_rank = get("TORCHELASTIC_ERROR_FILE")  # <directory>/attempt_<n>/<local rank>/error.json
        return "torchrun", run, *address, str(Path(of_rank).parent.parent.parent) if of_rank else ""
    step = get("SLURM_STEP_ID") or get("SLURM_STEPID")
    # A step of one task may be a shell that many jobs are started from.
    if step is not None and get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return "slurm", get("SLURM_JOB_ID", ""), step
    namespace = get("PMIX_NAMESPACE")
    if namespace is not None:
        return "mpi", namespace
    if rank is not None and all(address):
        return "ranks", *address
    return "local", f"{_family.digest():016x}"


def job_name() -> str:
    """Name of the job's store.

    The same in all ranks of a job on this node and in the processes that they start by :mod:`multiprocessing`, whatever their
    environment has become by then.
    """
    given = os.environ.get("TORCHSHM_JOB")
    if given:
        return given
    # Travels to children as the authkey does, with every start method, and to nobody else.
    config: dict[str, str] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    found = config.get(_INHERITED)
    if found is None:
        identity = _identity()
        digest = hashlib.blake2b("\0".join(identity).encode(), digest_size=8).hexdigest()
        found = config[_INHERITED] = f"{_PREFIX}{identity[0]}-{digest}"
    return found


# ---- what the dead leave


def _directory() -> Path:
    """As csrc/service/address.cc has it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return Path(runtime) / "torchshm"
    uid = os.geteuid()
    return Path("/run/torchshm" if uid == 0 else f"/tmp/torchshm-{uid}")


def tidy(name: str) -> None:
    """Remove socket and lock of a store that nobody serves."""
    socket, path = (_directory() / f"{name}.{ending}" for ending in ("sock", "lock"))
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.stat(path)):  # else its next service has put up its own
            socket.unlink(missing_ok=True)
            path.unlink()
    except OSError:
        pass  # it is being served
    finally:
        os.close(lock)


def tidy_dead(prefix: str) -> None:
    """What was killed as a whole has left its files, and nobody will take its names again."""
    with contextlib.suppress(OSError):
        for path in list(_directory().glob(f"{prefix}*.lock")):
            tidy(path.stem)


def _leave(name: str) -> None:
    store = _stores.get(name)
    if store is not None:
        store.close()
    tidy(name)


# ---- the store


def _serve(name: str) -> Store:
    parent = _directory().parent
    if not parent.is_dir():  # a batch system hands on the login node's environment, not its directories
        raise StoreUnavailableError(
            f"{parent} (XDG_RUNTIME_DIR) is not a directory on this machine: unset XDG_RUNTIME_DIR, and stores are in /tmp, or set it to "
            "a directory of this machine that is yours alone"
        )
    store = start(name, os.environ.get("TORCHSHM_LIMIT") or None)
    tidy_dead(_PREFIX)
    return store


def _pool_served(name: str) -> int | None:
    try:
        return int(_C.store_status(name)["pool_id"])
    except StoreUnavailableError:
        return None


def _find(name: str) -> Store:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            core = _C.Store.connect(name, 0)
        except StoreUnavailableError as error:
            why = str(error)
        else:
            # Had the service died while the files were on their way here, its successor might not have found them with anybody and
            # have begun a store anew. Served still, now that they are here: whoever comes next finds them.
            if _pool_served(name) == core.pool_id:
                return Store(name, _PATIENCE, core)
            why = "its service has just ended"
        try:
            return _serve(name)
        except KeyExistsError:
            pass  # somebody was faster
        if time.monotonic() > deadline:
            raise StoreUnavailableError(
                f"the job's store {name} can't be reached, and can't be started: {why}"
            )
        time.sleep(_PAUSE)


def node_store() -> Store:
    """Return the store that all processes of this job on this node have in common, starting it if need be.

    The first process that asks serves it, by a thread. It lives as long as any process that has asked does.

    Returns
    -------
    Store
        With all that a :class:`torchshm.Store` can do: ``remove(key)`` what :func:`once` made, ``info()``, ``lock(key)``.

    Raises
    ------
    StoreUnavailableError
        When the directory of sockets is not this user's alone, or its parent, ``XDG_RUNTIME_DIR``, is not there.

    Notes
    -----
    A job is what one launcher has started: torchrun (its run and its directory of logs), a Slurm step with several tasks, an MPI
    namespace, else all that have ``RANK`` or ``LOCAL_RANK`` and the same ``MASTER_ADDR`` and ``MASTER_PORT``, else this process and
    those it starts by multiprocessing. The environment's ``TORCHSHM_JOB`` names the store instead. Its limit is ``TORCHSHM_LIMIT``,
    else half of what the machine or the cgroup allows.
    """
    name = job_name()
    store = _stores.get(name)
    if store is not None and not store._closed:
        return store
    with _lock:
        store = _stores.get(name)
        if store is None or store._closed:
            first = store is None
            store = _stores[name] = _find(name)
            if first:
                multiprocessing.util.Finalize(None, _leave, args=(name,), exitpriority=-100)
        return store


def keep_served(store: Store) -> None:
    """Serve the job's store from here if nobody does any more: a service takes back what the dead have left."""
    if _stores.get(store.name) is not store or _pool_served(store.name) is not None:
        return
    with _lock, contextlib.suppress(KeyExistsError):
        _stores[store.name] = _serve(store.name)
