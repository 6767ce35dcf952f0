"""A short soak of the Python layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_soak_finds_every_byte_right_and_everything_comes_back(tmp_path):
    result = tmp_path / "soak.json"
    done = subprocess.run(
        [
            sys.executable,
            HERE / "soak.py",
            "--seconds",
            "10",
            "--seed",
            "1",
            "--processes",
            "6",
            "--json",
            result,
        ],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(result.read_text())
    assert found["violations"] == []
    figures = found["figures"]
    assert figures["kills"] > 0 and figures["checks"] > 0 and figures["returns"] > 0
