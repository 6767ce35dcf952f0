"""Queues and events of torchshm.get_context: what the standard ones do, and what those can't."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import time

import numpy as np
import pytest
from forked import ended, forked
from scripts import METHODS, passes

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

KINDS = ["Queue", "JoinableQueue", "SimpleQueue"]


@pytest.fixture(params=["torchshm", "multiprocessing"])
def either(request):
    """The context in question, and the standard one: both must do the same."""
    return {"torchshm": torchshm, "multiprocessing": multiprocessing}[request.param].get_context("fork")


@pytest.fixture
def context():
    return torchshm.get_context("fork")


def left():
    gc.collect()
    stats = torchshm.stats()
    return stats["blocks"], stats["tickets"]


def echo(inbox, outbox):
    while (x := inbox.get()) is not None:
        outbox.put(x)


def numbered(out, sender, count):
    for i in range(count):
        out.put((sender, i, b"x" * (i % 3000)))


def taken(inbox, out):
    while (x := inbox.get()) is not None:
        out.put(x[:2])


def settled(condition, patience=30.0):
    """The standard queue sends in a thread of its own, a moment later."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


# ---- what the standard ones do


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_messages_go_there_and_back(method, kind):
    context = torchshm.get_context(method)
    inbox, outbox = getattr(context, kind)(), getattr(context, kind)()
    child = context.Process(target=echo, args=(inbox, outbox))
    child.start()
    messages = [1, "a", None, {"k": [1, (2, 3)]}, b"x" * 1_000_000, np.arange(50_000.0), list(range(1000))]
    for x in messages:
        inbox.put([x])
    for x in messages:
        (y,) = outbox.get()
        assert np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
    inbox.put(None)
    child.join()
    assert child.exitcode == 0


def test_full_and_empty(either):
    q = either.Queue(2)
    assert q.empty() and not q.full() and q.qsize() == 0
    with pytest.raises(queue.Empty):
        q.get_nowait()
    with pytest.raises(queue.Empty):
        q.get(timeout=0.05)
    with pytest.raises(queue.Empty):
        q.get(True, -1)
    q.put(1)
    q.put(2)
    assert q.full() and q.qsize() == 2
    with pytest.raises(queue.Full):
        q.put_nowait(3)
    with pytest.raises(queue.Full):
        q.put(3, timeout=0.05)
    assert settled(lambda: not q.empty())
    assert [q.get(), q.get(timeout=5)] == [1, 2]
    assert not q.full()
    threading.Timer(0.1, q.put, (4,)).start()
    assert q.get(timeout=30) == 4


def test_a_blocked_put_goes_on_when_there_is_room(either):
    q = either.Queue(1)
    q.put(1)
    threading.Timer(0.1, q.get).start()
    q.put(2, timeout=30)
    assert q.get(timeout=30) == 2


def test_closed(either):
    q = either.Queue()
    q.put(1)
    q.close()
    for use in (lambda: q.put(2), q.get, q.get_nowait):
        with pytest.raises(ValueError, match="is closed"):
            use()
    q.join_thread()
    other = either.Queue()
    other.cancel_join_thread()
    with pytest.raises(AssertionError):
        other.join_thread()
    simple = either.SimpleQueue()
    simple.close()
    for use in (lambda: simple.put(1), simple.get):
        with pytest.raises(OSError, match="closed"):
            use()


@pytest.mark.parametrize("kind", [*KINDS, "Event"])
def test_pickled_only_for_a_child(either, kind):
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(getattr(either, kind)())


def test_tasks(either):
    q = either.JoinableQueue()
    q.join()
    with pytest.raises(ValueError, match="too many"):
        q.task_done()
    for i in range(3):
        q.put(i)
    joined = threading.Event()
    thread = threading.Thread(target=lambda: (q.join(), joined.set()), daemon=True)
    thread.start()
    for _ in range(3):
        q.get()
        assert not joined.is_set()
        q.task_done()
    assert joined.wait(30)
    thread.join()


