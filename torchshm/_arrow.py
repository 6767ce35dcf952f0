"""Reducers for Arrow memory: of pyarrow, of pandas' Arrow-backed arrays, of polars. And awkward's arrays.

Everything of pyarrow's pickles down to arrays, and those to buffers; the buffers go as NumPy arrays of bytes, so a buffer in the pool is
sent by reference. Where pickling itself would copy first, or ship more than what is looked at, this goes around it. The same goes for
what is saved in a store, for which the pickler of torchshm._values uses these reducers too.

ForkingPickler copies its table for each message (25 ns an entry), so the table has the types that hold arrays and of the fifty types of
array the common ones. The others go to the pool as well, but a lone one that is a slice ships all that it is a slice of.
"""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import multiprocessing.reduction
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from torchshm import _C
from torchshm._arrivals import WhenImported

_WASTE = 16 << 10  # bytes of an array's buffers outside of it that are not worth another way. Arbitrary
_IPC_FROM = (
    1 << 20
)  # bytes; from here on it pays (1.8 times as fast at 16 MiB) that the IPC writer spares a copy

_COMMON = (
    *("Int32", "Int64", "Float", "Double", "Boolean", "Timestamp", "String", "LargeString", "Binary"),
    *("Dictionary", "List", "LargeList", "FixedSizeList", "Struct", "Extension"),
)


class _Saving(threading.local):
    """The store that this thread is pickling for; None: a message."""

    core: _C.Store | None = None


_saving = _Saving()


@contextlib.contextmanager
def saving(core: _C.Store) -> Iterator[dict[type, Any]]:
    """Reducers for what is saved in that store, as long as the block lasts."""
    before, _saving.core = _saving.core, core
    try:
        yield reducers()
    finally:
        _saving.core = before


_installed: dict[type, Any] = {}  # by type: the reducers that the program had, or None


# ---- pyarrow


def _buffer(data: Any, mutable: bool) -> Any:
    import pyarrow as pa

    if not mutable:
        data.flags.writeable = False
    return pa.py_buffer(data)


def _in_band() -> bool:
    """Whether everything is to be inside the pickle."""
    return _saving.core is None and _C.is_inline()


def _reduce_buffer(buffer: Any) -> Any:
    if not buffer.is_cpu or buffer.size == 0 or _in_band():
        return buffer.__reduce_ex__(4)
    return _buffer, (np.frombuffer(buffer, np.uint8), buffer.is_mutable)


def _stays(array: Any) -> bool:
    """Whether the array's memory is sent or saved by reference, however much of it."""
    for buffer in array.buffers():
        if buffer is not None and buffer.is_cpu:
            if _saving.core is not None:
                return _saving.core.refer(buffer.address, buffer.size) is not None
            place = _C.block_at(buffer.address)
            return place is not None and not place[3]
    return False


def _extended(kind: Any) -> bool:
    """Whether a type holds an extension type, of which IPC ships the name only."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return True
    if isinstance(kind, pa.DictionaryType):
        return _extended(kind.value_type)
    return any(_extended(kind.field(i).type) for i in range(kind.num_fields))


def _read(message: Any) -> Any:
    """The array of :func:`_write`, over the message."""
    import pyarrow as pa

    return pa.ipc.open_stream(_buffer(message, False)).read_next_batch().column(0)


def _write(array: Any) -> Any:
    """Write what the array looks at into a block, as an Arrow stream of one column."""
    import pyarrow as pa

    batch = pa.RecordBatch.from_arrays([array], [""])

    def into(sink: Any) -> None:
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)

    size = pa.MockOutputStream()
    into(size)
    core = _saving.core
    block = _C.empty((size.size(),), np.dtype("u1")) if core is None else core.blank(size.size())
    into(pa.FixedSizeBufferWriter(pa.py_buffer(block)))
    return block


def _reduce_slice(array: Any, used: int) -> Any:
    if used >= _IPC_FROM and (_saving.core is not None or _C.is_member()) and not _extended(array.type):
        try:
            return _read, (_write(array),)
        except MemoryError:
            pass  # no room
    return sys.modules["pyarrow"].concat_arrays([array]).__reduce__()


def _reduce_array(array: Any) -> Any:
    """As pyarrow does, but for slices: those ship themselves, and not all that they are a slice of."""
    if not _in_band():
        try:
            used = array.nbytes
            if array.get_total_buffer_size() - used > _WASTE and not _stays(array):
                return _reduce_slice(array, used)
        except _pa_errors():
            pass  # a type that can't do that
    return array.__reduce__()


def _pa_errors() -> type[Exception]:
    """What pyarrow raises for types that an operation does not know."""
    return sys.modules["pyarrow.lib"].ArrowException


class _Ours:
    """An array that is reduced here, whatever its type."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __reduce__(self) -> Any:
        return _reduce_array(self._array)


def _reduce_chunked(chunked: Any) -> Any:
    rebuild, (chunks, *kind) = chunked.__reduce__()
    return rebuild, ([_Ours(chunk) for chunk in chunks], *kind)


def _of_pyarrow() -> dict[type, Any]:
    lib = sys.modules["pyarrow.lib"]
    arrays = [kind for name in _COMMON if (kind := getattr(lib, f"{name}Array", None)) is not None]
    return {
        lib.Buffer: _reduce_buffer,
        lib.ResizableBuffer: _reduce_buffer,
        lib.ChunkedArray: _reduce_chunked,  # a table's columns too
        lib.RecordBatch: _reduce_chunked,
        **dict.fromkeys(arrays, _reduce_array),
    }


