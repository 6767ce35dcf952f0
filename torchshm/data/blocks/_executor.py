"""The process that executes a plan: it starts workers, and gives them tasks.

It is a child of the process that iterates, and touches no data. What is ready it announces by small values in the store, named
``<run>.<epoch>.<shard>.<number>``; a consumer removes the announcement when it has loaded the block, and asks for a further epoch by
the name ``<run>.wanted``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchshm.data._job import tidy
from torchshm.data.blocks import _home
from torchshm.data.blocks import _operators as op
from torchshm.data.blocks._outlet import Outlet, alive
from torchshm.data.blocks._plan import Stage, Step
from torchshm.data.blocks._recipes import Made, Outcome, Task
from torchshm.data.blocks._shuffler import Shuffler
from torchshm.data.blocks._sources import Source
from torchshm.data.blocks._tasks import Kitchen
from torchshm.data.blocks._worker import failure, worker
from torchshm.errors import PoolFullError

_CONNECT = 30.0  # s
_LOOK = 0.002  # s between looks at what consumers have taken
_WATCH = 0.25  # s between looks at anything else
_TELL = 0.2  # s between statistics
_TRIES, _DYING = 20, 0.1  # s between them
_GRACE = 1.0  # s for a worker to end by itself
_CREDIT = 2  # blocks that a task may make before it asks
_BLOCK = 128 << 20
_PRIVATE = 24 << 20  # bytes of memory that a worker has for itself, about
# Parts of the memory that a block and a window may be: whatever the number of workers, which the order of rows must not depend on.
_SHARES, _WINDOWS = 32, 5
# Of the store's limit, what may be in use when a task is begun: of the last stage, of those before.
_ROOM, _EARLY = 0.9, 0.65


@dataclass
class Job:
    """What is to be executed, and with how much."""

    store: str
    prefix: str  # of all its names there
    directory: str  # that values go to, in case the store's owner dies
    stages: list[Stage]
    memory: int
    workers: int
    seed: int
    target: int = _BLOCK
    epoch: int = 0
    epochs: dict[int, int | None] = field(default_factory=dict)  # of each reader
    shards: int = 1
    equal: bool = True
    retries: int = 3
    ahead: int = 2  # blocks that wait for each consumer

    @property
    def limit(self) -> int:
        """Bytes of blocks: what workers have beside them is theirs."""
        return max(self.memory - self.workers * _PRIVATE, self.memory // 2)


class Failure(Exception):
    """Of a task, or of this process; with what the user gets to see."""

    def __init__(self, pickled: bytes, text: str) -> None:
        super().__init__(text)
        self.pickled, self.text = pickled, text


# ---- the process


def serve(job: Job, control: Any, owner: int, inherited: Any) -> None:
    """Run a job until its consumers have all of it, or the owner says so, or has gone. `inherited`: the owner's end of the pipe."""
    if inherited is not None:
        inherited.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the owner's, who ends this
    # Who gets it with the owner can tidy up after that one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    executor = None
    try:
        executor = Executor(job, control, owner)
        control.send(("ready", executor.limit))
        executor.run()
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):
            control.send(("failed", *failure(error)))
    finally:
        if executor is not None:
            executor.close()


class Hand:
    """A worker as the executor sees it."""

    def __init__(self, number: int, process: Any, link: Any) -> None:
        self.number, self.process, self.link = number, process, link
        self.orders: deque[op.Order] = deque()  # the first one is being done
        self.owed = 0  # blocks that its task has made since it was last told to go on


