"""A crowd that allocates, hands on, keeps, forks and dies at random: every byte stays right, and all memory comes back."""

from __future__ import annotations

import pytest
from scripts import passes

CROWD = """
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import time

import numpy as np
import torchshm

SIZES = [10, 300, 600, 3000, 10_000, 70_000, 200_000]


class Item:
    # An array full of one number, and whether writes to it are its holder's own: not those to what the program shared. (Not to "c" either:
    # one that comes back is the same memory within the process.)
    def __init__(self, chance):
        size, self.number = chance.choice(SIZES), chance.random()
        kind = chance.randrange(7)
        self.own = kind < 2
        x = np.full(size, self.number)
        if kind == 1:
            x = torchshm.loads(torchshm.dumps(x))
        elif kind == 2:
            x = torchshm.share(x)
        elif kind == 3:
            x = torchshm.share(np.full((size, 2), self.number))[:, chance.randrange(2)]
        elif kind == 4:  # written to before it is sent, and so copied
            x = torchshm.share(x)
            x[...] = self.number = chance.random()
        elif kind == 5:
            with torchshm.pooled():
                x = x + 0
        elif kind == 6:
            x = torchshm.share(x, "r")
        self.x = x

    def check(self):
        seen = set(self.x.tolist())
        assert seen == {self.number}, (self.number, seen, self.x.size, self.x.strides, self.x.base, self.own)

    def change(self, chance, forked=False):
        small = self.x.nbytes < 16 << 10  # docs/differences.md: after a fork they are seen by both, when they have been received
        if self.own and not (small and forked) and chance.random() < 0.3:
            self.number = chance.random()
            self.x[...] = self.number

    def narrow(self, chance):
        if chance.random() < 0.2:
            self.x = self.x[::-1][: self.x.size // 2 + 1]


def worker(pipe, seed):
    chance = random.Random(seed)
    kept = []
    while (items := pipe.recv()) is not None:
        for item in items:
            item.check()
            item.change(chance)
            item.narrow(chance)
        kept += items
        chance.shuffle(kept)
        while len(kept) > 12:
            kept.pop().check()
        if chance.random() < 0.03:
            child = os.fork()
            if child == 0:
                for item in kept:
                    item.check()
                    item.change(chance, forked=True)
                    item.check()
                torchshm.loads(torchshm.dumps(Item(chance))).check()
                os._exit(0)
            for item in kept:
                item.change(chance, forked=True)
            assert os.waitpid(child, 0)[1] == 0
        pipe.send([Item(chance) for n in range(chance.randrange(3))] + kept[: chance.randrange(3)])
    for item in kept:
        item.check()


def main():
    torchshm.register()
    method, seconds, mean_life = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    context = multiprocessing.get_context(method)
    chance = random.Random(sys.argv[4])
    members, kept, deaths, messages = {}, [], 0, 0

    def begin():
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, chance.random()), daemon=True)
        process.start()
        theirs.close()
        ours.send([])
        members[ours] = process, time.monotonic() + chance.expovariate(1 / mean_life)

    def bury(pipe):
        process, _ = members.pop(pipe)
        process.kill()
        process.join()
        pipe.close()
        return process.exitcode

    for _ in range(4):
        begin()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for pipe in multiprocessing.connection.wait(list(members), timeout=0.01):
            items = pipe.recv()  # an error here is a failure: nobody but this process kills
            messages += 1
            for item in items:
                item.check()
                item.change(chance)
            kept += items
            chance.shuffle(kept)
            pipe.send(kept[: chance.randrange(4)] + [Item(chance) for n in range(chance.randrange(3))])
            while len(kept) > 15:
                kept.pop().check()
        for pipe, (_, death) in list(members.items()):
            if time.monotonic() > death:
                bury(pipe)
                deaths += 1
                begin()
        if chance.random() < 0.02:
            torchshm.trim(chance.choice([0, 8 << 20]))
    for item in kept:
        item.check()
    for pipe in list(members):
        pipe.recv()
        pipe.send(None)
        members[pipe][0].join(60)
        assert bury(pipe) == 0
    items = item = None
    kept.clear()
    gc.collect()
    figures = torchshm.stats()
    assert figures["leases"] == 1 and figures["blocks"] <= figures["tickets"], figures
    limit = figures["limit_bytes"]
    time.sleep(6.1)  # what was sent to the dead is older than TORCHSHM_TICKET_AGE then
    whole = torchshm.empty(limit - (8 << 20), "u1")
    assert messages > 0
    print("ok", messages, deaths)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("method", "seconds", "mean_life"), [("fork", 5, 0.15), ("forkserver", 3, 0.5), ("fork", 3, 1e9)]
)
def test_crowd_keeps_every_byte_right_and_gives_all_memory_back(tmp_path, method, seconds, mean_life):
    done = passes(
        CROWD,
        tmp_path,
        method,
        str(seconds),
        str(mean_life),
        "3",
        TORCHSHM_LIMIT="192MiB",
        TORCHSHM_WARM="32MiB",
        TORCHSHM_TICKET_AGE="5",
        PYTHONWARNINGS="ignore",
    )
    assert done.startswith("ok")
