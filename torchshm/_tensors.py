"""Tensors: what register() installs when torch is there, and the unusual ones that ``_torch`` leaves to Python.

A tensor is reduced to its storage, and the storage moves into the pool: torch's own semantics, that both sides see what either
writes, with a block in the place of a file.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing.reduction
import sys
import warnings
from typing import Any

from torchshm import _C
from torchshm._arrivals import WhenImported

Memory = tuple[bool, int]
"""Whether tensors are made in a pool, and the address of its member; 0: of the process's own."""

_installed: dict[Any, Any] = {}  # by type: the reducers that torch had
_patched: dict[str, Any] = {}  # by name: the attributes that UntypedStorage had
_missing: str | None = None  # why there is no _torch here


# ---- the compiled half


def compiled() -> Any:
    """The module ``_torch``; None without torch, and where it was built for another version."""
    global _missing
    ready = sys.modules.get("torchshm._torch")
    if ready is not None:
        return ready
    torch = sys.modules.get("torch")
    if torch is None or _missing is not None or not hasattr(torch, "UntypedStorage"):
        return None
    version = torch.__version__.split("+")[0]
    try:
        _check_build(version)
        return importlib.import_module("torchshm._torch")
    except ImportError as error:
        _missing = str(error)
        return None


def __getattr__(name: str) -> Any:
    """The types of ``_torch`` that messages name, in a receiver that may not have imported torch yet."""
    if name not in ("storage", "tensor"):
        raise AttributeError(f"module 'torchshm._tensors' has no attribute {name!r}")
    importlib.import_module("torch")
    module = compiled()
    if module is None:
        raise ImportError(f"torchshm: a tensor came through the pool: {_missing}")
    return getattr(module, name)


def _check_build(version: str) -> None:
    """Raise ImportError before a build for other classes is loaded."""
    spec = importlib.util.find_spec("torchshm._torch")
    if spec is None:
        raise ImportError("torchshm was built where there was no torch")
    built_for = _C.torch_version()
    if built_for.split(".")[:2] != version.split(".")[:2]:
        raise ImportError(f"torchshm was built for torch {built_for}, and this is {version}")


def enter(member: int) -> Memory | None:
    """Let this thread's tensors be made in a pool; returns what :func:`leave` takes."""
    module = compiled()
    return None if module is None else module.switch_memory((True, member))


def leave(before: Memory | None) -> None:
    """Switch back."""
    if before is not None:
        compiled().switch_memory(before)


# ---- installing


def install() -> None:
    """Reduce tensors through the pool, now or when torch is imported."""
    _waiting.wait()


def uninstall() -> None:
    """Let torch's own reducers be used again."""
    _waiting.cancel()
    extra = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind, stock in _installed.items():
        if extra.get(kind) is reducers().get(kind):
            extra[kind] = stock
    _installed.clear()
    torch = sys.modules.get("torch")
    for name, stock in _patched.items():
        setattr(torch.UntypedStorage, name, stock)  # type: ignore[union-attr]
    _patched.clear()


