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
import signal
import time
from collections.abc import Sequence
from typing import Any

from torchshm.data.blocks import _home
from torchshm.data.blocks import _operators as op
from torchshm.data.blocks._hands import CREDIT, Doing, Hand, hire
from torchshm.data.blocks._job import Job
from torchshm.data.blocks._outlet import Outlet, alive, begun
from torchshm.data.blocks._plan import Step
from torchshm.data.blocks._recipes import GoOn, Made, Outcome, Task
from torchshm.data.blocks._shuffler import Shuffler
from torchshm.data.blocks._sources import Source
from torchshm.data.blocks._tasks import Kitchen
from torchshm.data.blocks._worker import failure
from torchshm.errors import PoolFullError

_CONNECT = 30.0  # s
_LOOK = 0.002  # s between looks at what consumers have taken
_WATCH = 0.25  # s between looks at anything else
_TELL = 0.2  # s between statistics
_GRACE = 1.0  # s for a worker to end by itself
# Tasks of a stage for each worker: where one takes long, what others make after it only lies there.
_BEHIND = 3
_DEEP = 4  # tasks of one worker, of which all but one wait
# Of the store's limit, what may be in use when a task is begun: of the last stage, of those before.
_ROOM, _EARLY = 0.9, 0.65


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
    try:
        watch = os.pidfd_open(owner)
    except ProcessLookupError:
        _home.tidy_after(job.store, job.directory)
        return
    executor = None
    try:
        control.send(("begun",))
        executor = Executor(job, control, watch)
        control.send(("ready", job.limit))
        executor.run()
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):
            control.send(("failed", *failure(error)))
    finally:
        if executor is not None:
            executor.close()
        # An owner that dies closes its end of the pipe first.
        gone = executor is None or not executor.listening
        if multiprocessing.connection.wait([watch], _GRACE if gone else 0):
            _home.tidy_after(job.store, job.directory)


