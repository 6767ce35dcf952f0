"""subscribe(): the batches of a publisher, read where they are."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torchshm
from torchshm import _C, _values
from torchshm._store import Store
from torchshm.data import _channel
from torchshm.data._channel import HEAD, TAIL, Answer, Greeting, Header, Keys, Kind, Message, Said
from torchshm.data._slices import Slices
from torchshm.errors import StaleHandleError, StoreUnavailableError

_APPEAR = 10.0  # s; for a publisher to appear, where no timeout is given
_LOOK = 50_000_000  # ns; how often who waits for a batch looks whether the publisher is alive
_COPY_ON_WRITE = _values.MODES["c"]


class Subscription:
    """The batches of a publisher; made by :func:`subscribe`.

    Each ``for batch in subscription:`` gives one epoch, from where the subscription is; the one after the last epoch gives nothing.
    What is written to a batch stays in this process. A subscription belongs to the process that made it, and to one thread at a time.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        batch_size: int | None,
        drop_last: bool,
        timeout: float | None,
        label: str,
        allow_pickle: bool,
    ) -> None:
        self._name, self._store, self._core = name, store, store._core
        self._timeout, self._allow_pickle, self._pid = timeout, allow_pickle, os.getpid()
        self._slices = None if batch_size is None else Slices(batch_size)
        self._drop_last = drop_last
        self._ended = False
        self._begun = False  # the publisher has answered
        self._number = self._epoch = self._index = self._batches = self._missed = 0
        self._kept: tuple[Header, list[Any]] | None = None  # of a later epoch
        greeting = self._find()
        self._keys, self._slow = Keys(name, greeting.run), greeting.slow
        self._me = secrets.randbits(63)
        self._mark = self._keys.subscriber(self._me)
        self._core.save(self._mark, b"", [], False, 0, True, -1)
        self._say(Said.COME, os.getpid(), label)
        self._end = weakref.finalize(self, _leave, self._pid, self._core, self._control, self._me, self._mark)

    def _find(self) -> Greeting:
        """Open what a publisher has put up, waiting for one."""
        mark = _channel.publisher(self._name)
        patience = _APPEAR if self._timeout is None else self._timeout
        deadline = time.monotonic() + patience
        while True:
            bell = self._core.bell(mark)
            with contextlib.suppress(KeyError, StaleHandleError):
                text, ((block, generation),) = self._core.load(mark, 0)[:2]
                if _channel.alive(self._core, mark):
                    greeting = Greeting.of(text)
                    self._counters = _channel.counters(self._core.open(block, generation, 0))
                    self._control: Any = _C.Queue(greeting.queue)
                    return greeting
            left = deadline - time.monotonic()
            if left <= 0:
                raise StoreUnavailableError(
                    f"nothing is published as {self._name!r} in the store {self._store.name}, after {patience} s: "
                    f"torchshm.data.publish(loader, {self._name!r}) does it"
                )
            self._core.wait(mark, bell, min(int(left * 1e9), _LOOK))

    # ---- what there is to see

    @property
    def name(self) -> str:
        """What is subscribed to."""
        return self._name

    @property
    def position(self) -> tuple[int, int] | None:
        """Epoch and index of the published batch that comes next; None before the publisher has answered."""
        if not self._begun and not (self._end.alive and self._look_for_answer()):
            return None
        if self._kept is not None:
            return self._kept[0].epoch, self._kept[0].place
        return self._epoch, self._index

    @property
    def dropped(self) -> int:
        """How many published batches were missed so far."""
        return self._missed

    @property
    def behind(self) -> int:
        """How many batches, and ends of epochs, are published and not taken."""
        return int(self._counters[HEAD]) - self._number if self._begun and self._end.alive else 0

    @property
    def ended(self) -> bool:
        """Whether the last epoch has been given, or the publisher was closed."""
        return self._ended

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"at {self.position}"
        return f"<torchshm.data.Subscription {self._name!r}, {state}>"

    # ---- batches

    # What is yielded nothing here refers to any more: a consumer that deletes its batch frees it.

    def __iter__(self) -> Iterator[Any]:
        slices = self._slices
        if slices is None:
            yield from self._of_epoch()
            return
        while part := slices.take():
            yield part.pop()
        for batch in self._of_epoch():
            slices.add(batch)
            del batch
            while part := slices.take():
                yield part.pop()
        part = slices.flush()
        if part and not self._drop_last:
            yield part.pop()

    def _of_epoch(self) -> Iterator[Any]:
        """Published batches up to the end of the epoch."""
        while not self._ended:
            if self._kept is not None:
                (header, box), self._kept = self._kept, None
            else:
                header, box = self._take()
                if header.kind is Kind.END:
                    self._ended = True
                if header.kind is not Kind.BATCH:
                    self._epoch, self._index = header.epoch + 1, 0
                    return
                if header.epoch != self._epoch:  # the end of the epoch was among what was missed
                    self._epoch, self._index = header.epoch, header.place
                    self._kept = header, box
                    return
            self._epoch, self._index = header.epoch, header.place + 1
            yield box.pop()

    def _take(self) -> tuple[Header, list[Any]]:
        """The next entry, waiting for it, and its batch."""
        if os.getpid() != self._pid:
            raise RuntimeError("a subscription is for the process that made it: subscribe() in this one")
        if not self._end.alive:
            raise StoreUnavailableError(f"this subscription is closed: subscribe({self._name!r}) again")
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while not self._begun:
            bell = self._core.bell(self._keys.answer(self._me))
            if not self._look_for_answer():
                self._wait(self._keys.answer(self._me), bell, deadline)
        while True:
            key = self._keys.entry(self._number)
            bell = self._core.bell(key)
            try:
                text, blocks = self._core.load(key, _COPY_ON_WRITE)
                header, text = Header.of(text)
                if header.kind is Kind.FAILED:
                    self._end()
                    raise StoreUnavailableError(
                        f"the publisher of {self._name!r} has failed: {text.decode()}. When it runs again, subscribe({self._name!r})"
                    )
                box = []
                if header.kind is Kind.BATCH:
                    box.append(_values.rebuild(self._core, self._name, text, blocks, "c", self._allow_pickle))
            except (KeyError, StaleHandleError):
                tail = int(self._counters[TAIL])
                if tail > self._number:
                    self._skip_to(tail)
                else:
                    self._wait(key, bell, deadline)
                continue
            self._number += 1
            self._missed += header.batches - self._batches
            self._batches = header.batches + (header.kind is Kind.BATCH)
            self._say(Said.TAKEN, self._number)
            return header, box

    def _skip_to(self, tail: int) -> None:
        if self._slow == "wait":
            self._end()
            raise TimeoutError(
                f"nothing was taken here for longer than the publisher's timeout, and it has gone on: subscribe({self._name!r}) again"
            )
        self._number = tail

    def _look_for_answer(self) -> bool:
        key = self._keys.answer(self._me)
        try:
            header, answer = Answer.of(self._core.load(key, 0)[0])
        except KeyError:
            return False
        self._core.remove(key)
        self._number, self._begun = answer.number, True
        self._epoch, self._index, self._batches = header.epoch, header.place, header.batches
        return True

    def _wait(self, key: str, bell: int, deadline: float | None) -> None:
        """Sleep until the key may be there, and see to it that somebody is going to put it there."""
        self._core.wait(key, bell, _LOOK)
        if self._core.bell(key) != bell:
            return
        if not self._publisher_lives() and not self._core.contains(key):
            self._core.sweep()
            self._end()
            raise StoreUnavailableError(
                f"the publisher of {self._name!r} has gone without ending: when it runs again, subscribe({self._name!r})"
            )
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"nothing was published as {self._name!r} within {self._timeout} s")

    def _publisher_lives(self) -> bool:
        mark = _channel.publisher(self._name)
        try:
            found = self._core.find(mark)
        except KeyError:
            return False
        return (
            not found["abandoned"] and Keys(self._name, Greeting.of(found["text"]).run).run == self._keys.run
        )

    def _say(self, said: Said, number: int = 0, label: str = "") -> None:
        self._control.put_bytes(Message(said, self._me, number, self._missed, label.encode()).pack(), -1)

    # ---- the end

    def close(self) -> None:
        """Take no more. Batches that are here stay valid."""
        if os.getpid() == self._pid:
            self._end()
        self._control = self._counters = self._kept = self._slices = None

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _leave(pid: int, core: _C.Store, control: _C.Queue, me: int, mark: str) -> None:
    if os.getpid() == pid:  # not a forked child's
        core.remove(mark)
        control.put_bytes(Message(Said.GOING, me).pack(), -1)


