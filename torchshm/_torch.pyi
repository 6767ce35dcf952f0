from typing import Any

import torch

class storage:
    # Gives a torch.UntypedStorage.
    def __new__(cls, wire: bytes, /) -> Any: ...

class tensor:
    # Gives a torch.Tensor or torch.nn.Parameter. flags: 1, requires_grad; 2, a Parameter. stride None: contiguous.
    def __new__(
        cls,
        storage: torch.UntypedStorage,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...] | None,
        flags: int,
        /,
    ) -> Any: ...

def reduce_tensor(tensor: torch.Tensor, /) -> tuple[Any, ...]: ...
def reduce_storage(storage: torch.UntypedStorage, /) -> tuple[Any, ...]: ...
def blank(bytes: int, /) -> torch.UntypedStorage | None: ...
def switch_memory(memory: tuple[bool, int], /) -> tuple[bool, int]: ...
