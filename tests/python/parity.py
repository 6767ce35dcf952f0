"""What a program can tell of a result: the same with PyTorch alone and with torchshm, or a difference."""

from __future__ import annotations

import collections.abc
import re
from typing import Any

import numpy as np
import torch

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]

# Names of ours that stand where torch's stand in tracebacks and messages.
_ADDRESS = re.compile(r"0x[0-9a-f]+|pid\(s\) [\d, ]+|\(pid [^)]*\)|pid \d+")


def outcome(function: Any, *arguments: Any) -> tuple[Any, ...]:
    """What a call returns, described, or what it raises: type and message."""
    try:
        value = function(*arguments)
    except BaseException as error:
        return "raised", type(error), message(error)
    return "returned", described(value)


def message(error: BaseException) -> str:
    """The message without the lines of a worker's traceback, which name files."""
    lines = str(error).splitlines()
    kept = [line for line in lines if not line.startswith(" ")]
    return _ADDRESS.sub("*", "\n".join(kept))


def described(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return _tensor(x)
    if isinstance(x, np.ndarray):
        kept = x.tolist() if x.dtype.hasobject or x.dtype.kind == "T" else np.ascontiguousarray(x).tobytes()
        flags = x.flags.c_contiguous, x.flags.f_contiguous, x.flags.writeable
        return type(x), str(x.dtype), x.shape, x.strides, flags, kept
    if isinstance(x, np.generic):
        return type(x), x.tobytes()
    if type(x).__module__.split(".")[0] in ("xarray", "pandas"):
        return type(x), str(x), described(np.asarray(x)) if not hasattr(x, "data_vars") else None
    if isinstance(x, collections.abc.Mapping):
        besides = getattr(x, "__dict__", None)
        return type(x), [(key, described(x[key])) for key in x], described(besides) if besides else None
    if isinstance(x, list | tuple | collections.abc.Sequence) and not isinstance(x, str | bytes | bytearray):
        return type(x), [described(item) for item in x]
    if hasattr(x, "__dict__") and not isinstance(x, type) and not callable(x):
        return type(x), described(vars(x))
    return type(x), repr(x)


def _tensor(x: torch.Tensor) -> Any:
    facts = [type(x), x.dtype, x.layout, str(x.device), x.requires_grad, x.is_leaf, x.is_nested]
    if x.is_nested:
        return [*facts, [described(part.detach()) for part in x.unbind()]]
    facts.append(tuple(x.shape))
    if x.is_meta:
        return facts
    if x.layout is not torch.strided:
        return [*facts, described(x.detach().to_dense())]
    plain = x.detach().contiguous()
    return [
        *facts,
        x.stride(),
        x.storage_offset(),
        bytes(plain.flatten().view(torch.uint8).numpy()) if x.numel() else b"",
    ]