def test_event(either):
    event = either.Event()
    assert not event.is_set()
    assert event.wait(0.01) is False
    child = either.Process(target=event.set)
    child.start()
    assert event.wait(30) is True
    assert event.wait() is True
    event.clear()
    assert not event.is_set()
    child.join()


@pytest.mark.parametrize("method", METHODS)
def test_event_of_every_method(method):
    context = torchshm.get_context(method)
    event = context.Event()
    child = context.Process(target=event.set)
    child.start()
    assert event.wait(60)
    child.join()


def test_connection_wait(either):
    first, second = either.SimpleQueue(), either.SimpleQueue()
    readers = [first._reader, second._reader]
    assert multiprocessing.connection.wait(readers, 0.01) == []
    for _ in range(50):
        child = forked(lambda: second.put(1))
        assert multiprocessing.connection.wait(readers, 30) == [second._reader]
        assert second._reader.poll() and second._reader.recv() == 1
        assert multiprocessing.connection.wait(readers, 0) == []
        assert ended(child) == 0
    first.put(1)
    second.put(2)
    assert multiprocessing.connection.wait(readers, 30) == readers
    first._writer.send_bytes(b"plain")
    assert first.get() == 1
    assert first._reader.recv_bytes() == b"plain"


def test_the_context_is_one_of_the_standard_library():
    for method in METHODS:
        context = torchshm.get_context(method)
        assert isinstance(context, multiprocessing.context.BaseContext)
        assert context.get_start_method() == method
        assert context.get_context() is context
        assert context.get_context("spawn") is torchshm.get_context("spawn")
        assert context.Process is multiprocessing.get_context(method).Process
    assert torchshm.get_context().get_start_method() == multiprocessing.get_start_method()
    with pytest.raises(ValueError, match="cannot find context"):
        torchshm.get_context("thread")


# ---- what those can't


def test_what_cannot_be_pickled_raises_in_put_and_leaves_nothing(context):
    before = left()
    q = context.Queue()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        q.put([np.arange(50_000.0), lambda: None])
    assert q.empty()
    assert left()[0] == before[0] + 1
    q.put(1)
    assert q.get() == 1


def test_arrays_and_messages_that_nobody_received_come_back_at_once(context):
    before = left()
    q = context.Queue()
    for _ in range(10):
        q.put({"a": np.arange(50_000.0), "b": b"x" * 100_000, "c": 1})
    kept = np.arange(50_000.0)
    with pytest.raises(queue.Full):
        (full := context.Queue(1)).put(1), full.put(kept, False)
    assert left()[0] > before[0] + 20
    del q, full
    assert left() == before


def test_a_queue_of_the_dead_comes_back(context):
    before = left()

    def live():
        q = context.Queue()
        for _ in range(10):
            q.put(np.arange(50_000.0))
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(live)) == -signal.SIGKILL
    assert left() == before


class _Fatal:
    """Kills whoever receives it, or sends it."""

    def __init__(self, sender):
        self.sender = sender

    def __reduce__(self):
        if self.sender:
            os.kill(os.getpid(), signal.SIGKILL)
        return kill_self, (None,)


def test_what_the_killed_had_in_hand_comes_back_while_the_queue_lives(context):
    """Takers that die of a message with a large array in it, and senders that die over one."""
    queue = context.Queue()
    queue.put(np.full(1_000_000, 7))

    def send():
        queue.put((np.ones(1_000_000), _Fatal(True)))

    def take():
        while True:
            queue.get()

    def live():
        return torchshm.stats()["live_bytes"]

    kept = live()
    for _ in range(5):
        assert ended(forked(send)) == -signal.SIGKILL
    waiting = queue.get()
    for _ in range(5):
        queue.put((np.ones(1_000_000), _Fatal(False)))
        assert ended(forked(take)) == -signal.SIGKILL
    queue.put(waiting)
    del waiting

    def at_work():
        queue.put("x")
        queue.put(queue.get())
        assert queue.get() == "x"
        return live() < kept + 1_000_000

    settled(at_work)
    assert queue.get()[-1] == 7 and queue.empty()


