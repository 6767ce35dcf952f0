"""Publisher: one loader whose batches several processes of this machine read in place."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import struct
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from queue import Empty
from typing import Any, NamedTuple

from torchshm import _C, _values
from torchshm._store import Store
from torchshm.data import _channel
from torchshm.data._channel import HEAD, TAIL, Answer, Greeting, Header, Keys, Kind, Message, Said
from torchshm.errors import KeyExistsError, PoolFullError

_FAREWELL = 10.0  # s; how long close() waits for subscribers where the publisher has no timeout
_CONDOLENCE = 1.0  # s; the same after an error, for those that are just waiting
_FULL = 10.0  # s; how long to wait for room in the store, where the publisher has no timeout
_LOOK = 20_000_000  # ns; how often a publisher that waits for somebody looks whether they are alive
_ROUND = 1.0  # s; how often a publisher that waits for nobody looks for the dead


class Consumer(NamedTuple):
    """A subscription, as its publisher sees it."""

    label: str
    pid: int
    lag: int
    """Batches, and ends of epochs, that are published and that it has not taken."""
    dropped: int
    """Batches that it has missed."""


class _Subscriber:
    __slots__ = ("label", "missed", "moved", "number", "pid")

    def __init__(self, number: int, pid: int, label: str) -> None:
        self.number, self.pid, self.label = number, pid, label  # number: of the entry that it takes next
        self.missed = 0
        self.moved = time.monotonic()


class _Stopped(Exception):
    """Another thread has called close()."""


class Publisher:
    """One loader for all that subscribe to a name; made by :func:`publish`.

    :meth:`run` publishes here and now, :meth:`start` in a thread. ``for batch in publisher:`` publishes one epoch, and gives each batch
    here too, as a subscriber gets it. As a context manager it closes itself.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        name: str,
        store: Store,
        owned: bool,
        slow: str,
        ahead: int,
        min_consumers: int,
        epochs: int | None,
        timeout: float | None,
    ) -> None:
        self._loader, self._name, self._store = loader, name, store
        self._slow, self._ahead, self._epochs, self._timeout = slow, ahead, epochs, timeout
        self._awaited = min_consumers
        self._core, self._pid = store._core, os.getpid()
        self._control: Any = _C.Queue(0)
        greeting = Greeting(secrets.token_hex(8), self._control.handle(), self._pid, slow)
        _C.Queue(
            greeting.queue
        )  # takes the handle's ticket: those who have the queue keep it, and not the handle
        block = self._core.blank(_channel.COUNTERS_BYTES)
        ref: Any = block.base
        self._counters = _channel.counters(block)
        self._counters[:] = 0
        self._keys = Keys(name, greeting.run)
        self._subscribers: dict[int, _Subscriber] = {}
        self._head = self._tail = 0  # as the counters
        self._epoch = self._index = self._batches = 0  # of the next batch
        self._in_epoch = self._ended = self._stopping = False
        self._looked = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        mark = _channel.publisher(name)
        while True:
            try:
                self._core.save(mark, greeting.text(), [ref], False, 0, True, -1)
                break
            except KeyExistsError:
                if _channel.alive(self._core, mark):
                    raise KeyExistsError(
                        f"something is being published as {name!r} already: subscribe to it, or take another name"
                    ) from None
                self._core.sweep()  # what the one before has left
        self._owned = owned
        self._end = weakref.finalize(self, _take_down, self._pid, self._core, mark, self._keys)

    # ---- what there is to see

    @property
    def name(self) -> str:
        """What to subscribe to."""
        return self._name

    @property
    def store(self) -> Store:
        """Where the batches are."""
        return self._store

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and index of the batch that is published next."""
        return self._epoch, self._index

    @property
    def consumers(self) -> list[Consumer]:
        """Those that are subscribed, in the order of coming, as of when the last batch was published."""
        return [
            Consumer(s.label, s.pid, self._head - s.number, s.missed)
            for s in list(self._subscribers.values())
        ]

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"{len(self._subscribers)} consumers"
        return f"<torchshm.data.Publisher {self._name!r}, {state}, at {self.position}>"

    # ---- publishing

    def run(self) -> None:
        """Publish all epochs; return when the subscribers have taken everything, or have gone.

        Raises
        ------
        TimeoutError
            When nobody subscribes within the publisher's `timeout`.
        PoolFullError
            When the store has no room for a batch, and consumers make none within that time (ten seconds, where there is none).
        """
        if self._thread is not None and self._thread is not threading.current_thread():
            raise RuntimeError("a thread publishes this already: join() waits for it")
        with contextlib.suppress(_Stopped):
            while self._epochs is None or self._epoch < self._epochs:
                batches = self._batches
                for _ in self._one_epoch(False):
                    pass
                if self._batches == batches and self._epochs is None:
                    raise ValueError("the loader has no batches: nothing can be published without end")
                self._end_epoch(last=self._epoch + 1 == self._epochs)
            if not self._ended:
                self._put(Kind.END)
            self._see_off(math.inf if self._timeout is None else self._timeout)
            self._end()

    def __iter__(self) -> Iterator[Any]:
        """Publish one epoch, and give its batches here too."""
        if self._thread is not None:
            raise RuntimeError("a thread publishes this already: subscribe() to it")
        yield from self._one_epoch(True)
        self._end_epoch()

    def _one_epoch(self, views: bool) -> Iterator[Any]:
        if self._ended or not self._end.alive:
            raise RuntimeError(f"publishing as {self._name!r} has ended: publish() again")
        self._end_epoch()  # one that was left early
        with self._telling():
            self._in_epoch = True
            for batch in self._loader:
                text, refs = self._placed(batch)
                del batch
                self._wait_for_room()
                view = self._put(Kind.BATCH, text, refs, views)
                del refs
                if views:
                    yield view
                del view

    def _placed(self, batch: Any) -> Any:
        """A batch in the store, when those who hold all of it let go of something."""
        patience = _FULL if self._timeout is None else self._timeout
        began = time.monotonic()
        while True:
            try:
                return _values.describe(self._core, batch)
            except _values.TooLargeError:
                raise
            except PoolFullError:
                if not self._subscribers or time.monotonic() - began > patience:
                    raise
            if self._stopping:
                raise _Stopped
            self._hear(_LOOK)
            self._bury()

    def _end_epoch(self, last: bool = False) -> None:
        if self._in_epoch:
            self._put(Kind.END if last else Kind.EPOCH)

    def start(self) -> Publisher:
        """Do in a thread what :meth:`run` does. Returns the publisher; :meth:`join` or :meth:`close` it before the program ends."""
        if self._thread is not None:
            raise RuntimeError("this publisher has been started already")
        self._thread = threading.Thread(target=self._work, name=f"publish {self._name}", daemon=True)
        self._thread.start()
        return self

    def _work(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread, `timeout` seconds at most; whether it has ended. Raises what made it fail."""
        if self._thread is None:
            raise RuntimeError("this publisher has not been started")
        self._thread.join(timeout)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return not self._thread.is_alive()

    def close(self) -> None:
        """End publishing: subscribers get what is published, and then the end.

        Waits for them, but not for those that take nothing for as long as the publisher's `timeout`, ten seconds where it has none.
        A loader that is just making a batch in :meth:`start`'s thread is waited for. What made that thread fail is raised here, if it
        has not been by :meth:`join`.
        """
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child
        if self._thread is not None and self._thread is not threading.current_thread():
            self._stopping = True
            if self._thread.is_alive():
                self._control.put_bytes(Message(Said.NOTHING).pack(), -1)
            self._thread.join()
            self._stopping = False
        try:
            if self._end.alive and error is not None:
                self._fail(error)
            elif self._end.alive:
                if not self._ended:
                    self._put(Kind.END)
                self._see_off(_FAREWELL if self._timeout is None else self._timeout)
        finally:
            self._ended = True
            self._end()
            self._subscribers.clear()
            self._control = self._counters = None
            if self._owned:
                self._store.close()
        if error is None and self._error is not None:
            self.join()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._close(error)

    # ---- entries

    def _put(self, kind: Kind, text: bytes = b"", refs: list[Any] | None = None, view: bool = False) -> Any:
        """Publish one entry, at once. Returns what a subscriber gets, if asked for."""
        key = self._keys.entry(self._head)
        header = Header(kind, self._epoch, self._index, self._batches)
        self._core.save(key, header.before(text), refs or [], False, 0, True, -1)
        value = None
        if view:
            text, blocks = self._core.load(key, _values.MODES["c"])
            value = _values.rebuild(self._core, key, Header.of(text)[1], blocks, "c", True)
        if kind is Kind.BATCH:
            self._index += 1
            self._batches += 1
        else:
            self._in_epoch = False
            self._epoch, self._index = self._epoch + 1, 0
            self._ended = kind is not Kind.EPOCH
        self._head += 1
        self._counters[HEAD] = self._head
        self._hear(0)
        if time.monotonic() - self._looked > _ROUND:
            self._bury()
        return value

    def _trim(self) -> None:
        """Let go of what nobody is going to take."""
        numbers = [s.number for s in self._subscribers.values()] or [self._head - self._ended]
        low = min(numbers)
        if self._slow == "drop":
            low = max(low, max(numbers) - self._ahead)
        if low > self._tail:
            gone, self._tail = range(self._tail, low), low
            self._counters[TAIL] = low  # before, so that who does not find its entry knows why
            for number in gone:
                self._core.remove(self._keys.entry(number))

    def _blocking(self) -> list[int]:
        """Those that have to take something before there is room for one more batch."""
        behind = [i for i, s in self._subscribers.items() if self._head - s.number >= self._ahead]
        return behind if self._slow == "wait" or len(behind) == len(self._subscribers) else []

    def _wait_for_room(self) -> None:
        began = time.monotonic()
        self._hear(0)
        while True:
            if self._stopping:
                raise _Stopped
            few = len(self._subscribers) < self._awaited
            blocking = self._blocking()
            if not few and not blocking:
                self._awaited = min(self._awaited, 1)
                return
            if self._timeout is not None:
                late = time.monotonic() - self._timeout
                if few and began < late:
                    raise TimeoutError(
                        f"{len(self._subscribers)} of {self._awaited} consumers have subscribed to {self._name!r} within "
                        f"{self._timeout} s"
                    )
                self._give_up([i for i in blocking if max(began, self._subscribers[i].moved) < late])
            self._hear(_LOOK)
            self._bury()

    def _see_off(self, patience: float) -> None:
        """Wait until everything is taken, or nobody has taken anything for so many seconds."""
        began = time.monotonic()
        while left := [i for i, s in self._subscribers.items() if s.number < self._head]:
            if self._stopping:
                return
            late = time.monotonic() - patience
            self._give_up([i for i in left if max(began, self._subscribers[i].moved) < late])
            self._hear(_LOOK)
            self._bury()

    # ---- subscribers

    def _hear(self, nanoseconds: int) -> None:
        """Read what subscribers say, waiting for something so long."""
        with contextlib.suppress(Empty):
            while True:
                data = self._control.get_bytes(nanoseconds)
                nanoseconds = 0
                with contextlib.suppress(ValueError, struct.error):  # from somebody else
                    self._react(Message.of(data))
        self._trim()

    def _react(self, message: Message) -> None:
        who = message.subscriber
        if message.said is Said.COME:
            if who in self._subscribers or not _channel.alive(self._core, self._keys.subscriber(who)):
                return
            label = message.label.decode("utf-8", "replace")
            begin = self._head - self._ended  # the end itself, or how it came
            self._subscribers[who] = _Subscriber(begin, message.number, label)
            answer = Answer(begin).text(Header(Kind.BATCH, self._epoch, self._index, self._batches))
            self._core.save(self._keys.answer(who), answer, [], True, 0, True, -1)
        elif message.said is Said.GOING:
            self._give_up([who])
        elif who in self._subscribers:
            known = self._subscribers[who]
            known.number = min(max(known.number, message.number), self._head)
            known.missed, known.moved = message.missed, time.monotonic()

    def _give_up(self, who: list[int]) -> None:
        """Wait for them no more, and keep nothing for them."""
        for each in who:
            if self._subscribers.pop(each, None) is not None:
                self._core.remove(self._keys.answer(each))
        if who:
            self._trim()

    def _bury(self) -> None:
        self._looked = time.monotonic()
        dead = [i for i in self._subscribers if not _channel.alive(self._core, self._keys.subscriber(i))]
        if dead:
            self._core.sweep()
            self._give_up(dead)

    # ---- errors

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (GeneratorExit, _Stopped):
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if self._ended:
            return
        self._put(Kind.FAILED, f"{type(error).__name__}: {error}".encode())
        if isinstance(error, Exception):
            self._see_off(_CONDOLENCE)
        self._end()  # nobody is going to listen


def _take_down(pid: int, core: _C.Store, mark: str, keys: Keys) -> None:
    if os.getpid() != pid:  # a forked child's
        return
    core.remove(mark)
    for key in core.keys(keys.run):
        if not keys.is_subscribers(key):
            core.remove(key)
