"""``torchshm check``: sound pools of running processes, and a saved copy that was damaged."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import PATIENCE

pytest.importorskip("typer")
pytest.importorskip("rich")

# A process with a pool of 64 MiB, a small array, a large one, and a message that nobody has received.
PROGRAM = """
import io, sys
from multiprocessing.reduction import ForkingPickler
import numpy as np
import torchshm
from torchshm import _C

torchshm.register(limit="64 MiB", min_bytes=0)
small, large = torchshm.empty(5000, "u1"), torchshm.empty(5_000_000, "u1")
message = bytes(ForkingPickler.dumps(small))
print(*_C.fds(), _C.pool_id(), flush=True)
sys.stdin.readline()
"""


class Program:
    """The program above, running."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        words = self.process.stdout.readline().split()
        self.pid = self.process.pid
        self.data, self.control = (Path(f"/proc/{self.pid}/fd/{fd}") for fd in words[:2])
        self.pool = f"{int(words[2]):016x}"


@pytest.fixture(scope="module")
def program():
    running = Program()
    yield running
    running.process.communicate("\n", timeout=PATIENCE)


@pytest.fixture
def copies(program, tmp_path):
    """Control and data file, copied as plain files."""
    for source, name in ((program.control, "control"), (program.data, "data")):
        subprocess.run(["cp", "--sparse=always", source, tmp_path / name], check=True, timeout=PATIENCE)
    return tmp_path / "control", tmp_path / "data"


def check(*arguments, status: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def flip_count(control: Path) -> int:
    """Raise the count of the first live block by one. Returns the block."""
    with control.open("r+b") as file:
        file.seek(40)
        (chunks,) = struct.unpack("<Q", file.read(8))
        tickets = (4460544 + 16 * chunks + 4095) // 4096 * 4096
        blocks = tickets + 16 * 2**22
        for block in range(512 * chunks):
            file.seek(blocks + 32 * block + 8)
            (word,) = struct.unpack("<Q", file.read(8))
            if word & 15:
                file.seek(blocks + 32 * block + 8)
                file.write(struct.pack("<Q", word + 16))
                return block
    raise AssertionError("no live block")


@pytest.mark.parametrize("exact", [(), ("--at-rest",)])
def test_a_running_pool_is_sound(program, exact):
    text = check("--pid", program.pid, *exact, status=0)
    assert program.pool in text and "sound" in text and str(program.pid) in text


def test_figures_as_json(program):
    (pool,) = json.loads(check("--pid", program.pid, "--json", status=0))["pools"]
    assert pool["pool"] == program.pool and pool["sound"] and not pool["copy"]
    assert [member["pid"] for member in pool["members"]] == [program.pid]
    assert (pool["blocks"], pool["tickets"], pool["violations"], pool["error"]) == (2, 1, [], None)


def test_checking_joins_no_pool(program):
    before = os.stat(program.control).st_blocks
    check("--pid", program.pid, status=0)
    (pool,) = json.loads(check("--pid", program.pid, "--json", status=0))["pools"]
    assert len(pool["members"]) == 1
    assert os.stat(program.control).st_blocks == before


def test_every_pool_of_the_machine_is_found(program):
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    pools = {pool["pool"]: pool for pool in json.loads(done.stdout)["pools"]}
    assert pools[program.pool]["sound"]


def test_memory_files_by_path(program):
    assert "sound" in check("--files", program.control, program.data, status=0)


def test_a_saved_copy_is_sound(program, copies):
    text = check("--files", *copies, "--at-rest", status=0)
    assert program.pool in text and "copy" in text and "sound" in text


def test_a_damaged_copy_is_named(copies):
    block = flip_count(copies[0])
    text = check("--files", *copies, status=1)
    assert "1 violation" in text
    assert re.search(rf"invariant 3: block {block} .*expected the count", text)
    (pool,) = json.loads(check("--files", *copies, "--json", status=1))["pools"]
    assert not pool["sound"]
    ((number, what),) = [(found["invariant"], found["what"]) for found in pool["violations"]]
    assert number == 3 and what.startswith(f"block {block} ")


def test_a_header_that_contradicts_its_file_is_no_crash(copies):
    with copies[0].open("r+b") as file:
        file.seek(40)
        file.write(struct.pack("<Q", 2**40))
    assert "contradicts the size" in check("--files", *copies, status=1)


@pytest.mark.parametrize("content", [b"", b"\0" * 8192, b"\xff" * 8192])
def test_a_file_that_is_no_pool_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    text = check("--files", tmp_path / "file", tmp_path / "file", status=1)
    assert "too short" in text or "not a torchshm control file" in text


def test_nothing_to_check_is_status_2(tmp_path):
    missing = tmp_path / "missing"
    assert "missing" in check("--files", missing, missing, status=2)
    with subprocess.Popen(["sleep", "100"]) as idle:
        assert f"No pool found in process {idle.pid}" in check("--pid", idle.pid, status=2)
        idle.kill()


def test_a_process_or_files_and_not_both(tmp_path):
    check("--pid", 1, "--files", tmp_path, tmp_path, status=2)
