"""SIGKILL in the middle of sending or receiving: the memory comes back, and what arrived whole stays whole."""

from __future__ import annotations

import pytest
from scripts import passes

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
        while time.monotonic() < end or messages <= n:  # the slowest is killed at work too
            if ours.poll(0.001):
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
    assert figures["blocks"] - 1 <= figures["tickets"], figures  # what fits beside it need not go
    print("ok")


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
        # The clock runs from the child's first answer, which a slow machine takes its time for: each child dies at work.
        killer = threading.Timer(chance.uniform(0, 0.05), child.kill)
        try:
            for m in range(10**9):
                x[0] = m
                ours.send(x if m % 2 else pooled)
                if m > 3:
                    received += answers.recv() >= 0
                if m == 4:
                    killer.start()
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
    assert passes(KILLED_RECEIVERS, tmp_path, TORCHSHM_LIMIT="256MiB", TORCHSHM_TICKET_AGE="0") == "ok\n"
