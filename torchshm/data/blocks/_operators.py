"""The stages as the executor sees them: each gets blocks in order, makes tasks of them, and passes on what tasks have made, in order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchshm.data.blocks._recipes import Gather, Part, Read, Recipe, Zipped


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
