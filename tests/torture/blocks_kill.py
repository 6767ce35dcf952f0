"""Workers of torchshm.data.blocks are killed at random moments: every row comes, in its order, with its bytes, and nothing is left.

Plans are drawn from the seed (blocks_plans.py). Each is run undisturbed, and again, with another number of workers, while these are killed;
both must give the same bytes, and afterwards no process, no file, no name and no memory may be left. With --stop workers and the executor
are stopped for a while in place of that. With --owner the process that iterates is killed: within ten seconds all of its processes
have ended, and what they have left where sockets and spilled values lie the next program removes. Each plan has a process of its own,
which this one watches: one that says nothing for most of a minute hangs. A violation says by which seed its plan is drawn, which --plan
runs alone; the moments are the scheduler's.

    python tests/torture/blocks_kill.py --minutes 10 --seed 1 --json build/torture/blocks_kill-1.json
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blocks_plans import draw, read
from result_file import ResultFile
from soak import PR_SET_PDEATHSIG, finish, libc

from torchshm import _check

PATIENCE = 45.0  # seconds without a word
GONE_WITHIN = 10.0  # seconds after the owner's death
KEPT = 8 << 20  # bytes that a store without values may keep: a chunk of 2 MiB for each process that had one
KILLS = (1, 5, 20)  # of one plan, at most: a task that is all of a source is begun anew with each
PAUSES = (0.005, 0.05, 0.2)  # seconds between them, on average
STOPS = (0.01, 0.1, 0.6)  # seconds that one is stopped, at most
OWNER_LIVES = (0.05, 0.5, 3.0)  # seconds, at most
MOST = 20  # violations, and it ends
FAULTS = "faults.txt"
MODES = ("kill", "stop", "owner")
NEXT = "import sys; from torchshm.data import blocks; blocks.from_arrays({'i': range(9)}).options(spill=sys.argv[1], num_workers=1).count()"


# ---- the process that iterates


def as_owner(work: Callable[[Any], None], say: Any, supervisor: int) -> None:
    """Begin a session of its own, by which what it leaves is found, and report everything that goes wrong."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    os.setsid()
    faults = open(Path(tempfile.gettempdir()) / FAULTS, "w")  # noqa: SIM115 - its children write to it too
    faulthandler.register(signal.SIGUSR1, file=faults, all_threads=True)
    try:
        work(say)
    except BaseException:
        say.send({"wrong": traceback.format_exc()})


def run_twice(seed: int, folder: Path, dice: random.Random, say: Any) -> None:
    """Undisturbed, and while the supervisor disturbs it."""
    plan = draw(seed, folder)
    several = dice.sample([1, 2, 3], 2)
    say.send({"plan": f"{plan.text}, {several[0]} and {several[1]} workers"})
    expected = read(plan.dataset.options(num_workers=several[0]))
    say.send({"disturb": True})
    found = read(plan.dataset.options(num_workers=several[1]))
    say.send({"disturb": False})
    wrong = []
    if (found.rows, found.digest) != (expected.rows, expected.digest):
        wrong.append(f"{found.rows} rows {found.digest}, undisturbed {expected.rows} rows {expected.digest}")
    say.send(
        {
            "found": {
                "rows": found.rows,
                "retries": found.retries,
                "values spilled": int(found.statistics["spills"]),
            },
            "wrong": "; ".join([*wrong, *left_inside()]),
        }
    )


def left_inside() -> list[str]:
    """What a run that has ended has left in its process's stores and on disk, and what `torchshm check` finds there."""
    from torchshm.data.blocks import _home

    gc.collect()
    wrong = []
    for home in _home._homes.values():
        if home.shares or home.store.keys():
            wrong.append(f"left in the store: {home.shares}, names {home.store.keys()}")
        if not waited(lambda: not values_in(Path(home.directory)), GONE_WITHIN):  # noqa: B023 - called at once
            wrong.append(f"left on disk: {values_in(Path(home.directory))}")
        home.cool()
        if not waited(lambda: home.store.info()["committed_bytes"] <= KEPT, GONE_WITHIN):  # noqa: B023
            wrong.append(f"memory is not back: {home.store.info()}")
    # Who has just died is taken back by the service, soon.
    if not waited(lambda: not _check.remarks(_pools()), GONE_WITHIN):
        wrong += _check.remarks(_pools())
    return wrong


def _pools() -> list[_check.Checked]:
    return _check.check_machine(os.getpid(), at_rest=True)


def run_on(seed: int, folder: Path, dice: random.Random, say: Any) -> None:
    """Again and again, until killed."""
    plan = draw(seed, folder, spills=dice.random() < 0.5)
    workers, method = dice.choice([1, 2, 3]), "spawn" if dice.random() < 0.1 else "fork"
    say.send({"plan": f"{plan.text}, {workers} workers, {method}"})
    while True:
        found = read(plan.dataset.options(num_workers=workers, start_method=method))
        say.send({"found": {"rows": found.rows, "values spilled": int(found.statistics["spills"])}})


# ---- what it leaves


