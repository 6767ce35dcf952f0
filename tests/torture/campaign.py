"""Every long test, one after the other, and what they found: ``make torture``.

Each campaign is a program of its own that leaves ``build/torture/<name>*.json``:
``{"name", "seed", "full", "seconds", "figures": {label: number or text}, "violations": [text]}``. Those of the full forms are kept in
``tests/torture/results``, each with the commit and the machine that it is of, until the campaign is run again. From these files, and
nothing else, this program writes ``tests/torture/RESULTS.md``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/torture"
KEPT = ROOT / "tests/torture/results"
RESULTS = ROOT / "tests/torture/RESULTS.md"
DEV = ROOT / "build/dev"
PYTHON = sys.executable
JOBS = str(min(2, os.cpu_count() or 1))

console = Console()

Result = dict[str, Any]
Command = list[str]


@dataclass(frozen=True)
class Campaign:
    """One entry of the list: what it proves, and how it is run."""

    name: str
    proves: str
    short: Command | None  # None: there is no short form
    full: Command
    budget: bool = False  # takes --seconds or --minutes: as long as it is given
    seeds: int = 1  # the budget is shared by so many runs
    writes: str = ""  # it takes no --json and writes this file
    needs: tuple[str, ...] = ()  # CMake presets that are built before


def program(name: str) -> str:
    return str(DEV / "tests/torture" / name)


def script(path: str) -> Command:
    return [PYTHON, str(ROOT / path)]


CAMPAIGNS = [
    Campaign(
        "points",
        "killed, failed and stopped at every failpoint, alone and while recovering from the first",
        [program("torchshm_points")],
        [program("torchshm_points"), "--full"],
        needs=("dev",),
    ),
    Campaign(
        "store_points",
        "the same for names and their service: killed, failed and stopped at every failpoint, both checkers clean afterwards",
        [program("torchshm_store_points"), "--jobs", JOBS],
        [program("torchshm_store_points"), "--jobs", JOBS, "--full"],
        needs=("dev",),
    ),
    Campaign(
        "step",
        "killed at every instruction of the optimised operations",
        [program("torchshm_step")],
        [program("torchshm_step"), "--full"],
        needs=("dev",),
    ),
    Campaign(
        "relacy",
        "the ledger's code under all interleavings, deaths and memory orders",
        [program("torchshm_relacy")],
        [program("torchshm_relacy"), "--full"],
        needs=("dev",),
    ),
    Campaign(
        "model",
        "the whole protocol as a state machine, its complete state space",
        script("tests/torture/model.py"),
        [*script("tests/torture/model.py"), "--full"],
    ),
    Campaign(
        "faults",
        "plausible mistakes, each of which some layer has to catch",
        script("tests/torture/faults.py"),
        [*script("tests/torture/faults.py"), "--full"],
    ),
    Campaign(
        "sanitizers",
        "the C++ suites, and the Python suites of _C, under ASan, LSan and UBSan and under TSan",
        None,
        [*script("tests/torture/sanitizers.py"), "--full"],
        writes="sanitizers.json",
    ),
    Campaign(
        "valgrind",
        "the C++ suites under valgrind's memcheck",
        None,
        [*script("tests/torture/sanitizers.py"), "--full", "--only", "valgrind", "--jobs", JOBS],
        writes="valgrind.json",
    ),
    Campaign(
        "fuzz",
        "handles, pickled arguments and whole control files made of arbitrary bytes",
        script("tests/fuzz/run.py"),
        [*script("tests/fuzz/run.py"), "--full"],
        budget=True,
        writes="fuzz{-full}.json",
    ),
    Campaign(
        "soak",
        "processes that do everything at random, killed and stopped anywhere; every byte verified; brought to rest and checked",
        [program("torchshm_soak"), "--seconds", "10"],
        [program("torchshm_soak"), "--full"],
        budget=True,
        seeds=3,
        needs=("dev",),
    ),
    Campaign(
        "soak_python",
        "the same through multiprocessing: fork, spawn, forkserver; pipes, queues, pools, arguments",
        [*script("tests/torture/soak.py"), "--seconds", "10"],
        [*script("tests/torture/soak.py"), "--full"],
        budget=True,
        seeds=3,
        needs=("dev",),
    ),
    Campaign(
        "store_soak",
        "clients of a store and its service killed at random; every value verified, nothing lost; savers that are gone at once",
        [*script("tests/torture/store_soak.py"), "--seconds", "10"],
        [*script("tests/torture/store_soak.py"), "--full"],
        budget=True,
        needs=("dev",),
    ),
    Campaign(
        "persist_kill",
        "everything that uses a persistent store killed at random moments; what was acknowledged is in the file, read and served",
        [*script("tests/torture/persist_kill.py"), "--kills", "15"],
        [*script("tests/torture/persist_kill.py"), "--full"],
        needs=("dev",),
    ),
    Campaign(
        "spill_soak",
        "a store with four times as much data as memory: every byte verified, nobody stands still, memory below its limit and 2 %",
        [*script("tests/torture/spill_soak.py"), "--seconds", "10"],
        [*script("tests/torture/spill_soak.py"), "--full"],
        budget=True,
        needs=("dev",),
    ),
    Campaign(
        "spill_soak_disk_full",
        "the same with a disk that is full in the middle: only what needs it fails, and everything goes on afterwards",
        [*script("tests/torture/spill_soak.py"), "--disk-full", "--seconds", "20"],
        [*script("tests/torture/spill_soak.py"), "--disk-full", "--full"],
        budget=True,
        needs=("dev",),
    ),
    Campaign(
        "spill_soak_unsynced",
        "the same with files that are left to the page cache",
        [*script("tests/torture/spill_soak.py"), "--no-spill-sync", "--seconds", "10"],
        [*script("tests/torture/spill_soak.py"), "--no-spill-sync", "--full"],
        budget=True,
        needs=("dev",),
    ),
    Campaign(
        "spill_soak_kill",
        "the same with clients and the service killed at random, and everybody in the end: all is there, no file is left over",
        [*script("tests/torture/spill_soak.py"), "--kill", "--seconds", "10"],
        [*script("tests/torture/spill_soak.py"), "--kill", "--full"],
        budget=True,
        needs=("dev",),
    ),
    Campaign(
        "loader_deaths",
        "a DataLoader whose worker is killed ends as PyTorch's own does, and all memory comes back",
        [
            *script("tests/torture/loader_deaths.py"),
            "--deaths",
            "20",
            "--register-deaths",
            "8",
            "--stock-deaths",
            "0",
        ],
        [*script("tests/torture/loader_deaths.py"), "--full", "--deaths", "1000"],
        needs=("dev",),
    ),
    Campaign(
        "blocks_kill",
        "workers of blocks killed at random: every row comes, in its order, with its bytes, and nothing is left",
        [*script("tests/torture/blocks_kill.py"), "--seconds", "10"],
        [*script("tests/torture/blocks_kill.py"), "--full"],
        needs=("dev",),
    ),
    Campaign(
        "blocks_kill_stop",
        "the same with workers and the executor stopped for a while",
        [*script("tests/torture/blocks_kill.py"), "--stop", "--seconds", "8"],
        [*script("tests/torture/blocks_kill.py"), "--stop", "--full"],
        needs=("dev",),
    ),
    Campaign(
        "blocks_kill_owner",
        "the process that iterates over blocks killed at random: all its processes end, no file of a store or a value is left",
        [*script("tests/torture/blocks_kill.py"), "--owner", "--seconds", "10"],
        [*script("tests/torture/blocks_kill.py"), "--owner", "--full"],
        needs=("dev",),
    ),
    Campaign(
        "coverage",
        "branch coverage of base, os and pool; what is not covered has a reason",
        None,
        [*script("tests/torture/coverage.py"), "--full"],
        writes="coverage.json",
    ),
]


# ---- running


def budgeted(campaign: Campaign, minutes: float, seed: int) -> Command:
    if campaign.name == "fuzz":
        return ["--minutes", f"{minutes:g}"]
    return ["--seconds", str(round(minutes * 60 / campaign.seeds)), "--seed", str(seed)]


def commands(
    campaign: Campaign, full: bool, minutes: float, first_seed: int
) -> Iterable[tuple[Path, Command]]:
    """What is run, and where each run leaves its result."""
    if not full:
        if campaign.short is not None:
            yield OUT / file_name(campaign, ""), campaign.short
        return
    runs = campaign.seeds if campaign.budget else 1
    for n in range(runs):
        extra = budgeted(campaign, minutes, first_seed + n) if campaign.budget else []
        form = f"-full-{first_seed + n}" if runs > 1 else "-full"
        yield OUT / file_name(campaign, form), [*campaign.full, *extra]


def file_name(campaign: Campaign, form: str) -> str:
    return campaign.writes.replace("{-full}", form) or f"{campaign.name}{form}.json"


def prepare(preset: str, log: Path) -> str:
    """Build a preset; returns what went wrong."""
    steps = [] if (ROOT / "build" / preset / "build.ninja").exists() else [["cmake", "--preset", preset]]
    steps.append(["cmake", "--build", "--preset", preset, "--parallel", JOBS])
    with log.open("w") as out:
        for step in steps:
            if subprocess.run(step, cwd=ROOT, stdout=out, stderr=out, check=False).returncode != 0:
                return f"{' '.join(step)} failed; see {log.relative_to(ROOT)}"
    return ""


def run_one(campaign: Campaign, path: Path, command: Command, full: bool) -> list[str]:
    """Run one command; returns why there is no result. What it found wrong is in its result."""
    logs = OUT / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{path.stem}.log"
    path.unlink(missing_ok=True)
    if not campaign.writes:
        command = [*command, "--json", str(path)]
    started = Path(command[1] if command[0] == PYTHON and command[1].startswith("/") else command[0])
    if started.is_absolute() and not started.exists():
        return [f"there is no {started.relative_to(ROOT)}"]
    environment = {**os.environ, "PYTHONPATH": f"{DEV}/python:{ROOT}"}
    with log.open("w") as out:
        code = subprocess.run(
            command, cwd=ROOT, stdout=out, stderr=out, env=environment, check=False
        ).returncode
    text = log.read_text(errors="replace")
    if not path.exists():
        return [f"no result, exit status {code}: {text[-400:].strip()}"]
    if code != 0 and not read(path)["violations"]:
        return [f"exit status {code} and no violation in the result: {text[-400:].strip()}"]
    return []


# ---- what came out


def read(path: Path) -> Result:
    result: Result = json.loads(path.read_text())
    return result


def results(campaign: Campaign, full: bool) -> list[Result]:
    """Results of one campaign, of the form that was asked for."""
    folder = KEPT if full else OUT
    paths = [folder / f"{campaign.name}.json", *sorted(folder.glob(f"{campaign.name}-*.json"))]
    found = [read(path) for path in paths if path.exists()]
    return [result for result in found if bool(result["full"]) == full and result["name"] == campaign.name]


def keep(campaign: Campaign, paths: list[Path]) -> None:
    """Put new results of a full form in the place of those that the campaign had."""
    old = [path for path in KEPT.glob(f"{campaign.name}*.json") if read(path)["name"] == campaign.name]
    for path in old:
        path.unlink()
    KEPT.mkdir(exist_ok=True)
    of = {"commit": commit(), "machine": machine(), "compilers": compilers()}
    for path in paths:
        (KEPT / path.name).write_text(json.dumps({**read(path), **of}, indent=1) + "\n")


def commit() -> str:
    """What the tree is of; with a plus sign where it is not just that."""
    found = subprocess.run(
        ["git", "describe", "--always", "--exclude", "*", "--dirty=+"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def combined(values: list[Any], label: str) -> str:
    """The figures of several runs as one: sums of counts, the largest of what is the longest, ranges of everything else."""
    if len(values) == 1 or all(value == values[0] for value in values):
        return shown(sum(values)) if counts(values, label) and len(values) > 1 else shown(values[0])
    if "longest" in label or "most" in label:
        return shown(max(values))
    if counts(values, label):
        return shown(sum(values))
    if all(isinstance(value, int | float) for value in values):
        return f"{shown(min(values))} to {shown(max(values))}"
    return "; ".join(dict.fromkeys(map(str, values)))


def counts(values: list[Any], label: str) -> bool:
    settings = ("longest", "most", "processes", "limit", "%", "descriptors more")
    exact = label == "processes started"
    return all(type(value) is int for value in values) and (
        exact or not any(word in label for word in settings)
    )


def shown(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.1f}"
        if isinstance(value, float)
        else str(value)
    )


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def machine() -> str:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}"


def compilers() -> str:
    found = []
    for name in ["c++", "clang++-14"]:
        try:
            found.append(
                subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout.split(
                    "\n"
                )[0]
            )
        except (OSError, subprocess.CalledProcessError):
            continue
    return "; ".join(found)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def report(full: bool, errors: dict[str, list[str]]) -> str:
    """The page, out of the results that are there."""
    lines = [
        "# What the long tests found",
        "",
        "Written by `make torture` (`tests/torture/campaign.py`) from the results of the programs, which lie in `results`; nothing here is "
        "typed. Each is of the commit that its row names.",
        "",
        "| campaign | what it shows | runs | seeds | duration | violations | commit |",
        "|---|---|---:|---|---:|---:|---|",
    ]
    found = {campaign.name: results(campaign, full) for campaign in CAMPAIGNS}
    every = [run for runs in found.values() for run in runs]
    machines = dict.fromkeys(f"{run['machine']}. {run['compilers']}." for run in every if "machine" in run)
    lines[4:4] = [line for each in machines for line in (each, "")]
    for campaign in CAMPAIGNS:
        if not (runs := found[campaign.name]):
            continue
        seeds = ", ".join(str(run["seed"]) for run in runs if run["seed"] is not None) or "none"
        lines.append(
            f"| {campaign.name} | {campaign.proves} | {len(runs)} | {seeds} | "
            f"{duration(sum(run['seconds'] for run in runs))} | {sum(len(run['violations']) for run in runs)} | "
            f"{', '.join(dict.fromkeys(run.get('commit', '') for run in runs))} |"
        )
    for campaign in CAMPAIGNS:
        if not (runs := found[campaign.name]):
            continue
        lines += ["", f"## {campaign.name}", "", "| figure | value |", "|---|---:|"]
        labels = dict.fromkeys(label for run in runs for label in run["figures"])
        for label in labels:
            values = [run["figures"][label] for run in runs if label in run["figures"]]
            lines.append(f"| {cell(label)} | {cell(combined(values, label))} |")
        lines += [f"\nViolation: {cell(text)}" for run in runs for text in run["violations"]]
    missing = [
        campaign.name for campaign in CAMPAIGNS if not found[campaign.name] and campaign.name not in errors
    ]
    if missing or errors:
        lines += ["", "## Not run", ""]
        lines += [f"- {name}: {cell(text)}" for name, texts in errors.items() for text in texts]
        lines += [f"- {name}" for name in missing]
    return "\n".join(lines) + "\n"


def tell(full: bool, errors: dict[str, list[str]]) -> bool:
    """Print a table; whether all is well."""
    table = Table("campaign", "runs", "duration", "violations", box=None)
    well = not errors
    for campaign in CAMPAIGNS:
        runs = results(campaign, full)
        violations = sum(len(run["violations"]) for run in runs)
        well = well and violations == 0
        if campaign.name in errors:
            table.add_row(campaign.name, "[red]error[/]", "", errors[campaign.name][0][:100])
        elif runs:
            style = "[red]" if violations else "[green]"
            table.add_row(
                campaign.name,
                str(len(runs)),
                duration(sum(run["seconds"] for run in runs)),
                f"{style}{violations}[/]",
            )
    console.print(table)
    return well


def run_all(
    chosen: list[Campaign], full: bool, minutes: float, seed: int, say: Callable[[str], None]
) -> dict[str, list[str]]:
    """Run them all, whatever any of them finds; returns those that gave no result, and why."""
    errors: dict[str, list[str]] = {}
    built: dict[str, str] = {}
    for campaign in chosen:
        for preset in campaign.needs:
            if preset not in built:
                say(f"building {preset}")
                (OUT / "logs").mkdir(parents=True, exist_ok=True)
                built[preset] = prepare(preset, OUT / f"logs/build-{preset}.log")
        if wrong := [built[preset] for preset in campaign.needs if built[preset]]:
            errors[campaign.name] = wrong
            continue
        paths = []
        for path, command in commands(campaign, full, minutes, seed):
            say(f"{campaign.name}: {campaign.proves}")
            began = time.monotonic()
            wrong = run_one(campaign, path, command, full)
            violations = read(path)["violations"] if path.exists() else []
            say(
                f"  {duration(time.monotonic() - began)}, {len(violations)} violations{'; ' + wrong[0] if wrong else ''}"
            )
            if wrong:
                errors.setdefault(campaign.name, []).extend(wrong)
            else:
                paths.append(path)
        if full and paths:
            keep(campaign, paths)
    return errors


def main(
    full: Annotated[
        bool,
        typer.Option("--full/--short", help="the long form of each; the short one is what `make test` runs"),
    ] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="these campaigns; may be given several times, or with commas")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="for each of: soak, soak_python, store_soak, spill_soak (four forms), fuzz")
    ] = 60.0,
    seed: Annotated[int, typer.Option(help="the first one")] = 1,
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="--no-run: write the page from the results that are there")
    ] = True,
    results_path: Annotated[
        Path | None,
        typer.Option("--results", help="the page; RESULTS.md, in the short form build/torture/RESULTS.md"),
    ] = None,
) -> None:
    """Runs the long tests and writes tests/torture/RESULTS.md from their results."""
    names = [name for part in only or [] for name in part.split(",")]
    known = [campaign.name for campaign in CAMPAIGNS]
    if unknown := set(names) - set(known):
        raise typer.BadParameter(
            f"no such campaign: {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    chosen = [campaign for campaign in CAMPAIGNS if not names or campaign.name in names]
    OUT.mkdir(parents=True, exist_ok=True)
    errors = run_all(chosen, full, minutes, seed, console.print) if run else {}
    page = results_path or (RESULTS if full else OUT / "RESULTS.md")
    page.write_text(report(full, errors))
    well = tell(full, errors)
    console.print(f"{page} written")
    raise typer.Exit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
