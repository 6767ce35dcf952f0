"""Doing something when a library is imported, for those that torchshm must not import itself."""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable
from typing import Any


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `then` once `module` has been executed."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self._module, self._then = module, then
        self._asking = threading.local()

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
        """What the other finders find, to be executed by us. Programs ask for it to know whether a library is there, too."""
        if fullname != self._module or getattr(self._asking, "now", False):
            return None
        self._asking.now = True  # other finders may ask all of them
        try:
            spec = self._find_elsewhere(path, target)
        finally:
            self._asking.now = False
        loader = None if spec is None else spec.loader
        if loader is not None and hasattr(loader, "exec_module"):
            self._follow(loader)
        return spec

    def _find_elsewhere(self, path: Any, target: Any) -> Any:
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if finder is not self and find is not None:
                spec = find(self._module, path, target)
                if spec is not None:
                    return spec
        return None

    def _follow(self, loader: Any) -> None:
        """Let a loader tell that it has executed the module."""
        execute = loader.exec_module
        if getattr(execute, "then", None) is self:
            return  # a loader of many modules, or of a search before

        def exec_module(module: Any) -> None:
            execute(module)
            if module.__name__ == self._module and self in sys.meta_path:
                self.cancel()
                self._then()

        exec_module.then = self  # type: ignore[attr-defined]
        loader.exec_module = exec_module
