"""DataLoader: torch's, its messages in the pool."""

from __future__ import annotations

import functools
import multiprocessing
from typing import Any

import torch.utils.data
from torch.utils.data import dataloader as _stock

import torchshm
from torchshm import _C, _reducers
from torchshm.data import _parcel
from torchshm.data._collate import collate

_COLLATE_FN = 6  # the place of that argument of torch's


class DataLoader(torch.utils.data.DataLoader):
    """A :class:`torch.utils.data.DataLoader` whose batches cross from the workers through shared memory.

    It calls :func:`torchshm.register` when it starts workers and that has not been done, takes the queues of
    :func:`torchshm.get_context`, and :func:`torchshm.data.collate` for batches.

    Parameters
    ----------
    *args, **kwargs
        Those of :class:`torch.utils.data.DataLoader`. A `collate_fn` or a context object that is given is used as it is; the name of
        a start method says how workers start, and no more.
    pooled : bool, optional
        Run all that a worker does for a batch, the Dataset's code and the `collate_fn`'s, inside :func:`torchshm.pooled`: the arrays
        and tensors that NumPy and torch make there are sent without being copied. NumPy arrays that the worker keeps, such as a
        buffer that is filled again for the next batch, are copied when they are sent. Tensors are shared with a worker that keeps
        them, as PyTorch has it. Allocations of less than a page take a page each, so this is for code that makes few and large
        arrays.

    Notes
    -----
    A generator that yields a local variable keeps it until it goes on: ``yield np.stack(...)`` is sent without a copy, and
    ``x = np.stack(...); yield x`` with one.
    """

    def __init__(self, *args: Any, pooled: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pooled = bool(pooled)
        given = kwargs.get("collate_fn", args[_COLLATE_FN] if len(args) > _COLLATE_FN else None)
        if given is None and self._auto_collation:
            self.collate_fn = collate

    def _get_iterator(self) -> Any:
        if self.num_workers == 0:
            return super()._get_iterator()
        if not _reducers.registered():
            torchshm.register()
        given: Any = self.multiprocessing_context  # type: ignore[has-type]
        self.multiprocessing_context = _context(given)
        try:
            if not self.pooled or not _C.is_member():
                return super()._get_iterator()
            self.check_worker_number_rationality()
            return _PooledIterator(self)
        finally:
            self.multiprocessing_context = given


def _context(given: Any) -> Any:
    """Ours of the same start method, in the place of multiprocessing's own; contexts of a program's are left alone."""
    make: Any = getattr(torchshm, "get_context", None)
    if make is None or not _C.is_member():
        return given
    if given is None:
        return make(multiprocessing.get_start_method())
    return make(given.get_start_method()) if type(given).__module__ == "multiprocessing.context" else given


class _PooledIterator(_stock._MultiProcessingDataLoaderIter):
    """torch's, whose workers fetch in the pool: they are told by the function that each calls first."""

    @property
    def _worker_init_fn(self) -> Any:
        return functools.partial(_begin_worker, self._users_init_fn)

    @_worker_init_fn.setter
    def _worker_init_fn(self, function: Any) -> None:
        self._users_init_fn = function


def _begin_worker(users: Any, worker_id: int) -> None:
    _stock._DatasetKind.create_fetcher = staticmethod(_create_fetcher)  # of this process, a worker
    if users is not None:
        users(worker_id)


_stock_create_fetcher = _stock._DatasetKind.create_fetcher


def _create_fetcher(*args: Any) -> Any:
    return _PooledFetcher(_stock_create_fetcher(*args))


class _PooledFetcher:
    def __init__(self, fetcher: Any) -> None:
        self._fetcher = fetcher

    def fetch(self, index: Any) -> Any:
        with torchshm.pooled():
            box = [self._fetcher.fetch(index)]
        return _parcel.pack(box)
