"""`torchshm top` in a real terminal, and what it looks with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from scripts import PATIENCE

from torchshm import _C, _pools
from torchshm._figures import Sample, StoreSample, Watcher, hit_rate, rates

pytestmark = pytest.mark.apart
pytest.importorskip("typer")
pytest.importorskip("rich")


def until(holds):
    """Ask until the answer is yes; a hang is the watchdog's."""
    deadline = time.monotonic() + PATIENCE / 2
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answer


def command(*arguments):
    return [sys.executable, "-m", "torchshm", *arguments]


@pytest.fixture
def serve(runtime):
    """Starts services of a process each."""
    started = []

    def start(name):
        done = subprocess.run(
            command("serve", name, "--limit", "64MiB", "--json"), capture_output=True, text=True, check=True
        )
        started.append(json.loads(done.stdout)["pid"])
        return started[-1]

    yield start
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def looking():
    """Processes that look at stores."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "torchshm._figures" in (process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def members(pool_id):
    return [files.pid for files in _pools.every_pool() if files.pool_id == pool_id]


# ---- in a terminal


class Screen:
    """A terminal of tmux with a shell in it."""

    def __init__(self):
        self.name = f"torchshm-{uuid.uuid4().hex[:8]}"
        # What readline or a test before has put there would go before the terminal's own size.
        shell = ("env", "-u", "COLUMNS", "-u", "LINES", "PS1=ready> ", "sh")
        self.tmux("-f", os.devnull, "new-session", "-d", "-x", "110", "-y", "60", *shell)
        self.shows("ready>")  # what is typed before stands in other places

    def tmux(self, *arguments):
        done = subprocess.run(
            ["tmux", "-L", self.name, *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return done.stdout

    def type(self, line):
        self.tmux("send-keys", "-l", line)
        self.tmux("send-keys", "Enter")

    def shows(self, *texts):
        """Wait until all of the texts are there."""
        last = ""
        deadline = time.monotonic() + PATIENCE / 2
        while time.monotonic() < deadline:
            last = self.tmux("capture-pane", "-p")
            if all(text in last for text in texts):
                return last
            time.sleep(0.05)
        raise AssertionError(f"no {texts} in\n{last}")


@pytest.fixture
def screen(runtime):
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    terminal = Screen()
    yield terminal
    terminal.tmux("kill-server")


@pytest.mark.parametrize("end", ["q", "C-c"])
def test_stores_come_and_go_on_the_screen_until_it_is_ended(screen, serve, end):
    name = f"screen-{end.lower()}"
    modes = "stty -a | grep -oE -e '-?(icanon|echo) ' | tr -d '\\n'; echo"
    screen.type(modes)
    screen.shows("\nicanon echo")
    screen.type(f"clear; {' '.join(command('top', name, '--interval', '0.1'))}; echo ended $?; {modes}")
    screen.shows(f"store {name}", "nobody serves it")
    pid = serve(name)
    screen.shows(f"store {name}", f"served by {pid}", "names: 0", "limit 64.0 MiB", "0 saves/s")
    script = f"""
import numpy as np, sys, torchshm
store = torchshm.connect({name!r})
store["a"] = np.ones(32 << 20, "u1")
store["b"] = 1
held = store["a"]
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        client.stdout.readline()
        shown = screen.shows("names: 2", "32.0 MiB  50%", str(client.pid))
        (line,) = [line for line in shown.splitlines() if line.startswith("│ live")]
        assert line.count("█") == line.count("░") == 16
        (line,) = [line for line in shown.splitlines() if str(client.pid) in line]
        assert "32.0 MiB" in line and line.split()[-2] == "1"
        os.kill(pid, signal.SIGKILL)
        screen.shows("nobody serves it", "names: 2")  # the client still has it
        client.stdin.close()
    until(lambda: "names" not in screen.shows("nobody serves it"))
    screen.tmux("send-keys", end)
    assert "store" not in screen.shows("ended 0", "\nicanon echo")
    until(lambda: not looking())


