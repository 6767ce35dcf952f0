"""A soak of a store that is too small: four times as much data as memory, eight processes, every byte verified.

Half of the processes go through the keys in order, half choose by Zipf's law (spill_worker.py). The conductor measures what the store's
memory files take, which is the limit and two per cent at most, and that every process gets on. With --disk-full the spill directory is a
file system of its own, which a filler fills in the middle and frees again: only what needs the disk may fail, and everything goes on
afterwards. With --kill clients and the service are killed at random, and everybody in the end.

    python tests/torture/spill_soak.py --seconds 60 --seed 1 --json build/torture/spill_soak-1.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from result_file import ResultFile
from soak import finish
from spill_worker import COUNTED, PINNED, TALLIES, Notes, Setting, Worker, save_pinned, waited
from store_soak import connect, kill, nursery

import torchshm
from torchshm import _C, _check
from torchshm._size import parse_size

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0  # seconds without a finished operation of a process
SHARE = 1.02  # of the limit
ROOM_TIMEOUT = 2.0  # seconds that an operation waits for room where the disk is to be full; else the default
CLONE_NEWNS = 0x20000
CHECK_EVERY = 3.0  # seconds
FULL_AT, FREE_AT = 0.35, 0.65  # of the time, or later, when somebody has felt it
UNFELT = 60.0  # seconds that a full disk stays unnoticed at most


# ---- a disk of its own


class Disk:
    """A small file system that can be filled, in a mount namespace of this process and its children."""

    def __init__(self, folder: Path, size: int, kind: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) != 0:
            raise MountRefused(f"unshare: {os.strerror(ctypes.get_errno())}")
        self.path = folder / "disk"
        self.path.mkdir()
        self.run("mount", "--make-rprivate", "/")
        if kind == "tmpfs":
            self.run("mount", "-t", "tmpfs", "-o", f"size={size}", "spill", str(self.path))
        else:
            image = folder / "image"
            with image.open("wb") as file:
                file.truncate(size)
            self.run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0", str(image))
            self.run("mount", "-o", "loop", str(image), str(self.path))
        self.filler = self.path / "filler"

    @staticmethod
    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MountRefused(f"{' '.join(command)}: {done.stderr.strip()}")

    def fill(self) -> None:
        """Takes all room that there is at the moment."""
        with self.filler.open("ab") as file:
            size, chunk = file.tell(), 64 << 20
            while chunk >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), size, chunk)
                    size += chunk
                    file.seek(size)
                except OSError:
                    size = file.seek(0, os.SEEK_END)
                    chunk //= 2

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)


class MountRefused(Exception):
    """This machine or container lets nobody mount."""


# ---- roles


def work(setting: Setting, slot: int, seed: int) -> None:
    Worker(setting, slot, seed).run()


def serve(setting: Setting, directory: str, timeout: float | None, sync: bool) -> None:
    """Until it is killed, or told to end."""
    with torchshm.start(setting.name, limit=setting.limit, spill=directory, timeout=timeout, spill_sync=sync):
        signal.sigwait({signal.SIGTERM})


ROLES = {"worker": work, "service": serve}


class Memory(threading.Thread):
    """Looks all the time at how much memory the store's files take: those of this process, which are the same."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.files: dict[str, int] = {}
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)")
                if "memfd:torchshm" in name:
                    self.files[name.rpartition("-")[2]] = int(number)
        assert set(self.files) == {"data", "control", "catalogue"}, self.files
        self.most_of = dict.fromkeys(self.files, 0)
        self.most = self.looks = 0
        self.ended = False

    def run(self) -> None:
        while not self.ended:
            sizes = {name: os.fstat(fd).st_blocks * 512 for name, fd in self.files.items()}
            self.most = max(self.most, sum(sizes.values()))
            self.most_of = {name: max(size, self.most_of[name]) for name, size in sizes.items()}
            self.looks += 1
            time.sleep(0.002)


# ---- the conductor


