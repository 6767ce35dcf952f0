"""SIGKILL of everything that uses a persistent store, at random moments, and what the file has afterwards.

Three writers save, overwrite and remove names of their own and of all. Each notes, in a file outside the store, what it is about to do
and what was acknowledged. Then service and writers are killed at once. A new process reads the file first as it is, by torchshm.open(),
and then serves it: every acknowledged operation must have happened, with the right bytes, unless its writer had begun a later one on that
name; and a check at rest must find nothing. The same file goes on through all kills. The seed decides who does what and when the kill
comes; the kernel's scheduler decides what it meets.

    python tests/torture/persist_kill.py --kills 50 --seed 1 --json build/torture/persist_kill-1.json
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from result_file import ResultFile
from soak import PR_SET_PDEATHSIG, finish, libc

import torchshm
from torchshm import _check

LIMIT = "128MiB"
WRITERS, OWN, SHARED = 3, 8, 4  # processes; keys of each; keys of all
SIZES = (3, 60, 500, 5_000, 100_000)  # elements of 8 bytes; arbitrary, from in one page to a run of chunks
PATIENCE = 60.0  # seconds

Value = tuple[int, int] | None  # writer and number of the operation; None: there is no such name


def value(writer: int, number: int) -> Any:
    """What is saved: an array, or a dict of one, that says by itself what it is."""
    array = np.full(SIZES[number % len(SIZES)], writer << 32 | number, np.int64)
    return {"array": array, "number": number} if number % 7 == 0 else array


def read(found: Any) -> Value:
    """Which one it is; ValueError when it is none."""
    array = found["array"] if isinstance(found, dict) else found
    writer, number = divmod(int(array[0]), 1 << 32)
    expected = value(writer, number)
    if isinstance(found, dict) and (not isinstance(expected, dict) or found["number"] != number):
        raise ValueError(f"a dict that nobody saved, of number {number}")
    whole = expected["array"] if isinstance(expected, dict) else expected
    if isinstance(found, dict) != isinstance(expected, dict) or not np.array_equal(array, whole):
        raise ValueError(f"wrong bytes in value {number} of writer {writer}")
    return writer, number


def forked(work: Callable[[], None]) -> int:
    """A child that ends by `work` and dies with this process."""
    pid = os.fork()
    if pid == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def write(folder: Path, name: str, writer: int, seed: int, first: int) -> None:
    """Work until killed. A note is one line: begun or done, the key, and the number of the operation; 0 removes."""
    store = torchshm.connect(name)
    dice = random.Random(seed)
    notes = os.open(folder / f"notes-{writer}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in range(first, first + 1_000_000):
        if dice.random() < 0.2:
            key, removes = f"shared-{dice.randrange(SHARED)}", False
        else:
            key, removes = f"own-{writer}-{dice.randrange(OWN)}", dice.random() < 0.25
        what = f"{key} {0 if removes else number}\n"
        os.write(notes, f"begun {what}".encode())
        if removes:
            with contextlib.suppress(KeyError):
                store.remove(key)
        else:
            store.save(key, value(writer, number), overwrite=True)
        os.write(notes, f"done {what}".encode())


class Run:
    """One file, and what must be in it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.path = folder / "file.store"
        self.allowed: dict[str, set[Value]] = {}  # of own keys
        self.begun: dict[str, set[Value]] = {}  # of shared ones
        self.next = 1
        self.starts: list[float] = []
        self.violations: list[str] = []
        self.kills = self.operations = self.unacknowledged = 0

    def kill_once(self) -> None:
        """Let them work, and kill all of them."""
        name = f"persist-{os.getpid()}"
        reading, writing = os.pipe()

        def serve() -> None:
            store = torchshm.start(name, LIMIT, file=self.path)
            os.write(writing, b"s")
            while True:
                time.sleep(10)
                store.name  # noqa: B018 - kept

        processes = [forked(serve)]
        try:
            self._wait_for(reading, processes[0])
            seeds = [self.dice.getrandbits(32) for _ in range(WRITERS)]
            processes += [
                forked(lambda w=w: write(self.folder, name, w, seeds[w], self.next))  # type: ignore[misc]
                for w in range(WRITERS)
            ]
            # Some die while they join.
            time.sleep(self.dice.choice([0.01, 0.05, 0.1, 0.2]) * self.dice.random() * 2)
        finally:
            self.dice.shuffle(processes)
            for pid in processes:
                os.kill(pid, signal.SIGKILL)
            for pid in processes:
                os.waitpid(pid, 0)
            os.close(reading)
            os.close(writing)
        self.kills += 1
        self._learn()

    def _wait_for(self, reading: int, pid: int) -> None:
        ready, _, _ = select.select([reading], [], [], PATIENCE)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            raise RuntimeError("the store was not served")
        os.read(reading, 1)

    def _learn(self) -> None:
        for writer in range(WRITERS):
            path = self.folder / f"notes-{writer}"
            # A kill may tear the last line: a note that nobody has made.
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            path.unlink(missing_ok=True)
            for line in lines:
                what, key, text = line.split()
                number = int(text)
                named: Value = None if number == 0 else (writer, number)
                if key.startswith("shared"):
                    self.begun.setdefault(key, set()).add(named)
                elif what == "begun":
                    self.allowed.setdefault(key, {None}).add(named)
                else:
                    self.allowed[key] = {named}
                self.operations += what == "done"
                self.next = max(self.next, number + 1)
            self.unacknowledged += len(lines) % 2

    def verify(self) -> None:
        """In a process of its own, which in every other case is killed too."""
        clean = self.dice.random() < 0.5
        reading, writing = os.pipe()

        def look() -> None:
            wrong = []
            with torchshm.open(self.path) as file:
                before = self._look("read", file, wrong)
            began = time.perf_counter()
            store = torchshm.start(f"verify-{os.getpid()}", file=self.path)
            took = time.perf_counter() - began
            after = self._look("served", store, wrong)
            if before != after:
                wrong.append(f"read as {before}, served as {after}")
            checked = _check.check_file(self.path, at_rest=True)
            wrong += [f"invariant {n}: {text}" for n, text in checked.violations]
            if checked.error is not None:
                wrong.append(checked.error)
            os.write(writing, repr((took, after, wrong[:20])).encode())
            if clean:
                store.close()

        pid = forked(look)
        os.close(writing)
        answer = b""
        while select.select([reading], [], [], PATIENCE)[0] and (part := os.read(reading, 1 << 16)):
            answer += part
        os.close(reading)
        os.waitpid(pid, 0)
        if not answer:
            raise RuntimeError("nothing could be verified")
        took, found, wrong = eval(answer, {})
        self.starts.append(took)
        self.violations += [f"kill {self.kills}: {text}" for text in wrong]
        # What is there now is what there was, from here on.
        self.allowed = {key: {found.get(key)} for key in self.allowed}
        self.begun = {key: {found.get(key)} for key in self.begun}

    def _look(self, how: str, names: Any, wrong: list[str]) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for key in names.keys():  # noqa: SIM118 - a client's keys() is a list
            try:
                found[key] = read(names.load(key))
            except Exception as error:
                wrong.append(f"{how}: {key}: {error!r}")
        for key, allowed in self.allowed.items():
            if found.get(key) not in allowed:
                wrong.append(f"{how}: {key} is {found.get(key)}, and may be one of {allowed}")
        for key in found:
            if key not in self.allowed and (key not in self.begun or found[key] not in self.begun[key]):
                wrong.append(f"{how}: {key} is {found[key]}, which nobody saved")
        return found

    def figures(self) -> dict[str, Any]:
        return {
            "SIGKILLs of everything": self.kills,
            "acknowledged operations": self.operations,
            "operations under way at a kill": self.unacknowledged,
            "starts, ms, median": round(1000 * float(np.median(self.starts)), 2) if self.starts else None,
            "starts, ms, longest": round(1000 * max(self.starts), 2) if self.starts else None,
        }


def torture(kills: int, seed: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and violations of so many kills."""
    run = Run(folder, seed)
    try:
        for _ in range(kills):
            run.kill_once()
            run.verify()
            if run.violations:
                break
    except Exception:
        run.violations.append(traceback.format_exc())
    return run.figures(), run.violations


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, help="default: 50; 1,000 in the full form")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the file is; default: a temporary one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true")
    chosen = parser.parse_args()
    kills = chosen.kills if chosen.kills is not None else 1000 if chosen.full else 50
    folder = Path(tempfile.mkdtemp(prefix="persist-kill-", dir=chosen.folder))
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    began = time.monotonic()
    try:
        figures, violations = torture(kills, chosen.seed, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - began
    finish(ResultFile("persist_kill", chosen.seed, chosen.full, took, figures, violations), chosen.json)


if __name__ == "__main__":
    main()
