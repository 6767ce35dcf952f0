"""Death is ordinary: what a killed process used comes back, what others hold stays, nobody waits."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
from peer import Peer, give, keep
from scripts import passes

import torchshm

pytestmark = pytest.mark.usefixtures("registered")


def dead_leave(figures, pid):
    return pid not in [process["pid"] for process in figures["processes"]]


def pattern(seed):
    return np.random.default_rng(seed).integers(0, 255, 300_000, "u1")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_arrays_outlive_the_death_of_their_sender(method):
    received = []
    for turn in range(5):
        sender = Peer(method)
        received += [(10 * turn + n, sender.call(pattern, 10 * turn + n)) for n in range(10)]
        sender.kill()
    fresh = [torchshm.share(np.zeros(300_000, "u1")) for _ in range(20)]
    assert dead_leave(torchshm.stats(), sender.process.pid)
    for seed, x in received:
        assert np.array_equal(x, pattern(seed))
    assert not any(x.any() for x in fresh)


def test_arrays_outlive_the_process_that_made_the_pool(tmp_path):
    """The script's process makes the pool, and two children are left when it is gone."""
    script = """
import multiprocessing
import os
import sys
import time

import numpy as np
import torchshm


def first(pipe, parent):
    x = pipe.recv()
    while os.getppid() == parent:
        time.sleep(0.001)
    figures = torchshm.stats()
    assert parent not in [process["pid"] for process in figures["processes"]], figures
    pipe.send((x, np.arange(50_000.0) + 1))
    pipe.close()
    time.sleep(0.05)


def second(pipe, parent):
    x, y = pipe.recv()
    z = torchshm.empty(50_000)
    z[...] = x + y
    assert np.array_equal(z, np.arange(50_000.0) * 2 + 1)
    os.write(1, b"ok\\n")


if __name__ == "__main__":
    torchshm.register()
    context = multiprocessing.get_context(sys.argv[1])
    a, b = context.Pipe()
    relay = context.Process(target=second, args=(b, os.getpid()))
    relay.start()
    child = context.Process(target=first, args=(a, os.getpid()))
    b.send(np.arange(50_000.0))
    child.start()
    os._exit(0)
"""
    assert passes(script, tmp_path, "fork") == "ok\n"


def test_stopped_process_is_not_taken_for_dead():
    with Peer("spawn") as sleeper:
        sleeper.call(keep, "x", pattern(1))
        back = sleeper.call(give, pattern(2))
        before = torchshm.stats()
        os.kill(sleeper.process.pid, signal.SIGSTOP)
        try:
            for _ in range(20):
                torchshm.share(np.zeros(300_000, "u1"))
                assert not dead_leave(torchshm.stats(), sleeper.process.pid)
            assert torchshm.stats()["reaped"] == before["reaped"]
        finally:
            os.kill(sleeper.process.pid, signal.SIGCONT)
        assert np.array_equal(sleeper.call(_kept_x), pattern(1))
        assert np.array_equal(back, pattern(2))


def _kept_x():
    from peer import kept

    return kept["x"]


def test_zombie_is_dead():
    child = os.fork()
    if child == 0:
        kept = [torchshm.share(np.zeros(300_000, "u1")) for _ in range(5)]
        os.kill(os.getpid(), signal.SIGKILL)
        del kept
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert dead_leave(torchshm.stats(), child)
    os.waitpid(child, 0)


def test_holder_that_is_killed_gives_its_blocks_back_by_the_next_stats():
    before = torchshm.stats()
    for _ in range(10):
        holder = Peer("fork")
        for n in range(3):
            holder.call(keep, n, pattern(n))
        figures = torchshm.stats()
        assert figures["blocks"] == before["blocks"] + 3
        time.sleep(random.uniform(0, 0.002))
        holder.kill()
        figures = torchshm.stats()
        assert (figures["blocks"], figures["leases"]) == (before["blocks"], before["leases"])
        assert figures["live_bytes"] == before["live_bytes"]


def test_allocation_takes_what_the_dead_had_without_asking_for_figures(tmp_path):
    script = """
import os
import signal

import torchshm

for turn in range(5):
    child = os.fork() if turn else 0
    if turn == 0:
        torchshm.empty(1)
        continue
    if child == 0:
        x = torchshm.empty(28 << 20, "u1")
        x[:: 4096] = 1
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    x = torchshm.empty(28 << 20, "u1")
    x[:: 4096] = 2
    del x
print("ok")
"""
    assert passes(script, tmp_path, TORCHSHM_LIMIT="32MiB") == "ok\n"
