"""Shards: the rows of one execution, dealt out to several consumers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchshm.data.blocks._formats import format_of, handed_out, mode_for
from torchshm.data.blocks._functions import check_batch_size, handed_batches
from torchshm.data.blocks._run import Consumer, Run


class Shard:
    """One consumer's part, from :meth:`Dataset.split`. It can be pickled, and be iterated in another process of this machine.

    Each iteration is an epoch; all shards go through the same epochs. The execution ends with the process that called ``split``, or
    when all shards there have gone.
    """

    def __init__(
        self, where: tuple[str, str], shard: int, count: int, run: Run | None, once: str = ""
    ) -> None:
        self._where, self._shard, self._count, self._run = where, shard, count, run
        self._once = once  # why there is no second epoch
        self._epoch = 0
        self._last: Consumer | None = None
        self._statistics: dict[str, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _shard, (self._where, self._shard, self._count, self._epoch, self._once)

    def __repr__(self) -> str:
        return f"<torchshm.data.blocks.Shard {self._shard} of {self._count}, of {self._where[0]}>"

    def _blocks(self, batch_format: str | None) -> Iterator[Any]:
        if self._once and self._epoch:
            raise ValueError(self._once)
        epoch, self._epoch = self._epoch, self._epoch + 1
        if self._last is not None:  # an iterator that somebody has kept, and that is not at its end
            self._last.leave()
        consumer = Consumer(
            *self._where, self._shard, epoch, self._run, first=epoch == 0, mode=mode_for(batch_format)
        )
        self._last = consumer
        try:
            for value, begin, end in consumer:
                yield format_of(value).slice(value, begin, end)
        finally:
            self._statistics = consumer.look()
            consumer.leave()

    def iter_blocks(self, *, batch_format: str | None = None) -> Iterator[Any]:
        """Yields this shard's part of each block."""
        for value in self._blocks(batch_format):
            yield handed_out(value, batch_format)

    def iter_batches(
        self, batch_size: int | None = 256, *, batch_format: str | None = "numpy", drop_last: bool = False
    ) -> Iterator[Any]:
        """Yields batches of this shard's rows, as :meth:`Dataset.iter_batches`."""
        check_batch_size(batch_size)
        yield from handed_batches(self._blocks(batch_format), batch_size, batch_format, drop_last)


def _shard(where: tuple[str, str], shard: int, count: int, epoch: int, once: str) -> Shard:
    made = Shard(where, shard, count, None, once)
    made._epoch = epoch
    return made
