"""The stages as the executor sees them: each gets blocks in order, makes tasks of them, and passes on what tasks have made, in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchshm.data.blocks._tasks import Deal, Gather, Merge, Part, Progress, Read, Recipe, Shuffled, Zipped


@dataclass(eq=False)
class Block:
    """One that is there, and how many tasks, operators or shards still want it."""

    key: str
    rows: int
    nbytes: int
    maker: int = -1  # the worker
    uses: int = 0


@dataclass(eq=False)
class Order:
    """A task to be done, or being done."""

    operator: Operator
    recipe: Recipe
    seed: tuple[int, ...]
    inputs: list[Block] = field(default_factory=list)
    plain: bool = False  # without the functions of the stage
    inner: bool = False  # what it makes is the operator's own, and does not go on
    estimate: int = 0  # bytes that it makes
    when_done: Callable[[Order], None] | None = None
    made: list[Block] = field(default_factory=list)
    passed: int = 0  # of these, how many have gone on
    done: bool = False
    attempts: int = 0
    number: int = -1


@dataclass(eq=False)
class Group:
    """A place in the line for orders that are not known yet."""

    items: deque[Item] = field(default_factory=deque)
    open: bool = True


Item = Order | Group | Callable[[], None]
Release = Callable[[Block], None]


class Operator(ABC):
    """One stage. What it makes goes on in the order in which it was asked for, whoever is done first."""

    def __init__(self, index: int, label: str, release: Release, target: int, seed: int) -> None:
        self.index, self.progress = index, Progress(label)
        self.release, self.target, self.seed = release, target, seed
        self.follower: Callable[[Block], None] = release
        self.after_end: Callable[[], None] = lambda: None
        self.after_flush: Callable[[int], None] = lambda epoch: None
        self.waiting: deque[Order] = deque()
        self.line = Group()
        self.ended = False
        self._advancing = False

    # ---- from above

    @abstractmethod
    def push(self, block: Block) -> None:
        """The next block."""

    def flush(self, epoch: int) -> None:
        """An epoch has ended: what comes is another one's."""
        self.in_turn(lambda: self.after_flush(epoch))

    def end(self) -> None:
        """No more will come."""
        self.in_turn(self._last)

    def _last(self) -> None:
        self.ended = True
        self.after_end()

    # ---- tasks

    def ask(self, order: Order, group: Group | None = None, first: bool = False) -> None:
        for block in order.inputs:
            block.uses += 1
        if not order.estimate:
            order.estimate = self.expected(sum(block.nbytes for block in order.inputs))
        if first:
            self.waiting.appendleft(order)
        else:
            self.waiting.append(order)
        (group or self.line).items.append(order)

    def expected(self, nbytes: int) -> int:
        """Bytes that are made of so many, by what was seen."""
        seen = self.progress
        return max(1, int(nbytes * seen.nbytes / seen.bytes_in) if seen.bytes_in else nbytes)

    def in_turn(self, action: Callable[[], None]) -> None:
        """Do that when everything before it has gone on."""
        self.line.items.append(action)
        self.advance()

    def refill(self) -> None:  # noqa: B027 - most only do as they are told
        """Ask for more where that is this operator's own decision."""

    def made(self, order: Order, block: Block) -> None:
        order.made.append(block)
        if not order.inner:
            self.progress.blocks += 1
            self.progress.rows += block.rows
            self.progress.nbytes += block.nbytes
        self.advance()

    def done(self, order: Order) -> None:
        order.done = True
        self.progress.tasks += 1
        if order.when_done is not None:
            order.when_done(order)
        for block in order.inputs:
            self.drop(block)
        self.advance()

    def drop(self, block: Block) -> None:
        block.uses -= 1
        if block.uses == 0:
            self.release(block)

    def advance(self) -> None:
        if self._advancing:  # an action has asked for more: the loop below comes to it
            return
        self._advancing = True
        try:
            self._advance(self.line)
        finally:
            self._advancing = False

    def _advance(self, group: Group) -> bool:
        """Whether nothing is left in the group."""
        while group.items:
            first = group.items[0]
            if isinstance(first, Group):
                if not self._advance(first) or first.open:
                    return False
                group.items.popleft()
            elif isinstance(first, Order):
                while not first.inner and first.passed < len(first.made):
                    first.passed += 1
                    self.follower(first.made[first.passed - 1])
                if not first.done:
                    return False
                group.items.popleft()
            else:
                group.items.popleft()
                first()
        return True


