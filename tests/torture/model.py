"""Checks the protocols as state machines, in several configurations, and that it sees when a protocol is broken.

``csrc/pool/ledger.m`` is the pool's, ``csrc/store/catalogue.m`` the store's; ``csrc/store/spill.m`` is how its values go to disk and come
back, ``csrc/store/room.m`` how processes wait for room. Each configuration and each breakage is a model with some of
its constants set otherwise. rumur translates it to C, gcc compiles that, and the program goes through all reachable states. A violated
invariant or liveness property, a configuration that does not end within its time, and a breakage that nobody notices are errors.
"""

import re
import resource
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from result_file import ResultFile
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "csrc/pool/ledger.m"
CATALOGUE = ROOT / "csrc/store/catalogue.m"
SPILL = ROOT / "csrc/store/spill.m"
ROOM = ROOT / "csrc/store/room.m"

Constants = dict[str, int | bool]


@dataclass(frozen=True)
class Configuration:
    name: str
    constants: Constants
    short: bool = False
    model: Path = LEDGER


@dataclass(frozen=True)
class Breakage:
    """The protocol without one of its precautions.

    Judged by what the protocol is for, and not by its own rules, which would see most of them at once.
    """

    what: str
    switch: str
    constants: Constants
    short: bool = False
    model: Path = LEDGER


PAIR: Constants = {"NP": 2, "NC": 1, "NM": 1, "MAXG": 2}
# Three leases: two reapers of one death, or a reaper and who gets the slot next.
REAPERS: Constants = {"NP": 3, "NC": 1, "NM": 1, "MAXG": 1, "MESSAGES": False, "FORK": False}

# One name: the slots in which it may be, and the values that are made for it.
NAME: Constants = {"NP": 2, "NS": 2, "NC": 2}

# A value, the cells that it moves between, and its files.
MOVED: Constants = {"NP": 2, "NC": 2, "NF": 3}
FULL: Constants = {"NP": 2, "NV": 2, "UNITS": 2}

CONFIGURATIONS = [
    Configuration("2 processes, 1 message, fork", PAIR, short=True),
    Configuration("2 processes, 2 messages, fork", {**PAIR, "NC": 2, "NM": 2}),
    Configuration("3 processes, no message", REAPERS),
    Configuration("3 processes, 1 message, 1 death", {**REAPERS, "MESSAGES": True, "DEATHS": 1}),
    Configuration("3 processes, fork, 2 deaths", {**REAPERS, "FORK": True, "DEATHS": 2}),
    Configuration("store: 2 processes, 2 values", NAME, short=True, model=CATALOGUE),
    Configuration("store: 2 processes, 3 values", {**NAME, "NC": 3}, model=CATALOGUE),
    Configuration("store: 3 processes, 2 values, 1 death", {**NAME, "NP": 3, "DEATHS": 1}, model=CATALOGUE),
    Configuration("spill: 2 processes, nobody saves", {**MOVED, "SAVES": False}, short=True, model=SPILL),
    Configuration("spill: 2 processes", MOVED, model=SPILL),
    Configuration(
        "spill: 3 processes, nobody saves, 1 death",
        {**MOVED, "NP": 3, "DEATHS": 1, "SAVES": False},
        model=SPILL,
    ),
    Configuration("room: 2 processes, 2 values", FULL, short=True, model=ROOM),
    Configuration("room: 3 processes, 3 values", {"NP": 3, "NV": 3, "UNITS": 3}, short=True, model=ROOM),
]

BREAKAGES = [
    Breakage("no second look at the intents", "LOOK_TWICE", PAIR, short=True),
    Breakage("no check of the sequence", "SEQUENCE", PAIR, short=True),
    Breakage("the dead one's bits dropped without an intent", "DROP_INTENT", PAIR, short=True),
    Breakage("a slot reused without a look at announcements", "ANNOUNCEMENTS", REAPERS, short=True),
    Breakage("no first look at the intents", "LOOK_FIRST", PAIR),
    Breakage("no second look at the lease", "LOOK_AGAIN", PAIR),
    Breakage("the bit before the count", "COUNT_FIRST", PAIR),
    Breakage("the count before the intent", "INTENT_FIRST", PAIR),
    Breakage("tickets without a nonce", "NONCE", PAIR),
    Breakage("nobody joins in place of the dead", "SUCCEED", PAIR),
    Breakage("store: claims of rivals are left alone", "RIVALS", NAME, short=True, model=CATALOGUE),
    Breakage("store: no look for the name after the claim", "LOOK_AGAIN", NAME, model=CATALOGUE),
    Breakage("store: a cell not marked before its name goes", "MARK_FIRST", NAME, model=CATALOGUE),
    Breakage("store: a sweeper that lets a name stand moves nothing", "MOVE", NAME, model=CATALOGUE),
    Breakage("store: a ticket kept before it is noted", "NOTE_FIRST", NAME, model=CATALOGUE),
    Breakage(
        "store: a mark left behind by who found the number moved",
        "AGAIN_IN_PLACE",
        NAME,
        short=True,
        model=CATALOGUE,
    ),
    Breakage("store: a cell let go in its next life", "SAME_LIFE", NAME, model=CATALOGUE),
    Breakage("spill: holds not counted after the claim", "COUNT", MOVED, model=SPILL),
    Breakage("spill: a writer that does not look at the claim", "CLAIMED", MOVED, short=True, model=SPILL),
    Breakage("spill: a writer that leaves no flag", "FLAG", MOVED, short=True, model=SPILL),
    Breakage("spill: a file told of in the cell's next life", "LIFE", MOVED, model=SPILL),
    Breakage("spill: a file that goes with the cell it was in", "KEEP", MOVED, model=SPILL),
    Breakage("spill: a file told of for a name that went, and removed", "TAKE_BACK", MOVED, model=SPILL),
    Breakage("spill: files swept without a claim", "CLAIM_TO_SWEEP", MOVED, short=True, model=SPILL),
    Breakage("spill: no second look before a file is swept", "LOOK_AGAIN", MOVED, model=SPILL),
    Breakage(
        "room: parts kept while waiting for more",
        "GIVE_UP",
        {**FULL, "DEATHS": False},
        short=True,
        model=ROOM,
    ),
    Breakage(
        "room: writing out needs room itself", "BEYOND", {**FULL, "DEATHS": False}, short=True, model=ROOM
    ),
    Breakage("room: a claim of the dead stays", "TAKE_OVER", FULL, short=True, model=ROOM),
]


