"""Arrays inherited by fork stay valid in the child whatever the parent does, and the other way round."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest
from scripts import passes

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

SYS_FORK = 57  # x86-64


def forked(body, fork=os.fork):
    """Run body() in a forked child. Returns its pid; the exit status says whether all of it was true."""
    pid = fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def numbers(seed, size=40_000):
    return np.arange(float(size)) + seed


STORM = """
import os
import random
import sys
import threading
import traceback

import numpy as np
import torchshm

torchshm.register()
stop = threading.Event()
errors = []


def check(x):
    assert x[0] == x[-1] and (x == x[0]).all(), x


def allocate(seed):
    chance = random.Random(seed)
    mine = []
    try:
        while not stop.is_set():
            with torchshm.pooled():
                mine.append(np.full(chance.choice([100, 700, 5000, 90_000]), float(seed)))
            while len(mine) > 20:
                check(mine.pop(chance.randrange(len(mine))))
    except BaseException:
        errors.append(traceback.format_exc())


def send(seed):
    chance = random.Random(seed)
    try:
        while not stop.is_set():
            x = np.full(chance.choice([300, 5000, 90_000]), float(seed))
            data = torchshm.dumps([x, x + 1])
            y, z = torchshm.loads(data)
            check(y)
            check(z)
    except BaseException:
        errors.append(traceback.format_exc())


def in_child(inherited):
    for n, x in enumerate(inherited):
        assert (x == n).all(), (n, x)
    own = [torchshm.share(np.full(5000, 100.0 + n)) for n in range(5)]
    again = torchshm.loads(torchshm.dumps(np.full(90_000, 7.0)))
    with torchshm.pooled():
        more = np.full(2000, 3.0)
    for n, x in enumerate(inherited):
        assert (x == n).all(), (n, x)
    for n, x in enumerate(own):
        assert (x == 100 + n).all()
    assert (again == 7).all() and (more == 3).all()
    figures = torchshm.stats()
    assert any(process["pid"] == os.getpid() for process in figures["processes"]), figures


threads = [threading.Thread(target=target, args=(seed,)) for seed in range(2) for target in (allocate, send)]
for thread in threads:
    thread.start()
