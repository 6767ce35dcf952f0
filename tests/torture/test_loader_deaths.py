"""Twenty deaths of DataLoader workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_loader_whose_worker_is_killed_ends_with_pytorchs_error_and_memory_comes_back(tmp_path):
    result = tmp_path / "deaths.json"
    done = subprocess.run(
        [
            *(
                sys.executable,
                HERE / "loader_deaths.py",
                "--seed",
                "1",
                "--deaths",
                "20",
                "--stock-deaths",
                "0",
            ),
            *("--spawned", "0.05", "--json", result),
        ],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    figures = json.loads(result.read_text())["figures"]
    assert figures["torchshm: deaths"] == figures["torchshm: RuntimeError as PyTorch's"] == 20