class Conductor:
    """Starts everybody, fills the disk, kills, and looks at the whole."""

    def __init__(self, chosen: argparse.Namespace, folder: Path, directory: Path, disk: Disk | None) -> None:
        self.chosen, self.directory, self.disk = chosen, directory, disk
        self.chance = random.Random(chosen.seed)
        os.environ["XDG_RUNTIME_DIR"] = str(folder)
        name = f"spill-soak-{os.getpid()}"
        self.setting = Setting(name, str(folder), parse_size(chosen.limit), chosen.times, chosen.processes)
        self.notes = Notes(self.setting)
        self.violations: list[str] = []
        self.kills = {"services": 0, "clients": 0}
        self.fillings = self.checks = 0
        self.after: dict[str, Any] = {}
        self.rested = self.unfelt = 0.0
        context = multiprocessing.get_context("fork")
        self.orders, other = context.Pipe()
        self.nursery = context.Process(target=nursery, args=(other, str(folder), ROLES))
        self.nursery.start()
        other.close()
        self.service = 0
        self.start_service()
        self.store = connect(name)
        save_pinned(self.store)
        self.memory = Memory()
        self.memory.start()
        self.seen = np.zeros(chosen.processes, "i8")
        self.moved = [time.monotonic()] * chosen.processes
        self.longest = 0.0
        self.workers = [
            self.order("worker", self.setting, i, chosen.seed * 100 + i) for i in range(chosen.processes)
        ]

    def order(self, role: str, *arguments: Any) -> int:
        self.orders.send((role, arguments))
        return int(self.orders.recv()[0])

    def start_service(self) -> None:
        timeout = ROOM_TIMEOUT if self.disk else None
        self.service = self.order(
            "service", self.setting, str(self.directory), timeout, not self.chosen.no_spill_sync
        )

        def answers() -> bool:
            with contextlib.suppress(torchshm.TorchshmError):
                return bool(_C.store_status(self.setting.name)["pid"] == self.service)
            return False

        if not waited(answers, PATIENCE):
            self.collect()
            self.violations.append(f"the service, process {self.service}, does not answer")

    # -- the whole

    def look(self, at_rest: bool = False) -> None:
        self.checks += 1
        found = _check.check_store(self.setting.name, at_rest=at_rest)
        if not found.sound:
            when = " at rest" if at_rest else ""
            self.violations += [f"checker{when}: {text}" for text in _check.remarks([found])[:5]]

    def collect(self) -> None:
        for path in Path(self.setting.folder).glob("*.txt"):
            self.violations.append(f"pid {path.stem}: {path.read_text()}")
            path.unlink()

    def watch(self) -> None:
        """Everybody gets on, and memory stays below the limit."""
        self.collect()
        now = time.monotonic()
        counted = self.notes.tallies.sum(axis=1)
        for slot in range(self.chosen.processes):
            if counted[slot] != self.seen[slot]:
                self.seen[slot], self.moved[slot] = counted[slot], now
            self.longest = max(self.longest, now - self.moved[slot])
            if now - self.moved[slot] > PATIENCE:
                self.violations.append(
                    f"process {slot} has not got any further for {PATIENCE} s: {self.stack(slot)}"
                )
        if self.memory.most > SHARE * self.setting.limit:
            self.violations.append(
                f"the store takes {self.memory.most} bytes, its limit is {self.setting.limit}"
            )

    def stack(self, slot: int) -> str:
        with contextlib.suppress(OSError):
            os.kill(self.workers[slot], signal.SIGUSR1)
            time.sleep(0.5)
            kernel = Path(f"/proc/{self.workers[slot]}/wchan").read_text()
            return f"in {kernel}\n" + Path(self.setting.folder, f"{slot}.stack").read_text()
        return "it is gone"

    def run(self, seconds: float) -> None:
        now = began = time.monotonic()
        next_look = next_kill = began + 1
        while not self.violations and now < began + seconds:
            time.sleep(0.05)
            now = time.monotonic()
            self.watch()
            if self.disk:
                began += self.work_on_disk(self.disk, now - began, seconds)
            if self.chosen.kill and now > next_kill:
                next_kill = now + self.chance.uniform(0, 1)
                self.kill_one()
            if now > next_look:
                self.look()
                next_look = now + CHECK_EVERY
        if not self.violations:
            self.rest()

    def work_on_disk(self, disk: Disk, passed: float, seconds: float) -> float:
        """Seconds that the soak takes longer, since nobody has felt so far that the disk is full."""
        full = int(self.notes.full[0]) % 2 == 1
        counted = self.notes.tallies.sum(axis=0)
        if full and passed > FREE_AT * seconds:
            late = 0.0 if counted[COUNTED["errors while the disk was full"]] else passed - FREE_AT * seconds
            if late and self.unfelt < UNFELT:
                self.unfelt += late
                disk.fill()
                return late
            disk.free()
            self.notes.full[0] += 1
            self.before_recovery = counted
        elif passed > FULL_AT * seconds and passed < FREE_AT * seconds:
            if not full:
                self.notes.full[0] += 1
                self.fillings += 1
            disk.fill()  # also what has become free meanwhile
        return 0.0

    def kill_one(self) -> None:
        if self.chance.random() < 0.4:
            kill(self.service)
            self.kills["services"] += 1
            time.sleep(self.chance.choice([0, self.chance.uniform(0, 0.5)]))
            self.start_service()
            return
        slot = self.chance.randrange(self.chosen.processes)
        kill(self.workers[slot])
        self.kills["clients"] += 1
        self.workers[slot] = self.order("worker", self.setting, slot, self.chance.randrange(2**31))
        self.moved[slot] = time.monotonic()

    # -- the end

    def rest(self) -> None:
        """Nobody works any more: all is there, nothing else, and it all goes."""
        self.stop_workers()
        self.collect()
        if self.disk and not self.violations:
            self.judge_recovery()
        if self.violations:
            return
        self.store.info()
        self.store._core.sweep()
        verifier = Worker(self.setting, 0, 0)
        verifier.verify_all()
        for number in range(PINNED):
            verifier.contents.version(self.store.load(f"pinned-{number}"), -1 - number, 64 << 10)
        del verifier
        gc.collect()
        self.settled()
        self.look(at_rest=True)
        done = subprocess.run(
            [sys.executable, "-m", "torchshm", "check", "--store", self.setting.name],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            self.violations.append(f"torchshm check --store: {done.stdout}{done.stderr}")
        self.files_belong_to_names()
        self.after = self.store.info()
        self.names_take_their_files_along()
        if self.chosen.kill:  # files for the next start to find
            value = np.ones(self.setting.sizes[-1], np.uint8)
            for number in range(2 * self.setting.limit // value.nbytes):
                self.store.save(f"left-{number}", value, policy="spill")

    def stop_workers(self) -> None:
        self.notes.stop[0] = 1
        for slot, pid in enumerate(self.workers):
            if self.chosen.kill:
                kill(pid)
                continue
            with contextlib.suppress(ProcessLookupError):
                ended = os.pidfd_open(pid)
                if not select.select([ended], [], [], PATIENCE)[0]:
                    self.violations.append(f"process {slot} does not end: {self.stack(slot)}")
                os.close(ended)

    def judge_recovery(self) -> None:
        counted = self.notes.tallies.sum(axis=0)
        if not counted[COUNTED["errors while the disk was full"]]:
            self.violations.append("nobody has noticed that the disk was full")
        since = counted - self.before_recovery
        if min(since[COUNTED["saves"]], since[COUNTED["loads"]]) < self.chosen.processes:
            self.violations.append(f"after the disk had room again there were only {since} of {TALLIES}")

    def files(self) -> list[Path]:
        return [path for path in self.directory.glob("*/*") if path.suffix in (".spill", ".part", ".spare")]

    def settled(self) -> None:
        """Waits until the service writes nothing more."""
        began = time.monotonic()
        waited(lambda: not any(path.suffix != ".spill" for path in self.files()), 10)
        self.rested = time.monotonic() - began

    def files_belong_to_names(self) -> None:
        names = self.store.keys()
        on_disk = sum(self.store.info(name)["where"] == "disk" for name in names)
        files = self.files()
        parts = [path.name for path in files if path.suffix != ".spill"]
        if parts:
            self.violations.append(f"half-written or discarded files at rest: {parts}")
        if not on_disk <= len(files) <= len(names):
            self.violations.append(f"{len(files)} files for {on_disk} names on disk of {len(names)} in all")
        if self.store.info()["spilled_names"] != on_disk:
            self.violations.append(
                f"{on_disk} names are on disk, and {self.store.info()['spilled_names']} are counted"
            )

    def names_take_their_files_along(self) -> None:
        for name in self.store:
            self.store.remove(name)
        self.store._core.sweep()
        if not waited(lambda: not self.files(), 10):
            stray = [path.name for path in self.files()]
            self.violations.append(f"{len(stray)} files of no name are left, {stray[:5]}")
        left = self.store.info()
        if left["names"] or left["spilled_bytes"] or left["live_bytes"]:
            self.violations.append(f"in the end {left} is left")

    def close(self) -> None:
        self.memory.ended = True
        self.memory.join()
        for pid in self.workers:
            kill(pid)
        if self.chosen.kill:
            kill(self.service)
        else:
            with contextlib.suppress(ProcessLookupError):
                ended = os.pidfd_open(self.service)
                signal.pidfd_send_signal(ended, signal.SIGTERM)
                select.select([ended], [], [], 10)
        kill(self.service)
        self.nursery.kill()
        self.nursery.join()
        self.collect()

    def figures(self) -> dict[str, Any]:
        setting = self.setting
        sums = dict(zip(TALLIES, map(int, self.notes.tallies.sum(axis=0)), strict=True))
        size = sum(map(setting.size, range(setting.keys)))
        figures: dict[str, Any] = {
            "processes": setting.processes,
            "limit MiB": setting.limit >> 20,
            "working set, most MiB": size >> 20,
            **sums,
            "most memory of the store, % of the limit": round(100 * self.memory.most / setting.limit, 2),
            **{
                f"most memory of the {name} file, MiB": round(size / 2**20, 2)
                for name, size in self.memory.most_of.items()
            },
            "looks at the memory": self.memory.looks,
            "longest without a finished operation, s": round(self.longest, 1),
            "looks of the checkers": self.checks,
            "longest until no file is half written, s": round(self.rested, 1),
        }
        if self.chosen.kill:
            figures |= {f"SIGKILLs of {who}": n for who, n in self.kills.items()}
        if self.disk:
            figures["times that the disk was full"] = self.fillings
        counters = ("spills", "written", "restores", "evictions", "spill_errors", "room_waits")
        return figures | {f"store: {name}": self.after[name] for name in counters if name in self.after}


# ---- around it


def conduct(chosen: argparse.Namespace, folder: Path, directory: Path, disk: Disk | None) -> None:
    """The soak, in a process of its own that leaves figures and violations, and dies with all that is the store's."""
    conductor = Conductor(chosen, folder, directory, disk)
    try:
        conductor.run(chosen.seconds)
    except Exception:
        conductor.collect()
        conductor.violations.append(traceback.format_exc())
    figures = conductor.figures()
    conductor.close()
    (folder / "result").write_text(json.dumps([figures, conductor.violations]))
    if chosen.kill:
        os.kill(os.getpid(), signal.SIGKILL)


def next_start(directory: Path) -> list[str]:
    """What is wrong after the next store has begun with this directory: those of dead stores are to be gone."""
    program = (
        "import sys, torchshm\n"
        "with torchshm.start(f'next-{sys.argv[1]}', limit='16MiB', spill=sys.argv[2]) as store:\n"
        "    pass\n"
    )
    for _ in range(2):  # the first one leaves no directory either
        subprocess.run(
            [sys.executable, "-c", program, str(os.getpid()), str(directory)], check=True, timeout=60
        )
    left = [path for path in directory.iterdir() if path.name not in ("lost+found", "filler")]
    strays = [str(path.relative_to(directory)) for path in left if path.name.startswith("spill-soak")]
    return [f"after the next start {strays} of the dead store is there"] if strays else []


def soak(chosen: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Figures and violations of one soak."""
    parent = chosen.spill or ROOT / "build/torture"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="spill-soak-", dir=parent))
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    disk: Disk | None = None
    try:
        if chosen.disk_full:
            disk = Disk(folder, 2 * chosen.times * parse_size(chosen.limit) + (64 << 20), chosen.filesystem)
        directory = (disk.path if disk else folder) / "spilled"
        directory.mkdir()
        context = multiprocessing.get_context("fork")
        process = context.Process(target=conduct, args=(chosen, folder, directory, disk))
        process.start()
        process.join()
        result = folder / "result"
        if not result.exists():
            return {}, [f"the soak itself died, exit code {process.exitcode}"]
        figures, violations = json.loads(result.read_text())
        figures["files left for the next start"] = sum(1 for _ in directory.glob("*/*.spill"))
        violations += next_start(directory)
        return figures, violations
    finally:
        if disk:
            subprocess.run(["umount", "-l", disk.path], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, help="default: 20")
    parser.add_argument("--minutes", type=float, help="default in the full form: 10")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", default="256MiB")
    parser.add_argument("--times", type=int, default=4, help="working set, in limits")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--spill", type=Path, help="a directory on a disk; default: build/torture")
    parser.add_argument("--disk-full", action="store_true", help="needs root")
    parser.add_argument("--filesystem", choices=["ext4", "tmpfs"], default="ext4", help="of --disk-full")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--no-spill-sync", action="store_true", help="leave files to the page cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true")
    chosen = parser.parse_args()
    if chosen.minutes is None and chosen.full:
        chosen.minutes = 10.0
    if chosen.seconds is None:
        chosen.seconds = 60 * chosen.minutes if chosen.minutes else 20.0
    name = "spill_soak" + ("_disk_full" if chosen.disk_full else "") + ("_kill" if chosen.kill else "")
    name += "_unsynced" if chosen.no_spill_sync else ""
    began = time.monotonic()
    try:
        figures, violations = soak(chosen)
    except MountRefused as error:
        sys.exit(f"--disk-full needs to mount: {error}")
    took = time.monotonic() - began
    finish(ResultFile(name, chosen.seed, chosen.full, took, figures, violations), chosen.json)


if __name__ == "__main__":
    main()
