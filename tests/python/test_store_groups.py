"""A store for a group: members who are other users have all of it, and nobody else has any."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from peer import Peer
from scripts import PATIENCE

import torchshm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a second user")

GROUP, STRANGER = 54321, 65534

# The interpreter may lie where only root can read: privileges are dropped after the imports, and the process made its own user's again.
BECOME = """
import ctypes, os, signal, sys
import numpy as np
import torch
import torchshm
os.setgroups({groups})
os.setgid({user})
os.setuid({user})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
"""

USE = """
with torchshm.connect("friends") as store:
    seen = store.load("from root")
    store["from the other"] = np.arange(100_000)
    mine = store.load("from the other")
    print(int(seen.sum()), flush=True)
    if sys.argv[1:] == ["wait"]:
        signal.pause()
"""


def other(script, *arguments, groups, user=STRANGER):
    """A process of another user."""
    text = BECOME.format(groups=groups, user=user) + script
    return subprocess.Popen(
        [sys.executable, "-c", text, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


# What runs in the process that serves: one of its own, since a process can have so many pools.
serving = {}


def serve(name, group=None):
    serving[name] = torchshm.start(name, mode=0o600 if group is None else 0o660, group=group)


def save(name, key, value):
    serving[name][key] = value


def total(name, key):
    return int(serving[name][key].sum())


def remove(name, key):
    serving[name].remove(key)


def figures(name):
    info = serving[name].info()
    return info["leases"], info["blocks"]


def end(name, runtime):
    os.environ["XDG_RUNTIME_DIR"] = runtime
    serving.pop(name).close()


@pytest.fixture
def server(monkeypatch):
    """It serves a store for a group, in a directory that others may pass through."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        with Peer("spawn") as peer:
            peer.call(serve, "friends", GROUP)
            peer.call(save, "friends", "from root", np.ones(1000))
            yield peer


def test_a_member_has_what_others_save_and_they_have_its(server):
    """Both ways, from another user; several stores for different groups lie in one directory."""
    server.call(serve, "private")
    server.call(serve, "others", GROUP + 1)
    out, err = other(USE, groups=[GROUP]).communicate(timeout=PATIENCE)
    assert (out, err) == ("1000\n", "")
    assert server.call(total, "friends", "from the other") == 4999950000


def test_what_a_killed_member_held_comes_back(server):
    """The other user's death is seen, without a look into its /proc files."""
    before = server.call(figures, "friends")
    child = other(USE, "wait", groups=[GROUP])
    assert child.stdout.readline() == "1000\n", child.stderr.read()
    child.send_signal(signal.SIGKILL)
    child.wait(PATIENCE)
    server.call(remove, "friends", "from the other")
    patience = time.monotonic() + PATIENCE
    while server.call(figures, "friends") != before and time.monotonic() < patience:
        time.sleep(0.01)
    assert server.call(figures, "friends") == before


def test_what_root_serves_is_found_from_another_users_directory(monkeypatch):
    """Root's own directory is looked at after the user's."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    name = f"of-root-{os.getpid()}"
    with Peer("spawn") as peer:
        peer.call(serve, name, GROUP)
        peer.call(save, name, "x", np.ones(3))
        script = f"print(int(torchshm.connect({name!r}).load('x').sum()))"
        for runtime in ("", "/nowhere"):
            monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
            assert other(script, groups=[GROUP]).communicate(timeout=PATIENCE) == ("3\n", "")
        assert Path(f"/run/torchshm/{name}.sock").exists()
        peer.call(end, name, "/nowhere")
        assert not Path(f"/run/torchshm/{name}.sock").exists()  # whatever its environment says by now


def test_nobody_else_has_any_of_it(server):
    """Not a member: refused with what is wrong."""
    child = other(USE, groups=[])
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1
    assert "Permission denied" in err.splitlines()[-1]


@pytest.mark.parametrize(("mode", "believed"), [(0o711, True), (0o1777, False)])
def test_another_users_service_is_believed_only_where_nobody_else_could_be_it(monkeypatch, mode, believed):
    """Who may make files in the folder could be anybody, as in /tmp."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        os.chown(folder, STRANGER, -1)
        os.chmod(folder, mode)
        theirs = other(
            f"with torchshm.start('theirs', mode=0o660, group={GROUP}):\n    print('serving', flush=True)\n    signal.pause()",
            groups=[GROUP],
        )
        try:
            assert theirs.stdout.readline() == "serving\n", theirs.stderr.read()
            child = other("torchshm.connect('theirs')", groups=[GROUP], user=STRANGER - 1)
            _, err = child.communicate(timeout=PATIENCE)
            assert child.returncode == (0 if believed else 1), err
            assert believed or "served by another user" in err
        finally:
            theirs.kill()
            theirs.communicate()