def waited(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def values_in(folder: Path) -> list[str]:
    """Those that lie on disk, and what is kept for further ones."""
    return [str(path) for path in folder.rglob("*") if path.suffix in (".spill", ".part", ".spare")]


def stat_of(pid: int) -> tuple[str, int, int]:
    """State, parent and session; OSError when it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except IndexError:
        raise ProcessLookupError(pid) from None
    return fields[0], int(fields[1]), int(fields[3])


def those(wanted: Callable[[str, int, int], bool]) -> list[int]:
    """Processes whose state, parent and session are as wanted."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if wanted(*stat_of(int(name))):
                    found.append(int(name))
    return sorted(found)


def in_session(session: int) -> list[int]:
    return those(lambda state, parent, found: found == session and state != "Z")


def children(pid: int) -> list[int]:
    return those(lambda state, parent, session: parent == pid and state != "Z")


class Supervised:
    """An owner, and what happens to it."""

    def __init__(self, work: Callable[[Any], None]) -> None:
        self.link, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=as_owner, args=(work, there, os.getpid()))
        self.process.start()
        there.close()
        assert self.process.pid is not None
        self.pid = self.process.pid
        self.plan = ""
        self.figures: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.disturbing = self.over = False
        self.heard = time.monotonic()

    def hear(self, seconds: float) -> bool:
        """Whether it has said something within so many seconds."""
        if not self.link.poll(max(seconds, 0)):
            if time.monotonic() - self.heard > PATIENCE:
                self.wrong.append(f"a hang.\n{describe(self.pid)}")
                self.take_away()
                self.over = True
            return False
        self.heard = time.monotonic()
        try:
            said = self.link.recv()
        except (EOFError, OSError):
            self.over = True
            return True
        self.plan = said.get("plan", self.plan)
        self.disturbing = said.get("disturb", self.disturbing)
        self.figures.update(said.get("found", {}))
        if said.get("wrong"):
            self.wrong.append(said["wrong"])
        return True

    def signal(self, pid: int, parent: int, number: signal.Signals) -> bool:
        """Send it to a process that is still that one's child."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if stat_of(pid)[1] != parent:
                return False
            signal.pidfd_send_signal(descriptor, number)
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)

    def end(self) -> None:
        """It has said what it had to say; nothing of it may be left."""
        self.process.join(PATIENCE)
        if self.process.exitcode not in (0, -signal.SIGKILL) and not self.wrong:
            self.wrong.append(f"the process ended with {self.process.exitcode}\n{describe(self.pid)}")
        self.take_away()

    def take_away(self) -> None:
        """Whatever it was."""
        for pid in in_session(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join()
        self.link.close()


def describe(session: int) -> str:
    """Who is there, and where each one waits, in the kernel and in Python."""
    lines = []
    faults = Path(tempfile.gettempdir()) / FAULTS
    for pid in in_session(session):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            state, parent, _ = stat_of(pid)
            wchan = Path(f"/proc/{pid}/wchan").read_text()
            lines.append(f"pid {pid}, child of {parent}, {state} in {wchan}")
            caught = int(status.split("SigCgt:")[1].split()[0], 16)
            if state != "T" and caught >> (signal.SIGUSR1 - 1) & 1:
                before = faults.stat().st_size
                os.kill(pid, signal.SIGUSR1)
                waited(lambda: faults.stat().st_size > before, 1)  # noqa: B023 - called at once
                time.sleep(0.05)
                with faults.open() as file:
                    file.seek(before)
                    lines.append(file.read())
    return "\n".join(lines)


# ---- the supervisor


class Campaign:
    """Plans, one after the other, and what was seen."""

    def __init__(self, mode: str, seed: int, folder: Path, verbose: bool) -> None:
        self.mode, self.seed, self.folder, self.verbose = mode, seed, folder, verbose
        self.plans = 0
        self.counts: Counter[str] = Counter()
        self.longest_gone = 0.0
        self.violations: list[str] = []
        self.data, self.spill = folder / "data", folder / "tmp"
        self.sockets = folder / "run" / "torchshm"
        for path in (self.data, self.spill, self.sockets.parent):
            path.mkdir(mode=0o700)
        os.environ["XDG_RUNTIME_DIR"], os.environ["TMPDIR"] = str(self.sockets.parent), str(self.spill)
        tempfile.tempdir = str(self.spill)

    def run(self, until: float, only: int | None) -> None:
        numbers = itertools.count() if only is None else itertools.repeat(only)
        for number in numbers:
            if time.monotonic() > until or len(self.violations) >= MOST:
                return
            self.one(self.seed * 1_000_000 + number if only is None else number)
            self.plans += 1

    def one(self, seed: int) -> None:
        dice, began = random.Random(seed), time.monotonic()
        mine = random.Random(dice.random())
        work = run_on if self.mode == "owner" else run_twice
        supervised = Supervised(lambda say: work(seed, self.data, dice, say))
        try:
            if self.mode == "owner":
                self.kill_owner(supervised, mine)
            else:
                self.disturb(supervised, mine)
                supervised.end()
            self.look_around(supervised)
        finally:
            supervised.take_away()
        if self.verbose:
            took = time.monotonic() - began
            print(f"{seed}: {supervised.plan}: {took:.1f} s, {dict(supervised.figures)}", flush=True)
        self.counts.update(supervised.figures)
        self.violations += [f"--plan {seed} ({supervised.plan}): {text}" for text in supervised.wrong]

    def disturb(self, run: Supervised, dice: random.Random) -> None:
        left, pause, longest = dice.choice(KILLS), dice.choice(PAUSES), dice.choice(STOPS)
        while not run.over:
            if not run.disturbing or not left:
                run.hear(PATIENCE)
                continue
            if run.hear(dice.expovariate(1 / pause)):
                continue
            executors = children(run.pid)
            workers = [(pid, executor) for executor in executors for pid in children(executor)]
            if not workers:
                continue
            left -= 1
            if self.mode == "kill":
                self.counts["SIGKILLs of workers"] += run.signal(*dice.choice(workers), signal.SIGKILL)
                continue
            chosen = dice.sample(workers, dice.randrange(1, len(workers) + 1))
            if dice.random() < 0.2:
                chosen.append((executors[0], run.pid))
            stopped = [each for each in chosen if run.signal(*each, signal.SIGSTOP)]
            self.counts["SIGSTOPs"] += len(stopped)
            time.sleep(dice.random() * longest)
            for each in stopped:
                run.signal(*each, signal.SIGCONT)

    def kill_owner(self, run: Supervised, dice: random.Random) -> None:
        while not run.plan and not run.over:
            run.hear(PATIENCE)
        deadline = time.monotonic() + dice.random() * dice.choice(OWNER_LIVES)
        while (wait := deadline - time.monotonic()) > 0 and not run.over:
            run.hear(wait)
        if run.over:
            return
        spilled, executors = len(values_in(self.spill)), children(run.pid)
        workers = len(those(lambda state, parent, session: parent in executors and state != "Z"))
        run.process.kill()
        run.process.join()
        began = time.monotonic()
        self.counts["SIGKILLs of owners"] += 1
        self.counts["with values on disk"] += spilled > 0
        self.counts["without an executor"] += not executors
        gone = waited(lambda: not in_session(run.pid), GONE_WITHIN)
        self.longest_gone = max(self.longest_gone, time.monotonic() - began)
        if not gone:
            run.wrong.append(f"{GONE_WITHIN:.0f} s after its owner's death there is\n{describe(run.pid)}")
        if self.files():  # nobody was left to take it away: the next program does
            self.counts["with files that the next program removed"] += 1
            subprocess.run([sys.executable, "-c", NEXT, self.spill], check=True)
        if found := self.files():
            run.wrong.append(
                f"left of an owner that had {len(executors)} executors, {workers} workers and {spilled} values on disk: "
                f"{', '.join(found)}{self.contents()}"
            )

    def files(self) -> list[str]:
        """Of stores, and on disk."""
        found = [*self.spill.glob("torchshm-blocks-*"), *self.sockets.glob("*")]
        return [str(path.relative_to(self.folder)) for path in found]

    def look_around(self, run: Supervised) -> None:
        if not run.over and self.mode != "owner":
            return
        if (there := in_session(run.pid)) and self.mode != "owner":
            run.wrong.append(f"processes are left: {there}\n{describe(run.pid)}")
        if found := self.files():
            if self.mode != "owner":
                run.wrong.append(f"left: {', '.join(found)}{self.contents()}")
            for path in found:
                whole = self.folder / path
                shutil.rmtree(whole) if whole.is_dir() else whole.unlink()

    def contents(self) -> str:
        inside = [str(path.relative_to(self.spill)) for path in self.spill.rglob("torchshm-blocks-*/**/*")]
        return f"; in there {len(inside)}: {', '.join(inside[:4])}" if inside else ""

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"plans": self.plans, **dict(sorted(self.counts.items()))}
        if self.mode == "owner":
            figures["longest s until all processes had ended"] = round(self.longest_gone, 2)
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, help="default: 60; 600 in the full form")
    parser.add_argument("--minutes", type=float, help="in place of seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plan", type=int, help="this one, again and again")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--stop", dest="mode", action="store_const", const="stop", default="kill")
    mode.add_argument("--owner", dest="mode", action="store_const", const="owner")
    parser.add_argument("--verbose", action="store_true", help="say each plan")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true")
    chosen = parser.parse_args()
    seconds = chosen.seconds or (chosen.minutes or 0) * 60 or (600 if chosen.full else 60)
    folder = Path(tempfile.mkdtemp(prefix="blocks-kill-"))
    began = time.monotonic()
    campaign = Campaign(chosen.mode, chosen.seed, folder, chosen.verbose)
    try:
        campaign.run(began + seconds, chosen.plan)
    except Exception:
        campaign.violations.append(traceback.format_exc())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    name = "blocks_kill" + ("" if chosen.mode == "kill" else f"_{chosen.mode}")
    took = time.monotonic() - began
    result = ResultFile(name, chosen.seed, chosen.full, took, campaign.figures(), campaign.violations)
    finish(result, chosen.json)


if __name__ == "__main__":
    main()
