"""The short form of a program of this folder, for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def figures_of(program: str, folder: Path, *arguments: str, timeout: float = 110) -> dict[str, Any]:
    """What it counted. It must end well, and have found nothing wrong."""
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(program), *arguments, "--json", result],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = json.loads(result.read_text())
    assert not found["violations"], found["violations"]
    figures: dict[str, Any] = found["figures"]
    return figures
