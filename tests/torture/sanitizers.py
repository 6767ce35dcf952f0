"""The suites under ASan + UBSan, TSan and valgrind, in C++ and in Python; see ``--help``.

``sanitize`` of the Makefile runs the first three, ``valgrind`` the last; each leaves a file in build/torture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from result_file import ResultFile
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build/torture"

# What is about _C and _torch, and neither about other packages (which bring extension modules of their own), nor about limits on
# address space or counts of mappings, of which the sanitizers have many of their own.
PYTHON_SUITES = (
    "dtypes",
    "fork",
    "handles",
    "killed_midway",
    "layouts",
    "membership",
    "messages",
    "modes",
    "object_arrays",
    "pooled",
    "pooled_arrays",
    "round_trips",
    "sender_writes",
    "shared_dict",
    "shared_list",
    "shared_list_model",
    "shared_list_writers",
    "stateful",
    "stats",
    "strangers",
    "tensors",
)
# With threads of Python at work in one member.
PYTHON_THREADS = ("threads",)

# Valgrind takes seconds to start and slows all down by 20 or more: not the enumerations and soaks, which are about other
# things; what they enumerate is run once all the same. A million blocks take hours, and there is no room for 300 members.
NOT_IN_VALGRIND = (
    *("Death.AtEveryPoint*", "Failure.*", "Soak.*", "Points*"),
    *("Pool.HoldsAMillion*", "Pool.TakesManyLeases"),
)
# Leaks are LeakSanitizer's: a member is meant to live as long as its process, and processes that are killed free nothing.
VALGRIND = (
    *(
        "valgrind",
        "--quiet",
        "--trace-children=yes",
        "--error-exitcode=99",
        "--leak-check=no",
        "--num-callers=24",
    ),
    f"--suppressions={Path(__file__).with_name('valgrind.supp')}",
)
SLOW = 900.0  # seconds for one test

MEMCHECK = re.compile(
    r"^==\d+== ((?:Invalid|Conditional jump|Use of uninit|Syscall param|Source and destination|Mismatched).*)",
    re.MULTILINE,
)

console = Console()


class Kind(str, Enum):
    """What to run."""

    address = "address"
    thread = "thread"
    address_python = "address-python"
    thread_python = "thread-python"
    valgrind = "valgrind"


def run(
    *command: str | Path, timeout: float | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **(environment or {})}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=timeout,
    )


def build(preset: str, jobs: int, *targets: str) -> None:
    if not (ROOT / f"build/{preset}/build.ninja").exists():
        subprocess.run(["cmake", "--preset", preset], cwd=ROOT, check=True)
    chosen = ["--target", *targets] if targets else []
    command = ["cmake", "--build", "--preset", preset, "--parallel", str(jobs), *chosen]
    subprocess.run(command, cwd=ROOT, check=True)


def reports(output: str) -> Iterator[str]:
    """The first lines of what the tools have found."""
    for pattern in (r"^SUMMARY: .*", r"^.*runtime error: .*"):
        yield from sorted(set(re.findall(pattern, output, re.MULTILINE)))


def outcome(
    preset: str, done: subprocess.CompletedProcess[str], passed: str, failed: str
) -> tuple[int, list[str]]:
    """Tests that were run, and what was wrong, out of what ctest or pytest printed; `passed`, `failed`: patterns."""
    log = OUT / f"{preset}.log"
    log.write_text(done.stdout)
    count = re.search(passed, done.stdout)
    wrong = [f"{preset}: {name}" for name in re.findall(failed, done.stdout, re.MULTILINE)]
    wrong += [f"{preset}: {text}" for text in reports(done.stdout)]
    if done.returncode != 0 and not wrong:
        wrong.append(f"{preset}: ended with {done.returncode}, see {log.relative_to(ROOT)}")
    return int(count.group(1)) if count else 0, wrong


def cpp(preset: str, jobs: int, **options: str) -> tuple[int, list[str]]:
    """Tests that were run, and what was wrong."""
    build(preset, jobs)
    done = run(
        "ctest",
        "--test-dir",
        f"build/{preset}",
        "--parallel",
        str(jobs),
        "--output-on-failure",
        environment=options,
    )
    return outcome(
        preset,
        done,
        r"tests? (?:passed|failed).* out of (\d+)",
        r"^\s*\d+ - (\S+) \((?!Skipped)",
    )


def runtime(name: str) -> str:
    """The sanitizer's library; libstdc++ after it, so that its interceptors find what they stand before."""
    paths = [run("gcc", f"-print-file-name={library}").stdout.strip() for library in (name, "libstdc++.so.6")]
    return " ".join(str(Path(path).resolve()) for path in paths)


def python(
    preset: str, library: str, suites: tuple[str, ...], jobs: int, **options: str
) -> tuple[int, list[str]]:
    build(preset, jobs, "python_modules")
    done = run(
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout=600",
            "-x",
            "--maxfail=5",
        ),
        *(ROOT / f"tests/python/test_{suite}.py" for suite in suites),
        environment={
            "LD_PRELOAD": runtime(library),
            "PYTHONPATH": f"{ROOT}/build/{preset}/python:{ROOT}",
            **options,
        },
    )
    return outcome(preset, done, r"(\d+) passed", r"^(?:FAILED|ERROR) (\S+)")


