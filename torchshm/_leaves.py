"""What an object is made of: its parts by the names that a program has for them, and the memory of those that are arrays.

For containers of Python, objects' attributes, xarray, pandas, pyarrow, polars, torch and awkward. Parts that pickle knows and this does
not are shared all the same; they have no name here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from torchshm import _arrow

Put = Callable[[Any], None]
Part = tuple[str, Callable[[], Any], Put | None]
"""A path's next step, how to read what is there, and how to replace it; None where it can't be."""
Piece = tuple[int, int]
"""Address and bytes."""

ATOMS = (
    int,
    float,
    complex,
    str,
    bool,
    bytes,
    bytearray,
    type(None),
    type,
    range,
    slice,
    np.generic,
    np.dtype,
)
_ARRAYS = (
    "_ndarray",
    "_data",
    "_mask",
    "_codes",
    "_pa_array",
    "_sparse_values",
    "_left",
    "_right",
    "categories",
)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Values that are not in memory."""

    nbytes: int
    why: str


def _is(x: Any, library: str, *names: str) -> bool:
    """Whether it is an instance of one of a library's types; the library is not imported for that."""
    module = sys.modules.get(library)
    return module is not None and isinstance(x, tuple(getattr(module, name) for name in names))


def is_array(x: Any) -> bool:
    """Whether it is one array, tensor, column or index: something with memory, and no container."""
    return (
        isinstance(x, np.ndarray)
        or _is(x, "torch", "Tensor")
        or _is(x, "pyarrow", "Buffer", "Array", "ChunkedArray")
        or _is(x, "polars", "Series")
        or _is(x, "pandas", "Index")
        or _is(x, "awkward", "Array")
        or _is_extension_array(x)
    )


def is_table(x: Any) -> bool:
    """Whether it is an Arrow table or batch, which can't be changed."""
    return _is(x, "pyarrow", "Table", "RecordBatch")


