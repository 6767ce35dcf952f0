"""Threads that pickle, receive, allocate and drop at once stay correct, and large copies do not hold the GIL."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
from peer import Peer, give

import torchshm

pytestmark = pytest.mark.usefixtures("registered")


def in_threads(count, work):
    errors = []
    start = threading.Barrier(count)

    def run(seed):
        try:
            start.wait()
            work(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def sample(seed, number):
    sizes = [20, 300, 5000, 40_000, 300_000]
    return np.full(sizes[number % 5], 1000.0 * seed + number)


def is_sample(x, seed, number):
    return x.size == sample(seed, number).size and (x == 1000.0 * seed + number).all()


def test_eight_threads_pickle_and_receive_at_once():
    before = torchshm.stats()

    def work(seed):
        kept = []
        for number in range(150):
            x = sample(seed, number)
            message = torchshm.dumps([x, {"again": x, "other": x[::-2]}])
            y, rest = torchshm.loads(message)
            assert is_sample(y, seed, number)
            assert rest["again"] is y
            assert (rest["other"] == y[0]).all()
            kept.append((number, y))
            if len(kept) > 10:
                number, y = kept.pop(0)
                assert is_sample(y, seed, number)

    in_threads(8, work)
    gc.collect()
    after = torchshm.stats()
    assert (after["blocks"], after["tickets"]) == (before["blocks"], before["tickets"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_eight_threads_talk_to_children_at_once(method):
    peers = [Peer(method) for _ in range(2)]
    locks = [threading.Lock() for _ in peers]

    def work(seed):
        for number in range(60):
            which = number % 2
            with locks[which]:
                y = peers[which].call(give, sample(seed, number))
            assert is_sample(y, seed, number)

    in_threads(8, work)
    for peer in peers:
        with peer:
            pass


def test_messages_go_from_thread_to_thread():
    messages = [[torchshm.dumps(sample(seed, number)) for number in range(100)] for seed in range(4)]

    def work(seed):
        for number in range(100):
            assert is_sample(
                torchshm.loads(messages[(seed + number) % 4][number]), (seed + number) % 4, number
            )

    in_threads(4, work)


def test_one_array_is_sent_and_dropped_by_many_threads():
    before = torchshm.stats()["blocks"]
    shared = [torchshm.share(np.arange(5000.0), mode) for mode in ("r+", "c", "r")]

    def work(seed):
        for number in range(300):
            y = torchshm.loads(torchshm.dumps(shared[number % 3][seed:]))
            assert y[0] == seed and y[-1] == 4999

    in_threads(8, work)
    assert torchshm.stats()["blocks"] == before + 3
    shared.clear()
    assert torchshm.stats()["blocks"] == before


def test_pooled_and_plain_threads_side_by_side():
    def work(seed):
        for number in range(150):
            if seed % 2:
                with torchshm.pooled():
                    x = sample(seed, number) + 0
                    assert torchshm.is_shared(x)
            else:
                x = sample(seed, number) + 0
                assert not torchshm.is_shared(x)
            assert is_sample(x, seed, number)

    in_threads(6, work)


def test_share_in_one_thread_does_not_change_what_another_sends():
    stop = threading.Event()

    def share():
        while not stop.is_set():
            torchshm.share([np.ones(5000), np.ones(3)], "r")

    thread = threading.Thread(target=share)
    thread.start()
    try:
        for _ in range(500):
            x, y = torchshm.loads(torchshm.dumps([np.ones(5000), np.ones(3)]))
            assert x.flags.writeable
            assert not torchshm.is_shared(y)
    finally:
        stop.set()
        thread.join()


def test_other_threads_run_while_a_large_array_is_copied():
    """With the GIL held, nothing else could happen in the middle of the copy."""
    x = np.ones(1 << 26)  # 512 MiB
    moments = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            moments.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(5):
            begin = time.monotonic()
            message = torchshm.dumps(x)
            end = time.monotonic()
            torchshm.loads(message)
            middle = [
                moment for moment in moments if begin + (end - begin) / 4 < moment < end - (end - begin) / 4
            ]
            if middle:
                break
        assert middle
    finally:
        stop.set()
        thread.join()
        del x
        torchshm.trim()
