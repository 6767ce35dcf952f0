"""multiprocessing.Pool and ProcessPoolExecutor over torchshm.get_context do what they do over the standard library's context.

Every test runs with both, for every way to start processes; the standard one with nothing registered.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from scripts import METHODS

import torchshm

LIBRARIES = {"torchshm": torchshm, "multiprocessing": multiprocessing}
ARRAY = np.arange(50_000.0)
PATIENCE = 90  # s; a hang is a failure too


class Context:
    """A context, and whether what its processes send lies in the pool."""

    def __init__(self, library, method):
        self.pooled = library == "torchshm"
        self.method = method
        (torchshm.register if self.pooled else torchshm.unregister)()
        self.made = LIBRARIES[library].get_context(method)

    def executor(self, workers=2, **options):
        return ProcessPoolExecutor(workers, mp_context=self.made, **options)


@pytest.fixture(
    scope="module",
    params=[(library, method) for library in LIBRARIES for method in METHODS],
    ids=lambda p: "-".join(p),
)
def context(request):
    yield Context(*request.param)
    torchshm.unregister()


# Those that live as long as the tests of a context do, each worker with what its initializer was given.
@pytest.fixture(scope="module")
def pool(context):
    with context.made.Pool(2, initialize, ("given", ARRAY)) as made:
        yield made
        made.close()
        made.join()


@pytest.fixture(scope="module")
def executor(context):
    with context.executor(initializer=initialize, initargs=("given", ARRAY)) as made:
        yield made


def settled(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def left():
    gc.collect()
    stats = torchshm.stats()
    return stats["blocks"], stats["tickets"]


# ---- what the workers run

_given = None


def initialize(*given):
    global _given
    _given = given


def fails_to_initialize():
    raise LookupError("no such thing")


def initialized(_):
    return _given[0], float(_given[1].sum())


def negative(x):
    return -x


def there_and_back(sample):
    """Of what arrived: whether it lies in the pool; and arrays of its own."""
    return torchshm.is_shared(sample["x"]), {
        "x": -sample["x"],
        "odd": sample["x"][1::2] + 1,
        "name": sample["name"],
    }


def fails(x):
    raise LookupError("no such thing", x)


def lambda_of(_):
    return lambda: None


def pid(_):
    return os.getpid()


def kill_self(x):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_given(_):
    return _given[0].wait(PATIENCE)


# ---- tasks


def run(either, function, *arguments):
    if isinstance(either, ProcessPoolExecutor):
        return either.submit(function, *arguments).result(PATIENCE)
    return either.apply_async(function, arguments).get(PATIENCE)


@pytest.fixture(params=["pool", "executor"])
def either(request, context):
    return request.getfixturevalue(request.param)


def test_arrays_go_there_and_back(context, either):
    for i in range(10):
        x = ARRAY + i
        pooled_there, y = run(either, there_and_back, {"x": x, "name": f"sample {i}"})
        assert (
            np.array_equal(y["x"], -x)
            and np.array_equal(y["odd"], x[1::2] + 1)
            and y["name"] == f"sample {i}"
        )
        assert pooled_there == torchshm.is_shared(y["x"]) == torchshm.is_shared(y["odd"]) == context.pooled
        y["x"][0] = 5  # it is the receiver's own
        assert x[0] == i


def test_every_worker_was_initialized(either):
    many = either.map(initialized, range(20))
    assert set(many) == {("given", float(ARRAY.sum()))}


def test_an_exception_arrives_with_what_it_holds_and_the_workers_traceback(context, either):
    with pytest.raises(LookupError, match="no such thing") as raised:
        run(either, fails, ARRAY)
    assert np.array_equal(raised.value.args[1], ARRAY)
    assert torchshm.is_shared(raised.value.args[1]) == context.pooled
    assert "in fails" in str(raised.value.__cause__)
    assert run(either, negative, 3) == -3


def test_a_result_that_can_not_be_pickled(either):
    with pytest.raises(Exception, match=r"(?i)pickle") as raised:
        run(either, lambda_of, 1)
    if isinstance(either, ProcessPoolExecutor):
        assert isinstance(raised.value, AttributeError | pickle.PicklingError)
    else:
        assert type(raised.value) is multiprocessing.pool.MaybeEncodingError
    assert run(either, negative, 3) == -3


def test_an_argument_that_can_not_be_pickled(either):
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"(?i)pickle"):
        run(either, negative, lambda: None)
    assert run(either, negative, 3) == -3


@pytest.mark.parametrize("chunksize", [1, 7])
def test_a_thousand_tasks_in_order(either, chunksize):
    assert list(either.map(negative, range(1000), chunksize=chunksize)) == [-i for i in range(1000)]
    if not isinstance(either, ProcessPoolExecutor):
        assert list(either.imap(negative, range(1000), chunksize)) == [-i for i in range(1000)]


def test_imap_unordered(context, pool):
    received = list(pool.imap_unordered(negative, (ARRAY + i for i in range(40))))
    assert sorted(int(-x[0]) for x in received) == list(range(40))
    assert all(torchshm.is_shared(x) == context.pooled and np.array_equal(x - x[0], -ARRAY) for x in received)


def test_starmap_and_callbacks(pool):
    seen, failed = [], []
    assert pool.starmap(np.add, [(ARRAY, 1.0), (2.0, ARRAY)])[1][3] == 5
    results = [pool.apply_async(negative, (i,), callback=seen.append) for i in range(5)]
    results.append(pool.apply_async(fails, (1,), error_callback=failed.append))
    for result in results:
        result.wait(PATIENCE)
    settled(lambda: len(seen) == 5 and len(failed) == 1)
    assert sorted(seen) == [-4, -3, -2, -1, 0] and isinstance(failed[0], LookupError)


# ---- workers that end


def test_maxtasksperchild(context):
    with context.made.Pool(2, maxtasksperchild=3) as pool:
        pids = pool.map(pid, range(12), chunksize=1)
        assert len(set(pids)) >= 4 and max(map(pids.count, pids)) <= 3
        assert np.array_equal(pool.apply(negative, (ARRAY,)), -ARRAY)


def workers():
    return {child.pid for child in multiprocessing.active_children()}


def all_begun(either, others):
    """Wait until every worker has done a task. One that is killed before it has read which queues are its own leaves them used."""
    seen = set()

    def look():
        seen.update(either.map(pid, range(8)))
        return workers() - others <= seen

    settled(look)


def test_a_pool_replaces_a_worker_that_was_killed_in_its_task_and_loses_that_task(context):
    before, others = left(), workers()
    with context.made.Pool(2) as pool:
        first = workers() - others
        all_begun(pool, others)
        lost = pool.apply_async(kill_self, (ARRAY,))
        kept = [pool.apply_async(negative, (ARRAY + i,)) for i in range(20)]
        for i, result in enumerate(kept):
            assert np.array_equal(result.get(PATIENCE), -ARRAY - i)
        settled(lambda: len(workers() - others) == 2 and workers() - others != first)
        all_begun(pool, others)
        assert pool.map(negative, range(100)) == [-i for i in range(100)]
        assert not lost.ready()
        pool.terminate()
        pool.join()
    del pool, lost, kept, result
    settled(lambda: left() == before)


@pytest.mark.parametrize("when", ["in a task", "idle"])
def test_an_executor_whose_worker_is_killed_is_broken(context, when):
    before, others = left(), workers()
    # What fills the pipe of the standard queue when the executor breaks hangs it (CPython 94777).
    sent = ARRAY if context.pooled else ARRAY[:100]
    with context.executor() as executor:
        all_begun(executor, others)
        if when == "in a task":
            result = executor.submit(kill_self, sent)
            waiting = []
            with contextlib.suppress(BrokenProcessPool):  # from the moment on at which the death is noticed
                for _ in range(10):
                    waiting.append(executor.submit(negative, sent))
            with pytest.raises(BrokenProcessPool):
                result.result(PATIENCE)
            concurrent.futures.wait(waiting, PATIENCE)
            assert all(one.done() for one in waiting)
            outcomes = [one.exception() for one in waiting]
            assert all(each is None or isinstance(each, BrokenProcessPool) for each in outcomes)
            del outcomes
        else:
            os.kill(next(iter(executor._processes)), signal.SIGKILL)
            settled(lambda executor=executor: executor._broken)
        with pytest.raises(BrokenProcessPool):
            executor.submit(negative, 1)
    del executor
    if when == "in a task":
        del result, waiting
    # The queue of calls is the standard one, a pipe that holds three: what dies in it is a message that nobody received.
    settled(lambda: all(now - then <= 4 for now, then in zip(left(), before, strict=True)))


def test_an_executor_whose_workers_can_not_be_initialized_is_broken(context):
    with context.executor(initializer=fails_to_initialize) as executor, pytest.raises(BrokenProcessPool):
        executor.submit(negative, 1).result(PATIENCE)


# ---- the end


def test_shutdown_cancels_what_has_not_begun(context):
    before = left()
    event = context.made.Event()
    executor = context.executor(1, initializer=initialize, initargs=(event,))
    futures = [executor.submit(wait_for_given, 0), *(executor.submit(negative, ARRAY) for _ in range(50))]
    settled(futures[0].running)
    executor.shutdown(wait=False, cancel_futures=True)
    event.set()
    # concurrent.futures.wait isn't told of those that are cancelled so.
    settled(lambda futures=futures: all(future.done() for future in futures))
    assert futures[0].result() is True
    assert sum(future.cancelled() for future in futures) >= 45
    assert all(future.cancelled() or np.array_equal(future.result(), -ARRAY) for future in futures[1:])
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(negative, 1)
    del executor, futures, event
    settled(lambda: left() == before)


def test_a_pool_that_is_closed_does_what_it_was_given(context):
    before = left()
    pool = context.made.Pool(2)
    results = [pool.apply_async(negative, (ARRAY + i,)) for i in range(30)]
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.apply(negative, (1,))
    pool.join()
    assert all(np.array_equal(result.get(0), -ARRAY - i) for i, result in enumerate(results))
    del pool, results
    settled(lambda: left() == before)


# ---- where the standard ones fail: an idle worker sleeps with the lock of the queue of tasks


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_goes_on_when_all_idle_workers_are_killed(method, registered):
    others = workers()
    with torchshm.get_context(method).Pool(2) as pool:
        assert pool.map(negative, range(20)) == [-i for i in range(20)]
        for _ in range(3):
            first = workers() - others
            for worker in first:
                os.kill(worker, signal.SIGKILL)
            settled(lambda first=first: len(workers() - others) == 2 and not first & workers())
            assert np.array_equal(pool.apply_async(negative, (ARRAY,)).get(PATIENCE), -ARRAY)