class _Pickled:
    """An object that travels as bytes, which are unpickled when somebody asks."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return _Pickled, (torchshm.dumps(self.data),)


class _Spoilt:
    def __reduce__(self):
        return int, ("no number",)


def test_bytes_in_a_message_can_be_unpickled_later(context):
    """Also when somebody has died since, and what the dead had is given back."""
    q = context.Queue()
    q.put(_Pickled(np.arange(50_000.0)))
    got = q.get()
    assert ended(forked(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    torchshm.stats()  # takes notice of the death
    q.put(1)
    assert q.get() == 1
    assert torchshm.loads(got.data)[-1] == 49_999


def test_what_can_not_be_unpickled_leaves_nothing(context):
    q = context.Queue()
    q.put(1)
    assert q.get() == 1
    before = left()
    for _ in range(5):
        q.put((_Spoilt(), np.arange(500_000.0)))
        with pytest.raises(ValueError, match="no number"):
            q.get()
    assert left() == before


@pytest.mark.parametrize("maxsize", [0, 7])
def test_many_senders_and_takers_lose_nothing(context, maxsize):
    senders, takers, each = 5, 3, 1500
    q, out = context.Queue(maxsize), context.Queue()
    sending = [context.Process(target=numbered, args=(q, s, each)) for s in range(senders)]
    taking = [context.Process(target=taken, args=(q, out)) for _ in range(takers)]
    for process in [*sending, *taking]:
        process.start()
    got = sorted(out.get(timeout=60) for _ in range(senders * each))
    assert got == [(s, i) for s in range(senders) for i in range(each)]
    for _ in taking:
        q.put(None)
    for process in [*sending, *taking]:
        process.join()
    assert q.empty() and out.empty()


def test_each_senders_messages_arrive_in_order(context):
    q = context.Queue()
    sending = [context.Process(target=numbered, args=(q, s, 1500)) for s in range(8)]
    for process in sending:
        process.start()
    following = [0] * 8
    for _ in range(8 * 1500):
        sender, i, data = q.get(timeout=60)
        assert i == following[sender] and len(data) == i % 3000
        following[sender] += 1
    for process in sending:
        process.join()


def test_kills_stop_nobody(context):
    before = left()
    q, out = context.Queue(20), context.Queue()
    for round_ in range(12):
        sending = [context.Process(target=numbered, args=(q, s, 10**9)) for s in range(2)]
        taking = [context.Process(target=taken, args=(q, out)) for _ in range(2)]
        for process in [*sending, *taking]:
            process.start()
        for _ in range(200):
            out.get(timeout=30)
        time.sleep(0.003 * round_)
        for process in [*sending, *taking]:
            process.kill()
        for process in [*sending, *taking]:
            process.join()
        while not q.empty():
            q.get(timeout=30)
        while not out.empty():
            out.get(timeout=30)
        q.put("alive", timeout=30)
        assert q.get(timeout=30) == "alive"
    del q, out, sending, taking, process
    assert left() == before


def test_a_sender_may_end_right_after_put(context):
    q = context.Queue()

    def send():
        q.put(np.full(50_000, 3.0))
        os._exit(0)

    assert ended(forked(send)) == 0
    assert (q.get(timeout=30) == 3).all()


@pytest.mark.parametrize(
    "wait", ["q.get()", "q.put(2)", "q.join()", "context.Event().wait()", "context.SimpleQueue().get()"]
)
def test_ctrl_c_ends_a_wait(wait, tmp_path):
    said = passes(
        f"""
        import os, signal, threading
        import torchshm

        context = torchshm.get_context("fork")
        q = context.JoinableQueue(1)
        if {wait!r} != "q.get()":
            q.put(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            {wait}
        except KeyboardInterrupt:
            print("interrupted")
        """,
        tmp_path,
    )
    assert said == "interrupted\n"


def test_a_wait_leaves_other_threads_running(context):
    q = context.Queue()
    thread = threading.Thread(target=q.get, daemon=True)
    thread.start()
    time.sleep(0.05)
    q.put(1)
    thread.join(30)
    assert not thread.is_alive()


def test_without_a_pool_the_queues_are_the_standard_ones(tmp_path):
    said = passes(
        """
        import resource
        import warnings
        import torchshm

        context = torchshm.get_context("fork")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # no memory file of a pool's size
            q, event = context.Queue(3), context.Event()
        print(type(q).__module__, len(caught), "standard library's queues" in str(caught[0].message))
        q.put(1)
        print(q.get())
        """,
        tmp_path,
    )
    assert said == "multiprocessing.queues 1 True\n1\n"


# ---- what is built on them


def double(x):
    return x * 2


def kill_self(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", METHODS)
def test_pool(method):
    with torchshm.get_context(method).Pool(2) as pool:
        assert pool.map(double, range(50)) == [2 * i for i in range(50)]
        assert sorted(pool.imap_unordered(double, range(10))) == [2 * i for i in range(10)]
        y = pool.apply(double, (np.arange(50_000.0),))
        assert torchshm.is_shared(y) and y[-1] == 99_998
        pool.close()
        pool.join()


def test_a_pool_is_terminated_with_work_left():
    pool = torchshm.get_context("fork").Pool(2)
    result = pool.map_async(time.sleep, [0.05] * 1000, chunksize=1)
    time.sleep(0.1)
    pool.terminate()
    pool.join()
    assert not result.ready()


def test_workers_of_a_pool_end_with_its_killed_owner(tmp_path):
    said = passes(
        """
        import multiprocessing, os, signal, time
        import torchshm

        def own(pipe):
            pool = torchshm.get_context("fork").Pool(2)
            pipe.send(pool.map(getpid, range(20), chunksize=1))
            os.kill(os.getpid(), signal.SIGKILL)

        def getpid(_):
            time.sleep(0.01)
            return os.getpid()

        here, there = multiprocessing.Pipe()
        owner = multiprocessing.get_context("fork").Process(target=own, args=(there,))
        owner.start()
        workers = set(here.recv())
        owner.join()
        def alive(pid):
            try:
                with open(f"/proc/{pid}/stat") as stat:
                    return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
            except FileNotFoundError:
                return False
        end = time.monotonic() + 60
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        print(sum(map(alive, workers)))
        """,
        tmp_path,
    )
    assert said == "0\n"


@pytest.mark.parametrize("method", METHODS)
def test_executor(method):
    context = torchshm.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(double, range(50))) == [2 * i for i in range(50)]


def test_executor_whose_worker_is_killed():
    context = torchshm.get_context("fork")
    with (
        concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor,
        pytest.raises(concurrent.futures.process.BrokenProcessPool),
    ):
        executor.submit(kill_self, 1).result(60)


class Squares:
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return np.full(20_000, float(i * i))


class Killed(Squares):
    def __getitem__(self, i):
        return kill_self(0) if i == 40 else super().__getitem__(i)


@pytest.mark.parametrize("method", METHODS)
def test_data_loader(method):
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(
        Squares(),
        8,
        num_workers=2,
        multiprocessing_context=torchshm.get_context(method),
        persistent_workers=True,
    )
    for _ in range(2):
        batches = list(loader)
        assert [float(x) for batch in batches for x in batch[:, 0]] == [float(i * i) for i in range(64)]


def test_data_loader_whose_worker_is_killed():
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(Killed(), 8, num_workers=2, multiprocessing_context=torchshm.get_context("fork"))
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
        list(loader)
