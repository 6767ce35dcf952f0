"""An exchange: a sender and a receiver between which one carrier carries one array, and its clock.

The loop is the same for every carrier. Messages go one way; at most a window of them is under
way, and the receiver acknowledges every half window through a pipe of its own. The time of a
message is that of the whole run (first send to last acknowledgement, so everything has been
received and released by then) divided by the number of messages.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection

import numpy as np

from benchmarks.carriers import CARRIERS
from benchmarks.carriers.carrier import Bytes, Carrier
from benchmarks.page import touch_pages
from benchmarks.units import MIB

LARGEST = 64 * MIB
"""No message is larger."""

MOST_IN_FLIGHT = 8
MOST_BYTES_IN_FLIGHT = 16 * MIB
"""Eight messages let both ends work at once (with 32 nothing gets faster here); large ones are
fewer, so that all blocks in flight and the source stay in a cache of 32 MiB where they can, as in
a consumer that keeps up. Never fewer than two: one is filled while the other is used."""


def window_for(nbytes: int) -> int:
    """How many messages of `nbytes` may be under way at once."""
    return max(2, min(MOST_IN_FLIGHT, MOST_BYTES_IN_FLIGHT // nbytes))


def content_of(nbytes: int) -> Bytes:
    """The array that is sent; a pattern with a prime period, so that a shifted block shows."""
    return np.resize(np.random.default_rng(0).integers(0, 256, 8191, dtype=np.uint8), nbytes)


class Exchange:
    """The sender's end; constructing it forks the receiver."""

    def __init__(self, carrier: str) -> None:
        self._carrier = CARRIERS[carrier]()
        self._carrier.open(2 * LARGEST)
        self._window = 1
        if not self._carrier.crosses:
            return
        context = multiprocessing.get_context("fork")
        receiving, self._link = context.Pipe(duplex=False)
        self._acks, acking = context.Pipe(duplex=False)
        ordered, self._orders = context.Pipe(duplex=False)
        ours = (self._link, self._acks, self._orders)
        self._receiver = context.Process(
            target=_receive, args=(self._carrier, receiving, acking, ordered, ours), daemon=True
        )
        self._receiver.start()
        for theirs in (receiving, acking, ordered):
            theirs.close()

    def load(self, nbytes: int) -> None:
        """Makes `nbytes` the size from here on, and sends one message whose content is checked."""
        content = content_of(nbytes)
        self._window = window_for(nbytes)
        self._carrier.load(content, self._window)
        if not self._carrier.crosses:
            self._carrier.send(self._nowhere)
            if not np.array_equal(self._carrier.view(self._carrier.receive(self._nowhere)), content):
                raise AssertionError("the array arrived damaged")
            return
        self._orders.send(("load", nbytes))
        self._wait()
        self._carrier.send(self._link)
        self._wait()

    def run(self, messages: int, touch: bool) -> float:
        """Seconds per message over `messages`, rounded up to whole windows.

        With `touch` the receiver reads one byte of every page, otherwise nothing.
        """
        window = self._window
        messages = -(-messages // window) * window
        if not self._carrier.crosses:
            return self._run_alone(messages, touch)
        send, link = self._carrier.send, self._link
        half = window // 2
        self._orders.send(("take", messages, half, touch))
        self._wait()
        credit = window
        begin = time.perf_counter()
        for _ in range(messages):
            if not credit:
                self._wait()
                credit = half
            send(link)
            credit -= 1
        while credit < window:
            self._wait()
            credit += half
        return (time.perf_counter() - begin) / messages

    def close(self) -> None:
        if self._carrier.crosses:
            self._orders.close()
            self._link.close()
            self._receiver.join(5)
        self._carrier.close()

    _nowhere: Connection = None  # type: ignore[assignment]  # a carrier that does not cross uses no link

    def _run_alone(self, messages: int, touch: bool) -> float:
        carrier = self._carrier
        begin = time.perf_counter()
        for _ in range(messages):
            carrier.send(self._nowhere)
            received = carrier.receive(self._nowhere)
            if touch:
                touch_pages(carrier.view(received))
            carrier.release(received)
            del received
        return (time.perf_counter() - begin) / messages

    def _wait(self) -> None:
        ack = self._acks.recv_bytes()
        if ack:
            raise RuntimeError(f"the receiver failed:\n{ack.decode()}")


def _receive(
    carrier: Carrier, link: Connection, acks: Connection, orders: Connection, senders: tuple[Connection, ...]
) -> None:
    """The receiver's process: an empty acknowledgement is good news, any other is a traceback."""
    for connection in senders:
        connection.close()  # or the death of the sender would not end this process
    try:
        carrier.adopt()
        while True:
            try:
                order, *arguments = orders.recv()
            except EOFError:
                return
            if order == "load":
                _check(carrier, link, acks, *arguments)
            else:
                _take(carrier, link, acks, *arguments)
    except Exception:
        acks.send_bytes(traceback.format_exc().encode())


def _check(carrier: Carrier, link: Connection, acks: Connection, nbytes: int) -> None:
    content = content_of(nbytes)
    carrier.expect(nbytes, window_for(nbytes))
    acks.send_bytes(b"")
    received = carrier.receive(link)
    if not np.array_equal(carrier.view(received), content):
        raise AssertionError("the array arrived damaged")
    carrier.release(received)
    acks.send_bytes(b"")


def _take(
    carrier: Carrier, link: Connection, acks: Connection, messages: int, half: int, touch: bool
) -> None:
    receive, release, view = carrier.receive, carrier.release, carrier.view
    acks.send_bytes(b"")
    for number in range(1, messages + 1):
        received = receive(link)
        if touch:
            touch_pages(view(received))
        release(received)
        del received
        if not number % half:
            acks.send_bytes(b"")
