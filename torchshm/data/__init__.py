"""PyTorch's data loading over shared memory: collate, DataLoader, ReadingService.

>>> from torchshm.data import DataLoader
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchshm.data._collate import collate
from torchshm.data._loader import DataLoader
from torchshm.data._publish import publish
from torchshm.data._subscribe import subscribe

if TYPE_CHECKING:
    from torchshm.data._reading import ReadingService

__all__ = ["DataLoader", "ReadingService", "collate", "publish", "subscribe"]


def __getattr__(name: str) -> Any:
    if name == "ReadingService":  # needs torchdata
        from torchshm.data._reading import ReadingService

        return ReadingService
    raise AttributeError(f"module 'torchshm.data' has no attribute {name!r}")