class Reader(Operator):
    """A source's tasks, in order, once for each epoch."""

    def __init__(
        self,
        index: int,
        label: str,
        release: Release,
        target: int,
        seed: int,
        sizes: Sequence[int | None],
        epochs: int | None,
        first: int,
    ) -> None:
        super().__init__(index, label, release, target, seed)
        self._sizes, self._epochs, self._first = list(sizes), epochs, first
        self._epoch = self._next = 0
        self._over = False
        self.ahead = 1

    def push(self, block: Block) -> None:
        raise AssertionError("nothing comes before a source")

    def refill(self) -> None:
        while not self._over and len(self.waiting) < self.ahead:
            epoch = self._first + self._epoch
            if self._next < len(self._sizes):
                number = self._next
                self._next += 1
                size = self._sizes[number] or self.target
                self.ask(
                    Order(
                        self,
                        Read(number),
                        (self.seed, self.index, epoch, number),
                        estimate=self.expected(size),
                    )
                )
                continue
            self._next = 0
            self._epoch += 1
            self._over = self._epoch == self._epochs or not self._sizes
            self.flush(epoch)
            if self._over:
                self.end()


class Regrouper(Operator):
    """Consecutive rows in blocks of another size: so many rows each, so many blocks in all, or each block as it is."""

    def __init__(
        self,
        index: int,
        label: str,
        release: Release,
        target: int,
        seed: int,
        rows: int | None,
        blocks: int | None,
        first: int,
    ) -> None:
        super().__init__(index, label, release, target, seed)
        self._rows, self._blocks, self._first = rows, blocks, first
        self._pending: deque[tuple[Block, int]] = deque()  # and the first row that is not used yet
        self._count = self._number = 0

    def push(self, block: Block) -> None:
        block.uses += 1
        self._pending.append((block, 0))
        self._count += block.rows
        if self._blocks is None:
            rows = self._rows or block.rows
            while self._count >= rows > 0:
                self._group(rows)

    def _group(self, rows: int) -> None:
        parts, inputs, used_up = take_rows(self._pending, rows)
        self._count -= rows
        self.ask(Order(self, Gather(parts), (self.seed, self.index, self._first, self._number), inputs))
        self._number += 1
        for block in used_up:
            self.drop(block)

    def _rest(self) -> None:
        total = self._count
        if self._blocks is None:
            if total:
                self._group(total)
            return
        for i in range(self._blocks):
            rows = total * (i + 1) // self._blocks - total * i // self._blocks
            if rows:
                self._group(rows)

    def flush(self, epoch: int) -> None:
        self._rest()
        super().flush(epoch)

    def end(self) -> None:
        self._rest()
        super().end()


def take_rows(
    pending: deque[tuple[Block, int]], rows: int
) -> tuple[tuple[Part, ...], list[Block], list[Block]]:
    """The next rows of blocks in a row: their parts, the blocks, and those that are used up by it."""
    parts: list[Part] = []
    inputs: list[Block] = []
    used_up: list[Block] = []
    while rows:
        block, begin = pending.popleft()
        count = min(rows, block.rows - begin)
        parts.append(Part(block.key, begin, begin + count))
        inputs.append(block)
        rows -= count
        if begin + count < block.rows:
            pending.appendleft((block, begin + count))
        else:
            used_up.append(block)
    return tuple(parts), inputs, used_up


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
        window: int,
        partitions: int,
        first: int,
    ) -> None:
        """partitions: 0 where each window is shuffled for itself."""
        super().__init__(index, label, release, target, seed)
        self._window, self._partitions, self._epoch = window, partitions, first
        self._blocks: list[Block] = []
        self._bytes = self._number = 0
        self._scattering: _Scattering | None = None

    def push(self, block: Block) -> None:
        block.uses += 1
        self._blocks.append(block)
        self._bytes += block.nbytes
        if self._bytes >= self._window:
            self._close(scatter=self._partitions > 0)

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
                    seed = (self.seed, self.index, epoch, number)
                    keys = tuple(block.key for block in blocks)
                    self.ask(Order(self, Merge(keys, (*seed, 2)), seed, blocks), merged)
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
        seed = (self.seed, self.index, self._epoch, self._number)
        self._number += 1
        count = max(1, round(nbytes / self.target))
        group = Group()
        self.line.items.append(group)
        scattering = self._scattering
        if scatter and scattering is None:
            scattering = self._scattering = _Scattering([{} for _ in range(self._partitions)])
        if scatter and scattering is not None:
            scattering.windows += 1

        def gather(deal: Order) -> None:
            order = deal.made[0]
            keys, rows = tuple(block.key for block in blocks), tuple(block.rows for block in blocks)
            inputs, share = [*blocks, order], nbytes // count
            if scatter and scattering is not None:
                self._scatter(scattering, group, keys, rows, inputs, count, share, seed)
            else:
                for i in range(count):
                    recipe = Shuffled(keys, rows, order.key, total * i // count, total * (i + 1) // count)
                    self.ask(Order(self, recipe, (*seed, i), inputs, estimate=self.expected(share)), group)
            group.open = False
            for block in blocks:
                self.drop(block)

        deal = Order(
            self, Deal(total, (*seed, 1)), seed, plain=True, inner=True, estimate=total * 8, when_done=gather
        )
        self.ask(deal, group, first=True)

    def _scatter(
        self,
        to: _Scattering,
        group: Group,
        keys: tuple[str, ...],
        rows: tuple[int, ...],
        inputs: list[Block],
        count: int,
        share: int,
        seed: tuple[int, ...],
    ) -> None:
        pieces, total, left, window = to.pieces, sum(rows), count, seed[-1]
        shares = np.random.default_rng((*seed, 0)).multinomial(total, [1 / len(pieces)] * len(pieces))
        ends = [0, *np.cumsum(shares).tolist()]

        def scattered(order: Order, chosen: list[int]) -> None:
            nonlocal left
            for number, block in zip(chosen, order.made, strict=True):
                block.uses += 1
                pieces[number][window] = block
            left -= 1
            if left == 0:
                to.one_is_done()

        for i in range(count):
            first, last = len(pieces) * i // count, len(pieces) * (i + 1) // count
            chosen = [p for p in range(first, last) if ends[p] < ends[p + 1]]
            cuts = tuple((ends[p], ends[p + 1]) for p in chosen)
            recipe = Shuffled(keys, rows, inputs[-1].key, ends[first], ends[last], cuts)
            order = Order(self, recipe, (*seed, i), inputs, plain=True, inner=True, estimate=share)
            order.when_done = lambda done, chosen=chosen: scattered(done, chosen)  # type: ignore[misc]
            self.ask(order, group)


class Zipper(Operator):
    """Rows of two sides next to each other, in blocks as the left side has them."""

    def __init__(self, index: int, label: str, release: Release, target: int, seed: int, first: int) -> None:
        super().__init__(index, label, release, target, seed)
        self._first = first
        self._sides: tuple[deque[tuple[Block, int]], ...] = (deque(), deque())
        self._counts = [0, 0]
        self._totals = [0, 0]
        self._ends = self._flushes = 0
        self._number = 0

    def push(self, block: Block) -> None:
        self.push_to(0, block)

    def push_to(self, side: int, block: Block) -> None:
        block.uses += 1
        self._sides[side].append((block, 0))
        self._counts[side] += block.rows
        self._totals[side] += block.rows
        while self._sides[0]:
            first, begin = self._sides[0][0]
            rows = first.rows - begin
            if self._counts[1] < rows:
                return
            self._pair(rows)

    def _pair(self, rows: int) -> None:
        taken = [take_rows(side, rows) for side in self._sides]
        self._counts = [count - rows for count in self._counts]
        recipe = Zipped(taken[0][0], taken[1][0])
        self.ask(
            Order(
                self, recipe, (self.seed, self.index, self._first, self._number), [*taken[0][1], *taken[1][1]]
            )
        )
        self._number += 1
        for _, _, used_up in taken:
            for block in used_up:
                self.drop(block)

    def flush(self, epoch: int) -> None:
        self._flushes += 1
        if self._flushes % 2 == 0:
            super().flush(epoch)

    def end(self) -> None:
        self._ends += 1
        if self._ends < 2:
            return
        if self._totals[0] != self._totals[1]:
            raise ValueError(
                f"zip: the left side has {self._totals[0]} rows, the right side {self._totals[1]}"
            )
        super().end()


class Repeater(Operator):
    """Passes on what comes, epoch after epoch; the reader runs as many."""

    def push(self, block: Block) -> None:
        block.uses += 1

        def go_on() -> None:
            self.follower(block)
            self.drop(block)

        self.in_turn(go_on)

    def flush(self, epoch: int) -> None:
        pass  # what follows sees one long epoch
