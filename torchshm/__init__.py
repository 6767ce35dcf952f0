"""torchshm: the shared-memory layer under Python data loading.

>>> import torchshm
>>> torchshm.register()
"""

import torchshm._C  # noqa: F401 - before NumPy, which has less to say to a subinterpreter  # isort: skip
from torchshm._context import get_context
from torchshm._key import key
from torchshm._reducers import is_shared, register, unregister
from torchshm._sharing import dumps, empty, inline, loads, pooled, share, stats, trim
from torchshm._starting import connect, start
from torchshm._store import Store
from torchshm._store_file import StoreFile
from torchshm._store_file import open_file as open
from torchshm.errors import (
    KeyExistsError,
    PoolFullError,
    StaleHandleError,
    StoreUnavailableError,
    TorchshmError,
)

__all__ = [
    "KeyExistsError",
    "PoolFullError",
    "StaleHandleError",
    "Store",
    "StoreFile",
    "StoreUnavailableError",
    "TorchshmError",
    "connect",
    "dumps",
    "empty",
    "get_context",
    "inline",
    "is_shared",
    "key",
    "loads",
    "open",
    "pooled",
    "register",
    "share",
    "start",
    "stats",
    "trim",
    "unregister",
]


def __getattr__(name: str) -> object:
    if name == "data":  # imports torch
        import importlib

        return importlib.import_module("torchshm.data")
    raise AttributeError(f"module 'torchshm' has no attribute {name!r}")
