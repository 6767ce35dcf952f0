"""PyTorch's data loading over shared memory: loaders, datasets that all processes share, and what a node makes once.

>>> from torchshm.data import DataLoader
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchshm.data._collate import collate
from torchshm.data._dict import SharedDict
from torchshm.data._job import node_store
from torchshm.data._list import SharedList
from torchshm.data._loader import DataLoader
from torchshm.data._once import once
from torchshm.data._publish import publish
from torchshm.data._share_dataset import share_dataset
from torchshm.data._subscribe import subscribe

if TYPE_CHECKING:
    from torchshm.data._reading import ReadingService

__all__ = [
    "DataLoader",
    "ReadingService",
    "SharedDict",
    "SharedList",
    "collate",
    "node_store",
    "once",
    "publish",
    "share_dataset",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    if name == "ReadingService":  # needs torchdata
        from torchshm.data._reading import ReadingService

        return ReadingService
    raise AttributeError(f"module 'torchshm.data' has no attribute {name!r}")
