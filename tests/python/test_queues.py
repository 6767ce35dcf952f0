"""Everything in multiprocessing that carries objects carries arrays: queues, pipes, pools, executors, managers."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import queue
import threading

import numpy as np
import pytest
from peer import Peer

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

METHODS = ["fork", "spawn", "forkserver"]
SIZE = 20_000


def numbers(seed, size=SIZE):
    return np.random.default_rng(seed).random(size)


def doubled(x):
    """Whether it came through the pool, and twice its value."""
    return torchshm.is_shared(x), os.getpid(), x * 2


def check(results, count):
    pids = set()
    for seed, (shared, pid, y) in zip(range(count), results, strict=True):
        assert shared
        assert torchshm.is_shared(y)
        assert np.array_equal(y, numbers(seed) * 2)
        pids.add(pid)
    assert os.getpid() not in pids


@pytest.mark.parametrize("method", METHODS)
def test_pool_takes_and_gives_arrays(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        check(pool.map(doubled, [numbers(seed) for seed in range(12)], chunksize=3), 12)
        check(pool.imap(doubled, (numbers(seed) for seed in range(6))), 6)
        check([pool.apply(doubled, (numbers(0),))], 1)
        check(pool.starmap_async(doubled, [(numbers(seed),) for seed in range(4)]).get(60), 4)


@pytest.mark.parametrize("method", METHODS)
def test_executor_takes_and_gives_arrays(method):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=context, initializer=numbers, initargs=(1,)
    ) as executor:
        check(executor.map(doubled, [numbers(seed) for seed in range(12)]), 12)
        futures = [executor.submit(doubled, numbers(seed)) for seed in range(4)]
        check([future.result(60) for future in futures], 4)


def test_executor_hands_out_the_exceptions_of_its_workers():
    with concurrent.futures.ProcessPoolExecutor(1) as executor:
        with pytest.raises(TypeError):
            executor.submit(doubled, None).result(60)
        check([executor.submit(doubled, numbers(0)).result(60)], 1)


def relay(source, target, count):
    for _ in range(count):
        target.put(doubled(source.get()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue", "JoinableQueue"])
def test_queues_carry_arrays_both_ways(method, kind):
    context = multiprocessing.get_context(method)
    there, back = getattr(context, kind)(), getattr(context, kind)()
    child = context.Process(target=relay, args=(there, back, 10))
    child.start()
    for seed in range(10):
        there.put(numbers(seed))
    check([back.get() for _ in range(10)], 10)
    child.join()
    assert child.exitcode == 0


def sender_threads(target, count):
    def send(first):
        for seed in range(first, count, 4):
            target.put((seed, numbers(seed)))

    threads = [threading.Thread(target=send, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_queue_with_many_senders_and_a_bound():
    box = multiprocessing.Queue(maxsize=5)
    children = [multiprocessing.Process(target=sender_threads, args=(box, 40)) for _ in range(3)]
    for child in children:
        child.start()
    seen = sorted((seed, np.array_equal(x, numbers(seed))) for seed, x in (box.get() for _ in range(120)))
    assert seen == sorted((seed, True) for seed in range(40) for _ in range(3))
    for child in children:
        child.join()
        assert child.exitcode == 0
    with pytest.raises(queue.Empty):
        box.get(timeout=0.01)


@pytest.mark.parametrize("duplex", [True, False])
def test_pipe_within_one_process(duplex):
    receiver, sender = multiprocessing.Pipe(duplex)
    for seed in range(5):
        sender.send([numbers(seed)])
    for seed in range(5):
        (x,) = receiver.recv()
        assert torchshm.is_shared(x)
        assert np.array_equal(x, numbers(seed))


@pytest.mark.parametrize("method", METHODS)
def test_manager_and_its_proxies(method):
    with multiprocessing.get_context(method).Manager() as manager:
        box, rows, names = manager.dict(), manager.list(), manager.Namespace()
        line = manager.Queue()
        for seed in range(5):
            box[seed] = numbers(seed)
            rows.append(numbers(seed))
            line.put(numbers(seed))
        names.x = numbers(9)
        for seed in range(5):
            for x in [box[seed], rows[seed], line.get()]:
                assert np.array_equal(x, numbers(seed))
        assert np.array_equal(names.x, numbers(9))
        assert np.array_equal(box[3], numbers(3))
        with Peer("fork") as other:
            assert np.array_equal(other.call(_third, rows), numbers(3))
        assert {seed: x.sum() for seed, x in box.copy().items()} == {
            seed: numbers(seed).sum() for seed in range(5)
        }


def _third(proxy):
    return proxy[3]


def _connect(address, key):
    with multiprocessing.connection.Client(address, authkey=key) as client:
        client.send(doubled(client.recv()))


def test_listener_and_client():
    key = bytes(multiprocessing.current_process().authkey)
    with multiprocessing.connection.Listener(None, "AF_UNIX", authkey=key) as listener:
        child = multiprocessing.get_context("spawn").Process(target=_connect, args=(listener.address, key))
        child.start()
        with listener.accept() as connection:
            connection.send(numbers(0))
            check([connection.recv()], 1)
        child.join()
        assert child.exitcode == 0


def _from_arguments(pipe, x, *, more):
    pipe.send((torchshm.is_shared(x), x.sum(), torchshm.is_shared(more["deep"][0]), more["deep"][0].sum()))


@pytest.mark.parametrize("method", METHODS)
def test_arguments_of_a_process(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    x, y = numbers(1), torchshm.share(numbers(2))
    child = context.Process(target=_from_arguments, args=(theirs, x), kwargs={"more": {"deep": [y]}})
    child.start()
    assert ours.recv() == (method != "fork", x.sum(), True, y.sum())
    child.join()
    assert child.exitcode == 0


def test_thread_pools_are_not_concerned():
    with multiprocessing.pool.ThreadPool(2) as pool:
        x = numbers(1)
        assert pool.map(id, [x, x]) == [id(x)] * 2
