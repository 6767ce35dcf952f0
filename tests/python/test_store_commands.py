"""serve, stop, ls, info and rm as a shell sees them."""

import contextlib
import grp
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from scripts import PATIENCE

import torchshm


def command(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def asked(*arguments):
    return json.loads(command(*arguments, "--json"))


def wait_for_end(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(PATIENCE)


@pytest.fixture
def served(runtime):
    told = asked("serve", "--name", "shell", "--limit", "256MiB")
    yield told["pid"]
    subprocess.run([sys.executable, "-m", "torchshm", "stop", "shell"], capture_output=True, timeout=PATIENCE)


def test_a_service_lives_on_its_own_is_looked_at_and_stopped(served, runtime):
    assert psutil.Process(served).ppid() != os.getpid() and os.getsid(served) != os.getsid(0)
    store = torchshm.connect("shell")
    store["a"], store["b"] = np.ones(100_000), {"x": 1}
    assert store.info()["service_pid"] == served and store.info()["limit_bytes"] == 256 << 20
    rows = {row["name"]: row for row in asked("ls")}
    assert rows["shell"]["running"] and rows["shell"]["pid"] == served and rows["shell"]["names"] == 2
    assert [(row["key"], row["kind"]) for row in asked("ls", "shell")] == [("a", "array"), ("b", "values")]
    assert [row["key"] for row in asked("ls", "shell", "--prefix", "b")] == ["b"]
    assert "array" in command("ls", "shell") and "shell" in command("ls")
    assert asked("info", "shell")["names"] == 2 and asked("info", "shell", "a")["bytes"] >= 800_000
    assert "256.0 MiB" in command("info", "shell")
    assert asked("rm", "shell", "a") == {"removed": ["a"], "missing": []}
    assert list(store) == ["b"]
    assert "'a'" in command("rm", "shell", "a", code=1) and "'a'" in command("info", "shell", "a", code=1)
    assert "being served already" in command("serve", "shell", code=1)
    assert "being served already" in command("serve", "shell", "--no-fork", code=1)
    assert asked("stop", "--name", "shell") == {"name": "shell", "pid": served}
    wait_for_end(served)
    assert store["b"] == {"x": 1}  # goes on with nobody serving it
    assert "no store named shell" in command("stop", "shell", code=1)
    assert "serve" in command("info", "shell", code=1)
    assert not list((runtime / "torchshm").glob("shell*"))
    store.close()


def test_a_killed_service_is_taken_over_with_nothing_lost(served):
    store = torchshm.connect("shell")
    store["a"] = np.arange(100_000)
    os.kill(served, signal.SIGKILL)
    wait_for_end(served)
    store["b"] = store["a"]
    assert store["b"].sum() == 4999950000
    with pytest.raises(torchshm.StoreUnavailableError):
        torchshm.connect("shell", timeout=0)
    # Nobody has to be running for expired names to make room.
    store.save("big", np.ones(150 << 20, np.uint8), ttl=0.3)
    time.sleep(0.4)
    store.save("bigger", np.ones(150 << 20, np.uint8), ttl=0.3)
    time.sleep(0.4)
    store.save("biggest", [np.ones(150 << 20, np.uint8)])
    del store["biggest"]
    told = asked("serve", "shell")
    assert told["took_over"] and told["pid"] != served
    assert [row["key"] for row in asked("ls", "shell")] == ["a", "b"]
    store.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_in_the_foreground_ends_cleanly(runtime, number):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torchshm",
            "serve",
            "--name",
            "front",
            "--no-fork",
            "--json",
            "--ttl",
            "0.2s",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert json.loads(process.stdout.readline())["pid"] == process.pid
    # Not in this process: what it has joined it never leaves.
    script = (
        "import torchshm, time\n"
        "store = torchshm.connect('front')\n"
        "store['a'] = 1\n"
        "while 'a' in store: time.sleep(0.01)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "", "")
    assert not list((runtime / "torchshm").glob("front*"))


def test_a_client_waits_for_a_service_that_is_about_to_start(runtime):
    script = "import torchshm; print(len(torchshm.connect('soon', timeout=60)))"
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    asked("serve", "soon")
    try:
        assert client.communicate(timeout=PATIENCE)[0] == "0\n"
    finally:
        command("stop", "soon")


def test_a_store_served_by_a_program_stops_on_request(runtime):
    script = (
        "import sys, torchshm\n"
        "store = torchshm.start('inside')\n"
        "store['a'] = 5\n"
        "print('there', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(store['a'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    command("stop", "inside")
    assert process.communicate("\n", timeout=PATIENCE)[0] == "5\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve",),
        ("stop",),
        ("rm", "x"),
        ("serve", "x", "--limit", "much"),
        ("serve", "x", "--ttl", "soon"),
        ("serve", "x", "--mode", "9"),
        ("serve", "x", "--mode", "7777"),
        ("serve", "x", "--limit", "9999999999999 TB"),
        ("serve", "x", "--ttl", "nan"),
        ("serve", "x", "--ttl", "1e300d"),
        ("serve", "x", "--group", "nosuchgroup"),
        ("serve", "x", "--name", "y"),
    ],
)
def test_wrong_usage(runtime, arguments):
    assert "Usage" in command(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("serve", "x", "--limit", "much"), "--limit"),
        (("serve", "x", "--ttl", "foo"), "--ttl"),
        (("serve", "x", "--timeout", "foo"), "--timeout"),
        (("serve", "x", "--timeout", "-1s"), "--timeout"),
        (("serve", "x", "--mode", "9"), "--mode"),
        (("serve", "x", "--group", "nosuchgroup"), "--group"),
        (("serve", "x", "--spill", ""), "--spill"),
        (("import", "x", "a.npz", "--ttl", "foo"), "--ttl"),
        (("import", "x", "a.npz", "--ttl", "nan"), "--ttl"),
    ],
)
def test_wrong_usage_says_of_which_option(runtime, arguments, option):
    assert f"Invalid value for {option}: " in command(*arguments, code=2)


