"""Advisory locks of a store: who has one keeps others out, in every process and thread, until it lets go or dies."""

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from forked import SYS_FORK, ended, forked
from peer import Peer, keep, kept
from scripts import METHODS, PATIENCE, passes

import torchshm


def take(lock):
    lock.acquire()
    keep("lock", lock)


def give_back():
    kept["lock"].release()


def is_free(lock):
    try:
        lock.acquire(0)
    except TimeoutError:
        return False
    lock.release()
    return True


@pytest.mark.parametrize("key", [None, "a"])
@pytest.mark.parametrize("theirs", ["shared", "exclusive"])
@pytest.mark.parametrize("mine", ["shared", "exclusive"])
def test_a_lock_keeps_out_what_is_not_shared_with_it(store, client, key, theirs, mine):
    client.call(take, store.lock(key, shared=theirs == "shared"))
    lock = store.lock(key, shared=mine == "shared")
    both = theirs == mine == "shared"
    assert is_free(lock) is both
    client.call(give_back)
    assert is_free(lock)


def test_locks_of_other_keys_and_of_the_store_are_apart(store, client):
    client.call(take, store.lock("a"))
    assert is_free(store.lock("b")) and is_free(store.lock()) and not is_free(store.lock("a"))
    client.call(give_back)
    with store.lock():
        assert client.call(is_free, store.lock("a")) and not client.call(is_free, store.lock())


def test_a_lock_keeps_nobody_from_the_value(store, client):
    with store.lock("a"):
        client.call(save, store, "a", 5)
    assert store["a"] == 5


def save(store, key, value):
    store[key] = value


def test_a_killed_holder_lets_go(store):
    with Peer("spawn") as peer:
        peer.call(take, store.lock("a"))
        assert not is_free(store.lock("a"))
        threading.Timer(0.2, os.kill, (peer.process.pid, signal.SIGKILL)).start()
        with store.lock("a", timeout=PATIENCE) as lock:
            assert lock.held


def test_release_wakes_who_waits(store, client):
    lock = store.lock("a")
    lock.acquire()
    client.ask(take, store.lock("a"))
    time.sleep(0.1)
    assert lock.held and not client.pipe.poll()
    lock.release()
    client.answer()
    assert not is_free(lock)
    client.call(give_back)


def test_the_time_to_wait_has_an_end(store, client):
    client.call(take, store.lock("a"))
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"'a' in 'session'.*0.1 s"):
        store.lock("a", timeout=0.1).acquire()
    assert time.monotonic() - begin >= 0.1
    with pytest.raises(TimeoutError), store.lock("a", timeout=0):
        raise AssertionError
    client.call(give_back)
    with store.lock("a", timeout=0) as lock:
        assert lock.held