chance = random.Random(3)
children = []
for fork in range(50):
    inherited = [torchshm.share(np.full(chance.choice([600, 5000, 200_000]), float(n)), "r+") for n in range(8)]
    if fork % 2:
        inherited += [torchshm.loads(torchshm.dumps(np.full(9000, 8.0)))]
    pid = os.fork()
    if pid == 0:
        try:
            in_child(inherited)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    del inherited
    children.append(pid)
    while len(children) > 3:
        assert os.waitpid(children.pop(0), 0)[1] == 0
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert not errors, errors
figures = torchshm.stats()
assert figures["leases"] == 1 and figures["tickets"] == 0 and figures["blocks"] == 0, figures
print("ok")
"""


def test_fork_while_other_threads_allocate_and_free(tmp_path):
    assert passes(STORM, tmp_path, TORCHSHM_LIMIT="1GiB") == "ok\n"


def test_inherited_arrays_stay_when_the_parent_drops_theirs():
    before = torchshm.stats()["blocks"]
    children = []
    for turn in range(20):
        x = torchshm.share(numbers(turn), "r+")
        go, gone = os.pipe()

        def child(x=x, turn=turn, go=go):
            os.read(go, 1)
            assert np.array_equal(x, numbers(turn))
            y = torchshm.loads(torchshm.dumps(x))
            assert np.array_equal(y, numbers(turn))

        children.append((forked(child), gone))
        os.close(go)
        del x, child
    fresh = [torchshm.share(np.zeros(40_000), "r+") for _ in range(30)]
    for pid, gone in children:
        os.write(gone, b"!")
        os.close(gone)
        assert ended(pid) == 0
    assert not any(x.any() for x in fresh)
    del fresh
    gc.collect()
    assert torchshm.stats()["blocks"] == before


def test_what_a_child_drops_stays_the_parents():
    x = torchshm.share(numbers(1), "r+")
    received = torchshm.loads(torchshm.dumps(numbers(2)))
    kept = [x, received]

    def child():
        nonlocal x, received
        del x, received
        kept.clear()
        gc.collect()
        fresh = [torchshm.share(np.zeros(40_000)) for _ in range(30)]
        assert not any(y.any() for y in fresh)

    for _ in range(5):
        assert ended(forked(child)) == 0
    assert np.array_equal(x, numbers(1))
    assert np.array_equal(received, numbers(2))


def test_messages_pickled_before_the_fork_are_received_after_it_once_on_either_side():
    ours, theirs = torchshm.dumps(numbers(1)), torchshm.dumps(numbers(2))

    def child():
        assert np.array_equal(torchshm.loads(theirs), numbers(2))

    assert ended(forked(child)) == 0
    assert np.array_equal(torchshm.loads(ours), numbers(1))
    with pytest.raises(torchshm.StaleHandleError):
        torchshm.loads(theirs)


def test_five_generations_hand_their_arrays_down():
    x = torchshm.share(numbers(0), "r+")

    def generation(depth, handed):
        assert np.array_equal(handed, numbers(depth))
        if depth < 5:
            own = torchshm.share(handed + 1, "r+")
            del handed
            assert ended(forked(lambda: generation(depth + 1, own))) == 0

    assert ended(forked(lambda: generation(0, x))) == 0


def test_orphan_keeps_its_arrays():
    x = torchshm.share(numbers(1), "r+")
    read, write = os.pipe()

    def parent():
        def orphan():
            while os.getppid() == middle:
                pass
            assert np.array_equal(x, numbers(1))
            os.write(write, b"alive")

        middle = os.getpid()
        forked(orphan)

    assert ended(forked(parent)) == 0
    del x
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"alive"


def test_children_that_end_leave_no_lease():
    before = torchshm.stats()
    x = torchshm.share(numbers(1))
    for _ in range(20):
        assert ended(forked(lambda: torchshm.share(numbers(2)))) == 0
    after = torchshm.stats()
    assert after["leases"] == before["leases"]
    assert after["blocks"] == before["blocks"] + 1
    assert np.array_equal(x, numbers(1))


LOOK = """
import os
seen = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
assert not any("torchshm" in name for name in seen), seen
assert "torchshm" not in open("/proc/self/maps").read()
"""


def test_exec_ends_the_membership():
    x = torchshm.share(numbers(1), "r+")
    before = torchshm.stats()
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-S", "-c", LOOK])
        assert ended(pid) == 0
    sleeper = os.fork()
    if sleeper == 0:
        os.execv("/bin/sleep", ["sleep", "1000"])
    try:
        while b"sleep" not in open(f"/proc/{sleeper}/cmdline", "rb").read().split(b"\0")[0]:
            pass
        after = torchshm.stats()
        assert after["leases"] == before["leases"]
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)
    assert np.array_equal(x, numbers(1))


def test_subprocesses_get_nothing_of_the_pool():
    before = torchshm.stats()
    for close_fds in [True, False]:
        subprocess.run([sys.executable, "-S", "-c", LOOK], check=True, close_fds=close_fds)
    assert torchshm.stats()["leases"] == before["leases"]


def test_fork_that_runs_no_handlers_is_noticed():
    """clone() called by hand: what a library in C might do."""
    libc = ctypes.CDLL(None)
    x = torchshm.share(numbers(1), "r+")
    dropped = torchshm.share(numbers(2), "r+")
    go, gone = os.pipe()

    def child():
        y = torchshm.share(numbers(3))
        os.read(go, 1)
        assert np.array_equal(x, numbers(1))
        assert np.array_equal(torchshm.loads(torchshm.dumps(x)), numbers(1))
        fresh = [torchshm.share(np.zeros(40_000)) for _ in range(10)]
        assert not any(z.any() for z in fresh)
        assert np.array_equal(y, numbers(3))
        assert any(process["pid"] == os.getpid() for process in torchshm.stats()["processes"])

    pid = forked(child, fork=lambda: libc.syscall(SYS_FORK))
    del dropped
    fresh = [torchshm.share(np.full(40_000, 5.0)) for _ in range(10)]
    os.write(gone, b"!")
    assert ended(pid) == 0
    assert all((z == 5).all() for z in fresh)
    assert np.array_equal(x, numbers(1))
    os.close(go)
    os.close(gone)


def test_more_children_than_leases_still_read_what_they_inherited(tmp_path):
    script = """
import os

import numpy as np
import torchshm
from multiprocessing.reduction import ForkingPickler
import pickle

torchshm.register()
x = torchshm.share(np.arange(5000.0), "r+")
go, gone = os.pipe()
ready, done = os.pipe()
children = []
for n in range(1100):
    pid = os.fork()
    if pid == 0:
        os.close(gone)
        os.write(done, b".")
        os.read(go, 1)
        y = pickle.loads(bytes(ForkingPickler.dumps(x + 1)))
        os._exit(0 if (x == np.arange(5000.0)).all() and (y == x + 1).all() else 1)
    children.append(pid)
for n in range(1100):
    os.read(ready, 1)
y = torchshm.share(np.ones(5000))
os.close(gone)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 1100
assert (y == 1).all()
print(torchshm.stats()["leases"])
"""
    assert passes(script, tmp_path, PYTHONWARNINGS="ignore") == "1\n"