class Executor:
    """Gives tasks to workers, and what they make to consumers."""

    def __init__(self, job: Job, control: Any, owner: int) -> None:
        self._job, self._control = job, control
        self._owner = os.pidfd_open(owner)
        self.limit = job.limit
        self._target = min(job.target, max(job.memory // _SHARES, 1 << 16))
        self._store = _home.client(job.store, _CONNECT)
        self._alive = self._store._core.lock(
            alive(job.prefix)
        )  # free when this process has gone, however it went
        self._alive.try_acquire(False)
        self._context = multiprocessing.get_context("fork")
        self._hands: list[Hand] = []
        self._live: dict[str, op.Block] = {}
        self._bytes = self._promised = 0
        self.most = 0
        self._numbers = 0
        self._stopped = False
        self._began = time.monotonic()
        self._told = 0.0
        self._before = self._store.info()
        self._finish = self._orphaned = False
        self._listening = True
        self._outlet: Outlet
        self._outlets: list[Outlet] = []  # of epochs before, of which somebody has not taken everything
        self._read_plan()
        self._begin(job.epoch)
        for number in range(job.workers):
            self._hands.append(self._hire(number))

    # ---- the plan

    def _read_plan(self) -> None:
        self._recipes: list[tuple[Source | None, Sequence[Step]]] = [
            (None if stage.source is None else stage.source.plan(self._target), stage.steps)
            for stage in self._job.stages
        ]

    def _begin(self, epoch: int) -> None:
        """Put up the operators of an epoch."""
        job = self._job
        self._operators: list[op.Operator] = []
        window = job.memory // _WINDOWS
        first = epoch * max([each or 1 for each in job.epochs.values()], default=1)
        sizes: list[int | None] = []  # of what each stage makes
        for index, stage in enumerate(job.stages):
            source = self._recipes[index][0]
            seed = job.seed if stage.seed is None else stage.seed
            common = (index, stage.label, self._release, self._target, seed)
            made: op.Operator
            if source is not None:
                several = [source.nbytes(number) for number in range(len(source))]
                size = None if None in several else sum(each or 0 for each in several)
                reader = op.Reader(*common, several, job.epochs.get(index, 1), first)
                reader.ahead = job.workers * 2
                made = reader
            else:
                size = sizes[stage.inputs[0]]
                if stage.kind == "shuffle":
                    # As many as it has blocks, as far as is known beforehand.
                    several_blocks = -(-(64 * self._target if size is None else size) // self._target)
                    partitions = max(1, several_blocks) if stage.window is None else 0
                    made = Shuffler(*common, min(stage.window or window, window), partitions, first)
                elif stage.kind == "repartition":
                    made = op.Regrouper(*common, stage.rows, stage.blocks, first)
                elif stage.kind == "zip":
                    made = op.Zipper(*common, first)
                else:
                    made = op.Repeater(*common)
            sizes.append(size)
            for side, before in enumerate(stage.inputs):
                above = self._operators[before]
                above.follower = (
                    made.push if side == 0 or not isinstance(made, op.Zipper) else _to_side(made, side)
                )
                above.after_end, above.after_flush = made.end, made.flush
            self._operators.append(made)
        if epoch != job.epoch:
            self._outlets.append(self._outlet)
        self._outlet = Outlet(
            self._store, self._say, f"{job.prefix}{epoch}", job.shards, job.equal, job.ahead, self._drop
        )
        last = self._operators[-1]
        last.follower, last.after_end = self._outlet.push, self._outlet.end

    # ---- memory

    def _release(self, block: op.Block) -> None:
        if self._live.pop(block.key, None) is not None:
            self._bytes -= block.nbytes
            with contextlib.suppress(KeyError):
                self._store.remove(block.key)

    def _drop(self, block: op.Block) -> None:
        block.uses -= 1
        if block.uses == 0:
            self._release(block)

    def _room_for(self, nbytes: int, last: bool) -> bool:
        return self._bytes + self._promised + nbytes <= (_ROOM if last else _EARLY) * self.limit

    # ---- workers

    def _hire(self, number: int) -> Hand:
        here, there = self._context.Pipe()
        others = [hand.link for hand in self._hands if not hand.link.closed]
        process = self._context.Process(
            target=worker,
            args=(there, [here, *others, self._control], Kitchen(self._store, self._recipes), os.getpid()),
            name=f"torchshm-blocks-{number}",
            daemon=True,
        )
        process.start()
        there.close()
        return Hand(number, process, here)

    def _choose(self, order: op.Order) -> Hand | None:
        """Of those that have nothing to do, the worker that made the largest part of what goes in."""
        idle = [hand for hand in self._hands if not hand.orders]
        if not idle:
            return None
        made = dict.fromkeys((hand.number for hand in idle), 0)
        for block in order.inputs:
            if block.maker in made:
                made[block.maker] += block.nbytes
        return max(idle, key=lambda hand: made[hand.number])

    def _dispatch(self) -> None:
        while True:
            busy = any(hand.orders for hand in self._hands)
            starving = not busy and self._outlet.wanting()
            order = self._next_order(starving)
            if order is None:
                return
            hand = self._choose(order)
            if hand is None:
                return
            order.operator.waiting.remove(order)
            self._give(hand, order)

    def _next_order(self, starving: bool) -> op.Order | None:
        """The last stage that can do something: what is nearest to being done with comes first."""
        for operator in reversed(self._operators):
            operator.refill()
            if not operator.waiting:
                continue
            order, last = operator.waiting[0], operator is self._operators[-1]
            if starving or (self._room_for(order.estimate, last) and not (last and self._outlet.full())):
                return order
        return None

    def _give(self, hand: Hand, order: op.Order) -> None:
        if order.number < 0:
            order.number = self._numbers
            self._numbers += 1
        order.attempts += 1
        task = Task(
            number=order.number,
            attempt=order.attempts,
            stage=order.operator.index,
            recipe=order.recipe,
            seed=order.seed,
            prefix=f"{self._job.prefix}b{order.number}.{order.attempts}.",
            plain=order.plain,
            target=self._target,
            skip=len(order.made),
        )
        hand.orders.append(order)
        self._promised += order.estimate
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            hand.link.send((task, _CREDIT))

    def _hear(self, hand: Hand) -> None:
        message = hand.link.recv()
        order = hand.orders[0]
        if isinstance(message, Made):
            block = op.Block(message.key, message.rows, message.nbytes, hand.number)
            self._live[block.key] = block
            self._bytes += block.nbytes
            self.most = max(self.most, self._bytes)
            kept = min(order.estimate, block.nbytes)  # of what was promised to it
            order.estimate -= kept
            self._promised -= kept
            order.operator.made(order, block)
            hand.owed += 1
            return
        assert isinstance(message, Outcome)
        hand.orders.popleft()
        hand.owed = 0
        self._promised -= order.estimate
        if message.error is not None:
            raise Failure(*message.error)
        progress = order.operator.progress
        progress.rows_in += message.rows_in
        progress.bytes_in += message.bytes_in
        progress.seconds += message.seconds
        order.operator.done(order)

    def _lose(self, hand: Hand) -> None:
        """A worker has died. What it was at is done again by others, from the block on that is missing."""
        with contextlib.suppress(OSError, EOFError):
            while hand.orders and hand.link.poll():  # what it said before it died
                self._hear(hand)
        hand.process.join()
        code = hand.process.exitcode
        orders, hand.orders = list(hand.orders), deque()
        hand.link.close()
        for order in orders:
            self._promised -= order.estimate
        if orders:
            begun = orders[0]
            begun.operator.progress.retries += 1
            told = {block.key for block in begun.made}
            for key in self._store.keys(f"{self._job.prefix}b{begun.number}.{begun.attempts}."):
                if key not in told:
                    with contextlib.suppress(KeyError):
                        self._store.remove(key)
            if begun.attempts > self._job.retries:
                how = (
                    f"signal {-code} ({signal.Signals(-code).name})"
                    if code and code < 0
                    else f"exit code {code}"
                )
                raise RuntimeError(
                    f"task {begun.number} of stage {begun.operator.index}, {begun.operator.progress.label}, was begun "
                    f"{begun.attempts} times, and each time the worker died; the last one by {how}. {_hint(code)}"
                )
            for order in orders[1:]:
                order.attempts -= 1
            for order in reversed(orders):
                order.operator.waiting.appendleft(order)
        self._hands[hand.number] = self._hire(hand.number)

    # ---- the loop

    def run(self) -> None:
        """One epoch after the other, as they are asked for."""
        epoch = self._job.epoch
        failed: tuple[bytes, str] | None = None
        while not self._stopped:
            try:
                if failed is None:
                    self._epoch()
            except Failure as error:
                failed = error.pickled, error.text
            except Exception as error:
                failed = failure(error)
            if failed is not None:  # whoever asks for more gets to know it too
                self._outlet.fail(*failed)
            while not self._stopped and self._wanted() <= epoch:
                self._look()
                if self._finish and self._outlet.empty():
                    self._clear()
                    return
                try:
                    self._wait(_WATCH if self._outlet.empty() else _LOOK)
                except Exception:
                    if failed is None:
                        raise
            epoch += 1
            if not self._stopped:
                self._begin(epoch)

    def _wanted(self) -> int:
        """The epoch that a consumer asks for."""
        try:
            return int(self._store.load(self._job.prefix + "wanted"))
        except KeyError:
            return self._job.epoch

    def _look(self) -> None:
        for outlet in [*self._outlets, self._outlet]:
            outlet.look()
        self._outlets = [outlet for outlet in self._outlets if outlet.waiting()]

    def _epoch(self) -> None:
        for operator in self._operators:
            operator.refill()
        while not self._stopped:
            self._look()
            self._dispatch()
            self._go_on()
            self._tell()
            if self._outlet.over():
                self._outlet.close(self.statistics())
                return
            self._wait(_LOOK if self._outlet.waiting() else _WATCH)

    def _wait(self, seconds: float) -> None:
        links = {hand.link: hand for hand in self._hands}
        ready = multiprocessing.connection.wait(
            [
                *links,
                *(hand.process.sentinel for hand in self._hands),
                *([self._control] if self._listening else []),
                self._owner,
            ],
            seconds,
        )
        sentinels = {hand.process.sentinel: hand for hand in self._hands}
        lost = [sentinels[each] for each in ready if each in sentinels]
        if self._owner in ready:
            self._stopped = self._orphaned = True
        if self._control in ready:
            try:
                self._finish = self._control.recv() == "finish"
                self._stopped = self._stopped or not self._finish
            except (EOFError, OSError):
                self._listening = False
                self._stopped = self._stopped or not self._finish
        for each in ready:
            if each in links and links[each] not in lost:  # type: ignore[index]
                hand = links[each]  # type: ignore[index]
                with contextlib.suppress(EOFError, ConnectionResetError):
                    self._hear(hand)
                    while hand.link.poll():
                        self._hear(hand)
        for hand in lost:
            self._lose(hand)

    def _go_on(self) -> None:
        """Lets tasks make further blocks, where there is room."""
        for hand in self._hands:
            if not hand.owed or not hand.orders:
                continue
            last = hand.orders[0].operator is self._operators[-1]
            stuck = all(not other.orders or other.owed >= _CREDIT for other in self._hands)
            if (stuck and self._outlet.wanting()) or (
                self._room_for(0, last) and not (last and self._outlet.full())
            ):
                for _ in range(hand.owed):
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        hand.link.send(None)
                hand.owed = 0

    def _clear(self) -> None:
        """Nobody will come for what is left."""
        for key in self._store.keys(self._job.prefix):
            with contextlib.suppress(KeyError):
                self._store.remove(key)

    def statistics(self) -> dict[str, Any]:
        info = self._store.info()
        return {
            "seconds": time.monotonic() - self._began,
            "limit": self.limit,
            "most": self.most,
            "spills": info["spills"] - self._before["spills"],
            "restores": info["restores"] - self._before["restores"],
            "stages": [vars(operator.progress) for operator in self._operators],
        }

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told > _TELL:
            self._told = now
            with contextlib.suppress(PoolFullError):
                self._store.save(
                    self._job.prefix + "statistics",
                    self.statistics(),
                    overwrite=True,
                    policy="pin",
                    timeout=0,
                )

    def _say(self, name: str, value: dict[str, Any]) -> None:
        """Save a word for consumers; nobody who waits for room for it misses the owner's death."""
        while True:
            try:
                self._store.save(name, value, overwrite=True, policy="pin", timeout=_TELL)
                return
            except PoolFullError:
                if multiprocessing.connection.wait([self._owner], 0):
                    self._orphaned = self._stopped = True
                    raise

    def close(self) -> None:
        for hand in self._hands:
            hand.process.terminate()
        deadline = time.monotonic() + _GRACE
        for hand in self._hands:
            hand.process.join(max(0.0, deadline - time.monotonic()))
            if hand.process.is_alive():
                hand.process.kill()
                hand.process.join()
        # An owner that has died may be seen to have closed its end of the pipe first.
        if self._stopped and not self._listening and multiprocessing.connection.wait([self._owner], _GRACE):
            self._orphaned = True
        if self._orphaned:  # the store has nobody who serves it, or will
            tidy(self._job.store)
            for _ in range(_TRIES):  # others of the store may be leaving it, and removing what is theirs
                shutil.rmtree(self._job.directory, ignore_errors=True)
                if not os.path.exists(self._job.directory):
                    break
                time.sleep(_DYING)


def _to_side(zipper: op.Zipper, side: int) -> Any:
    return lambda block: zipper.push_to(side, block)


def _hint(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "One that takes more memory than the machine or its cgroup has is killed like that: give smaller blocks, or fewer workers"
    return "Its last words are on stderr"
