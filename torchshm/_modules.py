"""Modules in a store: what save_module() writes, and a module whose parameters and buffers are re-pointed to it.

A saved module is a value like others (``_values``), not a pickle::

    {"module": 1, "state": {name: tensor}, "passing": [name], "extra": {name: object}, "leaves": [tensor], "pickle": bytes, "why": str}

``state`` has all parameters and buffers, ``passing`` says which of them a state_dict leaves out. ``pickle`` is the module with every
tensor as an index into ``leaves``; None, and ``why``, where it can't be pickled. It is read only with ``allow_pickle=True``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
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
    found = _Found(module)
    found.refuse_lazy()
    for name, _, tensor, persistent in found.tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        state[name] = (
            tensor if plain else bare.setdefault(id(tensor), tensor.detach().as_subclass(torch.Tensor))
        )
        if not persistent:
            passing.append(name)
    extra = {_joined(at, _EXTRA): each.get_extra_state() for at, each in found.with_extra}
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

    found = _Found(target) if isinstance(target, torch.nn.Module) else _made(target, state)
    _check(found, state, strict)
    _point(found, state)
    for at, each in found.with_extra:
        if (name := _joined(at, _EXTRA)) in state.extra:
            each.set_extra_state(state.extra[name])
    return found.module


class _Found:
    """What a module has, from one walk over it."""

    def __init__(self, module: torch.nn.Module) -> None:
        import torch

        self.module = module
        self.tensors: list[tuple[str, bool, torch.Tensor, bool]] = []
        """Name, whether it is a parameter, tensor, whether a state_dict has it; tied ones under each of their names."""
        self.with_extra: list[tuple[str, torch.nn.Module]] = []
        self.attributes: list[tuple[str, torch.Tensor]] = []
        """Tensors that are plain attributes."""
        self._seen: set[torch.nn.Module] = set()
        self._kind, self._no_extra = torch.Tensor, torch.nn.Module.get_extra_state
        self._usual = frozenset(vars(torch.nn.Module()))  # no tensor is in these
        self._walk("", module)

    def _walk(self, at: str, module: torch.nn.Module) -> None:
        add = self.tensors.append
        for name, parameter in module._parameters.items():
            if parameter is not None:
                add((at + name, True, parameter, True))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                add((at + name, False, buffer, name not in module._non_persistent_buffers_set))
        if module not in self._seen:
            self._seen.add(module)
            if type(module).get_extra_state is not self._no_extra:
                self.with_extra.append((at[:-1], module))
            attributes = vars(module)
            for name in attributes:
                if name not in self._usual and isinstance(attributes[name], self._kind):
                    self.attributes.append((at + name, attributes[name]))
        for name, child in module._modules.items():
            if child is not None:
                self._walk(f"{at}{name}.", child)

    def refuse_lazy(self) -> None:
        from torch.nn.parameter import is_lazy

        for name, _, tensor, _ in self.tensors:
            if is_lazy(tensor):
                raise ValueError(
                    f"{name} has no shape yet: run the lazy module once before it is saved or loaded"
                )

    def left_on_meta(self, state: State) -> list[str]:
        """Tensors without memory that `state` has nothing for: buffers, and plain attributes."""
        left = [name for name, _, tensor, _ in self.tensors if name not in state.tensors and tensor.is_meta]
        return left + [name for name, tensor in self.attributes if tensor.is_meta]


def _made(factory: Callable[[], torch.nn.Module], state: State) -> _Found:
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
    if isinstance(module, torch.nn.Module) and not (found := _Found(module)).left_on_meta(state):
        return found
    module = factory()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"the function made a {type(module).__name__}, not a torch.nn.Module")
    return _Found(module)


def _check(found: _Found, state: State, strict: bool) -> None:
    """Raise what load_state_dict would, before anything is changed."""
    saved, problems = state.tensors, []
    found.refuse_lazy()
    for name, _, tensor, persistent in found.tensors:
        other = saved.get(name)
        if other is not None and tensor.shape != other.shape and (persistent or tensor.is_meta):
            problems.append(
                f"size mismatch for {name}: a tensor with shape {tuple(other.shape)} is in the store, the shape in the "
                f"module is {tuple(tensor.shape)}."
            )
    expected = {name for name, _, _, persistent in found.tensors if persistent}
    if strict:
        own = {name for name, *_ in found.tensors}
        extras = {_joined(at, _EXTRA) for at, _ in found.with_extra}
        unexpected = [n for n in saved if n not in own and n not in state.passing]
        unexpected += [n for n in state.extra if n not in extras]
        missing = [name for name, _, _, persistent in found.tensors if persistent and name not in saved]
        missing += sorted(extras - set(state.extra))
        if missing:
            problems.insert(0, f"Missing key(s): {_listed(missing)}.")
        if unexpected:
            problems.insert(0, f"Unexpected key(s): {_listed(unexpected)}.")
    left = [name for name in found.left_on_meta(state) if not strict or name not in expected]
    if left:
        problems.append(f"On the meta device, and not in the store: {_listed(left)}.")
    if problems:
        lines = "".join(f"\n\t{each}" for each in problems)
        raise RuntimeError(f"Error(s) in loading {type(found.module).__name__} from the store:{lines}")


def _point(found: _Found, state: State) -> None:
    """Let parameters and buffers be the tensors of `state`; the objects stay, and so do optimizers and ties."""
    import torch

    strided, saved = torch.strided, state.tensors
    plain = (torch.Tensor, torch.nn.Parameter)
    # The last of the steps of torch.utils.swap_tensors, which takes eight times as long: classes and attributes stay as they are.
    swap = getattr(torch._C, "_swap_tensor_impl", None)
    whose: dict[
        int, tuple[int, int]
    ] = {}  # by address: which tensor of the module has that memory, and where it was before
    for name, is_parameter, tensor, _ in found.tensors:
        value = saved.get(name)
        if value is None or value.shape != tensor.shape:
            continue
        value = value.detach()
        if value.layout is strided and (address := value.data_ptr()) != 0:
            before = 0 if tensor.layout is not strided else tensor.data_ptr()
            other, theirs = whose.setdefault(address, (id(tensor), before))
            if other != id(tensor) and theirs != (before or None):
                value = value.clone()  # tied where it was saved, and not here
        if value.device == tensor.device and value.dtype is tensor.dtype and value.layout is tensor.layout:
            tensor.data = value
            continue
        grad = tensor.requires_grad and (value.is_floating_point() or value.is_complex())
        if swap is not None and type(tensor) in plain and tensor._use_count() == 1:
            swap(tensor, value.requires_grad_(grad))
            continue
        made = torch.nn.Parameter(value, grad) if is_parameter else value.requires_grad_(grad)
        vars(made).update(vars(tensor))
        torch.utils.swap_tensors(tensor, made)


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
