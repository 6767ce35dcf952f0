"""Fuzzing: what comes from others may be anything. Builds the targets, runs them, counts.

Short form (``make test``): the committed corpus again, then a few seconds of each target. ``--full``: for as long as it is told.
Writes ``build/torture/fuzz.json``, or ``fuzz-full.json``; logs, inputs that failed and the growing corpus lie in
``build/torture/fuzz/``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1] / "torture"))
from result_file import ResultFile

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build/fuzz"
OUT = ROOT / "build/torture/fuzz"
ARTIFACTS = ("crash-", "timeout-", "oom-", "leak-")

console = Console()


@dataclass(frozen=True)
class Target:
    """Something that is given arbitrary bytes."""

    name: str
    what: str
    share: float  # of the time there is
    options: list[str] = field(default_factory=list)


TARGETS = [
    Target("handle", "32 bytes as a handle, against a live pool", 0.25, ["-max_len=66"]),
    Target("wire", "the bytes of an array in a message", 0.2, ["-max_len=400"]),
    Target("value", "what a name in a store stands for, as C++ reads it", 0.1, ["-max_len=1000"]),
    Target("control", "the whole control file", 0.3, ["-max_len=400", "-len_control=0"]),
    Target("flips", "words of the control file that change under members at work", 0.05),
    Target("loads", "forged messages through loads()", 0.1),
]
NAMES = [target.name for target in TARGETS]


def build() -> None:
    if shutil.which("clang++-14") is None:
        raise typer.BadParameter(
            "clang++-14 not found. On Debian: apt-get install clang-14 libclang-rt-14-dev"
        )
    if not (BUILD / "build.ninja").exists():
        subprocess.run(["cmake", "--preset", "fuzz"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", "--preset", "fuzz"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def command(target: Target, where: Path, seconds: float, runs: int, seed: int) -> list[str]:
    if target.name == "flips":
        return [str(BUILD / "tests/fuzz/flip_stress"), f"{seconds:g}", str(seed)]
    work = where / "corpus" / target.name
    work.mkdir(parents=True, exist_ok=True)
    options = [
        f"-seed={seed}",
        "-timeout=120",  # of the clock; the targets themselves measure processor time
        "-report_slow_units=3600",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={where}/{target.name}-",
        *target.options,
    ]
    options += [f"-runs={runs}"] if runs else [f"-max_total_time={max(1, round(seconds))}"]
    if target.name == "loads":
        return [sys.executable, str(HERE / "loads.py"), *options, str(work)]
    corpus = HERE / "corpus" / target.name
    return [
        str(BUILD / f"tests/fuzz/{target.name}_fuzz"),
        *options,
        str(work),
        *([str(corpus)] if corpus.is_dir() else []),
    ]


def executions(text: str) -> int:
    """Of a log, also of one that is still being written."""
    final = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)
    if final:
        return sum(map(int, final))
    passed = re.findall(r"^#(\d+)\s", text, re.MULTILINE)
    return int(passed[-1]) if passed else 0


def findings_in(text: str, name: str) -> list[str]:
    summary = re.findall(
        r"^(?:SUMMARY|==\d+== ?ERROR): .*|^\S*: not so: .*|^AssertionError.*", text, re.MULTILINE
    )
    return [f"{name}: {line}" for line in dict.fromkeys(summary) if "run interrupted" not in line]


def figures_of(where: Path, logs: list[Path]) -> tuple[dict[str, Any], list[str]]:
    counts: dict[str, int] = {}
    violations: list[str] = []
    extra: dict[str, int] = {}
    for log in sorted(logs):
        name = log.stem.rpartition("-")[0]
        text = log.read_text(errors="replace")
        if name == "flips":
            for line in re.findall(r"^\{.*\}$", text, re.MULTILINE):
                for key, value in json.loads(line).items():
                    if key in {"rounds", "flips", "operations"}:
                        extra[f"flips: {key}"] = extra.get(f"flips: {key}", 0) + value
            violations += [
                f"flips: {line}" for line in text.splitlines() if line.startswith("round with seed")
            ]
        else:
            counts[name] = counts.get(name, 0) + executions(text)
        violations += findings_in(text, name)
    for artifact in sorted(where.glob("*")):
        if any(f"-{kind}" in artifact.name for kind in ARTIFACTS):
            violations.append(f"an input that fails: {artifact.relative_to(ROOT)}")
    figures: dict[str, Any] = {f"executions of {name}": n for name, n in sorted(counts.items())}
    figures["executions"] = sum(counts.values())
    return figures | extra, violations


def environment() -> dict[str, str]:
    """The module with failpoints, where it was built, and the sanitizers as strict as they go."""
    python = [str(ROOT / "build/dev/python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in python if p),
        # What a forked child leaves of its parent's, and the fuzz target does too, is leaked on purpose.
        "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def save(full: bool, seed: int | None, seconds: float, where: Path, logs: list[Path]) -> list[str]:
    figures, violations = figures_of(where, logs)
    path = ROOT / f"build/torture/{'fuzz-full' if full else 'fuzz'}.json"
    ResultFile("fuzz", seed, full, seconds, figures, violations).write(path)
    table = Table("target", "executions", title=f"fuzzing, {seconds:.0f} s")
    for label, value in figures.items():
        table.add_row(label, f"{value:,}")
    console.print(table)
    for violation in violations:
        console.print(violation, style="red", markup=False)
    return violations


def main(
    full: Annotated[bool, typer.Option("--full", help="For --minutes in place of some seconds.")] = False,
    minutes: Annotated[float, typer.Option(help="Of the full form, over all targets.")] = 60,
    seconds: Annotated[float, typer.Option(help="Of the short form, over all targets.")] = 20,
    runs: Annotated[int, typer.Option(help="Executions of each libFuzzer target, in place of a time.")] = 0,
    seed: Annotated[int, typer.Option(help="0 is libFuzzer's word for: another one each time.")] = 1,
    jobs: Annotated[int, typer.Option(help="Processes for each target, with seeds of their own.")] = 1,
    target: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(NAMES)}.")] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Run nothing; count what all logs of long runs say so far.")
    ] = False,
) -> None:
    """Run the fuzz targets and write what they did to build/torture/."""
    where = OUT if full or collect else OUT / "short"
    if where != OUT and where.exists():
        shutil.rmtree(where)
    where.mkdir(parents=True, exist_ok=True)
    if collect:
        logs = sorted(where.glob("*.log"))
        stats = [p.stat() for p in logs]
        elapsed = max((s.st_mtime for s in stats), default=0) - min((s.st_ctime for s in stats), default=0)
        raise typer.Exit(1 if save(True, None, max(elapsed, 0), where, logs) else 0)
    build()
    chosen = [t for t in TARGETS if not target or t.name in target]
    total = minutes * 60 if full else seconds
    share = total / sum(t.share for t in chosen)
    start, logs = time.monotonic(), []
    for one in chosen:
        # What failed before is a finding until it is fixed; what it was is kept as a test.
        for old in where.glob(f"{one.name}-*"):
            if any(f"{one.name}-{kind}" in old.name for kind in ARTIFACTS):
                old.unlink()
        running = []
        for job in range(jobs):
            log = where / f"{one.name}-{seed + job}.log"
            logs.append(log)
            with log.open("w") as out:
                running.append(
                    subprocess.Popen(
                        command(one, where, share * one.share, runs, seed + job),
                        cwd=where,
                        env=environment(),
                        stdout=out,
                        stderr=out,
                    )
                )
        for log, process in zip(logs[-jobs:], running, strict=True):
            if process.wait() != 0:
                with log.open("a") as out:
                    out.write(f"\nSUMMARY: {one.name} ended with {process.returncode}\n")
    violations = save(full, seed, time.monotonic() - start, where, logs)
    raise typer.Exit(1 if violations else 0)


if __name__ == "__main__":
    typer.run(main)
