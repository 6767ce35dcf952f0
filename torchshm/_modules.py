"""Modules in a store: what save_module() writes, and a module whose parameters and buffers are re-pointed to it.

A saved module is a value like others (``_values``), not a pickle::

    {"module": 1, "state": {name: tensor}, "passing": [name], "extra": {name: object}, "leaves": [tensor], "pickle": bytes, "why": str}

``state`` has all parameters and buffers, ``passing`` says which of them a state_dict leaves out. ``pickle`` is the module with every
tensor as an index into ``leaves``; None, and ``why``, where it can't be pickled. It is read only with ``allow_pickle=True``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torchshm.errors import TorchshmError

if TYPE_CHECKING:
    import torch

_EXTRA = "_extra_state"


# ---- saving


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, leaves: list[torch.Tensor]) -> None:
        import torch

        super().__init__(file, 5)
        self._leaves, self._kinds = leaves, (torch.Tensor, torch.nn.Parameter)
        self._known: dict[int, int] = {}

    def persistent_id(self, x: Any) -> int | None:
        if type(x) not in self._kinds:
            return None
        if id(x) not in self._known:
            self._leaves.append(x)
            self._known[id(x)] = len(self._leaves) - 1
        return self._known[id(x)]


def describe(module: torch.nn.Module) -> dict[str, Any]:
    """The value that a module is saved as."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"save_module() takes a torch.nn.Module, not {type(module).__name__}; save() takes the rest"
        )
    state, passing = {}, []
    bare: dict[int, torch.Tensor] = {}
    for name, _, tensor, persistent in _tensors(module):
        _no_lazy(name, tensor)
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        state[name] = (
            tensor if plain else bare.setdefault(id(tensor), tensor.detach().as_subclass(torch.Tensor))
        )
        if not persistent:
            passing.append(name)
    extra = {
        _joined(at, _EXTRA): each.get_extra_state() for at, each in module.named_modules() if _has_extra(each)
    }
    leaves: list[torch.Tensor] = []
    pickled, why, file = None, "", io.BytesIO()
    try:
        _Pickler(file, leaves).dump(module)
        pickled = file.getvalue()
    except Exception as error:  # whatever pickling it raises: lambdas, locks, local classes
        leaves, why = [], f"{type(error).__name__}: {error}"
    return {
        "module": 1,
        "state": state,
        "passing": passing,
        "extra": extra,
        "leaves": leaves,
        "pickle": pickled,
        "why": why,
    }


# ---- loading


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, leaves: list[Any]) -> None:
        super().__init__(file)
        self._leaves = leaves

    def persistent_load(self, pid: Any) -> Any:
        return self._leaves[pid]


def whole(key: str, value: Any, allow_pickle: bool) -> Any:
    """The module as it was pickled, over the tensors of its value."""
    if not _is_module(value):
        raise ValueError(
            f"{key!r} holds no module but other values: give load_module() the module that they are the state of"
        )
    if value["pickle"] is None:
        raise ValueError(
            f"the module in {key!r} could not be pickled when it was saved ({value['why']}): give load_module() a module of that kind, "
            "or a function that makes one"
        )
    if not allow_pickle:
        raise ValueError(
            f"to make the module in {key!r} from nothing needs unpickling, which runs whatever the saver chose: give load_module() a "
            "module, or a function that makes one; or, if you trust every process that can save into this store, allow_pickle=True"
        )
    return _Unpickler(io.BytesIO(value["pickle"]), value["leaves"]).load()


