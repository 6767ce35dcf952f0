"""collate: samples to a batch, stacked where the batch is to lie.

The walk through mappings, sequences and maps of functions is torch's own. Replaced are the functions at its leaves: those that stack
tensors and arrays, and, where asked for, those of numbers. Whatever is unusual there goes to torch's function.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import _utils, get_worker_info

import torchshm
from torchshm import _C, _tensors

_torch = _utils.collate
_Map = Mapping[Any, Callable[..., Any]]
_PAGE = 4096


def collate(
    batch: Any,
    *,
    numpy: bool = False,
    pad: Any = None,
    collate_fn_map: _Map | None = None,
) -> Any:
    """Make a batch of samples, as :func:`torch.utils.data.default_collate` does, in the pool where there is one.

    Tensors and NumPy arrays are copied once, from the sample to the batch. Use :func:`functools.partial` to give it options as a
    ``collate_fn``.

    Parameters
    ----------
    batch : sequence
        Samples: tensors, NumPy arrays and scalars, numbers, strings, and mappings, namedtuples and sequences of those, as
        ``default_collate`` takes. Besides these, xarray objects are concatenated along a new dimension ``"batch"`` (index
        coordinates that differ between samples become coordinates of batch and dimension), and pandas objects by
        :func:`pandas.concat`, the samples' numbers being the outer level, ``"batch"``, of the index.
    numpy : bool, optional
        Make NumPy arrays, of all numbers, arrays and tensors; also of strings and objects where samples are arrays of these.
    pad : scalar or "nested", optional
        Takes samples of different shapes. Tensors, arrays, and lists of numbers (of any depth) are filled up with this value, at the
        end of each dimension, to the largest of the batch: with `pad`, lists of numbers are arrays. ``"nested"`` makes nested
        tensors of layout ``torch.jagged``, which allows the first dimension to differ.
    collate_fn_map : dict, optional
        As that of ``torch.utils.data._utils.collate.collate``: by type the functions that are used, and no others but torchshm's
        in the place of torch's own. ``None`` is ``default_collate_fn_map``, with what a program has added to it, and xarray and
        pandas.

    Returns
    -------
    object
        What ``default_collate`` returns.

    Raises
    ------
    TypeError, RuntimeError
        As ``default_collate``.
    ValueError
        When `pad` is combined with what it can't be.
    """
    if isinstance(pad, str) and pad != "nested":
        raise ValueError(f"pad is a number or 'nested', not {pad!r}")
    if pad == "nested" and numpy:
        raise ValueError("pad='nested' makes tensors, which numpy=True excludes: pad with a number")
    given = _torch.default_collate_fn_map if collate_fn_map is None else collate_fn_map
    functions = {kind: _OURS.get(function, function) for kind, function in given.items()}
    if collate_fn_map is None:
        _add_tables(functions)
    if numpy:
        functions = {kind: _NUMPY.get(function, function) for kind, function in functions.items()}
        if collate_fn_map is None:
            functions.setdefault(np.generic, _scalars_to_numpy)  # datetimes and structs
    if pad is not None:
        functions = _padding(functions, pad, numpy)
    return _torch.collate(batch, collate_fn_map=functions)


# ---- memory


def _blank(dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    """A tensor of uninitialised memory in the pool; None where the batch is to lie elsewhere."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size == 0 or not _C.is_member():
        return None
    if get_worker_info() is not None:
        module = _tensors.compiled()
        storage = None if module is None else module.blank(size)
        return None if storage is None else torch.empty(0, dtype=dtype).set_(storage, 0, shape)
    # As torch makes them outside workers, where a batch can be resized.
    before = _tensors.enter(0) if size >= _PAGE else None
    if before is None:
        return None
    try:
        return torch.empty(shape, dtype=dtype)
    finally:
        _tensors.leave(before)