def subscribe(
    name: str,
    *,
    batch_size: int | None = None,
    drop_last: bool = False,
    timeout: float | None = None,
    store: Store | str | None = None,
    label: str | None = None,
    allow_pickle: bool | None = None,
) -> Subscription:
    """Read the batches that another process of this machine publishes, in place.

    It begins with the batch that is published next.

    Parameters
    ----------
    name : str
        What :func:`publish` was called with.
    batch_size : int, optional
        Samples in a batch here, in the place of the publisher's. Batches are cut along the first dimension of their arrays and
        tensors, which are views; where one reaches over the end of a published batch, that one alone is a copy. Lists with a plain
        value for each sample are cut too; what is no array goes into all parts, of two batches joined that of the first. An epoch's last
        one may be smaller.
    drop_last : bool
        Leave that one out.
    timeout : float, optional
        Seconds to wait, for a publisher and then for each published batch. Default: ten seconds for a publisher, and for a batch as long
        as it lives.
    store : Store or str, optional
        Where the publisher has its batches, if it was told to. Default: the store of that name.
    label : str, optional
        For the publisher's list of consumers. Default: the program's name.
    allow_pickle : bool, optional
        Also take batches that need unpickling, which runs code that the publisher chose: all but plain values, arrays, tensors, and
        dicts, lists and tuples of them. Default: where nobody but this user may use the store.

    Returns
    -------
    Subscription

    Raises
    ------
    StoreUnavailableError
        When nothing is published under that name in time. By the iteration: when the publisher has died or failed.
    TimeoutError
        By the iteration: when no batch comes in time, or this consumer was left behind for being slow.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is a number of samples, 1 or more, not {batch_size}")
    if drop_last and batch_size is None:
        raise ValueError("drop_last is for a batch_size")
    begin = time.monotonic()
    patience = _APPEAR if timeout is None else timeout
    found = (
        store
        if isinstance(store, Store)
        else torchshm.connect(name if store is None else store, timeout=patience)
    )
    left = None if timeout is None else max(0.0, timeout - (time.monotonic() - begin))
    if allow_pickle is None:
        allow_pickle = _channel.private(found)
    label = os.path.basename(sys.argv[0] if sys.argv else "") or "python" if label is None else label
    made = Subscription(name, found, batch_size, drop_last, left, label, allow_pickle)
    made._timeout = timeout
    return made
