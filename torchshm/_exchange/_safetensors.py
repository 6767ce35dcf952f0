"""Safetensors files, through the library of that name: it writes and checks them; the bytes are read straight to where they stay."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchshm._exchange import _arrays
from torchshm._exchange._item import Contents, Item

METADATA = "__metadata__"  # no tensor can have this name

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_NUMPYS = {"bool", "complex64"} | {
    name for name in _DTYPES.values() if not name.startswith(("b", "float8", "c"))
}
_CHUNK = 1 << 30  # bytes that one system call reads; Linux reads 2 GiB at most


def _library() -> Any:
    try:
        import safetensors
    except ImportError:
        raise _arrays.lacking(".safetensors", "safetensors") from None
    if not hasattr(safetensors, "TensorSpec"):
        raise ImportError(
            f"safetensors {safetensors.__version__} would copy all that it writes: pip install --upgrade safetensors"
        )
    return safetensors


def write(path: Path, arrays: Iterator[tuple[str, Any]], aside: bool = False) -> None:
    """Write all in one go, as the library does, from where the arrays lie. With `aside` each is put into a file before the next comes."""
    library = _library()
    specs: dict[str, Any] = {}
    put: dict[str, tuple[int, int]] = {}
    alive: list[Any] = []
    metadata: dict[str, str] | None = None
    tensors = 0
    with contextlib.ExitStack() as end:
        file: Any = None
        for name, x in arrays:
            if name == METADATA:
                metadata = x
                continue
            dtype, shape, memory = _memory(name, x)
            try:
                specs[name] = _spec(library, dtype, shape, memory)
            except (ValueError, TypeError, library.SafetensorError):
                raise TypeError(
                    f"{name!r} has the dtype {dtype}, which .safetensors has not: export it to .npz or .zarr, or "
                    f"{_arrays.ELSEWHERE}"
                ) from None
            tensors += _arrays.is_tensor(x)
            at = x.data_ptr() if _arrays.is_tensor(x) else x.ctypes.data
            if memory.nbytes and (aside or memory.ctypes.data != at):  # a copy, of which there may be many
                file = file or end.enter_context(open(path.parent / "aside", "w+b"))
                put[name] = file.tell(), memory.nbytes
                file.write(memory.reshape(-1).view(np.uint8).data)
            else:
                alive.append(memory)
            del x, memory
        if file is not None:
            file.flush()
            whole = np.memmap(file, np.uint8, "r")
            for name, (at, nbytes) in put.items():
                old = specs[name]
                specs[name] = library.TensorSpec(
                    dtype=_DTYPES[old.dtype],
                    shape=old.shape,
                    data_ptr=whole.ctypes.data + at,
                    data_len=nbytes,
                )
        if metadata is None and specs:
            # What transformers and others look at to know which library's tensors to make.
            metadata = (
                {"format": "pt"} if tensors == len(specs) else {"format": "np"} if tensors == 0 else None
            )
        library.serialize_file(specs, path, metadata=metadata)


def _spec(library: Any, dtype: str, shape: tuple[int, ...], memory: np.ndarray[Any, Any]) -> Any:
    return library.TensorSpec(dtype=dtype, shape=shape, data_ptr=memory.ctypes.data, data_len=memory.nbytes)


def _memory(name: str, x: Any) -> tuple[str, tuple[int, ...], np.ndarray[Any, Any]]:
    """Name of the dtype, shape, and the bytes in C order and little-endian: where they lie, if they are so."""
    if isinstance(x, np.ndarray):
        dense = np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
        return dense.dtype.name, x.shape, dense
    import torch

    dtype = str(x.dtype).removeprefix("torch.")
    dense = x.contiguous().reshape(-1)
    if dense.numel() == 0:
        return dtype, tuple(x.shape), np.empty(0, np.uint8)
    if dtype.startswith("float4"):
        return f"{dtype}, two to a byte", tuple(x.shape), np.empty(0, np.uint8)
    return dtype, tuple(x.shape), dense.view(torch.uint8).numpy()


@contextlib.contextmanager
def read(path: Path, framework: str | None) -> Iterator[Contents]:
    """The tensors of a file; by default of the library that its metadata names."""
    library = _library()
    with open(path, "rb", buffering=0) as file:
        try:
            # By the descriptor: what is checked is what is read, whatever is renamed to this path meanwhile.
            opened = library.safe_open(f"/proc/self/fd/{file.fileno()}", framework="np")
        except library.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from None
        with opened as header:
            metadata = dict(header.metadata() or {})
            made_for = metadata.pop("format", None)
            wanted = framework or ("pt" if made_for == "pt" else "np")
            plans = []
            for name in header.offset_keys():
                part = header.get_slice(name)
                plans.append((name, *_plan(name, part.get_dtype(), tuple(part.get_shape()), wanted)))
        # The library has checked that the tensors lie without gaps, up to the end of the file.
        at = os.fstat(file.fileno()).st_size - sum(nbytes for _, nbytes, _ in plans)
        items = []
        for name, nbytes, blank in plans:
            items.append(Item(name, nbytes, _reader(file, path, name, at, blank)))
            at += nbytes
        yield Contents(items, metadata or None)


Blank = Callable[[], tuple[Any, np.ndarray[Any, Any]]]


def _plan(name: str, code: str, shape: tuple[int, ...], framework: str) -> tuple[int, Blank]:
    """How many bytes a tensor has, and what makes it: it and its bytes."""
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise TypeError(f"{name!r} has the dtype {code}, which a store can't hold; leave it out of the file")
    native = np.dtype(dtype) if dtype in _NUMPYS else _by_ml_dtypes(dtype) if framework == "np" else None
    if framework == "pt" or native is None:
        try:
            import torch
        except ImportError:
            raise ImportError(
                f"{name!r} is a tensor of {dtype} for torch, which is not installed: pip install torch"
                + (
                    ", or import it with framework='np'"
                    if native is not None or framework == "pt"
                    else ", or ml_dtypes"
                )
            ) from None
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise TypeError(f"{name!r} has the dtype {dtype}, which torch {torch.__version__} has not")

        def tensor() -> tuple[Any, np.ndarray[Any, Any]]:
            made = torch.empty(shape, dtype=getattr(torch, dtype))
            return made, made.reshape(-1).view(torch.uint8).numpy() if made.numel() else np.empty(0, np.uint8)

        return math.prod(shape) * getattr(torch, dtype).itemsize, tensor

    def array() -> tuple[Any, np.ndarray[Any, Any]]:
        made = np.empty(shape, native)
        return made, made.reshape(-1).view(np.uint8) if made.size else np.empty(0, np.uint8)

    return math.prod(shape) * native.itemsize, array


def _by_ml_dtypes(name: str) -> np.dtype[Any] | None:
    """NumPy's dtype of that name, in programs that use ml_dtypes; others have torch's tensors."""
    known = sys.modules.get("ml_dtypes")
    made = getattr(known, name, None)
    return None if made is None else np.dtype(made)


def _reader(file: BinaryIO, path: Path, name: str, at: int, blank: Blank) -> Callable[[], Any]:
    def read() -> Any:
        made, data = blank()
        done = 0
        while done < data.nbytes:
            n = os.preadv(file.fileno(), [data.data[done : done + _CHUNK]], at + done)
            if n == 0:
                raise ValueError(f"{path} has been cut short in the middle of {name!r}")
            done += n
        return made

    return read
