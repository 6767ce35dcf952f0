"""Branch coverage of the rooms base, os and pool by the C++ suites; see ``--help``.

A branch is a way out of a conditional jump that gcov counts at -O0, in a build without exceptions: cleanups and
``throw`` edges are not there to be counted. What no test takes stands in ``uncovered.toml`` with its reason, matched by
file and source text. The measurement fails when a branch is in neither, when a reason no longer applies, and below
the floor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tomllib
import typer
from result_file import ResultFile
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/coverage"
OUT = ROOT / "build/torture"
REASONS = Path(__file__).with_name("uncovered.toml")
ROOMS = ("base", "os", "pool")
FLOOR = 95.0  # percent of the branches, of each room and of all

console = Console()


@dataclass(frozen=True)
class Line:
    """A line of source, and how many of its branches were never taken."""

    file: str
    number: int
    text: str
    missing: int


@dataclass
class Reason:
    """Why branches of all lines with this text are not taken."""

    file: str
    text: str
    branches: int
    reason: str
    sometimes: bool = False  # a race: taken in some runs


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def build_and_run(jobs: int, seconds: int, full: bool) -> list[str]:
    """Runs everything on fresh counters; returns what failed."""
    if not (BUILD / "build.ninja").exists():
        run("cmake", "--preset", "coverage")
    targets = [] if full else ["--target", "torchshm_tests"]
    run("cmake", "--build", "--preset", "coverage", "--parallel", str(jobs), *targets)
    for counters in BUILD.rglob("*.gcda"):
        counters.unlink()
    environment = {**os.environ, "TORCHSHM_SOAK_SECONDS": str(seconds)}
    failed = []
    suites = ["ctest", "--test-dir", str(BUILD), "--parallel", str(jobs), "--output-on-failure"]
    if not full:
        # Other campaigns, and the deaths of a store's members, which take their time and other paths.
        suites += ["--exclude-regex", "^torture[.]|^Store[.]DeathAtEveryPoint"]
    if subprocess.run(suites, cwd=ROOT, env=environment, check=False).returncode != 0:
        failed.append("the C++ suites failed")
    return failed


def measure() -> tuple[dict[str, list[int]], list[Line]]:
    """(taken, all) of each room, and the lines with branches that were not taken."""
    pages = OUT / "coverage"
    pages.mkdir(parents=True, exist_ok=True)
    raw = pages / "gcovr.json"
    filters = [part for room in ROOMS for part in ("--filter", f"csrc/{room}/")]
    run(
        *("gcovr", "--root", ROOT, *filters, "--exclude-throw-branches", "--exclude-unreachable-branches"),
        # Thousands of millions of calls: the checker reads the words of all pages.
        *("--gcov-suspicious-hits-threshold", "0"),
        # What the service has of the headers is built with exceptions; it is in another room.
        *("--exclude-directories", ".*/service"),
        *("--html-details", pages / "index.html", "--json", raw, BUILD),
    )
    totals = {room: [0, 0] for room in ROOMS}
    lines = []
    for file in json.loads(raw.read_text())["files"]:
        source = (ROOT / file["file"]).read_text().splitlines()
        per_line: dict[int, list[list[int]]] = {}
        for line in file["lines"]:
            if line.get("branches"):
                per_line.setdefault(line["line_number"], []).append([b["count"] for b in line["branches"]])
        for number, instances in sorted(per_line.items()):
            # A branch of a template is one branch, however often it is instantiated.
            alike = len({len(counts) for counts in instances}) == 1
            counts = (
                [max(c) for c in zip(*instances, strict=True)] if alike else [c for i in instances for c in i]
            )
            missing = counts.count(0)
            room = totals[file["file"].split("/")[1]]
            room[0] += len(counts) - missing
            room[1] += len(counts)
            if missing:
                lines.append(Line(file["file"], number, source[number - 1].strip(), missing))
    return totals, lines


def judge(lines: list[Line], reasons: list[Reason]) -> list[str]:
    """What the list of reasons and the measurement disagree about."""
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        found[line.file, line.text] += line.missing
    known = {(reason.file, reason.text): reason for reason in reasons}
    wrong = []
    for line in lines:
        reason = known.get((line.file, line.text))
        if reason is None:
            wrong.append(
                f"{line.file}:{line.number}: {line.missing} not taken, without a reason: {line.text}"
            )
    for key, reason in known.items():
        count = found[key]
        if count > reason.branches:
            wrong.append(
                f"{reason.file}: {count} not taken where {reason.branches} have a reason: {reason.text}"
            )
        elif count < reason.branches and not reason.sometimes:
            wrong.append(f"{reason.file}: {reason.branches} have a reason and {count} need it: {reason.text}")
        if not any(text.strip() == reason.text for text in (ROOT / reason.file).read_text().splitlines()):
            wrong.append(f"{reason.file}: no such line any more: {reason.text}")
    return wrong


def main(
    jobs: Annotated[int, typer.Option(help="Tests at a time")] = 1,
    seconds: Annotated[int, typer.Option(help="Length of the soak among the suites")] = 6,
    measured: Annotated[
        bool, typer.Option("--measured", help="Read the counters that are there; run nothing")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The long form: the other campaigns' short forms too")
    ] = False,
) -> None:
    """Builds, runs the C++ suites, writes build/torture/coverage/index.html and build/torture/coverage.json."""
    start = time.monotonic()
    violations = [] if measured else build_and_run(jobs, seconds, full)
    totals, lines = measure()
    listed = tomllib.loads(REASONS.read_text()).get("uncovered", [])
    violations += judge(lines, [Reason(**entry) for entry in listed])

    totals["all"] = [sum(column) for column in zip(*totals.values(), strict=True)]
    table = Table("room", "branches", "taken", "%")
    figures: dict[str, float | int] = {}
    for room, (taken, branches) in totals.items():
        percent = round(100 * taken / branches, 2) if branches else 100.0
        table.add_row(room, str(branches), str(taken), f"{percent:.1f}")
        figures[f"branches of {room}, %"] = percent
    figures["branches"] = totals["all"][1]
    figures["not taken"] = totals["all"][1] - totals["all"][0]
    figures["reasons"] = len(listed)
    for room in totals:
        percent = figures[f"branches of {room}, %"]
        if percent < FLOOR:
            violations.append(f"{percent} % of the branches of {room} are taken, fewer than {FLOOR:.0f} %")

    for line in lines:
        console.print(
            f"{line.file}:{line.number}: {line.missing}: {line.text}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(table)
    for violation in violations:
        console.print(violation, style="red", markup=False, highlight=False, soft_wrap=True)
    took = time.monotonic() - start
    ResultFile("coverage", None, full, took, figures, violations).write(OUT / "coverage.json")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    typer.run(main)
