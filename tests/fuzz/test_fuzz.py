"""The short form of the fuzzing: the committed inputs again, then some seconds of each target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)  # it builds the targets
def test_arbitrary_bytes_are_an_error_and_never_a_crash():
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/fuzz/run.py"), "--seconds", "20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads((ROOT / "build/torture/fuzz.json").read_text())["figures"]
    for name in ("handle", "wire", "control", "loads"):
        assert figures[f"executions of {name}"] > 100, figures
    assert figures["flips: rounds"] > 0
