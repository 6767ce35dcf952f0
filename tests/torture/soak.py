"""A soak of the Python layer: processes of all start methods send one another arrays, and are killed and stopped at random.

Every array says by itself what is in it, and everyone who holds one verifies that, before and after changing what is its own. Now and
then everything comes to rest and the checker looks at the whole pool; now and then everybody is killed and everything must have come
back. The seed decides who does what; the kernel's scheduler decides when.

    python tests/torture/soak.py --seconds 60 --seed 1 --json build/torture/soak_python-1.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib.array_utils import byte_bounds
from result_file import ResultFile

import torchshm
from torchshm import _C

PATIENCE = 30.0  # seconds; no operation of a survivor takes longer
HANG = 150.0  # seconds without any progress: everybody's stack is printed, and the soak ends

SIZES = [1, 10, 300, 600, 1500, 3000, 5000, 10_000, 20_000, 50_000]
LARGE = 200_000
DTYPES = ["u1", ">i2", "i4", "f4", "f8", "c16", "M8[s]", "S7", "bool", "i4,f8"]
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

libc = ctypes.CDLL(None, use_errno=True)


class WrongBytes(Exception):
    """An array does not hold what was put into it."""


def pattern(number: int, size: int, dtype: str) -> np.ndarray:
    """Values that depend on the number and on each element's place."""
    raw = np.frombuffer(np.uint64(number).tobytes() * (size * np.dtype(dtype).itemsize // 8 + 2), "u1")
    raw = raw[: size * np.dtype(dtype).itemsize].copy()
    raw[:: 13 + number % 7] ^= np.arange(len(raw[:: 13 + number % 7]), dtype="u8").astype("u1")
    return (raw & 1).view(dtype) if dtype == "bool" else raw.view(dtype)


def bytes_of(x: np.ndarray) -> bytes:
    # NumPy's own pickling may bring the values into the machine's byte order.
    return x.astype(x.dtype.newbyteorder("="), copy=False).tobytes()


class Item:
    """An array, or an object with arrays in it, and what it has to hold.

    `own`: its holder may write to it and nobody else sees that. "c": the same, unless the process has the block twice.
    "r+": all holders write the low byte of each word.
    """

    def __init__(self, chance: random.Random, plain: bool = False) -> None:
        self.number = chance.getrandbits(63)
        self.size = LARGE if chance.random() < 0.01 else chance.choice(SIZES)
        self.dtype = chance.choice(DTYPES)
        self.kind = (
            "own" if plain else chance.choice(["own", "own", "c", "c", "r", "r+", "sliced", "pooled", "deep"])
        )
        if chance.random() < 0.01 and not plain:
            self.kind = "frame"
        self.column = chance.randrange(3)
        try:
            self.x = self.make(chance)
        except torchshm.PoolFullError:
            self.kind = "own"
            self.x = self.make(chance)
        here.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        here.add(self)

    def make(self, chance: random.Random) -> Any:
        x: Any = pattern(self.number, self.size, self.dtype)
        if self.kind == "c":
            x = torchshm.share(x)
        elif self.kind == "r":
            x = torchshm.share(x, "r")
        elif self.kind == "r+":
            x = torchshm.share(self.words(), "r+")
        elif self.kind == "sliced":
            table = np.empty((self.size, 3), self.dtype)
            table[:, self.column] = x
            x = torchshm.share(table)[:, self.column]
        elif self.kind == "pooled":
            with torchshm.pooled():
                x = x.copy()
        elif self.kind == "frame":
            import pandas as pd
            import xarray as xr

            self.dtype = "f8"
            values = pattern(self.number, self.size, "i8") % 1000 / 7
            x = pd.DataFrame({"a": values, "b": values[::-1], "c": "text"})
            if chance.random() < 0.5:
                x = xr.Dataset(
                    {"a": ("t", values), "b": ("t", values[::-1].copy())}, coords={"t": np.arange(self.size)}
                )
        elif self.kind == "deep":
            x = {"list": [x, (x[::2],)], "text": "x" * 40}
        return x

    def words(self) -> np.ndarray:
        return (np.uint64(self.number >> 8 << 8)) + (np.arange(self.size, dtype="u8") << np.uint64(8))

    def parts(self) -> list[np.ndarray]:
        if self.kind == "deep":
            return [self.x["list"][0], self.x["list"][1][0]]
        if self.kind == "frame":
            return [np.asarray(self.x["a"]), np.asarray(self.x["b"])]
        return [self.x]

    def check(self, when: str) -> int:
        """Verify every byte; returns how many."""
        parts = self.parts()
        if self.kind == "r+":
            wrong = (parts[0] >> np.uint64(8)) != (self.words() >> np.uint64(8))
            fine = not wrong.any()
        elif self.kind == "frame":
            values = pattern(self.number, self.size, "i8") % 1000 / 7
            fine = bool((parts[0] == values).all() and (parts[1] == values[::-1]).all())
        else:
            wanted = pattern(self.number, self.size, self.dtype)
            fine = all(
                bytes_of(part) == bytes_of(step)
                for part, step in zip(parts, [wanted, wanted[::2]], strict=False)
            )
        if not fine:
            raise WrongBytes(
                f"pid {os.getpid()}, {when}: kind {self.kind}, {self.size} x {self.dtype}, number {self.number}, "
                f"{[(p.shape, p.strides, p.ctypes.data, torchshm.is_shared(p)) for p in parts]}"
            )
        return sum(part.nbytes for part in parts)

    def change(self, chance: random.Random, others: list[Item], forked: bool = False) -> bool:
        """Write to it, where that is its holder's own."""
        if chance.random() > 0.4:
            return False
        if self.kind == "r+":
            self.x[:: chance.randrange(1, 9)] ^= np.uint64(chance.randrange(256))
            return True
        # docs/differences.md: small ones are seen by both after a fork, when they have been received.
        if self.kind not in ("own", "c") or (forked and self.x.nbytes < 16 << 10):
            return False
        if not self.x.flags.writeable or any(shares(self, other) for other in others if other is not self):
            return False
        number = chance.getrandbits(63)
        if self.kind == "c":
            written.append(byte_bounds(self.x))
        self.x[...] = pattern(number, self.size, self.dtype)
        self.number = number
        return True


here: weakref.WeakSet[Item] = weakref.WeakSet()
"""All items of this process: those that it holds, those that a queue's thread still has, those that it inherited."""

written: list[tuple[int, int]] = []
"""Where this process has written to "c" arrays. They show that to every later view, until nothing here looks there any more."""


def overlaps(item: Item, low: int, high: int) -> bool:
    return any(low < end and start < high for start, end in map(byte_bounds, item.parts()))


def shares(a: Item, b: Item) -> bool:
    return any(np.may_share_memory(p, q) for p in a.parts() for q in b.parts())


def admit(received: list[Item], kept: list[Item], tally: Counter[str], when: str) -> None:
    """Check what has come, and keep it.

    A "c" array that comes a second time is the same memory within a process; where that was written to, its message is no news.
    """
    before = [item for item in here if all(item is not new for new in received)]
    written[:] = [bounds for bounds in written if any(overlaps(item, *bounds) for item in before)]
    for item in received:
        if any(overlaps(item, *bounds) for bounds in written):
            tally["came back to a written view"] += 1
            continue
        tally["bytes verified"] += item.check(when)
        kept.append(item)


# ---- workers


@contextlib.contextmanager
def reporting(folder: str) -> Iterator[None]:
    """What goes wrong in a child is found in a file of its own; its exit status says so too."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        yield
    except BaseException:
        path = Path(folder, f"{os.getpid()}.part")
        path.write_text(traceback.format_exc())
        path.rename(path.with_suffix(".txt"))
        os._exit(1)


def grandchild(chance: random.Random, kept: list[Item]) -> None:
    for item in kept:
        item.check("in a forked child")
        item.change(chance, kept, forked=True)
        item.check("in a forked child, after a write")
    made = torchshm.loads(torchshm.dumps(Item(chance)))
    made.check("made in a forked child")


def local_step(chance: random.Random, kept: list[Item], tally: Counter[str], folder: str) -> None:
    n = chance.random()
    if n < 0.3:
        admit([torchshm.loads(torchshm.dumps(Item(chance)))], kept, tally, "to itself")
    elif n < 0.5 and kept:
        item = chance.choice(kept)
        tally["bytes verified"] += item.check("before a write")
        tally["writes"] += item.change(chance, kept)
        tally["bytes verified"] += item.check("after a write")
    elif n < 0.6 and kept:
        # Unpickled twice, or never.
        pickled = torchshm.dumps(chance.choice(kept))
        for _ in range(chance.randrange(3)):
            try:
                tally["bytes verified"] += torchshm.loads(pickled).check("from a message that is used again")
            except torchshm.StaleHandleError:
                tally["stale handles"] += 1
    elif n < 0.63:
        torchshm.trim(chance.choice([0, 8 << 20]))
    elif n < 0.66:
        torchshm.stats()
    elif n < 0.69:
        tally["forks"] += 1
        child = os.fork()
        if child == 0:
            with reporting(folder):
                grandchild(random.Random(chance.random()), kept)
            os._exit(0)
        for item in kept:
            item.change(chance, kept, forked=True)
        if chance.random() < 0.3:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGKILL):
            raise RuntimeError(f"a forked child ended with {status}")
    elif kept:
        item = kept.pop(chance.randrange(len(kept)))
        tally["bytes verified"] += item.check("before it is dropped")
    while len(kept) > 14:
        tally["bytes verified"] += kept.pop(0).check("before it is dropped")


def worker(pipe: Any, seed: float, folder: str) -> None:
    with reporting(folder):
        os.nice(5)  # there are many of these and one conductor
        chance, kept, tally = random.Random(seed), [], Counter[str]()
        parent = os.getppid()
        while True:
            while not pipe.poll(0):
                if os.getppid() != parent:
                    return
                tally["operations"] += 1
                local_step(chance, kept, tally, folder)
            received = pipe.recv()
            if received is None:
                break
            if received == "rest":
                for item in kept:
                    tally["bytes verified"] += item.check("at rest")
                gc.collect()
                pipe.send(("resting", tally))
                tally.clear()
                pipe.poll(None)
                continue
            admit(received, kept, tally, "received")
            received = item = None
            for item in kept:
                item.change(chance, kept)
            sent = [Item(chance) for _ in range(chance.randrange(3))] + chance.sample(
                kept, min(len(kept), chance.randrange(3))
            )
            pipe.send(("items", sent))
            sent = None
        for item in kept:
            item.check("at the end")


def produce(queue: Any, seed: float, n: int, folder: str) -> None:
    with reporting(folder):
        chance = random.Random(seed)
        for _ in range(n):
            queue.put([Item(chance)])


def consume(queue: Any, folder: str) -> None:
    with reporting(folder):
        while (items := queue.get()) is not None:
            for item in items:
                item.check("from a queue")


def examine(folder: str, *items: Item) -> None:
    with reporting(folder):
        for item in items:
            item.check("from the arguments")


def transform(item: Item) -> Item:
    item.check("in a pool's worker")
    chance = random.Random(item.number)
    item.change(chance, [])
    return item


# ---- the conductor


class Conductor:
    def __init__(self, seed: int, processes: int) -> None:
        self.chance = random.Random(seed)
        self.processes = processes or self.chance.randrange(8, 15)
        self.tally: Counter[str] = Counter()
        self.violations: list[str] = []
        self.folder = tempfile.mkdtemp(prefix="torchshm-soak-")
        self.kept: list[Item] = []
        self.members: dict[Any, Any] = {}  # our end of the pipe: process
        self.stopped: dict[int, float] = {}
        self.longest = 0.0
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
        limit = self.chance.choice(["96MiB", "256MiB"])
        self.tally["limit MiB"] = int(limit[:-3])
        # That the pool is full is said once; here it is meant to be.
        warnings.simplefilter("ignore", RuntimeWarning)
        os.environ["PYTHONWARNINGS"] = "ignore"
        torchshm.register(limit=limit)
        self.limit = torchshm.stats()["limit_bytes"]
        multiprocessing.get_context("forkserver")
        signal.signal(signal.SIGALRM, self.resume)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        # Whatever is opened once and for all: the forkserver, the resource tracker.
        for method in ["forkserver", "spawn", "fork"]:
            process = multiprocessing.get_context(method).Process(
                target=examine, args=(self.folder, Item(self.chance))
            )
            process.start()
            process.join()
            process.close()
        gc.collect()
        self.descriptors = len(os.listdir("/proc/self/fd"))

    # -- signals; a child is only ever signalled before it has been waited for

    def resume(self, *_: Any) -> None:
        """Let those go on whose time has come. Between any two bytecodes, also while something waits for them."""
        for pid, until in list(self.stopped.items()):
            if time.monotonic() > until:
                self.stopped.pop(pid, None)
                os.kill(pid, signal.SIGCONT)

    def stop(self, process: Any) -> None:
        if process.pid in self.stopped:
            return
        self.tally["stops"] += 1
        seconds = self.chance.random() * (3 if self.chance.random() < 0.05 else 0.05)
        os.kill(process.pid, signal.SIGSTOP)
        self.stopped[process.pid] = time.monotonic() + seconds

    def end(self, process: Any, killed: bool) -> None:
        """Wait for a child's end; killed: kill it first."""
        if killed:
            self.tally["kills"] += 1
            self.stopped.pop(process.pid, None)
            process.kill()
        process.join(PATIENCE)
        if process.exitcode is None:
            self.wrong(f"pid {process.pid} does not end")
            process.kill()
            process.join()
        self.stopped.pop(process.pid, None)
        if process.exitcode != 0 and not (killed and process.exitcode == -signal.SIGKILL):
            self.wrong(f"pid {process.pid} ended with {process.exitcode}")
        process.close()

    def wrong(self, what: str) -> None:
        self.violations.append(what)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.longest = max(self.longest, took)
        if took > PATIENCE:
            self.wrong(f"{what} took {took:.1f} s")

    def context(self) -> Any:
        self.tally[method := self.chance.choices(["fork", "spawn", "forkserver"], [80, 8, 12])[0]] += 1
        return self.chance.choice([multiprocessing, torchshm]).get_context(method)

    # -- the crowd

    def begin(self) -> None:
        context = self.context()
        ours, theirs = context.Pipe()
        process = context.Process(
            target=worker, args=(theirs, self.chance.random(), self.folder), daemon=True
        )
        process.start()
        theirs.close()
        ours.send([])
        self.members[ours] = process

    def bury(self, pipe: Any, killed: bool) -> None:
        process = self.members.pop(pipe)
        self.end(process, killed)
        pipe.close()

    def receive(self, pipe: Any) -> None:
        what, content = pipe.recv()  # an error here is a violation: nobody but this process kills
        assert what == "items", what
        self.tally["messages"] += 1
        admit(content, self.kept, self.tally, "received by the conductor")
        for item in content:
            self.tally["writes"] += item.change(self.chance, self.kept)
        content = item = None
        self.chance.shuffle(self.kept)
        while len(self.kept) > 16:
            self.tally["bytes verified"] += self.kept.pop().check("before it is dropped")

    def answer(self, pipe: Any) -> None:
        sent = self.kept[: self.chance.randrange(4)] + [
            Item(self.chance) for _ in range(self.chance.randrange(3))
        ]
        with self.timed("dumps and send"):
            pipe.send(sent)

    def crowd_step(self) -> None:
        while len(self.members) < self.processes:
            self.begin()
        for pipe in multiprocessing.connection.wait(list(self.members), timeout=0.01):
            self.receive(pipe)
            self.answer(pipe)
        n, pipe = self.chance.random(), self.chance.choice(list(self.members))
        if n < 0.25:
            self.bury(pipe, killed=True)
        elif n < 0.5:
            self.stop(self.members[pipe])
        elif n < 0.51:
            self.leave(pipe)
        elif n < 0.55:
            with self.timed("trim"):
                torchshm.trim(self.chance.choice([0, 8 << 20]))

    def leave(self, pipe: Any) -> None:
        self.receive(pipe)
        pipe.send(None)
        self.tally["ordinary ends"] += 1
        self.bury(pipe, killed=False)

    # -- the other ways to start processes and to send

    def by_queue(self) -> None:
        context, n = self.context(), self.chance.randrange(1, 12)
        queue = context.Queue()
        process = context.Process(target=produce, args=(queue, self.chance.random(), n, self.folder))
        process.start()
        taken_back = torchshm.stats()["tickets_taken_back"]
        killed = self.chance.random() < 0.5
        # What a killed producer leaves in the queue may be half a message, which nobody may wait for: that is the program's.
        for _ in range(self.chance.randrange(n) if killed else n):
            try:
                items = queue.get(timeout=PATIENCE)
            except torchshm.StaleHandleError:
                # Allowed where the pool was full and the sender had ended.
                if torchshm.stats()["tickets_taken_back"] == taken_back:
                    raise
                self.tally["stale handles"] += 1
                continue
            for item in items:
                self.tally["bytes verified"] += item.check("from a queue")
        items = item = None
        self.end(process, killed)
        queue.close()
        self.tally["queues"] += 1

    def to_queue(self) -> None:
        context = self.context()
        queue = context.Queue()
        process = context.Process(target=consume, args=(queue, self.folder))
        process.start()
        for _ in range(self.chance.randrange(1, 12)):
            queue.put([Item(self.chance)])
        killed = self.chance.random() < 0.5
        if not killed:
            queue.put(None)
        ours = type(queue).__module__.startswith("torchshm")
        rest = -1 if ours else os.dup(queue._reader.fileno())  # the thread behind the queue closes its own
        self.end(process, killed)
        queue.close()
        # What a killed consumer has not received, perhaps from the middle of a message on, nobody will: those messages are lost.
        while not ours and os.read(rest, 1 << 16):
            pass
        if not ours:
            os.close(rest)
        queue.join_thread()
        self.tally["queues"] += 1

    def by_pool(self) -> None:
        with self.context().Pool(2) as pool:
            items = [Item(self.chance, plain=True) for _ in range(self.chance.randrange(1, 10))]
            for item in pool.imap_unordered(transform, items, chunksize=self.chance.randrange(1, 3)):
                self.tally["bytes verified"] += item.check("a pool's result")
            for item in items:
                self.tally["bytes verified"] += item.check("after a pool's work")
        pool.join()
        self.tally["pools"] += 1

    def by_arguments(self) -> None:
        items = [Item(self.chance) for _ in range(self.chance.randrange(1, 4))]
        process = self.context().Process(target=examine, args=(self.folder, *items))
        process.start()
        killed = self.chance.random() < 0.4
        if killed:
            time.sleep(self.chance.random() * 0.1)
        self.end(process, killed)
        self.tally["arguments"] += 1

    # -- rest

    def check(self, when: str) -> None:
        """The whole pool, when nobody is inside an operation; the threads that give memory back may be for a moment."""
        self.tally["checks"] += 1
        _C.reap()
        for _ in range(40):
            report = _C.check(*_C.fds(), True) if hasattr(_C, "check") else {"violations": []}
            if not report["violations"]:
                return
            time.sleep(0.05)
        self.wrong(f"{when}: {report}")

    def rest(self) -> None:
        """All workers between two operations, with what they hold."""
        self.tally["rests"] += 1
        for pid in list(self.stopped):
            self.stopped[pid] = 0.0
        for pipe in self.members:
            with self.timed("a worker's answer"):
                self.receive(pipe)
            pipe.send("rest")
        for pipe in self.members:
            what, tally = pipe.recv()
            assert what == "resting", what
            self.tally += tally
        figures = torchshm.stats()
        if figures["leases"] != 1 + len(self.members):
            self.wrong(f"at rest: {figures['leases']} leases, {1 + len(self.members)} processes")
        self.check("at rest")
        for item in self.kept:
            self.tally["bytes verified"] += item.check("kept, at rest")
        for pipe in self.members:
            self.answer(pipe)

    def come_back(self) -> None:
        """Everybody is gone, and everything is as it was at the start."""
        self.tally["returns"] += 1
        for pid in list(self.stopped):
            self.stopped[pid] = 0.0
        for pipe in list(self.members):
            if self.chance.random() < 0.3:
                self.leave(pipe)
            else:
                self.bury(pipe, killed=True)
        self.wait_for_orphans()
        for item in self.kept:
            self.tally["bytes verified"] += item.check("kept, all dead")
        item = None
        self.kept.clear()
        gc.collect()
        self.check("all dead")
        # All of the limit is wanted, so whatever no process uses is asked back: all tickets, whoever's and however old.
        _C.set_ticket_age(0)
        _C.set_limit(4 << 20)
        try:
            with self.timed("an allocation of all of the limit"):
                torchshm.empty(4 << 20, "u1")
        finally:
            _C.set_limit(self.limit)
            _C.set_ticket_age(300)
        for _ in range(40):  # the thread that gives memory back may be at work on a chunk
            torchshm.trim(0)
            figures = torchshm.stats()
            pages = os.fstat(_C.fds()[0]).st_blocks
            if figures["committed_bytes"] == 0 and pages == 0:
                break
            time.sleep(0.05)
        self.check("all back")
        wanted = {"leases": 1, "blocks": 0, "tickets": 0, "committed_bytes": 0}
        found = {name: figures[name] for name in wanted}
        if found != wanted or pages != 0:
            self.wrong(f"all back: {found}, {pages} blocks of 512 bytes in the data file")
        if (now := len(os.listdir("/proc/self/fd"))) != self.descriptors:
            self.wrong(f"all back: {now} descriptors, {self.descriptors} at the start")

    def wait_for_orphans(self) -> None:
        """Forked children of killed workers are ours now; they end by themselves."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0] > 0:
                    pass
            if torchshm.stats()["leases"] == 1:
                return
            time.sleep(0.01)

    # -- the whole

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        next_episode = next_rest = time.monotonic() + 1
        while time.monotonic() < end and not self.violations:
            faulthandler.dump_traceback_later(HANG, exit=True)
            self.crowd_step()
            if time.monotonic() > next_episode:
                with self.timed("an episode"):
                    self.chance.choice([self.by_queue, self.to_queue, self.by_pool, self.by_arguments])()
                next_episode = time.monotonic() + self.chance.random() * 1.5
            if time.monotonic() > next_rest:
                (self.rest if self.chance.random() < 0.7 else self.come_back)()
                next_rest = time.monotonic() + self.chance.random() * 4
            self.collect_reports()
        if not self.violations:
            self.come_back()
        self.collect_reports()
        faulthandler.cancel_dump_traceback_later()

    def collect_reports(self) -> None:
        for path in Path(self.folder).glob("*.txt"):
            self.wrong(f"pid {path.stem}: {path.read_text()}")
            path.unlink()

    def close(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for pid in self.stopped:
            os.kill(pid, signal.SIGCONT)
        for pipe, process in self.members.items():
            process.kill()
            process.join()
            pipe.close()
        self.collect_reports()
        shutil.rmtree(self.folder)


def soak(seconds: float, seed: int, processes: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Figures and violations of one soak."""
    conductor = Conductor(seed, processes)
    began = time.monotonic()
    try:
        conductor.run(seconds)
    except Exception:
        conductor.collect_reports()
        conductor.wrong(traceback.format_exc())
    finally:
        conductor.close()
    figures = {"processes": conductor.processes, **dict(sorted(conductor.tally.items()))}
    figures["longest operation of the conductor ms"] = round(conductor.longest * 1000)
    figures["leases reaped"] = torchshm.stats()["reaped"]
    figures["seconds"] = round(time.monotonic() - began, 1)
    return figures, conductor.violations


def finish(result: ResultFile, path: Path | None) -> NoReturn:
    print(
        f"seed {result.seed}, {result.seconds} s:",
        ", ".join(f"{n} {value}" for n, value in result.figures.items()),
    )
    for violation in result.violations:
        print("WRONG:", violation)
    result.write(path)
    sys.exit(1 if result.violations else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=0, help="0: the seed says")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true", help="said in the result")
    chosen = parser.parse_args()
    figures, violations = soak(chosen.seconds, chosen.seed, chosen.processes)
    took = figures.pop("seconds")
    finish(ResultFile("soak_python", chosen.seed, chosen.full, took, figures, violations), chosen.json)


if __name__ == "__main__":
    main()
