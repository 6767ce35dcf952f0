"""Blocks and picklers for lists in the pool."""

from __future__ import annotations

import copyreg
import operator
import pickle
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

import torchshm
from torchshm import _C
from torchshm._sharing import _MODES
from torchshm.errors import PoolFullError, TorchshmError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

PAGES = 16 << 10
"""From here on a block consists of whole pages, so that it can be seen copy-on-write."""


# ---- pickling


def _rebuild_tensor(
    buffer: Any,
    dtype: Any,
    shape: tuple[int, ...],
    requires_grad: bool,
    strides: tuple[int, ...] | None = None,
) -> Any:
    import torch

    if memoryview(buffer).readonly:  # which a tensor can't be
        buffer = bytearray(buffer)
    tensor = torch.frombuffer(buffer, dtype=dtype)
    tensor = tensor.view(shape) if strides is None else tensor.as_strided(shape, strides)
    return tensor.requires_grad_() if requires_grad else tensor


def _reduce_tensor(tensor: Any) -> Any:
    """Plain tensors by their bytes, which pickle leaves out of band; all others as torch does."""
    import torch

    if (
        tensor.device.type != "cpu"
        or tensor.layout != torch.strided
        or tensor.is_nested
        or tensor.is_quantized
        or not tensor.is_leaf
        or tensor.is_neg()
        or tensor.is_conj()
        or tensor.numel() == 0
        or tensor.__dict__
        or tensor._backward_hooks
    ):
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    plain, strides = tensor.detach(), None
    if not plain.is_contiguous() and _is_dense(plain):
        strides = plain.stride()
        plain = plain.as_strided((plain.numel(),), (1,))
    data = plain.contiguous().view(-1).view(torch.uint8).numpy()
    return _rebuild_tensor, (
        pickle.PickleBuffer(data),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.requires_grad,
        strides,
    )


def _is_dense(tensor: Any) -> bool:
    """Whether its elements fill a range of memory in some order of the dimensions, as those of a channels_last tensor do."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True


_as_ever = operator.methodcaller("__reduce_ex__", pickle.HIGHEST_PROTOCOL)


class _Reducers(dict[type, Any]):
    """copyreg's table, and tensors; finds each type once."""

    def __missing__(self, kind: type) -> Any:
        if issubclass(kind, type):
            raise KeyError(kind)  # classes are pickled by name
        torch = sys.modules.get("torch")
        reduce = copyreg.dispatch_table.get(kind, _as_ever)
        if torch is not None and kind is torch.Tensor:
            reduce = _reduce_tensor
        self[kind] = reduce
        return reduce


def open_list(items: _C.ItemList) -> None:
    """Let an empty list be appended to."""
    items._start(_make_pickler, _grow)


def _make_pickler() -> tuple[_C.ItemSink, Any, Any]:
    sink = _C.ItemSink()
    pickler = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=sink.keep)
    pickler.dispatch_table = _Reducers()
    return sink, pickler.dump, pickler.clear_memo


# ---- blocks


def _grow(least: int, wanted: int) -> tuple[Bytes, Bytes]:
    """One new block, twice: to write and to read. The smaller the block the fuller the pool."""
    least = max(least, PAGES)
    while True:
        try:
            block = torchshm.empty(wanted, np.uint8)
            break
        except PoolFullError:
            if wanted == least:
                raise
            wanted = max(least, wanted // 2)
    return block, alias(block, "r")


def alias(array: npt.NDArray[Any], mode: str) -> npt.NDArray[Any]:
    """A contiguous array of the pool in another mode."""
    return _C.alias(array.view(np.uint8), _MODES[mode]).view(array.dtype)


def fresh(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values in a block of their own, to read."""
    made = torchshm.empty(max(array.nbytes, PAGES), np.uint8)
    made[: array.nbytes].view(array.dtype)[...] = array
    return alias(made, "r")[: array.nbytes].view(array.dtype)


def _fitted(array: npt.NDArray[Any], of: int) -> npt.NDArray[Any]:
    """The same values in a block of their size where that spares an eighth of `of` bytes."""
    block: Any = array
    while isinstance(block.base, np.ndarray):
        block = block.base
    if (block.nbytes - array.nbytes) * 8 <= of or block.nbytes <= PAGES:
        return array
    try:
        return fresh(array)
    except PoolFullError:
        return array


def seal(items: _C.ItemList, mode: str) -> None:
    """Close a list that is open: spare room is given back, and what is written to items' arrays from here on stays this process's."""

    def made_of(parts: tuple[Any, Any, Any, int | None]) -> tuple[Any, Any, Any]:
        chunks, _, index, used = parts
        index = np.empty(0, np.uint64) if index is None else index.view(np.uint64)[: len(items)]
        if chunks:
            total = sum(chunk.nbytes for chunk in chunks)
            chunks = (*chunks[:-1], _fitted(chunks[-1][:used], total))
        return chunks, arrays(chunks, mode), _fitted(index, index.nbytes)

    items._seal_with(made_of)


def arrays(chunks: tuple[Bytes, ...], mode: str) -> tuple[Bytes, ...]:
    """The chunks as arrays of items see them."""
    return tuple(_array(chunk, mode) for chunk in chunks)


def _array(chunk: Bytes, mode: str) -> Bytes:
    if mode == "r":
        return chunk
    if not torchshm.is_shared(chunk):
        return chunk.view()
    try:
        return alias(chunk, "c")
    except TorchshmError:
        if chunk.nbytes >= PAGES:
            raise
        return chunk.copy()  # it shares pages with other blocks


def received(chunks: tuple[Bytes, ...], mode: str) -> tuple[tuple[Bytes, ...], tuple[Bytes, ...]]:
    """The chunks that came in a message, to read, and as arrays of items see them. What lies in no pool is this process's own."""
    texts = []
    own = []
    for chunk in chunks:
        if torchshm.is_shared(chunk):
            texts.append(alias(chunk, "r") if chunk.flags.writeable else chunk)
            own.append(_array(texts[-1], mode))
            continue
        own.append(chunk if chunk.flags.writeable or mode == "r" else chunk.copy())
        texts.append(own[-1].view())
        texts[-1].flags.writeable = False
    return tuple(texts), tuple(texts if mode == "r" else own)


class Pooled:
    """Pickles an array by its handle, whether the reducers are registered or not."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    def __reduce__(self) -> Any:
        return _C.reduce_ndarray(self._array)