# ---- pandas


def _reduce_extension_array(array: Any) -> Any:
    """As pandas does, but for the chunks, which it copies into one, even when there is only one."""
    chunks = getattr(array, "_pa_array", None)
    if chunks is None or chunks.num_chunks == 0 or _in_band():
        return array.__reduce_ex__(4)
    state = vars(array) | {"_pa_array": [_Ours(chunk) for chunk in chunks.chunks]}
    if "_cache" in state:
        state["_cache"] = {}
    return copyreg.__newobj__, (type(array),), state  # type: ignore[attr-defined]


def _of_pandas() -> dict[type, Any]:
    arrays = sys.modules["pandas"].arrays
    kinds = [getattr(arrays, name, None) for name in ("ArrowStringArray", "ArrowExtensionArray")]
    return {kind: _reduce_extension_array for kind in kinds if kind is not None}


# ---- polars


def _series(name: str, chunks: list[Any], order: int) -> Any:
    import polars as pl

    pieces: list[Any] = [pl.from_arrow(chunk) for chunk in chunks]
    made = (pl.concat(pieces, rechunk=False) if len(pieces) > 1 else pieces[0]).alias(name)
    return made.set_sorted(descending=order < 0) if order else made


def same_in_arrow(dtype: Any) -> bool:
    """Whether polars reads back what it gave pyarrow, over the same memory."""
    import polars as pl

    if isinstance(dtype, (pl.List, pl.Array)):
        return dtype.inner is not None and same_in_arrow(dtype.inner)
    if isinstance(dtype, pl.Struct):
        return bool(dtype.fields) and all(same_in_arrow(field.dtype) for field in dtype.fields)
    plain = (pl.Boolean, pl.String, pl.Binary, pl.Date, pl.Datetime, pl.Duration, pl.Time, pl.Decimal)
    numbers = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)
    return isinstance(dtype, (*plain, *numbers, pl.Float32, pl.Float64))


def _by_arrow() -> bool:
    """Whether there is pyarrow for it. A store has it imported, since what is saved lies there long."""
    if _saving.core is not None and "pyarrow" not in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("pyarrow")
    return "pyarrow" in sys.modules and not _in_band()


def _reduce_series(series: Any) -> Any:
    import polars as pl

    if not _by_arrow() or not len(series) or not same_in_arrow(series.dtype):
        return series.__reduce_ex__(4)
    newest = pl.CompatLevel.newest()
    pieces = [piece for piece in series.get_chunks() if len(piece)]
    arrays = [piece.to_arrow(compat_level=newest) for piece in pieces]
    if isinstance(series.dtype, (pl.String, pl.Binary)) and not _stays(arrays[0]):
        # Views look at all of their buffers wherever they are cut; strings with offsets do not.
        views, held = 16 * len(series), sum(each.get_total_buffer_size() for each in arrays)
        if held - views > 2 * series.estimated_size() + _WASTE:
            arrays = [piece.to_arrow(compat_level=pl.CompatLevel.oldest()) for piece in pieces]
    flags = series.flags
    order = 1 if flags.get("SORTED_ASC") else -1 if flags.get("SORTED_DESC") else 0
    return _series, (series.name, [_Ours(array) for array in arrays], order)


def _frame(columns: list[Any]) -> Any:
    import polars as pl

    return pl.DataFrame(columns)


def _reduce_frame(frame: Any) -> Any:
    if not _by_arrow() or frame.width == 0:
        return frame.__reduce_ex__(4)
    return _frame, (frame.get_columns(),)


def _of_polars() -> dict[type, Any]:
    pl = sys.modules["polars"]
    return {pl.DataFrame: _reduce_frame, pl.Series: _reduce_series}


# ---- awkward


def _reduce_awkward(array: Any) -> Any:
    return array.__reduce_ex__(
        4
    )  # from 5 on its arrays are PickleBuffers, which pickle writes before it asks anybody


def _of_awkward() -> dict[type, Any]:
    return {sys.modules["awkward"].Array: _reduce_awkward}


# ---- installing

_LIBRARIES: dict[str, Callable[[], dict[type, Any]]] = {
    "pyarrow": _of_pyarrow,
    "pandas": _of_pandas,
    "polars": _of_polars,
    "awkward": _of_awkward,
}
_made: dict[str, dict[type, Any]] = {}


def reducers() -> dict[type, Any]:
    """Types and the functions that reduce them, of the libraries that have been imported."""
    found: dict[type, Any] = {}
    for name, make in _LIBRARIES.items():
        if name in sys.modules:
            try:
                found |= _made.get(name) or _made.setdefault(name, make())
            except (AttributeError, KeyError):
                pass  # half imported, or a version without them: as it pickles by itself
    return found


def _install_now() -> None:
    extra = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind, reduce in reducers().items():
        if extra.get(kind) is not reduce:
            _installed[kind] = extra.get(kind)
            multiprocessing.reduction.ForkingPickler.register(kind, reduce)


_waiting = [WhenImported(name, _install_now) for name in _LIBRARIES]


def install() -> None:
    """Put them on ForkingPickler's dispatch, now or when their libraries are imported."""
    for each in _waiting:
        each.wait()


def uninstall() -> None:
    """Let what was there before be used again."""
    extra = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for each in _waiting:
        each.cancel()
    ours = reducers()
    for kind, before in _installed.items():
        if extra.get(kind) is ours.get(kind):
            del extra[kind]
            if before is not None:
                extra[kind] = before
    _installed.clear()
