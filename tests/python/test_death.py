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


KILLED_SENDERS = """
import multiprocessing
import random
import sys
import time

import numpy as np
import torchshm


def send(pipe, size):
    x = np.arange(float(size))
    keep = []
    for n in range(10**9):
        x[0] = n
        pipe.send(x)
        keep.append(torchshm.share(x[: size // 8]))
        del keep[:-3]


def main():
    torchshm.register()
    context = multiprocessing.get_context(sys.argv[1])
    kills, size = int(sys.argv[2]), 1 << 20
    chance = random.Random(1)
    messages = 0
    kept = []
    for n in range(kills):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=send, args=(theirs, size), daemon=True)
        child.start()
        theirs.close()
        x = ours.recv()  # it is at work
        end = time.monotonic() + chance.uniform(0, 0.03)
        while time.monotonic() < end:
            if ours.poll():
                x = ours.recv()
                assert x[1] == 1 and x[-1] == size - 1
                messages += 1
        child.kill()
        child.join()
        kept.append(x[: 1 << 16].copy() if n % 3 else x)
        while True:  # what it had sent is there, whole
            try:
                y = ours.recv()
            except (EOFError, OSError):
                break
            assert y[0] > x[0] and y[1] == 1 and y[-1] == size - 1
            del y
        ours.close()
        figures = torchshm.stats()
        assert figures["leases"] == 1, figures
        own = figures["processes"][0]
        # Beside what this process holds: at most the one block under way in each half-written message.
        assert figures["blocks"] - own["held_blocks"] <= figures["tickets"] <= n + 1, figures
        del kept[:-4], x
    kept.clear()
    figures = torchshm.stats()
    assert figures["live_bytes"] <= (kills + 1) * 8 * size, figures
    # What is left belongs to whoever wants it.
    whole = torchshm.empty(figures["limit_bytes"] - (16 << 20), "u1")
    whole[:: 1 << 12] = 1
    figures = torchshm.stats()
    assert figures["blocks"] - 1 <= figures["tickets"] <= 2, figures  # what fits beside it need not go
    print("ok" if messages > kills else "the children were too slow to be caught at work")


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("method", "kills"), [("fork", 30), ("forkserver", 6)])
def test_memory_of_senders_killed_in_mid_copy_comes_back(tmp_path, method, kills):
    assert passes(KILLED_SENDERS, tmp_path, method, str(kills), TORCHSHM_LIMIT="512MiB") == "ok\n"


KILLED_RECEIVERS = """
import multiprocessing
import random
import threading
import time

import numpy as np
import torchshm
from torchshm import _C


def receive(pipe, answer):
    kept = []
    while True:
        x = pipe.recv()
        assert x[1] == 1 and x[-1] == x.size - 1
        kept.append(x)
        del kept[:-5]
        answer.send(x[0])


def main():
    torchshm.register()
    _C.set_ticket_age(0)  # five minutes is longer than a test should take
    chance = random.Random(2)
    x = np.arange(float(1 << 18))
    pooled = torchshm.share(x, "r+")
    received = 0
    for n in range(30):
        ours, theirs = multiprocessing.Pipe()
        answers, answer = multiprocessing.Pipe()
        child = multiprocessing.Process(target=receive, args=(theirs, answer), daemon=True)
        child.start()
        theirs.close()
        answer.close()
        killer = threading.Timer(chance.uniform(0, 0.05), child.kill)
        killer.start()
        try:
            for m in range(10**9):
                x[0] = m
                ours.send(x if m % 2 else pooled)
                if m > 3:
                    received += answers.recv() >= 0
        except OSError:
            pass
        except EOFError:
            pass
        killer.join()
        child.join()
        ours.close()
        answers.close()
        figures = torchshm.stats()
        assert figures["leases"] == 1, figures
        assert figures["processes"][0]["held_blocks"] == 1, figures
        assert figures["blocks"] <= 1 + figures["tickets"], figures
    assert pooled[1] == 1 and pooled[-1] == x.size - 1
    whole = torchshm.empty(figures["limit_bytes"] - (16 << 20), "u1")
    figures = torchshm.stats()
    assert figures["blocks"] - figures["tickets"] <= 2, figures
    print("ok" if received > 30 else "the children were too slow to be caught at work")


if __name__ == "__main__":
    main()
"""


def test_memory_of_receivers_killed_half_way_comes_back(tmp_path):
    assert passes(KILLED_RECEIVERS, tmp_path, TORCHSHM_LIMIT="256MiB") == "ok\n"


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
