"""exec ends a membership, a closed descriptor does not, and no other program gets to see the pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import ended, forked, numbers
from scripts import passes

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

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
        while not Path(f"/proc/{sleeper}/cmdline").read_bytes().startswith(b"sleep"):
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


def test_daemon_that_closes_all_its_descriptors_stays_a_member():
    """And files that it opens then, under the same numbers, are its own."""
    held = [torchshm.share(numbers(1), "r+")]
    ready, is_ready = os.pipe()
    go, gone = os.pipe()

    def child():
        keep = os.dup2(go, 200), os.dup2(is_ready, 201)
        os.closerange(3, 200)
        os.closerange(202, 4096)
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]
        own = torchshm.share(numbers(2), "r+")
        os.write(keep[1], b"!")
        os.read(keep[0], 1)
        assert np.array_equal(held[0], numbers(1))
        assert np.array_equal(own, numbers(2))
        assert np.array_equal(torchshm.loads(torchshm.dumps(numbers(3))), numbers(3))

        def grandchild():
            assert np.array_equal(own, numbers(2))
            assert np.array_equal(torchshm.loads(torchshm.dumps(held[0])), numbers(1))

        assert ended(forked(grandchild)) == 0
        assert torchshm.stats()["leases"] >= 2
        assert all(os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in opened)

    pid = forked(child)
    os.read(ready, 1)
    for _ in range(5):
        assert pid in [process["pid"] for process in torchshm.stats()["processes"]]
    held.clear()
    fresh = [torchshm.share(np.zeros(40_000)) for _ in range(20)]
    os.write(gone, b"!")
    assert ended(pid) == 0
    assert pid not in [process["pid"] for process in torchshm.stats()["processes"]]
    assert not any(y.any() for y in fresh)
    for fd in [ready, is_ready, go, gone]:
        os.close(fd)


def test_process_that_closes_its_descriptors_itself_goes_on(tmp_path):
    """Its children have no way to a lease of their own; they read what they inherited, and send as ever."""
    script = """
import multiprocessing
import os
import pickle

import numpy as np
import torchshm


def child(pipe):
    pipe.send(np.arange(20_000.0))


torchshm.register()
x = torchshm.share(np.arange(20_000.0), "r+")
os.closerange(3, 4096)
opened = [os.open("/dev/null", os.O_RDONLY) for n in range(20)]
y = torchshm.loads(torchshm.dumps(x + 1))
assert (y == x + 1).all()
assert torchshm.stats()["leases"] == 1
ours, theirs = multiprocessing.Pipe()
process = multiprocessing.Process(target=child, args=(theirs,))
process.start()
z = ours.recv()
process.join()
assert (z == x).all() and process.exitcode == 0
if os.fork() == 0:
    same = pickle.loads(bytes(multiprocessing.reduction.ForkingPickler.dumps(x)))
    os._exit(0 if (x == np.arange(20_000.0)).all() and (same == x).all() else 1)
assert os.wait()[1] == 0
assert all(os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in opened)
print("ok")
"""
    assert passes(script, tmp_path, PYTHONWARNINGS="ignore") == "ok\n"
