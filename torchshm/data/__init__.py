"""PyTorch's data loading over shared memory: loaders, datasets that all processes share, and what a node makes once.

>>> from torchshm.data import DataLoader
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchshm.data import blocks
    from torchshm.data._collate import collate
    from torchshm.data._dict import SharedDict
    from torchshm.data._job import node_store
    from torchshm.data._list import SharedList
    from torchshm.data._loader import DataLoader
    from torchshm.data._once import once
    from torchshm.data._publish import publish
    from torchshm.data._reading import ReadingService
    from torchshm.data._share_dataset import share_dataset
    from torchshm.data._subscribe import subscribe

__all__ = [
    "DataLoader",
    "ReadingService",
    "SharedDict",
    "SharedList",
    "blocks",
    "collate",
    "node_store",
    "once",
    "publish",
    "share_dataset",
    "subscribe",
]

# Looked up when it is used: some need torch, one torchdata, and blocks neither.
_MODULES = {
    "DataLoader": "_loader",
    "ReadingService": "_reading",
    "SharedDict": "_dict",
    "SharedList": "_list",
    "collate": "_collate",
    "node_store": "_job",
    "once": "_once",
    "publish": "_publish",
    "share_dataset": "_share_dataset",
    "subscribe": "_subscribe",
}


def __getattr__(name: str) -> Any:
    if name == "blocks":
        return importlib.import_module("torchshm.data.blocks")
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'torchshm.data' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"torchshm.data.{module}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
