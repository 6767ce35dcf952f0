"""A soak of the store: processes work on the same names, while clients and the service are killed at random.

Every value says by itself what is in it, and everyone who loads it verifies that. Each worker has keys of its own as well, and notes
outside the store what it was about to save and what it had saved: whoever takes its place finds that, and nothing older. Producers save
and are gone at once, by exit or SIGKILL; what they saved must be there. The service is killed and started again, by the command line and,
to measure how long it takes over without the start of an interpreter, in a forked process that has its modules. The seed decides who does
what; the kernel's scheduler decides when.

    python tests/torture/store_soak.py --seconds 60 --seed 1 --json build/torture/store_soak-1.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from result_file import ResultFile
from soak import PR_SET_PDEATHSIG, SIZES, WrongBytes, finish, libc, pattern, reporting

import torchshm
from torchshm import _C, _check, _store_commands

LIMIT = "512MiB"
WORKERS, OWN = 5, 6  # processes; keys of each
SHARED = 24  # keys of all
KEPT = 20  # values that a reader holds on to
PATIENCE = 60.0  # seconds without progress
TALLIES = [
    "operations",
    "saved",
    "exists",
    "overwritten",
    "removed",
    "loaded",
    "missing",
    "created",
    "not served",
]
COUNTED = {what: i for i, what in enumerate(TALLIES)}


# ---- values


def value_of(number: int) -> Any:
    """What a number stands for: one array, or several, with other things between them."""
    chance = random.Random(number)
    size = chance.choice(SIZES)
    array = np.empty(2 + size, "u8")
    array[:2] = number, size
    array[2:] = pattern(number, size, "u8")
    if number % 3:
        return array
    return {"number": number, "all": [array, (array[2:], "text", b"bytes" * (number % 50))], "none": None}


def number_of(value: Any) -> int:
    """The number, after a look at every byte."""
    array = value["all"][0] if isinstance(value, dict) else value
    number, size = int(array[0]), int(array[1])
    expected = value_of(number)
    whole = expected["all"][0] if isinstance(expected, dict) else expected
    if len(array) != size + 2 or not np.array_equal(array, whole):
        raise WrongBytes(f"{number}: an array of {len(array)} words is not what was saved")
    if isinstance(value, dict) != isinstance(expected, dict):
        raise WrongBytes(f"{number}: a value of another kind")
    if isinstance(value, dict):
        view, text, octets = value["all"][1]
        if not np.array_equal(view, whole[2:]) or (text, octets) != expected["all"][1][1:]:
            raise WrongBytes(f"{number}: other parts than were saved")
    return number


# ---- what is noted outside the store


class Notes:
    """A file that all processes map: what each worker was about to save and had saved, and what it has counted."""

    def __init__(self, folder: str) -> None:
        path = Path(folder) / "notes"
        size = WORKERS * (2 * OWN + len(TALLIES))
        words = np.memmap(path, "i8", "r+" if path.exists() else "w+", shape=(size,))
        self.begun, self.done = words[: 2 * WORKERS * OWN].reshape(2, WORKERS, OWN)
        self.tallies = words[2 * WORKERS * OWN :].reshape(WORKERS, len(TALLIES))


def connect(name: str, notes: Notes | None = None, slot: int = 0) -> torchshm.Store:
    """Connect, however long nobody serves the store: the one thing that may fail."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return torchshm.connect(name, timeout=0.2)
        except torchshm.StoreUnavailableError:
            if notes is not None:
                notes.tallies[slot, COUNTED["not served"]] += 1
            if time.monotonic() > deadline:
                raise


# ---- roles