def watched(program: Path, test: str) -> tuple[str, list[str]]:
    """What one test printed under valgrind, and what was wrong in it or in a process that it forked."""
    with tempfile.TemporaryDirectory() as folder:
        command: list[str | Path] = [
            *VALGRIND,
            f"--log-file={folder}/%p.log",
            program,
            f"--gtest_filter={test}",
            "--gtest_brief=1",
        ]
        try:
            done = run(*command, timeout=SLOW, environment={"TORCHSHM_THREAD_STEPS": "300"})
            output, wrong = done.stdout, [] if done.returncode == 0 else [f"valgrind: {test}"]
        except subprocess.TimeoutExpired:
            output, wrong = "", [f"valgrind: {test}: not done in {SLOW:.0f} s"]
        for log in sorted(Path(folder).glob("*.log")):
            # What valgrind says of itself (a system call that it does not know) is no finding.
            text = log.read_text(errors="replace")
            wrong += [f"valgrind: {test}: {found}" for found in MEMCHECK.findall(text)]
            output += text
        return output, wrong


def memcheck(jobs: int) -> tuple[int, list[str]]:
    build("dev", jobs, "torchshm_tests")
    program = ROOT / "build/dev/tests/cpp/torchshm_tests"
    listed = run(
        program, "--gtest_list_tests", f"--gtest_filter=-{':'.join(NOT_IN_VALGRIND)}"
    ).stdout.splitlines()
    suite, tests = "", []
    for line in listed:
        if line.startswith("  "):
            tests.append(suite + line.split("#")[0].strip())
        elif line.split("#")[0].rstrip().endswith("."):
            suite = line.split("#")[0].rstrip()
    # A process each: pools that were adopted stay with their process.
    with ThreadPoolExecutor(jobs) as workers:
        done = list(workers.map(lambda test: watched(program, test), tests))
    (OUT / "valgrind.log").write_text(
        "\n".join(f"--- {test}\n{output}" for test, (output, _) in zip(tests, done, strict=True))
    )
    return len(tests), [text for _, wrong in done for text in wrong]


PRESETS = {
    Kind.address: "asan-ubsan",
    Kind.thread: "tsan",
    Kind.address_python: "asan-python",
    Kind.thread_python: "tsan-python",
}


def before(kinds: list[Kind], full: bool) -> ResultFile:
    """What the file has of the kinds that are not run now."""
    path = OUT / "sanitizers.json"
    old = ResultFile(**json.loads(path.read_text())) if path.exists() else None
    if old is None or old.full is not full:
        return ResultFile("sanitizers", None, full, 0.0, {}, [])
    figures = {
        name: count
        for name, count in old.figures.items()
        if name not in [f"tests under {kind.value}" for kind in kinds]
    }
    again = tuple(f"{text}: " for kind in kinds for text in (PRESETS.get(kind), kind.value))
    violations = [text for text in old.violations if not text.startswith(again)]
    return ResultFile("sanitizers", None, full, old.seconds if figures else 0.0, figures, violations)


def write(name: str, seconds: float, full: bool, figures: dict[str, int], violations: list[str]) -> None:
    ResultFile(name, None, full, seconds, figures, violations).write(OUT / f"{name}.json")


def main(
    only: Annotated[
        list[Kind] | None,
        typer.Option(
            help="What to run; all but valgrind without it. Of the others the file keeps what it has"
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Tests at a time")] = 1,
    full: Annotated[
        bool, typer.Option("--full", help="The long form: more steps of the crowd of threads")
    ] = False,
) -> None:
    """Runs the suites under the sanitizers, writes build/torture/sanitizers.json or build/torture/valgrind.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHSHM_THREAD_STEPS", "40000" if full else "4000")
    address = "strict_string_checks=1:detect_stack_use_after_return=1"
    undefined = "print_stacktrace=1"
    # Python never frees all it has; and a test's children die at any point.
    in_python = {
        "ASAN_OPTIONS": f"{address}:detect_leaks=0:verify_asan_link_order=0",
        "UBSAN_OPTIONS": undefined,
    }
    table = Table("under", "tests", "found", "seconds")
    figures: dict[str, int] = {}
    violations: list[str] = []
    found = 0
    start = time.monotonic()
    kinds = only or list(PRESETS)
    for kind in kinds:
        began = time.monotonic()
        if kind is Kind.address:
            tests, wrong = cpp(
                "asan-ubsan", jobs, ASAN_OPTIONS=f"{address}:detect_leaks=1", UBSAN_OPTIONS=undefined
            )
        elif kind is Kind.thread:
            tests, wrong = cpp("tsan", jobs, TSAN_OPTIONS="halt_on_error=0:second_deadlock_stack=1")
        elif kind is Kind.address_python:
            tests, wrong = python(
                "asan-python", "libasan.so", PYTHON_SUITES + PYTHON_THREADS, jobs, **in_python
            )
        elif kind is Kind.thread_python:
            suppressed = Path(__file__).with_name("tsan_python.supp")
            options = f"ignore_noninstrumented_modules=1:suppressions={suppressed}"
            tests, wrong = python("tsan-python", "libtsan.so", PYTHON_THREADS, jobs, TSAN_OPTIONS=options)
        else:
            tests, wrong = memcheck(jobs)
        if tests == 0:
            wrong.append(f"{kind.value}: no test was run")
        found += len(wrong)
        table.add_row(kind.value, str(tests), str(len(wrong)), f"{time.monotonic() - began:.0f}")
        if kind is Kind.valgrind:
            write("valgrind", time.monotonic() - began, full, {"tests": tests}, wrong)
        else:
            figures[f"tests under {kind.value}"] = tests
            violations += wrong
        for text in wrong:
            console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    if figures:
        rest = before(kinds, full)
        seconds = rest.seconds + time.monotonic() - start
        write("sanitizers", seconds, full, {**rest.figures, **figures}, rest.violations + violations)
    console.print(table)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    typer.run(main)