class Executor:
    """Gives tasks to workers, and what they make to consumers."""

    def __init__(self, job: Job, control: Any, owner: int) -> None:
        """owner: a descriptor of its process."""
        self._job, self._control = job, control
        self._owner = owner
        self._store = _home.client(job.store, _CONNECT)
        # Free when this process has gone, however it went.
        self._alive = self._store._core.lock(alive(job.prefix))
        self._alive.try_acquire(False)
        self._say(begun(job.prefix), {})
        self._hands: list[Hand] = []
        self._live: dict[str, op.Block] = {}
        self._bytes = self._promised = self._most = 0
        self._numbers = 0
        self._stopped = False
        self._began = time.monotonic()
        self._told = 0.0
        self._before = self._store.info()
        self._finish = False
        self.listening = True
        self._recipes: list[tuple[Source | None, Sequence[Step]]] = [
            (None if stage.source is None else stage.source.plan(job.target), stage.steps)
            for stage in job.stages
        ]
        # Sources of one task that may go on for ever.
        self._streams = {
            index
            for index, (source, _) in enumerate(self._recipes)
            if source is not None and len(source) == 1 and source.nbytes(0) is None
        }
        self._outlet: Outlet
        self._outlets: list[Outlet] = []  # of epochs before, of which somebody has not taken everything
        self._begin(job.epoch)
        for number in range(max(job.workers, len(self._streams))):
            self._hands.append(self._hire(number))

    # ---- the plan

    def _begin(self, epoch: int) -> None:
        """Put up the operators of an epoch."""
        job = self._job
        self._operators: list[op.Operator] = []
        # What is before a zip, of each of its sides.
        self._sides: list[tuple[op.Zipper, int, set[int]]] = []
        above: list[set[int]] = []  # of each stage, those before it, and itself
        for index, stage in enumerate(job.stages):
            made = self._operator(index, epoch)
            above.append({index}.union(*(above[before] for before in stage.inputs)))
            for side, before in enumerate(stage.inputs):
                self._connect(self._operators[before], made, side)
                if isinstance(made, op.Zipper):
                    self._sides.append((made, side, above[before]))
            self._operators.append(made)
        self._before_each = [stages - {index} for index, stages in enumerate(above)]
        if epoch != job.epoch:
            self._outlets.append(self._outlet)
        self._outlet = Outlet(
            self._store, self._say, f"{job.prefix}{epoch}", job.shards, job.equal, job.ahead, self._release
        )
        last = self._operators[-1]
        last.follower, last.after_end = self._outlet.push, self._outlet.end
        # What only passes on has no tasks.
        self._last = next(each for each in reversed(self._operators) if not isinstance(each, op.Repeater))

    def _operator(self, index: int, epoch: int) -> op.Operator:
        job, stage, source = self._job, self._job.stages[index], self._recipes[index][0]
        first = epoch * max([each or 1 for each in job.epochs.values()], default=1)
        common = (index, stage.label, self._release, job.target, job.seed)
        if source is not None:
            sizes = [source.nbytes(number) for number in range(len(source))]
            return op.Reader(*common, sizes, job.epochs.get(index, 1), first, job.workers * 2, source.done)
        if stage.kind == "shuffle":
            drawn = job.seed if stage.seed is None else stage.seed
            return Shuffler(*common, drawn, job.window(stage.window), stage.window is not None, first)
        if stage.kind == "repartition":
            return op.Regrouper(*common, stage.rows, stage.blocks, first)
        if stage.kind == "zip":
            return op.Zipper(*common, first)
        return op.Repeater(*common, stage.times)

    @staticmethod
    def _connect(above: op.Operator, below: op.Operator, side: int) -> None:
        if isinstance(below, op.Zipper):
            above.follower = lambda block: below.push_to(side, block)
            above.after_flush = lambda epoch: below.flush_to(side, epoch)
            above.after_end = lambda: below.end_of(side)
        else:
            above.follower, above.after_flush, above.after_end = below.push, below.flush, below.end

    def _held(self) -> set[int]:
        """Stages whose blocks would only wait: for those of the other side of a zip, or for a stage that has enough to do."""
        held: set[int] = set()
        for operator in self._operators:
            if operator.crowded():
                held |= self._before_each[operator.index]
        for zipper, side, before in self._sides:
            if zipper.ahead(side):
                held |= before
        return held

    # ---- memory

    def _release(self, block: op.Block) -> None:
        if self._live.pop(block.key, None) is not None:
            self._bytes -= block.nbytes
            with contextlib.suppress(KeyError):
                self._store.remove(block.key)

    def _may_make(self, operator: op.Operator, nbytes: int) -> bool:
        """Whether there is room for so much more of a stage, and somebody to take it."""
        last = operator is self._last
        if last and self._outlet.full():
            return False
        used = self._bytes - sum(each.aside for each in self._operators) + self._promised
        return used + nbytes <= (_ROOM if last else _EARLY) * self._job.limit

    # ---- workers

    def _hire(self, number: int) -> Hand:
        others = [hand.link for hand in self._hands if not hand.link.closed]
        return hire(number, Kitchen(self._store, self._recipes), [*others, self._control])

    def _replace(self, hand: Hand) -> None:
        """Another worker in place of one that has died."""
        self._hands[hand.number] = self._hire(hand.number)
        hand.close()

    def _choose(self, order: op.Order) -> Hand | None:
        """Of those that have nothing to do, the worker that made the largest part of what goes in; else of those that wait to go on with
        an earlier stage."""
        free = [hand for hand in self._hands if not hand.doing] or [
            hand
            for hand in self._hands
            if hand.stuck and len(hand.doing) < _DEEP and self._may_be_put_before(hand.doing[-1].order, order)
        ]
        made = dict.fromkeys((hand.number for hand in free), 0)
        for block in order.inputs:
            if block.maker in made:
                made[block.maker] += block.nbytes
        return max(free, key=lambda hand: made[hand.number], default=None)

    def _may_be_put_before(self, stuck: op.Order, order: op.Order) -> bool:
        """Whether one that waits to go on can wait for that order: it is of a later stage, or of the other side of a zip, and ends."""
        earlier, later = stuck.operator.index, order.operator.index
        if earlier in self._before_each[later]:
            return True
        return earlier != later and later not in self._before_each[earlier] and later not in self._streams

    def _starving(self) -> bool:
        """Whether a consumer has nothing and nobody works at it: then something is done whether there is room or not."""
        return self._outlet.wanting() and not any(hand.working for hand in self._hands)

    def _dispatch(self) -> None:
        while (order := self._next_order()) is not None and (hand := self._choose(order)) is not None:
            order.operator.waiting.remove(order)
            self._give(hand, order)

    def _next_order(self) -> op.Order | None:
        """The last stage that can do something: what is nearest to being done with comes first."""
        starving, held = self._starving(), self._held()
        for operator in reversed(self._operators):
            operator.refill()
            if starving and any(
                hand.stuck and hand.doing[-1].order.operator is operator for hand in self._hands
            ):
                return None  # one of its tasks goes on, before another one takes memory too
            if operator.waiting and operator.index not in held:
                order = operator.waiting[0]
                if starving or (
                    operator.behind() < _BEHIND * len(self._hands)
                    and self._may_make(operator, order.estimate + order.takes_up)
                ):
                    return order
        return None

    def _give(self, hand: Hand, order: op.Order) -> None:
        if order.number < 0:
            order.operator.underway += 1
            order.number = self._numbers
            self._numbers += 1
        order.attempts += 1
        order.begun = True
        order.operator.aside -= order.takes_up
        order.takes_up = 0
        task = Task(
            number=order.number,
            attempt=order.attempts,
            stage=order.operator.index,
            recipe=order.recipe,
            seed=order.seed,
            prefix=f"{self._job.prefix}b{order.number}.{order.attempts}.",
            plain=order.plain,
            whole=order.whole,
            target=self._job.target,
            skip=len(order.made),
        )
        hand.doing.append(Doing(order))
        self._promised += order.estimate
        hand.send((task, CREDIT))

    def _go_on(self) -> None:
        """Let tasks make further blocks, where there is room; where nothing else goes on, one of the last stage that has any."""
        held = self._held()
        for hand in self._hands:
            if hand.doing and hand.doing[-1].owed:
                operator = hand.doing[-1].order.operator
                if operator.index not in held and self._may_make(operator, 0):
                    self._let_go_on(hand)
        if self._starving():
            stuck = [hand for hand in self._hands if hand.stuck]
            free = [hand for hand in stuck if hand.doing[-1].order.operator.index not in held] or stuck
            if free:
                self._let_go_on(max(free, key=lambda hand: self._urgency(hand.doing[-1].order)))

    @staticmethod
    def _urgency(order: op.Order) -> tuple[int, int]:
        return order.operator.index, -order.number

    def _let_go_on(self, hand: Hand) -> None:
        doing = hand.doing[-1]
        hand.send(GoOn(doing.order.number, doing.owed))
        doing.owed = 0

    def _hear(self, hand: Hand) -> None:
        try:
            message = hand.link.recv()
        except OSError as error:  # cut off by its death in the middle
            raise EOFError from error
        doing = hand.doing[-1]
        order = doing.order
        if isinstance(message, Made):
            block = op.Block(message.key, message.rows, message.nbytes, hand.number)
            self._live[block.key] = block
            self._bytes += block.nbytes
            self._most = max(self._most, self._bytes)
            kept = min(order.estimate, block.nbytes)  # of what was promised to it
            order.estimate -= kept
            self._promised -= kept
            doing.owed += 1
            order.operator.made(order, block)
            return
        assert isinstance(message, Outcome)
        hand.doing.pop()
        self._promised -= order.estimate
        if message.error is not None:
            raise Failure(*message.error)
        progress = order.operator.progress
        progress.rows_in += message.rows_in
        progress.bytes_in += message.bytes_in
        if not order.inner:
            order.operator.taken_in += message.bytes_in
        progress.seconds += message.seconds
        order.operator.done(order)

    def _lose(self, hand: Hand) -> None:
        """A worker has died. What it was at is done again by others, from the block on that is missing."""
        with contextlib.suppress(OSError, EOFError):
            while hand.doing and hand.link.poll():  # what it said before it died
                self._hear(hand)
        hand.process.join()
        code = hand.process.exitcode
        lost, hand.doing = [doing.order for doing in hand.doing], []
        self._replace(hand)
        for order in lost:
            self._promised -= order.estimate
            self._forget_untold(order)
        if lost:
            begun = lost[-1]
            begun.operator.progress.retries += 1
            if begun.attempts > self._job.retries:
                raise RuntimeError(
                    f"task {begun.number} of stage {begun.operator.index}, {begun.operator.progress.label}, was begun "
                    f"{begun.attempts} times, and each time the worker died; the last one by {_how(code)}. {_hint(code)}"
                )
        for order in lost[:-1]:  # they only waited
            order.attempts -= 1
        for order in lost:
            order.begun = False
            order.operator.waiting.appendleft(order)

    def _forget_untold(self, order: op.Order) -> None:
        """Remove what its worker saved and did not live to tell."""
        told = {block.key for block in order.made}
        for key in self._store.keys(f"{self._job.prefix}b{order.number}.{order.attempts}."):
            if key not in told:
                with contextlib.suppress(KeyError):
                    self._store.remove(key)

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
                    if multiprocessing.connection.wait([self._owner], _LOOK):
                        self._stopped = True
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
            if self._outlet.left():
                self._abandon()
                return
            self._dispatch()
            self._go_on()
            self._tell()
            if self._outlet.over():
                self._tell(at_once=True)
                self._outlet.close(self.statistics())
                return
            self._wait(_LOOK if self._outlet.waiting() else _WATCH)

    def _abandon(self) -> None:
        """Nobody wants the rest of this epoch."""
        deadline = time.monotonic() + _GRACE
        while any(hand.working for hand in self._hands) and time.monotonic() < deadline and not self._stopped:
            with contextlib.suppress(Failure):  # of what nobody wants any more
                self._wait(_LOOK)
        for hand in self._hands:
            if hand.doing:
                hand.kill()
                for doing in hand.doing:
                    self._forget_untold(doing.order)
                self._replace(hand)
        self._promised = 0
        announced = {block.key for outlet in self._outlets for block in outlet.blocks()}
        for block in [each for each in self._live.values() if each.key not in announced]:
            self._release(block)

    def _wait(self, seconds: float) -> None:
        links = {hand.link: hand for hand in self._hands}
        deaths = {hand.death: hand for hand in self._hands}
        control = [self._control] if self.listening else []
        ready = multiprocessing.connection.wait([*links, *deaths, *control, self._owner], seconds)
        lost = [deaths[each] for each in ready if each in deaths]
        if self._owner in ready:
            self._stopped = True
        if self._control in ready:
            try:
                self._finish = self._control.recv() == "finish"
                self._stopped = self._stopped or not self._finish
            except (EOFError, OSError):
                self.listening = False
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

    def _clear(self) -> None:
        """Nobody will come for what is left."""
        for key in self._store.keys(self._job.prefix):
            with contextlib.suppress(KeyError):
                self._store.remove(key)

    # ---- what it says

    def statistics(self) -> dict[str, Any]:
        info = self._store.info()
        return {
            "seconds": time.monotonic() - self._began,
            "limit": self._job.limit,
            "most": self._most,
            "spills": info["spills"] - self._before["spills"],
            "restores": info["restores"] - self._before["restores"],
            "stages": [vars(operator.progress) for operator in self._operators],
        }

    def _tell(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._told > _TELL:
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
                if multiprocessing.connection.wait([self._owner, self._control], 0):
                    raise

    def close(self) -> None:
        for hand in self._hands:
            hand.process.terminate()
        deadline = time.monotonic() + _GRACE
        for hand in self._hands:
            if not hand.ended(max(0.0, deadline - time.monotonic())):
                hand.kill()


def _how(code: int | None) -> str:
    return f"signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"exit code {code}"


def _hint(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "One that takes more memory than the machine or its cgroup has is killed like that: give smaller blocks, or fewer workers"
    if code == -signal.SIGBUS:
        return "One that reads a mapped file which becomes shorter is killed like that: write a new file, and rename it, in place of that"
    return "Its last words are on stderr"
