"""A short soak of the store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_names_outlive_their_savers_and_the_service(tmp_path):
    result = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, HERE / "store_soak.py", "--seconds", "10", "--producers", "50", "--json", result],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(result.read_text())
    assert found["violations"] == []
    figures = found["figures"]
    assert figures["SIGKILLs of services"] > 0 and figures["SIGKILLs of clients"] > 0
    assert figures["loads of what they saved"] == figures["producers gone right after their save"] == 50