def _blank_array(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    size = dtype.itemsize
    for n in shape:
        size *= n
    # Smaller ones are sent inside the pickle.
    if size >= _PAGE and not dtype.hasobject and _C.is_member():
        try:
            return torchshm.empty(shape, dtype)
        except (torchshm.PoolFullError, TypeError):  # no room, or a dtype whose values lie elsewhere
            pass
    return np.empty(shape, dtype)


# ---- tensors


def _plain(tensor: Any, dtype: torch.dtype, shape: torch.Size) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.dtype is dtype
        and tensor.shape == shape
        and not tensor.requires_grad
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def _tensors_to_tensor(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    elem = batch[0]
    dtype = elem.dtype
    if type(elem) is torch.Tensor and not elem.is_nested:
        shape = elem.shape
        if all(_plain(x, dtype, shape) for x in batch):
            out = _blank(dtype, (len(batch), *shape))
            if out is not None:
                return torch.stack(batch, 0, out=out)
    return _torch.collate_tensor_fn(batch, collate_fn_map=collate_fn_map)


def _as_array(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        x = x.detach().resolve_conj().resolve_neg()
        return x.numpy()
    return np.asarray(x)


def _stack(arrays: list[Any]) -> Any:
    dtype = arrays[0].dtype
    if not dtype.isnative or any(x.dtype != dtype for x in arrays):
        dtype = np.result_type(*arrays)
    shape = arrays[0].shape
    if type(dtype).__module__.split(".")[0] != "numpy" or any(x.shape != shape for x in arrays):
        return np.stack(arrays)  # its own errors
    out = _blank_array(dtype, (len(arrays), *shape))
    return np.stack(arrays, out=out)


def _to_numpy(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    return _stack([_as_array(x) for x in batch])


# ---- NumPy


def _as_tensor_takes(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The dtype of the tensor over an array's memory; None where torch makes none, or does something else."""
    found = _TORCH_DTYPES.get(dtype, False)
    if found is False:
        try:
            found = torch.as_tensor(np.empty(0, dtype)).dtype if dtype.isnative else None
        except TypeError:
            found = None
        _TORCH_DTYPES[dtype] = found
    return found


_TORCH_DTYPES: dict[np.dtype[Any], Any] = {}


def _arrays_to_tensor(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    elem = batch[0]
    dtype, shape = elem.dtype, elem.shape
    tensors = (collate_fn_map or {}).get(torch.Tensor)
    if tensors is _tensors_to_tensor and all(
        type(x) in (np.ndarray, np.memmap) and x.dtype == dtype and x.shape == shape for x in batch
    ):
        kind = _as_tensor_takes(dtype)
        if kind is not None and all(s >= 0 for x in batch for s in x.strides):
            unwriteable = next((x for x in batch if not x.flags.writeable), None)
            if unwriteable is not None:
                torch.as_tensor(unwriteable)  # warns
            out = _blank(kind, (len(batch), *shape))
            if out is not None:
                _fill(out.numpy(), batch)
                return out
    return _torch.collate_numpy_array_fn(batch, collate_fn_map=collate_fn_map)


def _fill(out: Any, arrays: Any) -> None:
    for i, x in enumerate(arrays):
        out[i] = x


def _arrays_to_numpy(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    return _stack(list(batch))


def _scalars_to_numpy(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    return np.array(batch)


def _floats_to_numpy(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    return np.array(batch, dtype=np.float64)


# ---- xarray and pandas


def _add_tables(functions: dict[Any, Callable[..., Any]]) -> None:
    """What sees itself as a mapping or a sequence, or as nothing that torch knows."""
    xarray = sys.modules.get("xarray")
    if xarray is not None and hasattr(xarray, "Dataset"):
        for kind in (xarray.Dataset, xarray.DataArray, xarray.Variable):
            functions.setdefault(kind, _xarray_to_xarray)
    pandas = sys.modules.get("pandas")
    if pandas is not None and hasattr(pandas, "DataFrame"):
        for kind in (pandas.DataFrame, pandas.Series):
            functions.setdefault(kind, _pandas_to_pandas)


def _in_pool(function: Callable[[], Any]) -> Any:
    if not _C.is_member():
        return function()
    with torchshm.pooled():
        return function()


def _xarray_to_xarray(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    import xarray

    samples = list(batch)
    first = samples[0]
    if isinstance(first, xarray.Variable):
        return _in_pool(lambda: xarray.Variable.concat(samples, dim="batch"))
    different = [
        name
        for name, index in first.indexes.items()
        if name in first.dims
        and not all(name in x.indexes and index.equals(x.indexes[name]) for x in samples[1:])
    ]
    if different:
        samples = [x.reset_index([name for name in different if name in x.indexes]) for x in samples]
    # Exact: filling up with NaN what is elsewhere on the globe would be a batch of another kind.
    return _in_pool(
        lambda: xarray.concat(
            samples,
            dim="batch",
            data_vars="all",
            coords="different",
            compat="equals",
            join="exact",
            combine_attrs="drop_conflicts",
        )
    )


def _pandas_to_pandas(batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
    import pandas

    samples = list(batch)
    names = ["batch", *samples[0].index.names]
    return _in_pool(lambda: pandas.concat(samples, keys=range(len(samples)), names=names))


# ---- samples of different shapes


class _Ragged:
    """Takes the places of functions of one map: pads, or nests, and leaves to `next` what needs neither."""

    def __init__(self, value: Any, numpy: bool, then: Callable[..., Any] | None) -> None:
        self.value = value
        self.numpy = numpy
        self.then = then

    def __call__(self, batch: Any, *, collate_fn_map: _Map | None = None) -> Any:
        shapes = {tuple(x.shape) for x in batch}
        if self.value == "nested":
            return _nested(list(batch))
        if len(shapes) == 1 and self.then is not None:
            return self.then(batch, collate_fn_map=collate_fn_map)
        dims = {len(shape) for shape in shapes}
        if len(dims) != 1:
            raise RuntimeError(
                f"pad fills up samples of one number of dimensions, and these have {sorted(dims)}"
            )
        largest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        if all(isinstance(x, np.ndarray) for x in batch):
            out = _pad_arrays([np.asarray(x) for x in batch], largest, self.value)
            return out if self.numpy else torch.from_numpy(out)
        tensor = _pad_tensors([torch.as_tensor(x) for x in batch], largest, self.value)
        return tensor.numpy() if self.numpy else tensor


def _pad_arrays(batch: list[Any], largest: tuple[int, ...], value: Any) -> Any:
    out = _blank_array(np.result_type(*(x.dtype for x in batch)), (len(batch), *largest))
    for i, x in enumerate(batch):
        place = out[i]
        if x.shape != largest:
            place[...] = value
        place[tuple(slice(n) for n in x.shape)] = x
    return out


def _pad_tensors(batch: list[Any], largest: tuple[int, ...], value: Any) -> Any:
    dtype = batch[0].dtype
    for x in batch[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    out = _blank(dtype, (len(batch), *largest))
    if out is None:
        out = torch.empty((len(batch), *largest), dtype=dtype)
    for i, x in enumerate(batch):
        place = out[i]
        if tuple(x.shape) != largest:
            place.fill_(value)
        place[tuple(slice(n) for n in x.shape)] = x.detach()
    return out


def _nested(batch: list[Any]) -> Any:
    tensors = [torch.as_tensor(x).detach() for x in batch]
    first = tensors[0]
    if any(x.dim() == 0 or x.shape[1:] != first.shape[1:] or x.dtype != first.dtype for x in tensors):
        raise RuntimeError(
            "pad='nested' takes samples of one dtype that differ in their first dimension only: pad with a number"
        )
    ends = torch.tensor([0, *(len(x) for x in tensors)]).cumsum(0)
    values = _blank(first.dtype, (int(ends[-1]), *first.shape[1:]))
    values = torch.cat(tensors) if values is None else torch.cat(tensors, out=values)
    return torch.nested.nested_tensor_from_jagged(values, ends)


def _numbers(x: Any) -> bool:
    return isinstance(x, list) and all(
        isinstance(n, (bool, int, float, np.bool_, np.number)) or (isinstance(n, list) and _numbers(n))
        for n in x
    )


class _RaggedLists:
    """Lists: of numbers they are arrays here, all others are torch's."""

    def __init__(self, inner: _Ragged) -> None:
        self.inner = inner

    def __call__(self, batch: Any, *, collate_fn_map: _Map) -> Any:
        if all(_numbers(x) for x in batch):
            kinds = [_dense(x, self.inner.value) for x in batch]
            filled = [x for x in kinds if x.size] or kinds  # an empty list says nothing of its kind
            dtype = np.result_type(*(x.dtype for x in filled))
            return self.inner([x.astype(dtype, copy=False) for x in kinds], collate_fn_map=collate_fn_map)
        made = copy.copy(batch[0])  # as torch does, for subclasses
        if len({len(x) for x in batch}) > 1:
            raise RuntimeError("each element in list of batch should be of equal size")
        for i, samples in enumerate(zip(*batch, strict=True)):
            made[i] = _torch.collate(samples, collate_fn_map=collate_fn_map)
        return made


def _dense(x: list[Any], value: Any) -> Any:
    """An array of a list of numbers, whose own lists may be of different lengths."""
    if not any(isinstance(n, list) for n in x):
        return np.array(x) if x else np.empty(0)
    rows = [_dense(n if isinstance(n, list) else [n], value) for n in x]
    largest = tuple(max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True))
    if value == "nested":
        return np.stack(rows)  # raises where inner lists differ
    out = np.full((len(rows), *largest), value, np.result_type(*rows))
    for i, row in enumerate(rows):
        out[i][tuple(slice(n) for n in row.shape)] = row
    return out


def _padding(
    functions: dict[Any, Callable[..., Any]], value: Any, numpy: bool
) -> dict[Any, Callable[..., Any]]:
    ours = {_tensors_to_tensor, _arrays_to_tensor, _to_numpy, _arrays_to_numpy}
    made = {
        kind: _Ragged(value, numpy, function) if function in ours else function
        for kind, function in functions.items()
    }
    then = functions.get(np.ndarray)
    made[list] = _RaggedLists(_Ragged(value, numpy, then))
    return made


_OURS: dict[Any, Callable[..., Any]] = {
    _torch.collate_tensor_fn: _tensors_to_tensor,
    _torch.collate_numpy_array_fn: _arrays_to_tensor,
}
_NUMPY: dict[Any, Callable[..., Any]] = {
    _tensors_to_tensor: _to_numpy,
    _arrays_to_tensor: _arrays_to_numpy,
    _torch.collate_numpy_scalar_fn: _scalars_to_numpy,
    _torch.collate_int_fn: _scalars_to_numpy,
    _torch.collate_float_fn: _floats_to_numpy,
}
