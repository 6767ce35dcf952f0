"""publish(): what makes a Publisher, and the store that its batches lie in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torchshm
from torchshm import _C, _reducers
from torchshm._store import Store
from torchshm.data._publisher import Publisher
from torchshm.errors import KeyExistsError


def publish(
    loader: Iterable[Any],
    name: str,
    *,
    slow: str = "wait",
    ahead: int = 2,
    min_consumers: int = 1,
    epochs: int | None = None,
    timeout: float | None = None,
    store: Store | str | None = None,
    limit: int | str | None = None,
) -> Publisher:
    """Let one loader feed all processes of this machine that subscribe to a name: each batch is prepared once and read in place.

    The batches lie in a store. This process and the children that it starts from now on use its pool for their messages
    (``register(store=...)``), so what workers send is published without a copy; what comes from elsewhere is copied once.

    Parameters
    ----------
    loader : iterable
        A DataLoader, or whatever can be iterated over once an epoch. Its batches are anything that a store saves: arrays, tensors on the
        CPU, dicts, lists and tuples of them, and objects that pickle.
    name : str
        For :func:`subscribe`.
    slow : {"wait", "drop"}
        What happens when consumers are not equally fast. ``"wait"``: the slowest sets the pace, and all get all batches. ``"drop"``:
        the fastest does; who is more than `ahead` behind misses batches, and sees how many.
    ahead : int
        Most batches that are published and not taken; with ``"drop"`` not taken by the fastest, and as many for those behind. So much
        memory is in use, and a loader's own prefetching comes on top.
    min_consumers : int
        How many to wait for before the first batch. After that publishing rests while there is none; with 0 it never waits.
    epochs : int, optional
        How often :meth:`Publisher.run` goes through the loader. Default: until :meth:`Publisher.close`; once, if it is an iterator.
    timeout : float, optional
        Seconds that a consumer may take nothing before it is left behind; and that :meth:`Publisher.run` waits for consumers. Default:
        as long as they live.
    store : Store or str, optional
        Where the batches lie. Default: the store of that name, served from here if nobody does.
    limit : int or str, optional
        Most memory of the store that is started, in bytes or as in ``"8GiB"``.

    Returns
    -------
    Publisher
        Not running yet.

    Raises
    ------
    KeyExistsError
        When something is being published under that name.

    Examples
    --------
    >>> with torchshm.data.publish(DataLoader(dataset, 64, num_workers=8), "train", epochs=10) as publisher:
    ...     publisher.run()
    >>> for batch in torchshm.data.subscribe("train"):  # in any other process, any number of them
    ...     ...
    """
    if not name or "\0" in name:
        raise ValueError("a name has at least one character, and no zero bytes")
    if slow not in ("wait", "drop"):
        raise ValueError(f"slow is 'wait' or 'drop', not {slow!r}")
    if ahead < 1:
        raise ValueError(f"ahead is a number of batches, 1 or more, not {ahead}")
    if min_consumers < 0 or (epochs is not None and epochs < 0):
        raise ValueError("min_consumers and epochs are numbers, 0 or more")
    if isinstance(loader, Iterator):
        if epochs not in (None, 0, 1):
            raise ValueError(
                "an iterator can be gone through once: publish what it is made from, or epochs=1"
            )
        epochs = 1 if epochs is None else epochs
    if limit is not None and store is not None:
        raise ValueError("limit is the store's: give it to torchshm.start() or `torchshm serve --limit`")
    found, owned = _find_store(name, store, limit)
    try:
        torchshm.register(_C.min_bytes() if _reducers.registered() else None, store=found)
        return Publisher(loader, name, found, owned, slow, ahead, min_consumers, epochs, timeout)
    except BaseException:
        if owned:
            found.close()
        raise


def _find_store(name: str, store: Store | str | None, limit: int | str | None) -> tuple[Store, bool]:
    if store is not None:
        return (torchshm.connect(store) if isinstance(store, str) else store), False
    try:
        return torchshm.start(name, limit), True
    except KeyExistsError:
        if limit is not None:
            raise
        return torchshm.connect(name), False
