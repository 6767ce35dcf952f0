"""Doing something when a library is imported, for those that torchshm must not import itself."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `then` once `module` has been executed."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then = module, then

    def wait(self) -> None:
        """Call now, or when the module is imported."""
        if self._module in sys.modules:
            self._then()
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def cancel(self) -> None:
        """Do not wait any longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self._module:
            return None
        self.cancel()
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None and hasattr(loader, "exec_module"):
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self._then()

            loader.exec_module = exec_module
        return spec