def test_ctrl_c_ends_a_wait(store, tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(
        "import signal, torchshm\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background\n"
        "lock = torchshm.connect('session').lock('a')\n"
        "print('waiting', flush=True)\n"
        "try:\n"
        "    lock.acquire()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', lock.held, flush=True)\n"
    )
    with store.lock("a"):
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(2)
        assert process.communicate(timeout=PATIENCE)[0] == "interrupted False\n"


def test_a_forked_child_does_not_have_its_parents_lock(store, tmp_path):
    """The parent is killed while its child lives on: the lock is free."""
    script = (
        "import os, signal, sys, torchshm\n"
        "store = torchshm.connect('session')\n"
        "lock = store.lock('a')\n"
        "lock.acquire()\n"
        "parent = os.getpid()\n"
        "ready, tell = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(tell, b'.')\n"
        "    os.close(tell)\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "os.read(ready, 1)\n"
        "print('forked', flush=True)\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "forked\n"
    assert not is_free(store.lock("a"))
    process.kill()
    process.wait()
    store.lock("a", timeout=PATIENCE).acquire()  # its child reads on until stdin ends
    process.stdin.close()


def test_a_forked_child_takes_the_lock_for_itself(store):
    lock = store.lock("a", timeout=PATIENCE)
    lock.acquire()
    ready, tell = os.pipe()

    def child():
        assert not lock.held and not is_free(store.lock("a"))
        with pytest.raises(RuntimeError, match="forked from"):
            lock.release()
        os.write(tell, b".")
        with lock:
            assert lock.held

    pid = forked(child)
    os.read(ready, 1)
    assert lock.held
    lock.release()
    assert ended(pid) == 0
    os.close(ready)
    os.close(tell)


def test_release_frees_it_also_where_a_fork_ran_no_handlers(store):
    libc = ctypes.CDLL(None, use_errno=True)
    lock = store.lock("a")
    lock.acquire()
    end, go = os.pipe()

    def child():
        os.close(go)
        os.read(end, 1)  # until the parent says so, or has died

    pid = forked(child, fork=lambda: libc.syscall(SYS_FORK))
    assert not is_free(store.lock("a"))
    lock.release()
    assert is_free(store.lock("a"))
    os.write(go, b".")
    assert ended(pid) == 0
    os.close(end)
    os.close(go)


def test_a_child_that_leaves_the_block_of_its_parent_gives_nothing_back(store):
    with store.lock("a"):
        pid = os.fork()
        if pid == 0:
            lock = store.lock("a")
    if pid == 0:
        os._exit(0 if not lock.held else 1)
    assert ended(pid) == 0
    assert is_free(store.lock("a"))


def test_threads_keep_each_other_out(store):
    total = np.zeros(1, np.int64)

    def work(lock):
        for _ in range(100):
            with lock:
                seen = int(total[0])
                time.sleep(0)
                total[0] = seen + 1

    shared = store.lock("a")
    locks = [store.lock("a"), store.lock("a"), shared, shared]  # objects of their own, and one for two
    threads = [threading.Thread(target=work, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert total[0] == 400


def test_taking_it_twice_is_an_error_that_says_so(store):
    with store.lock("a") as lock, pytest.raises(RuntimeError, match="not re-entrant"):
        lock.acquire()
    with pytest.raises(RuntimeError, match="is not held"):
        lock.release()
    with lock:  # again, after the end
        assert lock.held and "held" in repr(lock)
    with pytest.raises(ValueError, match="at least one character"):
        store.lock("")
    with pytest.raises(TypeError, match="a key is a str"):
        store.lock(3)


def test_a_held_lock_is_not_pickled(store):
    lock = store.lock("a", shared=True, timeout=3)
    with lock, pytest.raises(TypeError, match="while it is held"):
        pickle.dumps(lock)
    again = pickle.loads(pickle.dumps(lock))
    assert repr(again) == repr(lock)
    with again, lock:
        assert lock.held and again.held


def test_a_lock_that_is_collected_is_free(store):
    lock = store.lock("a")
    lock.acquire()
    assert not is_free(store.lock("a"))
    del lock
    gc.collect()
    assert is_free(store.lock("a"))


def test_descriptors_do_not_pile_up(store):
    with store.lock("a"):
        pass
    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        with store.lock(f"key {i}"):
            pass
        is_free(store.lock("a"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_lost_with_its_descriptors_says_so_and_closes_nobody_elses(runtime, tmp_path):
    passes(
        """
        import os
        import torchshm

        store = torchshm.start("closing", limit="64MiB")
        lock = store.lock("a")
        lock.acquire()
        os.closerange(3, 200)
        others = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
        try:
            lock.release()
        except torchshm.TorchshmError as error:
            assert "given up" in str(error), error
        else:
            raise AssertionError
        for fd in others:
            os.fstat(fd)
        try:
            lock.acquire()
        except torchshm.TorchshmError as error:
            assert "closed the store's descriptors" in str(error), error
        else:
            raise AssertionError
        os._exit(0)
        """,
        tmp_path,
    )


def count(store, times):
    counter = store.load("counter", mode="r+")
    for _ in range(times):
        with store.lock("counter"):
            seen = int(counter[0])
            time.sleep(0)
            counter[0] = seen + 1


@pytest.mark.parametrize("method", METHODS)
def test_eight_processes_count_without_losing_any(store, method):
    store["counter"] = np.zeros(1, np.int64)
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=count, args=(store, 500)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert store["counter"][0] == 4000
    assert torchshm.is_shared(store["counter"])
