"""Programs as real files, run by an interpreter of their own, with what they said and how they ended."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# A hang is a failure too. No test here needs more than a few seconds on an idle machine.
PATIENCE = 110

METHODS = ["fork", "spawn", "forkserver"]

# Knows nothing of torchshm: what it sends is pooled because its process is a member.
WORK = """
import multiprocessing
import sys

import numpy as np


def send(pipe, generation, more, method, late):
    assert method == "fork" or late or "torch" not in sys.modules
    if late:
        import torch
    if more:
        context = multiprocessing.get_context(method)
        child = context.Process(target=send, args=(pipe, generation + 1, more - 1, method, late))
        child.start()
        child.join()
        assert child.exitcode == 0
    pipe.send((generation, np.full(20_000, float(generation))))
    pipe.close()


def echo(pipe):
    while (x := pipe.recv()) is not None:
        pipe.send(x)
"""


def run(arguments: list[str], folder: Path, limits: dict[int, int] | None = None, **environment: str):
    """Run a command as a process group of its own, so that a hang leaves nobody behind."""

    def limit() -> None:
        for what, value in (limits or {}).items():
            resource.setrlimit(what, (value, value))

    preparation: Callable[[], None] | None = limit if limits else None
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=preparation,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end after {PATIENCE} s\n{out}\n{err}")
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def run_script(
    source: str, folder: Path, *arguments: str, limits: dict[int, int] | None = None, **environment: str
):
    """Write `source` to folder/script.py and run it."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(source))
    return run([sys.executable, str(path), *arguments], folder, limits, **environment)


def passes(
    source: str, folder: Path, *arguments: str, limits: dict[int, int] | None = None, **environment: str
) -> str:
    """The output of a script, which must end well and say nothing on stderr."""
    done = run_script(source, folder, *arguments, limits=limits, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stderr == "", done.stderr
    return done.stdout