class Worker:
    """One client at work, until it is killed."""

    def __init__(self, name: str, folder: str, slot: int, seed: int) -> None:
        self.name, self.slot, self.chance = name, slot, random.Random(seed)
        self.notes = Notes(folder)
        self.store = connect(name, self.notes, slot)
        self.kept: deque[tuple[int, Any]] = deque()
        for key in range(OWN):
            self.look_at_own(key)

    def count(self, what: str) -> None:
        self.notes.tallies[self.slot, COUNTED[what]] += 1

    def find(self, key: str, **options: Any) -> int:
        """Number of the value, 0 when there is none."""
        try:
            value = self.store.load(key, **options)
        except (KeyError, TimeoutError):
            self.count("missing")
            return 0
        self.count("loaded")
        number = number_of(value)
        self.kept.append((number, value))
        return number

    def look_at_own(self, key: int) -> None:
        found = self.find(f"own/{self.slot}/{key}")
        allowed = {int(self.notes.begun[self.slot, key]), int(self.notes.done[self.slot, key])}
        if found not in allowed:
            raise WrongBytes(f"own/{self.slot}/{key} stands for {found}, and was last {sorted(allowed)}")
        self.notes.begun[self.slot, key] = self.notes.done[self.slot, key] = found

    def change_own(self, key: int) -> None:
        number = self.chance.randrange(1, 10**9) if self.chance.random() < 0.8 else 0
        self.notes.begun[self.slot, key] = number
        if number:
            self.store.save(f"own/{self.slot}/{key}", value_of(number), overwrite=True)
            self.count("overwritten")
        else:
            with contextlib.suppress(KeyError):
                self.store.remove(f"own/{self.slot}/{key}")
                self.count("removed")
        self.notes.done[self.slot, key] = number
        self.look_at_own(key)

    def step(self) -> None:
        chance, store = self.chance, self.store
        self.count("operations")
        key = f"shared/{chance.randrange(SHARED)}"
        number = chance.randrange(1, 10**9)
        ttl = chance.uniform(0.001, 0.3) if chance.random() < 0.2 else None
        what = chance.random()
        if what < 0.15:
            try:
                store.save(key, value_of(number), ttl=ttl)
                self.count("saved")
            except torchshm.KeyExistsError:
                self.count("exists")
        elif what < 0.25:
            store.save(key, value_of(number), ttl=ttl, overwrite=True)
            self.count("overwritten")
        elif what < 0.35:
            try:
                store.remove(key)
                self.count("removed")
            except KeyError:
                self.count("missing")
        elif what < 0.45:
            number_of(store.get_or_create(key, lambda: value_of(number), timeout=PATIENCE))
            self.count("created")
        elif what < 0.6:
            self.change_own(chance.randrange(OWN))
        elif what < 0.65:
            self.find(key, timeout=chance.uniform(0, 0.02))
        elif what < 0.68:
            for found in store.keys("shared/"):
                self.find(found)
            len(store)
        elif what < 0.7:
            self.store = connect(self.name, self.notes, self.slot)
        else:
            self.find(key)
        # What a reader holds stays as it was, also removed and replaced.
        while len(self.kept) > KEPT:
            number, value = self.kept.popleft()
            if number_of(value) != number:
                raise WrongBytes(f"a value that was held, {number}, is another now")

    def run(self) -> None:
        while True:
            self.step()


