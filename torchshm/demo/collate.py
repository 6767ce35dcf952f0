"""How samples become a batch, in the worker. Functions of a module, so that spawned workers get them too."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stack(samples: list[np.ndarray]) -> np.ndarray:
    """The collate every numpy user writes."""
    return np.stack(samples)


def stack_pooled(samples: list[np.ndarray]) -> np.ndarray:
    """The same with the batch allocated in the pool, which makes handing it over free."""
    import torchshm

    with torchshm.pooled():
        return np.stack(samples)


def same(item: T) -> T:
    """No collate; torch's own would take an xarray Dataset for a dict and rebuild it."""
    return item
