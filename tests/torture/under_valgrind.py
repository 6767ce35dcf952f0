"""The C++ suites under valgrind's memcheck, one test at a time, the processes that they fork included.

Leaks are LeakSanitizer's: a member is meant to live as long as its process, and processes that are killed free nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "build/dev/tests/cpp/torchshm_tests"

NOT_HERE = {
    "Pool.TakesManyLeases": "300 members in one process; valgrind has no room for so many mappings",
}
FINDING = re.compile(
    r"^(Invalid|Conditional jump|Use of uninit|Syscall param|Source and destination|Mismatched)", re.MULTILINE
)
SLOW = 900.0  # seconds for one test; a few enumerate thousands of deaths


def all_tests() -> list[str]:
    listed = subprocess.run([TESTS, "--gtest_list_tests"], capture_output=True, text=True, check=True).stdout
    names, suite = [], ""
    for line in listed.splitlines():
        line = line.split("#")[0].rstrip()
        if line.startswith("  "):
            names.append(suite + line.strip())
        elif line.endswith("."):
            suite = line
    return names


def run(name: str) -> tuple[str, int, list[str]]:
    """Returns the test's end, how many processes said that they were watched to their end, and what was found."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--quiet", "--leak-check=no", "--error-exitcode=99", "--num-callers=20"]
        command += [f"--log-file={folder}/%p.log", str(TESTS), f"--gtest_filter={name}"]
        # A soak takes as long as it is told, and is none under valgrind.
        environment = {**os.environ, "TORCHSHM_SOAK_SECONDS": "5"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SLOW, env=environment, check=False
            )
            end = "passed" if done.returncode == 0 else f"exit status {done.returncode}: {done.stdout[-600:]}"
        except subprocess.TimeoutExpired:
            end = "timeout"
        found, logs = [], sorted(Path(folder).glob("*.log"))
        for log in logs:
            # What valgrind says of itself (a system call it does not know) is no finding.
            text = re.sub(r"^==\d+== ", "", log.read_text(errors="replace"), flags=re.MULTILINE)
            if FINDING.search(text):
                found.append(f"{name}: {text[:1500]}")
        return end, len(logs), found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="tests whose names contain this")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    began = time.monotonic()
    names = [name for name in all_tests() if name not in NOT_HERE and chosen.only in name]
    violations: list[str] = []
    passed = processes = timeouts = 0
    with ThreadPoolExecutor(chosen.jobs) as workers:
        for name, (end, watched, found) in zip(names, workers.map(run, names), strict=True):
            processes += watched
            violations += found
            passed += end == "passed"
            timeouts += end == "timeout"
            print(f"{name}: {end}", flush=True)
            if end not in ("passed", "timeout") and not found:
                violations.append(f"{name}: {end}")
    figures = {
        "tests": len(names),
        "passed": passed,
        "stopped after 15 minutes": timeouts,
        "processes watched": processes,
    }
    figures |= {f"not run: {name}": reason for name, reason in NOT_HERE.items()}
    print(figures, violations)
    if chosen.json:
        result = {
            "name": "valgrind",
            "seed": None,
            "full": True,
            "seconds": round(time.monotonic() - began, 1),
        }
        chosen.json.write_text(
            json.dumps({**result, "figures": figures, "violations": violations}, indent=1) + "\n"
        )
    raise SystemExit(1 if violations else 0)


if __name__ == "__main__":
    main()
