"""A container's 64 MiB /dev/shm.

Quantity: time per batch of 38.5 MB through a DataLoader with two workers, in a private mount
namespace whose /dev/shm is a tmpfs of 64 MiB, as docker gives; and the same with a pool whose
limit (TORCHSHM_LIMIT) is 64 MiB, reached at once. Unit: seconds.
Opponents: torch tensors by file_descriptor and by file_system, and stock numpy through the pipe.
A crash is a result here and goes to ``facts.outcomes``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.availability import missing
from benchmarks.benchmark import Benchmark
from benchmarks.figure import at_least, at_most
from benchmarks.images import BATCH_BYTES, ImageLoader
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample
from benchmarks.units import MIB

NAME = "small_devshm"
DEVSHM_BYTES = 64 * MIB
WARNING = re.compile(r"^.*Warning: .*$", re.MULTILINE)

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "stock": ("stock", {}),
    "torchshm": ("torchshm", {}),
    "torchshm_full": ("torchshm", {"TORCHSHM_LIMIT": "64MiB"}),
    "torch_fd": ("torch_fd", {}),
    "torch_fs": ("torch_fs", {}),
}
FULL = Arm("torchshm, pool limited to 64 MiB", "as torchshm; the pool holds one batch, the rest falls back")


def measure(quick: bool, meter: Meter) -> Result:
    """Every case in a namespace and a process of its own, one after the other."""
    result = Result(
        NAME,
        f"time per batch of {BATCH_BYTES / 1e6:.1f} MB through a DataLoader with a /dev/shm of 64 MiB",
        "s",
        {case: ImageLoader.VARIANTS.get(case, FULL) for case in CASES},
        quick=quick,
    )
    epochs = 2 if quick else 5
    cases = {case: how for case, how in CASES.items() if not quick or not case.startswith("torch_")}
    meter.expect(len(cases))
    no_namespace = _no_namespace()
    outcomes: dict[str, dict[str, Any]] = {}
    for case, (variant, environment) in cases.items():
        meter.doing(case)
        reason = missing("torch") or no_namespace or (missing("torchshm") if variant == "torchshm" else None)
        if reason:
            result.not_available[case] = reason
        else:
            outcomes[case] = _run(variant, environment, epochs)
            if outcomes[case]["seconds"]:
                result.add(case, outcomes[case].pop("seconds"))
        meter.step()
    result.facts["outcomes"] = outcomes

    def delivered(case: str) -> Sample | None:
        return Sample.of([outcomes[case]["delivered"]]) if case in outcomes else None

    full = outcomes.get("torchshm_full")
    warned = Sample.of([full["warnings"]]) if full and full["delivered"] else None
    result.figures = [
        at_least("epochs delivered", epochs, "epochs", delivered("torchshm")),
        at_least("epochs delivered at the pool's limit", epochs, "epochs", delivered("torchshm_full")),
        at_most("warnings at the pool's limit", 1, "warnings", warned),
    ]
    return result


def _no_namespace() -> str | None:
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run(_inside(["true"]), capture_output=True, text=True)
    return None if done.returncode == 0 else f"no private mount namespace: {done.stderr.strip()}"


def _inside(command: list[str]) -> list[str]:
    """`command` in a namespace with the small /dev/shm."""
    own = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    mount = f'mount -t tmpfs -o size={DEVSHM_BYTES} tmpfs /dev/shm && exec "$@"'
    return ["unshare", *own, "sh", "-c", mount, "sh", *command]


def _run(variant: str, environment: dict[str, str], epochs: int) -> dict[str, Any]:
    """The epochs that came and were right, the seconds per batch of each, the warnings, the error."""
    command = [sys.executable, "-m", "benchmarks.small_devshm", variant, str(epochs)]
    outcome: dict[str, Any] = {"delivered": 0, "warnings": 0, "seconds": []}
    try:
        done = subprocess.run(
            _inside(command),
            cwd=Path(__file__).parents[1],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return outcome | {"error": "hung: no end within 60 s"}
    warnings = [line.strip() for line in WARNING.findall(done.stderr) if "torchshm" in line.lower()]
    outcome |= {"warnings": len(warnings), "warning": warnings[0] if warnings else ""}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return outcome | {"error": lines[-1][:300] if lines else f"exit code {done.returncode}"}
    seconds = json.loads(done.stdout.splitlines()[-1])
    return outcome | {"delivered": len(seconds), "seconds": seconds}


def main(variant: str, epochs: int) -> None:
    """One case, inside the namespace: prints the seconds per batch of every epoch."""
    loader = ImageLoader(variant, workers=2)
    loader.check()
    print(json.dumps([loader.run(8)[0] for _ in range(epochs)]))


BENCHMARK = Benchmark(NAME, "a 64 MiB /dev/shm, and a pool whose limit is reached", measure)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
