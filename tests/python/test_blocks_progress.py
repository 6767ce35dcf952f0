"""What torchshm.data.blocks shows of a run while it goes on, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
from scripts import PATIENCE

from torchshm.data import blocks
from torchshm.data.blocks import _plan
from torchshm.data.blocks._progress import Rates, shares
from torchshm.data.blocks._sources import ArraySource

pytestmark = pytest.mark.apart
pytest.importorskip("rich")

ROWS = 20_000
SETTINGS = {"memory": "64MiB", "block_size": "100KiB", "num_workers": 2, "seed": 1}


def job(**more):
    given = {"i": np.arange(ROWS), "x": np.zeros((ROWS, 16))}
    return blocks.from_arrays(given).options(**SETTINGS, **more)


def ended():
    """Nobody draws, and what is printed goes where it went."""
    names = [thread.name for thread in threading.enumerate()]
    return "torchshm-progress" not in names and not hasattr(sys.stdout, "rich_proxied_file")


# ---- where it is drawn


def test_it_writes_the_last_state_where_there_is_no_terminal(capsys):
    dataset = job(progress=True).map_batches(lambda batch: batch).shuffle()
    assert dataset.count() == ROWS
    said = capsys.readouterr().err
    first, second, foot = said.splitlines()
    assert first.startswith("from_arrays -> map_") and second.startswith("shuffle ")
    for line in (first, second):
        assert "100 %" in line and f"{ROWS:,} rows" in line and "MiB" in line and "rows/s" in line
    assert "spilled" in foot and ended()


@pytest.mark.parametrize("given", [None, False])
def test_it_says_nothing_where_nobody_asked(capsys, monkeypatch, given):
    monkeypatch.setenv("TORCHSHM_PROGRESS", "1")  # for terminals alone
    assert job(progress=given).count() == ROWS
    assert capsys.readouterr().err == ""


def test_a_notebook_is_no_terminal_though_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TORCHSHM_PROGRESS", "1")
    assert job().count() == ROWS
    assert capsys.readouterr().err == ""
    assert job(progress=True).count() == ROWS
    (line, foot) = capsys.readouterr().err.splitlines()
    assert line.startswith("from_arrays ") and "spilled" in foot and "\x1b" not in line


def test_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"progress needs rich: pip install 'torchshm\[cli\]'"):
        job(progress=True).count()
    assert not psutil.Process().children()
    assert job().count() == ROWS


# ---- how it ends


def test_it_ends_with_a_loop_that_is_left(capsys):
    for _ in job(progress=True).iter_batches(100):
        break
    assert ended() and capsys.readouterr().err.endswith("\n")


def test_it_ends_with_an_exception_of_a_function(capsys):
    def fail(batch):
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        job(progress=True).map_batches(fail).count()
    assert ended() and capsys.readouterr().err.endswith("\n")


def test_it_ends_with_an_exception_of_the_loop(capsys):
    def loop():
        for _ in job(progress=True).iter_batches(100):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert ended() and capsys.readouterr().err.endswith("\n")


PROGRAM = """
import sys, time
import numpy as np
from torchshm.data import blocks

given = {"i": np.arange(4000), "x": np.zeros((4000, 16))}
dataset = blocks.from_arrays(given).options(memory="64MiB", block_size="50KiB", num_workers=2)
"""


@contextlib.contextmanager
def terminal(code, **environment):
    """A program on a terminal of its own, and what it has written there when it has ended."""
    parent, child = pty.openpty()
    said = bytearray()

    def read():
        with contextlib.suppress(OSError):  # nobody has the other end any more
            while got := os.read(parent, 1 << 16):
                said.extend(got)

    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + code],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40", **environment},
    )
    os.close(child)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, said
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(parent)


def wait_for(said, text):
    pause = threading.Event()
    while text not in said:  # the watchdog ends it
        pause.wait(0.02)


def last_screen(said):
    """The lines that stay: what was drawn over is gone."""
    assert said.count(b"\x1b[?25l") == said.count(b"\x1b[?25h") == 1  # the cursor is back
    kept = re.split(rb"(?:\x1b\[2K\x1b\[1A)+\x1b\[2K", bytes(said))[-1]
    return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", kept).decode().replace("\r", "").splitlines()


def test_the_environment_asks_for_it_on_a_terminal_and_prints_stay_whole():
    code = """