@pytest.mark.parametrize("way", [(), ("--no-fork",)])
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("x", "--hugepages", "foo"), 2, "hugepages is auto, never or 2MiB, not 'foo'"),
        (("x", "--numa", "spread:0"), 2, "numa"),
        (("x", "--numa", ""), 2, "numa is a policy"),
        (("bad name",), 1, "a store's name has"),
        (("x", "--file", "/etc/passwd"), 1, "/etc/passwd is not the file of a torchshm store"),
        (("x", "--spill", "/etc/passwd/x/y"), 1, "/etc/passwd/x: Not a directory"),
    ],
)
def test_why_nothing_is_served_is_said_once_and_by_the_exit_code(runtime, way, arguments, code, said):
    line = command("serve", *arguments, *way, code=code)
    assert line.startswith(f"torchshm: {said}") and line.count("torchshm: ") == 1, line
    assert len(line.splitlines()) == 1


def test_a_spill_directory_in_memory_is_warned_of(runtime):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "torchshm", "serve", "warned", "--spill", f"{folder}/a/b", "--json"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert json.loads(done.stdout)["name"] == "warned"
        assert done.stderr.startswith("torchshm: the spill directory") and "tmpfs" in done.stderr
        command("stop", "warned")


def test_the_file_of_a_store_is_looked_at_by_its_path(runtime, tmp_path, monkeypatch):
    script = (
        "import sys, numpy as np, torchshm\n"
        "with torchshm.start('filed', '16MiB', file=sys.argv[1]) as store:\n"
        "    store['a'], store['b'] = np.ones(1000), 'text'\n"
    )
    path = tmp_path / "p.store"
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=PATIENCE)
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "./p.store", "p.store"):
        assert [(row["key"], row["kind"]) for row in asked("ls", name)] == [("a", "array"), ("b", "values")]
        assert [row["key"] for row in asked("ls", name, "--prefix", "b")] == ["b"]
        assert "array" in command("ls", name)
        assert asked("info", name)["name"] == "filed" and asked("info", name, "a")["bytes"] >= 8000
        assert "filed" in command("info", name)
        assert f"the store {name} has no name 'c'" in command("info", name, "c", code=1)
    assert "No such file" in command("ls", "./none.store", code=1)
    assert "is not the file of a torchshm store" in command("info", "/etc/passwd", code=1)
    (tmp_path / "plain").write_text("text")
    assert "no store named plain" in command("ls", "plain", code=1)
    asked("serve", "p.store", "--limit", "16MiB")  # a store of that name goes before a file
    try:
        assert asked("ls", "p.store") == [] and len(asked("ls", "./p.store")) == 2
    finally:
        command("stop", "p.store")


