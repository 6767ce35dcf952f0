"""Job: what is to be executed, and with how much."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchshm._size import format_size
from torchshm.data.blocks._plan import Stage

BLOCK = 128 << 20
"""Bytes of a block, where the user says nothing."""
_PRIVATE = 32 << 20  # bytes of memory that a worker has for itself, about
# Parts of the memory that a block and a window may be: whatever the number of workers, which the order of rows must not depend on.
_SHARES, _WINDOWS = 32, 5
_FULL = 8  # the same for windows of a shuffle of all rows, whose pieces have to lie beside them
_LEAST = 1 << 16  # bytes of a block
# Every process has chunks of its own for small values: with less memory they would be all of it.
_LEAST_MEMORY, _LEAST_PER_WORKER = 32 << 20, 16 << 20


@dataclass
class Job:
    """A plan, and what its execution may take; made by the process that iterates, for the one that executes."""

    stages: list[Stage]
    memory: int
    workers: int
    seed: int
    block_size: int = BLOCK
    epoch: int = 0
    epochs: dict[int, int | None] = field(default_factory=dict)  # of each reader
    shards: int = 1
    equal: bool = True
    retries: int = 3
    ahead: int = 2  # blocks that wait for each consumer
    store: str = ""
    prefix: str = ""  # of all its names there
    directory: str = ""  # that values go to, in case the store's owner dies

    def __post_init__(self) -> None:
        least = _LEAST_MEMORY + self.workers * _LEAST_PER_WORKER
        if self.memory < least:
            raise ValueError(
                f"{format_size(self.memory)} of memory are too little for {self.workers} workers: give "
                f"memory={format_size(least).replace(' ', '')!r} or more, or fewer workers"
            )

    @property
    def limit(self) -> int:
        """Bytes of blocks: what workers have beside them is theirs."""
        return max(self.memory - self.workers * _PRIVATE, self.memory // 2)

    @property
    def target(self) -> int:
        """Bytes of a block."""
        return min(self.block_size, max(self.memory // _SHARES, _LEAST))

    def window(self, wanted: int | None) -> int:
        """Bytes that are shuffled at a time; None: as many as there is room for where all rows are shuffled."""
        return self.memory // _FULL if wanted is None else min(wanted, self.memory // _WINDOWS)
