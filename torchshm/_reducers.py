"""The reducers on multiprocessing's pickler: what register() installs."""

from __future__ import annotations

import multiprocessing.reduction
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from torchshm import _C, _arrow, _family, _tensors
from torchshm._size import parse_limit
from torchshm.errors import TorchshmError

if TYPE_CHECKING:
    from torchshm._store import Store

_INLINE_BELOW = _C.min_bytes()  # measured: benchmarks/inline_threshold
_installed = False
_replaced: dict[type, Any] = {}  # reducers that the program had for our types


def _rebuild_masked(subtype: type, data: Any, mask: Any, fill_value: Any) -> Any:
    array = data.view(subtype)
    array._mask = mask
    array._sharedmask = True
    array.fill_value = fill_value
    return array


def _reduce_masked(array: Any) -> Any:
    """Reduce an exact MaskedArray as its own ``__getstate__`` does, data and mask as arrays of their own.

    What that can't deliver exactly (fields, a base class such as matrix) goes as it always went.
    """
    data = np.ndarray.view(array, np.ndarray)
    if (
        data.dtype.names is not None
        or data.dtype.hasobject
        or array._baseclass is not np.ndarray
        or data.nbytes < _C.min_bytes()
    ):
        return array.__reduce__()
    mask = np.ma.getmaskarray(array)
    if data.flags.fnc:
        mask = np.asfortranarray(mask)
    return _rebuild_masked, (type(array), data, mask, array._fill_value)


def masked_type() -> Any:
    """numpy.ma.MaskedArray; None where nobody has imported it, which takes longer than most values do, and so nobody has one."""
    return getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)


def reducers() -> dict[type, Any]:
    """Types and the functions that reduce them; exact types only, as ForkingPickler looks them up."""
    return {
        np.ndarray: _C.reduce_ndarray,
        np.matrix: _C.reduce_ndarray,
        np.recarray: _C.reduce_ndarray,
        np.memmap: _C.reduce_ndarray,
        np.ma.MaskedArray: _reduce_masked,
    }


def registered() -> bool:
    """Whether the reducers are installed in this process."""
    return _installed


def install() -> None:
    """Put the reducers on ForkingPickler's dispatch."""
    global _installed
    extra = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind, reduce in reducers().items():
        if extra.get(kind, reduce) is not reduce:
            _replaced[kind] = extra[kind]
        multiprocessing.reduction.ForkingPickler.register(kind, reduce)
    _tensors.install()
    _arrow.install()
    _installed = True


def register(
    min_bytes: int | None = None, *, limit: int | str | None = None, store: Store | str | None = None
) -> None:
    """Carry what multiprocessing pickles through shared memory, in this process and in its children.

    After this call every exact ``numpy.ndarray`` that a DataLoader worker, a queue, a pipe or a process argument pickles crosses
    by one copy into shared memory, or by none when it lies there already. Children of every start method inherit it. Calling it
    again changes the settings only.

    Parameters
    ----------
    min_bytes : int, optional
        Buffers smaller than this many bytes travel inside the pickle, as without torchshm. ``None`` is the measured threshold,
        ``0`` sends every buffer through the pool.
    limit : int or str, optional
        Most memory that the pool takes: bytes, as in ``"8GiB"``, or a share of what the machine or the cgroup allows, as in
        ``"25%"``. Default: the environment's ``TORCHSHM_LIMIT``, else ``"50%"``. A pool that exists already takes the new limit at
        once, for all its processes. A store's is given when it is started.
    store : Store or str, optional
        Use the pool of this store, or of the store of this name, so that messages and names share memory: what was loaded from it
        or made in :meth:`Store.storage` is sent without a copy, and what was received is saved without one. For this process and
        the children that it starts from now on; calling register() again without a store does not end it. What lies in the pool
        that the process had before stays valid and is sent by reference as before; everything else goes to the store's.

    Raises
    ------
    StoreUnavailableError
        When there is no such store.

    Warns
    -----
    RuntimeWarning
        When this system does not allow a pool; everything then works as before.
    """
    if min_bytes is not None and min_bytes < 0:
        raise ValueError(f"min_bytes is a number of bytes, 0 or more, not {min_bytes}")
    size = None if limit is None else parse_limit(limit)
    if store is not None:
        from torchshm._starting import connect

        if size is not None:
            raise ValueError("limit is the store's: give it to torchshm.start() or `torchshm serve --limit`")
        found = connect(store) if isinstance(store, str) else store
        _family.change_to(found._core.pool_id, found._core)
    elif size is not None and _C.is_member() and _C.family() == _family.STORES:
        raise ValueError(
            "the pool of this process is a store's, which keeps the limit that it was started with"
        )
    try:
        _family.ensure(size)
    except TorchshmError as error:
        warnings.warn(
            f"torchshm: no shared-memory pool here, nothing is changed: {error}", RuntimeWarning, stacklevel=2
        )
        return
    _C.set_min_bytes(_INLINE_BELOW if min_bytes is None else min_bytes)
    install()


def unregister() -> None:
    """Pickle as before register(). What lies in the pool stays valid, and messages under way can still be received."""
    global _installed
    extra = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind, reduce in reducers().items():
        if extra.get(kind) is reduce:
            del extra[kind]
            if kind in _replaced:
                extra[kind] = _replaced.pop(kind)
    _tensors.uninstall()
    _arrow.uninstall()
    _installed = False


def is_shared(x: Any) -> bool:
    """Whether an array, a tensor or a buffer lies in a pool.

    Parameters
    ----------
    x : numpy.ndarray, torch.Tensor or any object with the buffer protocol
    """
    if isinstance(x, np.ndarray):
        return _C.holds_address(x.__array_interface__["data"][0]) if x.dtype != object else False
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return x.device.type == "cpu" and x.layout == torch.strided and _C.holds_address(x.data_ptr())
    try:
        view = memoryview(x)
    except TypeError:
        return False
    return view.nbytes > 0 and _C.holds_address(
        np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]
    )