def _is_extension_array(x: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(x, pandas.api.extensions.ExtensionArray)


# ---- parts


def parts(x: Any) -> Iterator[Part]:
    """The parts of a container; nothing of what is no container. None of them is held here."""
    if isinstance(x, dict):
        for key in list(x):
            yield f"[{key!r}]", partial(x.__getitem__, key), partial(x.__setitem__, key)
    elif isinstance(x, (list, tuple)):
        for i in range(len(x)):
            put = partial(x.__setitem__, i) if isinstance(x, list) else None
            yield f"[{i}]", partial(x.__getitem__, i), put
    elif _is(x, "pandas", "DataFrame", "Series"):
        yield from _of_pandas(x)
    elif _is(x, "xarray", "Dataset", "DataArray", "Variable"):
        yield from _of_xarray(x)
    elif is_table(x):
        for i, name in enumerate(x.schema.names):
            yield f"[{name!r}]", partial(x.column, i), None
    elif _is(x, "polars", "DataFrame"):
        for i, name in enumerate(x.columns):
            yield f"[{name!r}]", partial(x.to_series, i), partial(x.replace_column, i)
    elif _is(x, "datasets", "Dataset"):
        yield ".data.table", partial(getattr, x.data, "table"), None
    elif not isinstance(x, ATOMS) and type(x).__module__ != "builtins":
        yield from _attributes(x)


def _attributes(x: Any) -> Iterator[Part]:
    held = getattr(x, "__dict__", None)
    if isinstance(held, dict):
        for name in list(held):
            yield f".{name}", partial(held.__getitem__, name), partial(held.__setitem__, name)
    for kind in type(x).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and hasattr(x, name):
                yield f".{name}", partial(getattr, x, name), partial(object.__setattr__, x, name)


def _of_pandas(x: Any) -> Iterator[Part]:
    frame = _is(x, "pandas", "DataFrame")
    for block in x._mgr.blocks:
        step = ".array"
        if frame:
            names = list(x.columns[block.mgr_locs.as_array[:3]])
            more = f", and {len(block.mgr_locs) - 3} more" if len(block.mgr_locs) > 3 else ""
            step = f"[{names[0]!r}]" if len(names) == 1 else f"[{str(names)[1:-1]}{more}]"
        yield step, partial(getattr, block, "values"), partial(_put_values, x, block)
    yield ".index", partial(getattr, x, "index"), None
    if frame:
        yield ".columns", partial(getattr, x, "columns"), None


def _put_values(frame: Any, block: Any, new: Any) -> None:
    block.values = new
    views = vars(frame).get("_item_cache")  # of pandas before 3
    if isinstance(views, dict):
        views.clear()


def _of_xarray(x: Any) -> Iterator[Part]:
    if _is(x, "xarray", "Variable"):
        variables = [("", x)]
    elif _is(x, "xarray", "Dataset"):
        variables = [(f"[{name!r}]", variable) for name, variable in x._variables.items()]
        yield ".attrs", partial(getattr, x, "_attrs"), None
    else:
        variables = [("", x.variable), *((f"[{name!r}]", each) for name, each in x._coords.items())]
    for step, variable in variables:
        yield from _of_variable(step, variable)
        yield f"{step}.attrs", partial(getattr, variable, "_attrs"), None


def _of_variable(step: str, variable: Any) -> Iterator[Part]:
    get: Callable[[], Any] = partial(getattr, variable, "_data")
    put: Put | None = partial(setattr, variable, "_data")
    if not isinstance(get(), np.ndarray):
        kind = type(get())
        if hasattr(get(), "__dask_graph__"):
            put, get = None, partial(Lazy, variable.nbytes, "lazy, a dask graph: share(x.compute())")
        elif _is(getattr(get(), "array", None), "pandas", "Index"):
            put, get = None, partial(getattr, get(), "array")
        elif kind.__module__.startswith("xarray."):
            put, get = None, partial(Lazy, variable.nbytes, "lazy: share(x.load())")
    yield f"{step}.values", get, put


# ---- memory


def memory(x: Any) -> Iterator[Piece]:
    """The pieces of memory of what is_array(); none of Python objects, and of what does not pickle as arrays."""
    if isinstance(x, np.ndarray):
        if x.nbytes and not x.dtype.hasobject and x.dtype.kind != "T":
            yield x.__array_interface__["data"][0], x.nbytes
    elif _is(x, "torch", "Tensor"):
        torch = sys.modules["torch"]
        if x.device.type == "cpu" and x.layout is torch.strided and not x.is_nested:
            if x.numel():
                yield x.data_ptr(), x.nbytes
        elif x.device.type == "cpu" and x.layout is torch.sparse_coo:
            yield from memory(x._indices())
            yield from memory(x._values())
    elif _is(x, "pyarrow", "Buffer", "Array", "ChunkedArray"):
        yield from _of_arrow(x)
    elif _is(x, "polars", "Series"):
        if "pyarrow" in sys.modules and _arrow.same_in_arrow(x.dtype):
            newest = sys.modules["polars"].CompatLevel.newest()
            for chunk in x.get_chunks():
                yield from _of_arrow(chunk.to_arrow(compat_level=newest))
    elif _is(x, "awkward", "Array"):
        for each in sys.modules["awkward"].to_buffers(x)[2].values():
            yield from memory(np.asarray(each))
    elif _is(x, "pandas", "MultiIndex"):
        for each in (*x.codes, *x.levels):
            yield from memory(each)
    elif not _is(x, "pandas", "RangeIndex"):
        for name in _ARRAYS:
            each = getattr(x, name, None)
            if each is not None:
                yield from memory(each)


def _of_arrow(x: Any) -> Iterator[Piece]:
    if _is(x, "pyarrow", "ChunkedArray"):
        for chunk in x.chunks:
            yield from _of_arrow(chunk)
        return
    for buffer in [x] if _is(x, "pyarrow", "Buffer") else x.buffers():
        if buffer is not None and buffer.size:
            yield buffer.address, buffer.size
