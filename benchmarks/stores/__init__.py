"""Stores: the ways to find an array by its name, by name of the way.

A store says only how; `benchmarks.naming` does the timing, with the same loop for all.
"""

from __future__ import annotations

from benchmarks.stores.named_store import NamedStore
from benchmarks.stores.ray_references import RayReferences, WarmRay
from benchmarks.stores.shared_memory_names import SharedMemoryNames
from benchmarks.stores.torchshm_store import TorchshmStore
from benchmarks.stores.vineyard_names import VineyardNames
from benchmarks.stores.warm_memcpy import WarmMemcpy

STORES: dict[str, type[NamedStore]] = {
    "torchshm": TorchshmStore,
    "ray": RayReferences,
    "ray_warm": WarmRay,
    "vineyard": VineyardNames,
    "shared_memory": SharedMemoryNames,
    "memcpy": WarmMemcpy,
}