def produce(name: str, folder: str, number: int, seed: int, told: Connection) -> None:
    """So many processes that save a value and are gone, and a look at each value."""
    chance = random.Random(seed)
    store = connect(name)
    for i in range(number):
        how, key = chance.choice(["killed", "exits", "connects and is killed"]), f"produced/{seed}/{i}"
        pid = os.fork()
        if pid == 0:
            with reporting(folder):
                mine = connect(name) if how.startswith("connects") else store
                mine.save(key, value_of(seed * 1_000_000 + i))
                if how.endswith("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)
        os.waitpid(pid, 0)
        found = number_of(store.load(key))
        if found != seed * 1_000_000 + i:
            raise WrongBytes(f"{key} stands for {found}")
        store.remove(key)
        told.send(i + 1)


def serve(name: str) -> None:
    """As `torchshm serve --no-fork` does, in a process that has its modules already."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for good
    _store_commands.serve(name, no_fork=True, limit=LIMIT, ttl=None, mode="0600", group=None, as_json=True)


def nursery(orders: Connection, folder: str, roles: Mapping[str, Callable[..., None]]) -> None:
    """Forks who is asked for. It is no client itself, so neither are they."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        role, arguments = orders.recv()
        if role == "end":
            return
        began = time.monotonic()
        pid = os.fork()
        if pid:
            orders.send((pid, began))
            continue
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with reporting(folder):
            roles[role](*arguments)
        os._exit(0)


def work(*arguments: Any) -> None:
    Worker(*arguments).run()


ROLES = {"worker": work, "producers": produce, "service": serve}


def kill(pid: int) -> None:
    """Kill a process, child or not, and see it dead: only then its locks are gone."""
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    signal.pidfd_send_signal(ended, signal.SIGKILL)
    select.select([ended], [], [])
    os.close(ended)


# ---- the conductor


class Conductor:
    """Starts everybody, kills, and looks at the whole."""

    def __init__(self, seed: int, producers: int) -> None:
        self.seed, self.chance, self.wanted = seed, random.Random(seed), producers
        self.folder = tempfile.mkdtemp(prefix="store-soak-")
        os.environ["XDG_RUNTIME_DIR"] = self.folder
        self.name = f"soak-{os.getpid()}"
        self.violations: list[str] = []
        self.notes = Notes(self.folder)
        context = multiprocessing.get_context("fork")
        self.orders, other = context.Pipe()
        self.nursery = context.Process(target=nursery, args=(other, self.folder, ROLES))
        self.nursery.start()
        other.close()
        self.service = 0
        self.popen: subprocess.Popen[bytes] | None = None
        self.warm: list[float] = []
        self.cold: list[float] = []
        self.kills = {"services": 0, "services while they start": 0, "clients": 0}
        self.produced = self.checks = 0
        self.start_service(first=True)
        self.store = connect(self.name)
        self.told, theirs = context.Pipe(duplex=False)
        self.workers = [
            self.order("worker", self.name, self.folder, i, seed * 100 + i)[0] for i in range(WORKERS)
        ]
        self.order("producers", self.name, self.folder, producers, seed, theirs)
        theirs.close()
        self.progress = time.monotonic()

    def order(self, role: str, *arguments: Any) -> tuple[int, float]:
        self.orders.send((role, arguments))
        pid, began = self.orders.recv()
        return int(pid), float(began)

    # -- the service

    def start_service(self, first: bool = False) -> None:
        warm = not first and self.chance.random() < 0.7
        if warm:
            self.service, began = self.order("service", self.name)
        else:
            began = time.monotonic()
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "torchshm", "serve", self.name, "--no-fork", "--limit", LIMIT],
                stdout=subprocess.DEVNULL,
            )
            self.service = self.popen.pid
        if not first and self.chance.random() < 0.15:
            time.sleep(self.chance.uniform(0, 0.02 if warm else 0.4))
            self.kill_service("services while they start")
            return self.start_service()
        while not self.answers():
            if time.monotonic() - began > PATIENCE:
                self.violations.append(f"the service, process {self.service}, does not answer")
                return None
            time.sleep(0.0002)
        took = time.monotonic() - began
        if not first:
            (self.warm if warm else self.cold).append(took * 1000)
            if _C.store_status(self.name)["pool_id"] != self.store.info()["pool_id"]:
                self.violations.append("a service began anew, with the store there")
        return None

    def answers(self) -> bool:
        try:
            return bool(_C.store_status(self.name)["pid"] == self.service)
        except torchshm.TorchshmError:
            return False

    def kill_service(self, what: str = "services") -> None:
        kill(self.service)
        if self.popen is not None:
            self.popen.wait()
            self.popen = None
        self.kills[what] += 1

    # -- the whole

    def look(self, at_rest: bool = False) -> None:
        self.checks += 1
        found = _check.check_store(self.name, at_rest=at_rest)
        if not found.sound:
            when = " at rest" if at_rest else ""
            self.violations += [f"checker{when}: {text}" for text in _check.remarks([found])[:5]]

    def collect(self) -> None:
        for path in Path(self.folder).glob("*.txt"):
            self.violations.append(f"pid {path.stem}: {path.read_text()}")
            path.unlink()
        before = self.produced
        with contextlib.suppress(EOFError):
            while self.told.poll():
                self.produced = self.told.recv()
        operations = int(self.notes.tallies[:, 0].sum())
        if operations != getattr(self, "seen", -1) or self.produced != before:
            self.seen, self.progress = operations, time.monotonic()
        if time.monotonic() - self.progress > PATIENCE:
            self.violations.append(f"nobody has got any further for {PATIENCE} s")

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        chance = self.chance
        next_look = 0.0
        while not self.violations and (time.monotonic() < end or self.produced < self.wanted):
            time.sleep(chance.uniform(0, 0.4))
            what = chance.random()
            if what < 0.5:
                self.kill_service()
                time.sleep(chance.choice([0, chance.uniform(0, 0.3)]))
                self.start_service()
            elif what < 0.8:
                slot = chance.randrange(WORKERS)
                kill(self.workers[slot])
                self.kills["clients"] += 1
                self.workers[slot] = self.order(
                    "worker", self.name, self.folder, slot, chance.randrange(2**31)
                )[0]
            if time.monotonic() > next_look:
                self.look()
                next_look = time.monotonic() + 1
            self.collect()
        self.end()

    def end(self) -> None:
        """Everybody is killed; all that was saved is there, nothing else, and all of it comes back."""
        for pid in self.workers:
            kill(pid)
        self.kills["clients"] += len(self.workers)
        self.kill_service()
        self.orders.send(("end", ()))
        self.nursery.join()
        self.collect()
        if self.violations:
            return
        core = self.store._core
        for _ in range(2):  # what expires while the first goes on
            self.store.info()  # reaps
            core.sweep()
        for slot in range(WORKERS):
            for key in range(OWN):
                name = f"own/{slot}/{key}"
                found = number_of(self.store[name]) if name in self.store else 0
                if found not in (self.notes.begun[slot, key], self.notes.done[slot, key]):
                    self.violations.append(f"in the end {name} stands for {found}")
        gc.collect()
        self.look(at_rest=True)
        for name in list(self.store):
            with contextlib.suppress(KeyError):  # expires meanwhile
                self.store.remove(name)
        core.sweep()
        # A ticket of the dead that no cell had yet comes back when there is no room.
        with contextlib.suppress(torchshm.PoolFullError):
            core.blank(2 * self.store.info()["limit_bytes"])
            self.violations.append("twice the limit was given out")
        left = self.store.info()
        if left["names"] or left["blocks"] or left["leases"] != 1:
            self.violations.append(f"in the end {left} is left")

    def close(self) -> None:
        for pid in [*self.workers, self.service]:
            kill(pid)
        if self.nursery.is_alive():
            self.nursery.kill()
        self.nursery.join()
        self.collect()
        shutil.rmtree(self.folder, ignore_errors=True)

    def figures(self) -> dict[str, Any]:
        sums = dict(zip(TALLIES, map(int, self.notes.tallies.sum(axis=0)), strict=True))
        figures: dict[str, Any] = {"processes": WORKERS + 1, **sums}
        figures |= {f"SIGKILLs of {who}": n for who, n in self.kills.items()}
        figures["producers gone right after their save"] = self.produced
        figures["loads of what they saved"] = self.produced
        figures["looks of the checkers"] = self.checks
        for how, times in (
            ("process start, modules loaded", self.warm),
            ("the start of the interpreter", self.cold),
        ):
            if times:
                figures[f"service takes over, ms from {how}, median"] = round(statistics.median(times), 1)
                figures[f"service takes over, ms from {how}, longest"] = round(max(times), 1)
        return figures


def soak(seconds: float, seed: int, producers: int) -> tuple[dict[str, Any], list[str]]:
    """Figures and violations of one soak."""
    conductor = Conductor(seed, producers)
    try:
        conductor.run(seconds)
    except Exception:
        conductor.collect()
        conductor.violations.append(traceback.format_exc())
    finally:
        figures = conductor.figures()
        conductor.close()
    return figures, conductor.violations


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--producers", type=int, help="default: 200; 10,000 in the full form")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true")
    chosen = parser.parse_args()
    producers = chosen.producers if chosen.producers is not None else 10_000 if chosen.full else 200
    began = time.monotonic()
    figures, violations = soak(chosen.seconds, chosen.seed, producers)
    took = time.monotonic() - began
    finish(ResultFile("store_soak", chosen.seed, chosen.full, took, figures, violations), chosen.json)


if __name__ == "__main__":
    main()