class State:
    """Tensors by name, of one saved module or of several parts of one."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.extra: dict[str, Any] = {}
        self.passing: set[str] = set()

    def add(self, key: str, value: Any) -> None:
        """Take in a saved module, or a state_dict, whole or in part."""
        import torch

        if _is_module(value):
            parts, extra = value["state"], value["extra"]
            self.passing |= set(value["passing"])
        elif isinstance(value, dict):
            extra = {name: x for name, x in value.items() if isinstance(name, str) and name.endswith(_EXTRA)}
            parts = {name: x for name, x in value.items() if name not in extra}
        else:
            parts, extra = None, {}
        if parts is None or not all(
            isinstance(x, torch.Tensor) and isinstance(n, str) for n, x in parts.items()
        ):
            raise TypeError(f"{key!r} holds neither a module nor a state_dict: a dict of names and tensors")
        twice = [name for name in (*parts, *extra) if name in self.tensors or name in self.extra]
        if twice:
            raise ValueError(f"{_listed(twice)} of {key!r} came with another key already")
        self.tensors.update(parts)
        self.extra.update(extra)


def into(
    target: torch.nn.Module | Callable[[], torch.nn.Module], state: State, strict: bool
) -> torch.nn.Module:
    """The module, or one that the function makes, over the tensors of `state`."""
    import torch

    module = target if isinstance(target, torch.nn.Module) else _made(target, state)
    _check(module, state, strict)
    _point(module, state)
    for at, each in module.named_modules():
        if _has_extra(each) and (name := _joined(at, _EXTRA)) in state.extra:
            each.set_extra_state(state.extra[name])
    return module


def _made(factory: Callable[[], torch.nn.Module], state: State) -> torch.nn.Module:
    """On the meta device, where that costs neither time nor memory and all of it is in `state`; else as the function makes it."""
    import torch

    if not callable(factory):
        raise TypeError(
            f"a torch.nn.Module or a function that makes one is expected, not {type(factory).__name__}"
        )
    module: Any = None
    try:
        with torch.device("meta"):
            module = factory()
    except Exception:  # it looks at values, which are not there; its own errors come again below
        pass
    if not isinstance(module, torch.nn.Module) or _left_on_meta(module, state):
        module = factory()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"the function made a {type(module).__name__}, not a torch.nn.Module")
    return module


def _left_on_meta(module: torch.nn.Module, state: State) -> list[str]:
    """Tensors without memory that `state` has nothing for: buffers, and plain attributes."""
    import torch

    left = [name for name, _, tensor, _ in _tensors(module) if tensor.is_meta and name not in state.tensors]
    for at, each in module.named_modules():
        left += [_joined(at, n) for n, x in vars(each).items() if isinstance(x, torch.Tensor) and x.is_meta]
    return left


def _check(module: torch.nn.Module, state: State, strict: bool) -> None:
    """Raise what load_state_dict would, before anything is changed."""
    own = {name: tensor for name, _, tensor, _ in _tensors(module)}
    expected = {name for name, _, _, persistent in _tensors(module) if persistent}
    extras = {_joined(at, _EXTRA) for at, each in module.named_modules() if _has_extra(each)}
    problems = []
    for name, tensor in own.items():
        _no_lazy(name, tensor)
        needed = name in expected or tensor.is_meta
        if needed and name in state.tensors and tensor.shape != state.tensors[name].shape:
            problems.append(
                f"size mismatch for {name}: a tensor with shape {tuple(state.tensors[name].shape)} is in the store, the shape in the "
                f"module is {tuple(tensor.shape)}."
            )
    if strict:
        unexpected = [n for n in state.tensors if n not in own and n not in state.passing]
        unexpected += [n for n in state.extra if n not in extras]
        missing = [n for n in own if n in expected and n not in state.tensors]
        missing += sorted(extras - set(state.extra))
        if missing:
            problems.insert(0, f"Missing key(s): {_listed(missing)}.")
        if unexpected:
            problems.insert(0, f"Unexpected key(s): {_listed(unexpected)}.")
    left = [name for name in _left_on_meta(module, state) if not strict or name not in expected]
    if left:
        problems.append(f"On the meta device, and not in the store: {_listed(left)}.")
    if problems:
        lines = "".join(f"\n\t{each}" for each in problems)
        raise RuntimeError(f"Error(s) in loading {type(module).__name__} from the store:{lines}")


def _point(module: torch.nn.Module, state: State) -> None:
    """Let parameters and buffers be the tensors of `state`; the objects stay, and so do optimizers and ties."""
    import torch

    whose: dict[
        int, tuple[int, int]
    ] = {}  # by address: which tensor of the module has that memory, and where it was before
    for name, is_parameter, tensor, _ in _tensors(module):
        found = state.tensors.get(name)
        if found is None or found.shape != tensor.shape:
            continue
        value = found.detach()
        if value.layout == torch.strided and value.numel() > 0:
            before = 0 if tensor.layout != torch.strided else tensor.data_ptr()
            other, theirs = whose.setdefault(value.data_ptr(), (id(tensor), before))
            if other != id(tensor) and theirs != (before or None):
                value = value.clone()  # tied where it was saved, and not here
        if (value.device, value.dtype, value.layout) == (tensor.device, tensor.dtype, tensor.layout):
            tensor.data = value
            continue
        grad = tensor.requires_grad and (value.is_floating_point() or value.is_complex())
        made = torch.nn.Parameter(value, grad) if is_parameter else value.requires_grad_(grad)
        vars(made).update(vars(tensor))
        torch.utils.swap_tensors(tensor, made)


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, bool, torch.Tensor, bool]]:
    """Name, whether it is a parameter, tensor, whether a state_dict has it; tied ones under each of their names."""
    for at, each in module.named_modules(remove_duplicate=False):
        for name, parameter in each._parameters.items():
            if parameter is not None:
                yield _joined(at, name), True, parameter, True
        for name, buffer in each._buffers.items():
            if buffer is not None:
                yield _joined(at, name), False, buffer, name not in each._non_persistent_buffers_set


def _no_lazy(name: str, tensor: torch.Tensor) -> None:
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet: run the lazy module once before it is saved or loaded")


def _has_extra(module: torch.nn.Module) -> bool:
    import torch

    return type(module).get_extra_state is not torch.nn.Module.get_extra_state


def _is_module(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("module")) is not int or "state" not in value:
        return False
    if value["module"] != 1:
        raise TorchshmError("this module was saved by another version of torchshm")
    return True


def _joined(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _listed(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
