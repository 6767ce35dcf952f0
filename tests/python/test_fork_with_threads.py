"""A process may fork while its other threads allocate, free, send and receive."""

from __future__ import annotations

from scripts import passes

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