def _install_now() -> None:
    if compiled() is None:
        if "torch" in sys.modules and _missing is not None:
            warnings.warn(
                f"torchshm: tensors travel as torch sends them, arrays as usual: {_missing}; "
                "`pip install --no-build-isolation torchshm` builds it for the torch that is installed",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    import torch

    extra = multiprocessing.reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind, reduce in reducers().items():
        if extra.get(kind) is not reduce:
            _installed[kind] = extra.get(kind)
            multiprocessing.reduction.ForkingPickler.register(kind, reduce)
    if not _patched:
        for name, ours in (
            ("_new_shared", classmethod(_new_shared)),
            ("is_shared", _is_shared),
            ("share_memory_", _share_memory_),
        ):
            _patched[name] = torch.UntypedStorage.__dict__.get(name) or getattr(torch.UntypedStorage, name)
            setattr(torch.UntypedStorage, name, ours)


_waiting = WhenImported("torch.multiprocessing", _install_now)


def reducers() -> dict[type, Any]:
    """Types and the functions that reduce them; none where tensors go torch's way."""
    module = compiled()
    if module is None:
        return {}
    import torch

    return {
        torch.Tensor: module.reduce_tensor,
        torch.nn.Parameter: module.reduce_tensor,
        torch.UntypedStorage: module.reduce_storage,
    }


# ---- storages


def _new_shared(cls: Any, size: int, *, device: Any = "cpu") -> Any:
    """What default_collate makes a batch in, in a worker."""
    import torch

    if cls is torch.UntypedStorage and torch.device(device).type == "cpu":
        made = compiled().blank(size)
        if made is not None:
            return made
    return _patched["_new_shared"].__func__(cls, size, device=device)


def _is_shared(storage: Any) -> bool:
    return _in_pool(storage) or _patched["is_shared"](storage)


def _share_memory_(storage: Any, *args: Any, **kwargs: Any) -> Any:
    return storage if _in_pool(storage) else _patched["share_memory_"](storage, *args, **kwargs)


def _in_pool(storage: Any) -> bool:
    return storage.device.type == "cpu" and _C.is_written_by_all(storage.data_ptr())


def reduce_other_storage(storage: Any) -> Any:
    """Of other devices, empty, shared by torch, or when the pool is full; and inside inline()."""
    from torch.multiprocessing import reductions

    if _C.is_inline() and storage.device.type == "cpu":
        import torch

        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        return _plain_storage, (bytearray(memoryview(whole.numpy())),)
    return reductions.reduce_storage(storage)


def _plain_storage(data: bytearray) -> Any:
    import torch

    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage()


# ---- tensors


def reduce_other(tensor: Any) -> Any:
    """What is more, or something else, than sizes and strides over a storage."""
    import torch
    from torch.multiprocessing import reductions

    kept = tensor.requires_grad, type(tensor) is torch.nn.Parameter
    if (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not (tensor.requires_grad and not tensor.is_leaf)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        if tensor.is_conj() or tensor.is_neg():
            torch.utils.hooks.warn_if_has_hooks(tensor)
            bits = tensor.is_conj(), tensor.is_neg()
            bare = tensor.detach()
            bare = bare.conj() if bits[0] else bare
            bare = torch._neg_view(bare) if bits[1] else bare
            return _with_bits, (bare, *bits, *kept)
        if tensor.is_quantized:
            torch.utils.hooks.warn_if_has_hooks(tensor)
            place = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
            return _quantized, (tensor.untyped_storage(), tensor.dtype, *place, _quantizer(tensor), *kept)
    return reductions.reduce_tensor(tensor)


def _kept(made: Any, requires_grad: bool, parameter: bool) -> Any:
    import torch

    return torch.nn.Parameter(made, requires_grad) if parameter else made.requires_grad_(requires_grad)


def _with_bits(bare: Any, conj: bool, neg: bool, requires_grad: bool, parameter: bool) -> Any:
    import torch

    made = torch._neg_view(bare) if neg else bare
    return _kept(made.conj() if conj else made, requires_grad, parameter)


def _quantizer(tensor: Any) -> tuple[Any, ...]:
    import torch

    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    return tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()


def _quantized(
    storage: Any,
    dtype: Any,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    quantizer: tuple[Any, ...],
    requires_grad: bool,
    parameter: bool,
) -> Any:
    import torch

    if len(quantizer) == 2:
        scale, zero = quantizer
        made = torch._empty_affine_quantized([0], scale=scale, zero_point=zero, dtype=dtype)
    else:
        scales, zeros, axis = quantizer
        empty = [0 if i != axis else n for i, n in enumerate(size)]
        made = torch._empty_per_channel_affine_quantized(
            empty, scales=scales, zero_points=zeros, axis=axis, dtype=dtype
        )
    return _kept(made.set_(storage, offset, size, stride), requires_grad, parameter)