for number, _ in enumerate(dataset.shuffle().iter_batches(400)):
    time.sleep(0.1)
    print(f"batch {number} is done")
"""
    with terminal(code, TORCHSHM_PROGRESS="1") as (process, said):
        pass
    assert process.returncode == 0
    for number in range(10):
        assert f"batch {number} is done\r\n".encode() in said
    lines = last_screen(said)
    assert [line.split()[0] for line in lines[:2]] == ["from_arrays", "shuffle"]
    assert all("100 %" in line and "4,000 rows" in line for line in lines[:2])


def test_ctrl_c_leaves_a_whole_terminal_and_no_process():
    code = """
for batch in dataset.options(progress=True).repeat().iter_batches(400):
    time.sleep(0.05)
"""
    with terminal(code) as (process, said):
        wait_for(said, b"rows/s")
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == -signal.SIGINT
    assert not psutil.wait_procs(everybody, timeout=PATIENCE)[1]
    assert last_screen(said)[-1].startswith("KeyboardInterrupt")


def test_an_iterator_that_is_never_closed_gives_the_cursor_back_at_the_end():
    code = """
batches = dataset.options(progress=True).iter_batches(400)
next(batches)
time.sleep(0.5)
"""
    with terminal(code) as (process, said):
        pass
    assert process.returncode == 0 and last_screen(said)


def test_processes_that_are_forked_meanwhile_print_plainly():
    code = """
def look(batch):
    print("from a worker", flush=True)
    return {"plain": np.array([not hasattr(sys.stdout, "rich_proxied_file")])}

for _ in dataset.options(progress=True).iter_batches(4000):
    assert hasattr(sys.stdout, "rich_proxied_file")
    assert all(row["plain"] for row in dataset.map_batches(look).iter_rows())
print("all of them")
"""
    with terminal(code) as (process, said):
        pass
    assert process.returncode == 0 and b"from a worker\r\n" in said and b"all of them\r\n" in said


# ---- what it says


def stage(rows=0, rows_in=0, tasks=0, total=None):
    return {"rows": rows, "rows_in": rows_in, "tasks": tasks, "total": total}


def test_a_share_is_given_where_it_is_known():
    source = ArraySource({"i": np.arange(10)})
    read = _plan.Stage("read", [], source=source)
    function = _plan.Step("filter", len)

    def of(stages, *progress):
        return shares(stages, {"stages": progress})

    assert of([read], stage(5, tasks=1, total=4)) == [0.25]
    assert of([read], stage(5)) == [None]  # without end
    assert of([read], stage(5, tasks=0, total=1)) == [None]
    assert of([read], stage(0, tasks=0, total=0)) == [1.0]
    after = _plan.Stage("shuffle", [0])
    assert of([read, after], stage(5, tasks=1, total=4), stage(2)) == [0.25, None]
    assert of([read, after], stage(20, tasks=4, total=4), stage(5)) == [1.0, 0.25]
    # A filter lets through who knows how many; what has gone in is known, if it goes in once.
    filtered = _plan.Stage("repartition", [0], [function])
    assert of([read, filtered], stage(20, tasks=4, total=4), stage(5, 10)) == [1.0, 0.5]
    filtered = _plan.Stage("shuffle", [0], [function])
    assert of([read, filtered], stage(20, tasks=4, total=4), stage(5, 10)) == [1.0, None]
    # What is repeated is as far as its source, and zipped rows are those of one side.
    repeat, after = _plan.Stage("repeat", [0], times=2), _plan.Stage("repartition", [1])
    assert of([read, repeat, after], stage(20, tasks=2, total=2), stage(), stage(15)) == [1.0, 1.0, 0.75]
    both = [read, read, _plan.Stage("zip", [0, 1])]
    assert of(both, stage(20, tasks=2, total=2), stage(20, tasks=2, total=2), stage(20)) == [1.0, 1.0, 1.0]


def test_rates_are_those_of_the_time_in_which_rows_came():
    rates = Rates()

    def at(seconds, *rows):
        return rates.update({"seconds": seconds, "stages": [{"rows": each} for each in rows]})

    assert at(1.0, 0, 0) == [0.0, 0.0]
    assert at(2.0, 100, 0) == [100.0, 0.0]
    assert at(3.0, 300, 0) == [150.0, 0.0]
    assert at(5.0, 300, 100) == [150.0, 50.0]
