"""Shuffler: rows in a random order, of windows or of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torchshm.data.blocks._operators import Block, Group, Operator, Order, Release
from torchshm.data.blocks._recipes import Deal, Merge, Shuffled

_PARTITIONS, _FEWEST = 256, 16  # where nobody knows how much is to come
# Of a window, bytes in each partition: smaller values share chunks of memory, which none of them can leave alone.
_PIECE = 520 << 10


@dataclass(eq=False)
class _Scattering:
    """All rows of an epoch on their way into partitions."""

    pieces: list[dict[int, Block]]  # of each partition, one from each window that has rows for it
    windows: int = 0  # that are not done
    merge: Callable[[], None] | None = None  # what to do when they are

    def one_is_done(self) -> None:
        self.windows -= 1
        if self.windows == 0 and self.merge is not None:
            self.merge()


class Shuffler(Operator):
    """Rows in a random order: of each window of blocks, or of all.

    For a window a task deals the order, and as many tasks as it has blocks gather rows by it. All rows of more than one window are
    scattered over partitions, window by window, and each partition is shuffled when it has its part of all windows.
    """

    def __init__(
        self,
        index: int,
        label: str,
        release: Release,
        target: int,
        seed: int,
        drawn: int,
        window: int,
        windowed: bool,
        first: int,
    ) -> None:
        """drawn: the seed of the order; windowed: whether each window is shuffled for itself."""
        super().__init__(index, label, release, target, seed)
        self._drawn, self._window, self._windowed, self._epoch = drawn, window, windowed, first
        self._blocks: list[Block] = []
        self._bytes = self._number = 0
        self._scattering: _Scattering | None = None

    def push(self, block: Block) -> None:
        block.uses += 1
        self._blocks.append(block)
        self._bytes += block.nbytes
        if self._bytes >= self._window:
            self._close(scatter=not self._windowed)

    def flush(self, epoch: int) -> None:
        self._all()
        super().flush(epoch)
        self._epoch, self._number = epoch + 1, 0

    def end(self) -> None:
        self._all()
        super().end()

    def _all(self) -> None:
        if self._scattering is None:
            self._close(scatter=False)
            return
        self._close(scatter=True)
        scattering, self._scattering = self._scattering, None
        merged = Group()
        self.line.items.append(merged)
        epoch = self._epoch

        def merge() -> None:
            for number, several in enumerate(scattering.pieces):
                blocks = [several[window] for window in sorted(several)]
                if blocks:
                    place = (self.index, epoch, number)
                    recipe = Merge(tuple(block.key for block in blocks), (self._drawn, *place, 2))
                    order = Order(self, recipe, (self.seed, *place), blocks)
                    order.takes_up = sum(block.nbytes for block in blocks)
                    self.ask(order, merged)
                for block in blocks:
                    self.drop(block)  # the task has them
            merged.open = False

        scattering.merge = merge
        if scattering.windows == 0:
            merge()

    def _close(self, scatter: bool) -> None:
        """The window is full."""
        blocks, self._blocks, nbytes, self._bytes = self._blocks, [], self._bytes, 0
        if not blocks:
            return
        total = sum(block.rows for block in blocks)
        place = (self.index, self._epoch, self._number)
        drawn, seed = (self._drawn, *place), (self.seed, *place)
        self._number += 1
        count = max(1, round(nbytes / self.target))
        group = Group()
        self.line.items.append(group)
        scattering = self._scattering
        if scatter and scattering is None:
            scattering = self._scattering = _Scattering([{} for _ in range(self._partitions(blocks, nbytes))])
        if scatter and scattering is not None:
            scattering.windows += 1

        def gather(deal: Order) -> None:
            order = deal.made[0]
            keys, rows = tuple(block.key for block in blocks), tuple(block.rows for block in blocks)
            inputs, share = [*blocks, order], nbytes // count
            if scatter and scattering is not None:
                self._scatter(scattering, group, keys, rows, inputs, count, share, drawn)
            else:
                for i in range(count):
                    recipe = Shuffled(keys, rows, order.key, total * i // count, total * (i + 1) // count)
                    self.ask(Order(self, recipe, (*seed, i), inputs, estimate=self.expected(share)), group)
            group.open = False
            for block in blocks:
                self.drop(block)

        deal = Order(
            self, Deal(total, (*drawn, 1)), seed, plain=True, inner=True, estimate=total * 8, when_done=gather
        )
        self.ask(deal, group, first=True)

    def _partitions(self, blocks: list[Block], nbytes: int) -> int:
        """As many as all rows will have blocks, by the first window of them; fewer where the pieces would be very small."""
        known = [block.reach for block in blocks if block.reach]
        most = max(1, nbytes // _PIECE)
        if not known:
            return max(_FEWEST, min(_PARTITIONS, most))
        total = int(nbytes / max(known))
        return max(min(-(-total // self.target), most), -(-total // self._window))

    def _scatter(
        self,
        to: _Scattering,
        group: Group,
        keys: tuple[str, ...],
        rows: tuple[int, ...],
        inputs: list[Block],
        count: int,
        share: int,
        drawn: tuple[int, ...],
    ) -> None:
        pieces, total, left, window = to.pieces, sum(rows), count, drawn[-1]
        shares = np.random.default_rng((*drawn, 0)).multinomial(total, [1 / len(pieces)] * len(pieces))
        ends = [0, *np.cumsum(shares).tolist()]

        def scattered(order: Order, chosen: list[int]) -> None:
            nonlocal left
            for number, block in zip(chosen, order.made, strict=True):
                block.uses += 1
                self.aside += block.nbytes
                pieces[number][window] = block
            left -= 1
            if left == 0:
                to.one_is_done()

        for i in range(count):
            first, last = len(pieces) * i // count, len(pieces) * (i + 1) // count
            chosen = [p for p in range(first, last) if ends[p] < ends[p + 1]]
            cuts = tuple((ends[p], ends[p + 1]) for p in chosen)
            recipe = Shuffled(keys, rows, inputs[-1].key, ends[first], ends[last], cuts)
            order = Order(self, recipe, (*drawn, i), inputs, plain=True, inner=True, estimate=share)
            order.when_done = lambda done, chosen=chosen: scattered(done, chosen)  # type: ignore[misc]
            self.ask(order, group)
