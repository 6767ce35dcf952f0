"""The generators that functions use without asking, as each task finds them: it gives the same result wherever it runs, and again."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

_word = 0  # of the last seed; what is imported later starts from it


def seed(words: tuple[int, ...]) -> None:
    """Begin a task's random numbers: those of ``random``, ``numpy.random`` and torch."""
    global _word
    made = np.random.SeedSequence(words).generate_state(4)
    _word = int(made[0])
    random.seed(_word)
    np.random.seed(made[1:])  # noqa: NPY002 - what functions use
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(_word)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leave the generators as they were: a task has been put between the blocks of another one."""
    global _word
    word, plain, numbers = _word, random.getstate(), np.random.get_state()  # noqa: NPY002
    torch = sys.modules.get("torch")
    tensors = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        _word = word
        random.setstate(plain)
        np.random.set_state(numbers)  # noqa: NPY002
        if torch is not None:
            torch.set_rng_state(tensors)
        elif "torch" in sys.modules:
            sys.modules["torch"].manual_seed(word)


def when_torch_is_there(action: Callable[[ModuleType], Any]) -> None:
    """Do that with torch, now or when somebody imports it; it gets the seed of the task then."""
    torch = sys.modules.get("torch")
    if torch is not None:
        action(torch)
    else:
        sys.meta_path.insert(0, _Watch(action))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds torch as everyone does, and sees when it has been loaded."""

    def __init__(self, action: Callable[[ModuleType], Any]) -> None:
        self._action = action
        self._busy = False

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch" or self._busy:
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_tell(module: ModuleType) -> None:
            load(module)
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            module.manual_seed(_word)
            self._action(module)

        spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec
