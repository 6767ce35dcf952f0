"""The stages as the executor sees them: each gets blocks in order, makes tasks of them, and passes on what tasks have made, in order."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchshm.data.blocks._recipes import Gather, Part, Read, Recipe, Zipped

_ENOUGH = 8  # blocks


@dataclass
class Progress:
    """What a stage has done so far, for the user."""

    label: str
    tasks: int = 0
    blocks: int = 0
    rows: int = 0
    nbytes: int = 0
    rows_in: int = 0
    bytes_in: int = 0
    seconds: float = 0.0
    retries: int = 0
    total: int | None = None  # tasks, where that is known beforehand


@dataclass(eq=False)
class Block:
    """One that is there, and how many tasks, operators or shards still want it."""

    key: str
    rows: int
    nbytes: int
    maker: int = -1  # the worker
    uses: int = 0
    # What part of its source has been read when it is there, at least; None: not known.
    reach: float | None = None

    def drop(self, release: Release) -> None:
        """One who wanted it does no more."""
        self.uses -= 1
        if self.uses == 0:
            release(self)


@dataclass(eq=False)
class Order:
    """A task to be done, or being done."""

    operator: Operator
    recipe: Recipe
    seed: tuple[int, ...]
    inputs: list[Block] = field(default_factory=list)
    plain: bool = False  # without the functions of the stage
    whole: bool = False  # one block, whatever its size
    inner: bool = False  # what it makes is the operator's own, and does not go on
    estimate: int = 0  # bytes that it makes
    takes_up: int = 0  # of its inputs, bytes that were laid aside
    when_done: Callable[[Order], None] | None = None
    made: list[Block] = field(default_factory=list)
    passed: int = 0  # of these, how many have gone on
    begun: bool = False  # a worker has it
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
        self.aside = 0  # bytes of blocks that may as well lie on disk for now
        self.line = Group()
        self.taken_in = 0  # bytes that went into what has gone on; not into what is this operator's own
        self.underway = 0  # orders that were begun, and of which not all has gone on
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
        self.in_turn(self.after_end)

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
        return max(1, int(nbytes * self.progress.nbytes / self.taken_in) if self.taken_in else nbytes)

    def in_turn(self, action: Callable[[], None]) -> None:
        """Do that when everything before it has gone on."""
        self.line.items.append(action)
        self.advance()

    def refill(self) -> None:  # noqa: B027 - most only do as they are told
        """Ask for more where that is this operator's own decision."""

    def behind(self) -> int:
        """Orders that were begun, or done, and wait for one before them that somebody is at."""
        group: Item = self.line
        while isinstance(group, Group) and group.items:
            group = group.items[0]
        return self.underway if isinstance(group, Order) and group.begun and not group.done else 0

    def crowded(self) -> bool:
        """Whether what comes before should wait: there is enough to do here."""
        return False

    def made(self, order: Order, block: Block) -> None:
        block.reach = self.reach(order)
        order.made.append(block)
        if not order.inner:
            self.progress.blocks += 1
            self.progress.rows += block.rows
            self.progress.nbytes += block.nbytes
        self.advance()

    def reach(self, order: Order) -> float | None:
        """That of the blocks that a task makes."""
        return max((block.reach for block in order.inputs if block.reach is not None), default=None)

    def done(self, order: Order) -> None:
        order.done = True
        self.progress.tasks += 1
        if order.when_done is not None:
            order.when_done(order)
        for block in order.inputs:
            self.drop(block)
        self.advance()

    def drop(self, block: Block) -> None:
        block.drop(self.release)

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
                self.underway -= 1
            else:
                group.items.popleft()
                first()
        return True


class Regrouping(Operator):
    """One that needs the next rows alone; what is read long before would only lie there."""

    def crowded(self) -> bool:
        return sum(order.estimate for order in self.waiting) > _ENOUGH * self.target


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
        ahead: int,
        source_done: Callable[[int], None],
    ) -> None:
        """ahead: how many tasks wait for workers."""
        super().__init__(index, label, release, target, seed)
        self._sizes, self._epochs, self._first = list(sizes), epochs, first
        self._source_done = source_done
        self._epoch = self._next = 0
        self._over = False
        self._ahead = ahead
        # A single task says nothing of how far it is.
        several = len(self._sizes) > 1
        weights = [1.0 if None in self._sizes else float(size or 0) for size in self._sizes]
        total = sum(weights)
        self._ends = [end / total for end in itertools.accumulate(weights)] if several and total else []
        self.progress.total = None if epochs is None else len(self._sizes) * epochs

    def push(self, block: Block) -> None:
        raise AssertionError("nothing comes before a source")

    def reach(self, order: Order) -> float | None:
        if not self._ends:
            return None
        assert isinstance(order.recipe, Read)
        number = order.recipe.number
        # At least the tasks before it; of the first one, half: what is taken for less only divides more finely.
        return self._ends[number - 1] if number else self._ends[0] / 2

    def done(self, order: Order) -> None:
        if isinstance(order.recipe, Read):
            self._source_done(order.recipe.number)
        super().done(order)

    def refill(self) -> None:
        while not self._over and len(self.waiting) < self._ahead:
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


class Regrouper(Regrouping):
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
        seed = (self.seed, self.index, self._first, self._number)
        self.ask(
            Order(self, Gather(parts), seed, inputs, whole=self._rows is not None or self._blocks is not None)
        )
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


class Zipper(Regrouping):
    """Rows of two sides next to each other, in blocks as the left side has them."""

    def __init__(self, index: int, label: str, release: Release, target: int, seed: int, first: int) -> None:
        super().__init__(index, label, release, target, seed)
        self._first = first
        self._sides: tuple[deque[tuple[Block, int]], ...] = (deque(), deque())
        self._counts = [0, 0]  # rows that wait for those of the other side
        self._totals = [0, 0]
        self._epochs: tuple[list[int], ...] = ([], [])  # the totals as each of them ended
        self._ended = [False, False]
        self._flushed = self._number = 0

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
                break
            self._pair(rows)
        self._check()

    def ahead(self, side: int) -> bool:
        """Whether more of that side would only lie there."""
        return self._counts[side] > self._counts[1 - side]

    def _pair(self, rows: int) -> None:
        taken = [take_rows(side, rows) for side in self._sides]
        self._counts = [count - rows for count in self._counts]
        seed = (self.seed, self.index, self._first, self._number)
        self.ask(Order(self, Zipped(taken[0][0], taken[1][0]), seed, [*taken[0][1], *taken[1][1]]))
        self._number += 1
        for _, _, used_up in taken:
            for block in used_up:
                self.drop(block)

    def _check(self) -> None:
        """One side must not have rows that the other, which has ended, has nothing for."""
        for side in (0, 1):
            if self._ended[side] and self._totals[1 - side] > self._totals[side]:
                raise _unequal(self._totals, None if self._ended[1 - side] else 1 - side)

    def flush_to(self, side: int, epoch: int) -> None:
        self._epochs[side].append(self._totals[side])
        if len(self._epochs[0]) > self._flushed < len(self._epochs[1]):
            totals = [epochs[self._flushed] for epochs in self._epochs]
            if totals[0] != totals[1]:
                raise _unequal(totals)
            self._flushed += 1
            self.flush(epoch)

    def end_of(self, side: int) -> None:
        self._ended[side] = True
        self._check()
        if all(self._ended):
            self.end()


def _unequal(totals: list[int], going_on: int | None = None) -> ValueError:
    """going_on: the side that may have more."""
    left, right = (f"{'at least ' if side == going_on else ''}{total}" for side, total in enumerate(totals))
    return ValueError(f"zip: the left side has {left} rows, the right side {right}")


class Repeater(Operator):
    """Passes on what comes, epoch after epoch; the reader runs as many."""

    def __init__(
        self, index: int, label: str, release: Release, target: int, seed: int, times: int | None
    ) -> None:
        super().__init__(index, label, release, target, seed)
        self._times, self._flushes = times, 0

    def push(self, block: Block) -> None:
        block.uses += 1

        def go_on() -> None:
            self.follower(block)
            self.drop(block)

        self.in_turn(go_on)

    def flush(self, epoch: int) -> None:
        """What follows sees all times as one long epoch."""
        self._flushes += 1
        if self._times is not None and self._flushes % self._times == 0:
            super().flush(epoch)