def test_a_bad_name_can_t_be_served(runtime):
    assert "letters" in command("serve", "a/b", code=1)


def test_a_group_is_given_by_name_or_number(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # which is the group's from then on
    for group in (grp.getgrgid(os.getgid()).gr_name, str(os.getgid())):
        asked("serve", "ours", "--mode", "0660", "--group", group)
        command("stop", "ours")


def files_of(pid, pattern):
    return next(fd for fd in Path(f"/proc/{pid}/fd").iterdir() if re.search(pattern, os.readlink(fd)))


def test_check_tells_messages_from_what_names_keep(served, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    store = torchshm.connect("shell")
    store["a"], store["b"] = np.ones(100_000), [np.ones(3), np.ones(100_000)]
    script = (
        "import sys, numpy as np, torchshm\n"
        "torchshm.register(store='shell')\n"
        "messages = [torchshm.dumps(np.ones(5000)) for _ in range(5)]\n"
        "print('sent', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdout.readline() == "sent\n"
        (found,) = asked("check", "--store", "shell")["pools"]
        assert found["sound"] and found["messages"] == 5 and found["tickets"] > 5
        lines = command("check", "--store", "shell").splitlines()
    (row,) = [line for line in lines if found["pool"] in line]
    assert row.split("│")[4].strip() == "5"


def test_check_knows_the_catalogue(served, tmp_path):
    store = torchshm.connect("shell")
    store["a"], store["b"] = np.ones(100_000), {"x": [np.ones(3), "y"]}
    for arguments in (("--store", "shell"), ("--pid", str(served)), ("--store", "shell", "--at-rest")):
        (found,) = asked("check", *arguments)["pools"]
        assert found["sound"] and found["catalogue"] == {
            "store": "shell",
            "names": 2,
            "marks": 0,
            "cells": 2,
            "on_disk": 0,
        }
    assert "shell: 2 names" in command("check", "--store", "shell")
    # A copy, in which a slot names another life of its cell.
    copies = []
    for pattern in ("-control ", "-data ", "-shell-catalogue "):
        copies.append(tmp_path / pattern.strip())
        subprocess.run(["cp", "--sparse=always", files_of(served, pattern), copies[-1]], check=True)
    files = ("--files", *map(str, copies[:2]), "--catalogue", str(copies[2]))
    (found,) = asked("check", *files)["pools"]
    assert found["sound"] and found["copy"] and found["catalogue"]["names"] == 2
    with copies[2].open("r+b") as file:
        file.seek(143360)  # the slots
        words = struct.unpack("<16384Q", file.read(16 * 8192))
        slot = next(i for i in range(8192) if words[2 * i] & 3 == 2)
        file.seek(143360 + 16 * slot + 8)
        file.write(struct.pack("<Q", words[2 * slot + 1] + 1))
    said = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", *files, "--json"], capture_output=True, text=True
    )
    assert said.returncode == 1
    (found,) = json.loads(said.stdout)["pools"]
    assert [violation["invariant"] for violation in found["violations"]] == [11, 11]
    assert found["violations"][0]["what"].startswith(f"slot {slot} ")


def test_check_of_what_is_not_there_is_status_2(served, tmp_path):
    assert "no living process has the store" in command("check", "--store", "nobody", code=2)
    command("check", "--store", "shell", "--pid", str(served), code=2)
    command("check", "--catalogue", str(tmp_path), code=2)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ls shel", ["shell"]),
        ("info shell t", ["t2m", "tp"]),
        ("rm shell t2m tp", ["tp"]),
        ("info nobody t", []),
    ],
)
def test_the_shell_completes_stores_and_names(served, line, found):
    torchshm.connect("shell").save("t2m", 1)
    torchshm.connect("shell").save("tp", 2)
    words = ["torchshm", *line.split()]
    done = subprocess.run(
        [Path(sys.executable).with_name("torchshm")],
        env={
            **os.environ,
            "_TORCHSHM_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.split() == found, done.stderr
