"""Starting stores, and connecting to them."""

from __future__ import annotations

import os
import warnings

from torchshm import _C
from torchshm._arguments import patience_of, policy_of, ttl_of, whole_path
from torchshm._joining import counting_pools, join
from torchshm._size import parse_limit
from torchshm._store import Store


def _spill_directory(spill: str | os.PathLike[str]) -> str:
    directory = whole_path(spill, "spill", "a directory")
    parent = os.path.dirname(directory)
    os.makedirs(parent, exist_ok=True)
    if warning := spill_warning(directory):
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
    return directory


def spill_warning(directory: str) -> str | None:
    """What is to be said of a directory, which need not be there yet, whose file system keeps files in memory."""
    place = directory
    try:
        while not os.path.isdir(place):
            place = os.path.dirname(place)
        device = os.stat(place).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            rows = [line.split() for line in mounts]
    except OSError:
        return None
    number = f"{os.major(device)}:{os.minor(device)}"
    if not any(row[2] == number and row[row.index("-") + 1] in ("tmpfs", "ramfs") for row in rows):
        return None
    return f"the spill directory {directory} is on tmpfs, which is memory: what goes there makes no room; give one on a disk"


_HUGEPAGES = {None: "auto", False: "never", True: "2MiB"}


def start(
    name: str,
    limit: float | str | None = None,
    ttl: float | None = None,
    *,
    mode: int = 0o600,
    group: int | str | None = None,
    spill: str | os.PathLike[str] | None = None,
    spill_sync: bool = True,
    policy: str | None = None,
    timeout: float | None = None,
    file: str | os.PathLike[str] | None = None,
    hugepages: bool | str | None = None,
    prefault: bool = False,
    numa: str | None = None,
) -> Store:
    """Serve a store from this process, by a thread that needs neither Python nor its lock, and return a client of it.

    A store of that name whose service has died, or was stopped, while some process still has it, is taken over with all that is in
    it. With `file` the store lies in that file, and whatever becomes of the processes, the next ``start`` with the file has what was
    in it.

    Parameters
    ----------
    name : str
        Letters, digits, ``.``, ``_`` and ``-``.
    limit : float or str, optional
        Most memory that the store takes: bytes, of which whole ones count, as in ``"8GiB"``, or a share of what the machine or the
        cgroup allows, as in ``"25%"``. Default: ``"50%"``; with reserved huge pages, those that are free, if they are fewer; with `file`
        at most half of what its disk has free. Given for a file that is there, it becomes its limit.
    ttl : float, optional
        Seconds after which names go that were saved without a ttl. Default: never.
    mode : int
        Permissions of the socket.
    group : int or str, optional
        Members of this group may use the store too; give it with a `mode` such as ``0o660``.
    spill : path, optional
        Directory, on a disk, for values that do not fit into memory; ``~`` is the home directory. Made if it is missing, for this user or
        the group alone, with those that it lies in, which get the usual permissions. Files of a store that is gone are removed.
    spill_sync : bool
        A value's memory is given up when the disk has its file. False: when the kernel has it, which writes it out in its own time while
        memory is to spare. That is several times faster, and what a failing disk does not take then is lost: loading it is an error.
    policy : {"keep", "drop", "spill", "pin"}, optional
        Of values that are saved without one, see :meth:`Store.save`. ``"drop"`` makes the store a cache. Default: ``"keep"``.
    timeout : float, optional
        Seconds that :meth:`Store.save` and :meth:`Store.load` wait for room. Default: 10 with `spill` or ``policy="drop"``, else 0.
    file : path, optional
        Keep the store in this file, which is made if it is not there: on a local disk, or on tmpfs; ``~`` is the home directory.
        docs/persistence.md says what survives what.
    hugepages : bool or {"auto", "never", "2MiB"}, optional
        ``"auto"``, the default: transparent huge pages where the system has some. False or ``"never"``: pages of 4 KiB only. True or
        ``"2MiB"``: huge pages that the administrator has reserved (``sysctl vm.nr_hugepages``).
    prefault : bool
        Take the memory up to the limit at the start, and keep it: no save waits for the kernel to find and clear pages.
    numa : str, optional
        On which nodes memory is put: ``"local"``, the default: the node of who first writes to it; ``"interleave"``, over all nodes
        in turn, or ``"interleave:0,1"``; ``"bind:0,1"``: on these only; ``"preferred:0"``: there while there is room.

    `limit`, `hugepages`, `prefault` and `numa` are those of a new store: one that is taken over keeps its own. `ttl`, `policy` and
    `timeout` become those of a store that is there, where they are given.

    Warns
    -----
    RuntimeWarning
        When `spill` is on tmpfs, such as ``/dev/shm``: what goes there stays in memory.

    Raises
    ------
    KeyExistsError
        When a store of that name or file is being served, or the file is being read by :func:`torchshm.open`.
    PoolFullError
        When the file's disk has no room.
    TorchshmError
        When the file is no store's, or another version's, or has been cut short; or when the machine went down while it was in use:
        ``torchshm check --repair`` then keeps what can be relied on.
    StoreUnavailableError
        When the directory of sockets is not this user's alone.
    PoolFullError
        When `prefault` asks for more memory than there is.
    ValueError
        For limits and pages that there are none of, nodes that this machine has not, and an empty `spill`, `file` or `numa`.
    OSError
        When the directories that `spill` lies in can't be made.
    TorchshmError
        When fewer huge pages are reserved than the limit needs, and when the system refuses a policy; and for a 17th pool: those of
        closed stores count until the process ends.
    """
    size = 0 if limit is None else parse_limit(limit)
    pages = _HUGEPAGES[hugepages] if hugepages is None or isinstance(hugepages, bool) else str(hugepages)
    if isinstance(group, str):
        import grp

        group = grp.getgrnam(group).gr_gid
    if numa is not None and (not isinstance(numa, str) or not numa):
        raise ValueError(f'numa is a policy such as "interleave" or "bind:0", or None, not {numa!r}')
    where = "" if file is None else whole_path(file, "file", "a path")
    directory = "" if spill is None else _spill_directory(spill)
    with counting_pools():
        core = _C.Store.start(
            name,
            size,
            ttl_of(ttl),
            mode,
            -1 if group is None else group,
            directory,
            spill_sync,
            policy_of(policy),
            patience_of(timeout),
            where,
            pages,
            prefault,
            numa or "",
        )
    return Store(name, 10.0, core)


def connect(name: str, timeout: float = 10.0) -> Store:
    """Return a client of a store of this machine, waiting for one that is about to start.

    Parameters
    ----------
    name : str
    timeout : float
        Seconds; ``0``: one try, ``-1``: until it is there.

    Raises
    ------
    StoreUnavailableError
        When there is none, or it belongs to somebody else.
    TorchshmError
        For a 17th pool in one process: those of closed stores count until it ends.
    """
    return Store(name, timeout, join(name, timeout))
