"""Few descriptors and few mappings, however many arrays a program has."""

from __future__ import annotations

import resource

from scripts import passes

COUNTING = """
import gc, multiprocessing, os, re, sys, threading, warnings
import numpy as np
import torchshm


def fds():
    return len(os.listdir("/proc/self/fd"))


def mappings():
    with open("/proc/self/maps") as file:
        return sum(1 for line in file)
"""

MANY = (
    COUNTING
    + """
def send(pipe):
    for n in range(200):
        pipe.send([np.full(40, float(n * 250 + m)) for m in range(250)])


def main():
    first = multiprocessing.Process(target=abs, args=(1,))
    first.start()
    first.join()
    multiprocessing.Pipe()  # all libraries are loaded from here on
    before = fds(), mappings()
    torchshm.register(min_bytes=0)
    own = [torchshm.empty(16, "u1") for n in range(50_000)]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=send, args=(theirs,))
    child.start()
    received = []
    for n in range(200):
        received += ours.recv()
    child.join()
    assert len(own) + len(received) == 100_000
    assert all(x[0] == n == x[-1] for n, x in enumerate(received))
    gc.collect()
    assert torchshm.stats()["processes"][0]["held_blocks"] == 100_000
    print(fds() - before[0], mappings() - before[1])


if __name__ == "__main__":
    main()
"""
)


def test_a_hundred_thousand_live_arrays_cost_a_handful_of_descriptors_and_mappings(tmp_path):
    fds, mappings = map(int, passes(MANY, tmp_path).split())
    assert fds <= 16
    assert mappings <= 64


TRAFFIC = (
    COUNTING
    + """
def echo(pipe):
    while (x := pipe.recv()) is not None:
        pipe.send(x)


def turn(sizes):
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=echo, args=(theirs,))
    child.start()
    theirs.close()
    kept = []
    for size in sizes:
        ours.send([np.ones(size), torchshm.share(np.ones(size)), torchshm.share(np.ones(size), "r")])
        kept.append(ours.recv())
        kept[-1][1][:] = 5
        with torchshm.pooled():
            kept.append(np.ones(size) + 1)
    ours.send(None)
    child.join()
    assert child.exitcode == 0
    ours.close()
    child.close()


def main():
    torchshm.register(min_bytes=0)
    turn([10, 1000, 100_000])
    gc.collect()
    before = fds(), mappings(), torchshm.stats()
    for n in range(20):
        turn([1, 50, 600, 5000, 70_000, 300_000] * 5)
    gc.collect()
    after = fds(), mappings(), torchshm.stats()
    assert after[2]["blocks"] == after[2]["tickets"] == after[2]["live_bytes"] == 0, after
    assert after[2]["leases"] == 1
    assert after[0] == before[0], (before, after)
    assert after[1] <= before[1] + 4, (before, after)  # of malloc's and Python's own
    print("ok")


if __name__ == "__main__":
    main()
"""
)


def test_descriptors_mappings_and_blocks_are_back_at_the_baseline_after_traffic(tmp_path):
    assert passes(TRAFFIC, tmp_path) == "ok\n"


def test_ten_thousand_arrays_with_a_limit_of_forty_descriptors(tmp_path):
    script = (
        MANY.replace("range(50_000)", "range(5_000)")
        .replace("range(200)", "range(20)")
        .replace("100_000", "10_000")
    )
    fds, _ = map(int, passes(script, tmp_path, limits={resource.RLIMIT_NOFILE: 40}).split())
    assert fds <= 16