def test_all_pools_of_the_user_are_shown(screen, serve):
    pid = serve("all-of-them")
    script = "import sys, torchshm\ntorchshm.register()\nx = torchshm.empty(1 << 20)\nprint(flush=True)\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        client.stdout.readline()
        screen.tmux("resize-window", "-x", "110", "-y", "400")
        screen.type(f"{' '.join(command('top'))}")
        screen.shows("store all-of-them", f"served by {pid}", "pool ", str(client.pid))
        client.stdin.close()


PLAN = """
import sys
import numpy as np
from torchshm.data import blocks

plan = blocks.from_arrays({"i": np.arange(4000), "x": np.zeros((4000, 16))}).filter(lambda batch: batch["i"] % 2 == 0)
plan = plan.shuffle().options(memory="64MiB", block_size="50KiB", num_workers=2)
taken = iter(plan.iter_batches(100))
next(taken)
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def plan(runtime):
    """The store of a program whose loop over a plan stands still after the first batch."""
    with subprocess.Popen(
        [sys.executable, "-c", PLAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        program.stdout.readline()
        (name,) = (each for each in _C.store_names() if each.startswith(f"blocks-{program.pid}-"))
        yield name
        program.stdin.close()


def test_plans_of_blocks_are_shown_stage_by_stage(screen, plan):
    screen.type(f"clear; {' '.join(command('top', plan, '--interval', '0.1'))}")
    shown = screen.shows(f"store {plan}", "execution r0", "retries", " 2,000 ").splitlines()
    (read,) = (line for line in shown if "from_arrays -> filter(<lambda>)" in line)
    tasks, rows, _, unit, _, retries, _ = read.split("filter(<lambda>)")[1].split()
    assert int(tasks) > 5 and rows == "2,000" and unit == "KiB" and retries == "0"
    assert any(line.split()[1] == "shuffle" for line in shown)


# ---- once, and as JSON


def test_looking_at_a_plan_is_no_use_of_its_store(plan):
    with Watcher(plan) as watcher:

        def look():
            (store,) = watcher.sample().stores
            return store

        until(lambda: look().figures["executions"]["r0"]["stages"][0]["rows"] == 2000)
        assert look().number("loads") == look().number("loads")


def test_a_look_is_a_line_of_json_with_rates_from_the_second_on(store):
    with subprocess.Popen(
        command("top", "session", "--json", "--interval", "0.1"), stdout=subprocess.PIPE, text=True
    ) as top:
        first = json.loads(top.stdout.readline())["stores"][0]
        assert first["name"] == "session" and first["rates"] == {} and first["hit_rate"] is None
        saved = 0.0
        store["a"] = 1
        while saved == 0:  # the watchdog ends it
            row = json.loads(top.stdout.readline())["stores"][0]
            saved = row["rates"]["saved"]
        assert row["names"] == 1 and row["service_pid"] == os.getpid()
        assert [process["pid"] for process in row["processes"]].count(os.getpid()) == 1
        assert top.pid not in [process["pid"] for process in row["processes"]]
        top.send_signal(signal.SIGTERM)
        top.stdout.read()
    assert top.returncode == 0
    until(lambda: not looking())


def test_once_prints_and_ends(serve):
    serve("once")
    done = subprocess.run(command("top", "once", "--once"), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "store once" in done.stdout and "spilled" in done.stdout, done
    done = subprocess.run(
        command("top", "nothing", "--once"), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("torchshm: no store named nothing: ") and "serve" in done.stderr


def test_without_a_terminal_each_look_is_printed(serve):
    serve("plain")
    with subprocess.Popen(
        command("top", "plain", "--interval", "0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as top:
        looks = 0
        while looks < 3:  # the watchdog ends it
            looks += "store plain" in top.stdout.readline()
        top.send_signal(signal.SIGINT)
        _, said = top.communicate(timeout=PATIENCE)
    assert top.returncode == 0 and said == ""
    line = f"{' '.join(command('top', 'plain', '--interval', '0.1'))} | head -n 30; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=PATIENCE)
    assert len(done.stdout.splitlines()) == 30 and done.stderr == "" and done.returncode == 0, done
    assert done.stdout.count("store plain") > 1 and "\x1b" not in done.stdout


def test_a_small_terminal_shows_the_beginning_of_each_line(screen, serve):
    pid = serve("narrow")
    screen.tmux("resize-window", "-x", "40", "-y", "8")
    screen.type(f"clear; {' '.join(command('top', 'narrow', '--interval', '0.1'))}")
    lines = screen.shows(f"served by {pid}", "saves/s").splitlines()
    assert [line[2:6] for line in lines[1:7]] == ["serv", "live", "warm", "in m", "spil", "0 lo"]
    assert "░" in lines[2] and lines[2].endswith(" 0 B   0% │")


def test_a_reader_that_has_enough_ends_it(serve):
    serve("pipe")
    line = f"{' '.join(command('top', 'pipe', '--json', '--interval', '0.1'))} | head -n 2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=PATIENCE)
    assert len(done.stdout.splitlines()) == 2 and done.stderr == "" and done.returncode == 0, done


def test_with_nothing_to_see_it_says_so():
    from rich.console import Console

    from torchshm import _top

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(_top.draw(Sample(0.0), None))
    assert "No store and no pool" in console.export_text()


# ---- what it looks with


def test_watching_keeps_nothing_alive_and_finds_what_comes_back(serve):
    pid = serve("watched")
    with Watcher("watched") as watcher:
        (store,) = watcher.sample().stores
        assert store.service_pid == pid and [row["pid"] for row in store.figures["processes"]] == [pid]
        assert store.figures["leases"] == 1
        pool = store.figures["pool_id"]
        assert pool not in [files.pool_id for files in _pools.pools_of(Path("/proc/self").resolve())]
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=PATIENCE)
        until(lambda: watcher.sample().stores[0].figures is None and not members(pool))
        again = serve("watched")
        (store,) = watcher.sample().stores
        assert store.service_pid == again and store.figures["pool_id"] != pool
    assert not looking()


def test_what_clients_still_have_is_watched_when_the_service_has_died(serve):
    first = serve("twice")
    script = 'import sys, torchshm\nx = torchshm.connect("twice")\nx["a"] = 1\nprint(flush=True)\nsys.stdin.read()\n'
    with (
        Watcher("twice") as watcher,
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client,
    ):
        client.stdout.readline()
        (one,) = watcher.sample().stores
        os.kill(first, signal.SIGKILL)
        until(lambda: watcher.sample().stores[0].service_pid is None)
        (kept,) = watcher.sample().stores
        assert kept.number("names") == 1 and kept.figures["pool_id"] == one.figures["pool_id"]
        client.stdin.close()
        client.wait()
        until(lambda: watcher.sample().stores[0].figures is None and not members(one.figures["pool_id"]))


def test_rates_are_differences_by_second():
    def look(at, **figures):
        return StoreSample("x", at, 1, {"pool_id": 7, **figures})

    before, now = look(10.0, saved=5, loads=100, restores=10), look(12.0, saved=9, loads=300, restores=60)
    assert rates(before, now) == {"saved": 2.0, "loads": 100.0, "restores": 25.0}
    assert hit_rate(rates(before, now)) == 0.75
    assert rates(None, now) == {} and hit_rate({}) is None
    assert rates(look(10.0, saved=50), look(12.0, saved=9)) == {"saved": 0}
    assert rates(before, StoreSample("x", 12.0, 1, {"pool_id": 8, "saved": 9})) == {}
    assert rates(StoreSample("x", 10.0), now) == {}