def written(model: Path, constants: Constants) -> str:
    """The model with these constants."""
    text = model.read_text()
    for name, value in constants.items():
        text, found = re.subn(rf"\b{name}: \w+;", f"{name}: {str(value).lower()};", text)
        if found != 1:
            raise ValueError(f"{model.name} has {found} constants {name}")
    return text


def without(breakage: Breakage) -> Constants:
    rules: Constants = {"STRICT": False} if breakage.model in (LEDGER, ROOM) else {}
    return {breakage.switch: False, **rules}


@dataclass(frozen=True)
class Found:
    states: int
    seconds: float
    violation: str  # empty: there is none
    finished: bool = True


def translated(text: str, work: Path, threads: int, optimise: str) -> Path:
    source, code, program = work / "model.m", work / "model.c", work / "model"
    source.write_text(text)
    # Symmetry: leases, tickets and messages are interchangeable.
    options = ["--deadlock-detection", "off", "--scalarset-schedules", "off", "--threads", str(threads)]
    subprocess.run(["rumur", *options, source, "-o", code], check=True)
    subprocess.run(["gcc", optimise, "-mcx16", "-w", code, "-o", program, "-lpthread"], check=True)
    return program


def explored(
    text: str, seconds: float, memory: float, threads: int, optimise: str, keep: Path | None = None
) -> Found:
    """Goes through all states. With `keep`, a trace to a violation is left there."""

    def limited() -> None:
        limit = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    with tempfile.TemporaryDirectory(prefix="torchshm-model-") as folder:
        program = translated(text, Path(folder), threads, optimise)
        trace = Path(folder) / "trace"
        began = time.monotonic()
        with trace.open("w") as out:
            try:
                code = subprocess.run(
                    [program], stdout=out, stderr=out, timeout=seconds, preexec_fn=limited, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                return Found(0, seconds, "", finished=False)
        took = time.monotonic() - began
        said = trace.read_text()
        if keep is not None:
            shutil.copy(trace, keep)
    counted = re.search(r"(\d+) states, \d+ rules fired", said)
    violation = re.search(r"error trace for the error:\s+(.*)|(liveness property .*) violated", said)
    if counted is None or (code != 0 and violation is None):
        return Found(0, took, "", finished=False)
    return Found(int(counted[1]), took, (violation[1] or violation[2]) if violation else "")


def main(
    full: Annotated[
        bool, typer.Option("--full", help="all configurations and breakages, not only the small")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="configurations and breakages whose name contains this")
    ] = None,
    limit: Annotated[float, typer.Option(help="seconds for each")] = 3600.0,
    memory: Annotated[float, typer.Option(help="GiB for each")] = 6.0,
    threads: Annotated[int, typer.Option()] = 1,
    trace: Annotated[Path | None, typer.Option(help="leave what the last one printed here")] = None,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Model checking of the pool's protocol and of the store's."""
    console = Console()
    table = Table("what", "states", "seconds", "verdict")
    figures: dict[str, Any] = {}
    violations: list[str] = []
    began = time.monotonic()
    everything: list[Configuration | Breakage] = [*CONFIGURATIONS, *BREAKAGES]
    chosen = [
        one
        for one in everything
        if (full or one.short)
        and (only is None or only in (one.name if isinstance(one, Configuration) else one.what))
    ]
    states = caught = 0
    for one in chosen:
        if isinstance(one, Configuration):
            found = explored(written(one.model, one.constants), limit, memory, threads, "-O3", trace)
            wrong = found.violation or (
                "" if found.finished else f"not finished in {limit:g} s, {memory:g} GiB"
            )
            violations += [f"{one.name}: {wrong}"] if wrong else []
            figures[f"{one.name}: states"] = found.states
            figures[f"{one.name}: seconds"] = round(found.seconds, 1)
            table.add_row(one.name, f"{found.states:,}", f"{found.seconds:.1f}", wrong or "holds")
            states += found.states
        else:
            found = explored(
                written(one.model, one.constants | without(one)),
                limit,
                memory,
                threads,
                "-O1",
                trace,
            )
            if not found.violation:
                violations.append(f"not noticed: {one.what}")
            figures[f"broken: {one.what}"] = found.violation or "not noticed"
            table.add_row(
                f"broken: {one.what}",
                f"{found.states:,}",
                f"{found.seconds:.1f}",
                found.violation or "not noticed",
            )
            caught += bool(found.violation)
    figures = {"states": states, "breakages noticed": caught, **figures}
    ResultFile("model", None, full, time.monotonic() - began, figures, violations).write(json_path)
    console.print(table)
    for violation in violations:
        console.print(f"[red]{violation}")
    raise typer.Exit(1 if violations or not chosen else 0)


if __name__ == "__main__":
    typer.run(main)
