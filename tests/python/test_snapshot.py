"""A snapshot of a store at work: whole values, a whole file or none, and all that a store can hold."""

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from disks import small_disk
from peer import Peer, keep, kept_value
from scripts import PATIENCE

import torchshm
from torchshm import _snapshot
from torchshm._exchange import _place

pytestmark = pytest.mark.apart


def in_file(path, function, *arguments):
    """What a function of what is in that file returns."""
    with torchshm.open(path) as file:
        return function(file, *arguments)


def when_served(path, function, *arguments):
    """The same by a service, in a process of its own."""
    with Peer("spawn") as peer:
        return peer.call(_when_served, str(path), function, *arguments)


def _when_served(path, function, *arguments):
    with torchshm.start(f"snapshot-{os.getpid()}", file=path) as store:
        return function(store, *arguments)


def keys_and_figures(store):
    return {key: store.info(key) for key in store}


def made():
    """Values of all kinds, here or there: pickling changes byte orders."""
    x = np.arange(100_000.0)
    return {
        "array": x,
        "big endian": x[:10].astype(">f8"),
        "strided": x.reshape(100, 1000)[::-3, ::2],
        "empty": np.empty((0, 3)),
        "none": np.float32(3),
        "tree": {"a": [x[:7], {"b": "text"}], "c": (None, 1 << 70)},
        "bytes": b"0123" * 9999,
        "tensor": torch.arange(12).reshape(3, 4).T,
        "half": torch.ones(5, dtype=torch.bfloat16),
        "sparse": torch.eye(3).to_sparse(),
        "ü" * 300: x[:3],
        "/a/../b": "text " * 100,
    }


def same(store):
    values = made()
    assert sorted(store) == sorted([*values, "set"])
    for key, value in values.items():
        got = store[key]
        assert type(got) is type(value), key
        if isinstance(value, torch.Tensor):
            assert got.dtype == value.dtype and got.to_dense().equal(value.to_dense()), key
        elif isinstance(value, (np.ndarray, np.generic)):
            assert (
                got.dtype == value.dtype and got.shape == value.shape and got.tobytes() == value.tobytes()
            ), key
        elif key == "tree":
            assert (
                (got["a"][0] == value["a"][0]).all()
                and got["a"][1] == {"b": "text"}
                and got["c"] == value["c"]
            )
        else:
            assert got == value, key
    assert store.load("set", allow_pickle=True) == {1, 2, 3}
    return True


def test_all_that_a_store_holds_is_in_it(store, tmp_path):
    for key, value in made().items():
        store[key] = value
    store["set"] = {1, 2, 3}
    assert sorted(store.snapshot(tmp_path / "s")) == sorted(store)
    assert [each.name for each in tmp_path.iterdir()] == ["s"]
    assert in_file(tmp_path / "s", same)
    assert when_served(tmp_path / "s", same)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o666 & ~_place._umask()
    assert same(store)  # as before


def test_nothing_is_unpickled(store, tmp_path):
    store["trap"] = Trap()
    store.snapshot(tmp_path / "s")
    assert in_file(tmp_path / "s", kind_of, "trap") == "object"
    with pytest.raises(RuntimeError, match="sprung"):
        store.load("trap", allow_pickle=True)


class Trap:
    def __reduce__(self):
        return spring, ()


def spring():
    raise RuntimeError("sprung")


def kind_of(store, key):
    return store.info(key)["kind"]


def test_a_module_comes_back(store, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    store.save_module("net", net)
    store.snapshot(tmp_path / "s")
    got = when_served(tmp_path / "s", parameters_of, "net")
    assert [x.tobytes() for x in got] == [x.numpy().tobytes() for x in net.state_dict().values()]


def parameters_of(store, key):
    return [x.numpy().copy() for x in store.load_module(key, allow_pickle=True).state_dict().values()]


def test_what_names_share_is_copied_once(store, tmp_path):
    whole = torch.arange(1 << 20)
    store["whole"] = whole
    lying = store["whole"]
    for i in range(100):
        store[f"part{i:02}"] = lying[i * 1000 : (i + 1) * 1000]
    before = store.info()["live_bytes"]
    assert before < 10 << 20
    store.snapshot(tmp_path / "s")
    assert (tmp_path / "s").stat().st_blocks * 512 < before + (24 << 20)
    assert in_file(tmp_path / "s", part, "part42") == (42_000, 42_999)


def part(store, key):
    x = store[key]
    return int(x[0]), int(x[-1])


def test_what_is_left_of_a_lifetime_is_kept(store, tmp_path):
    store.save("short", np.ones(3), ttl=3600)
    store["long"] = np.ones(3)
    store.snapshot(tmp_path / "s")
    figures = in_file(tmp_path / "s", keys_and_figures)
    assert 3000 < figures["short"]["expires_in"] <= 3600 and figures["long"]["expires_in"] is None


def test_a_value_has_its_own_lifetime_and_policy_in_it(store, tmp_path):
    store.save("x", np.zeros(3), ttl=3600, policy="drop")
    core = store._core

    class Late:
        """Somebody else saves between two looks."""

        def __init__(self):
            self.saved = False

        def __getattr__(self, name):
            return getattr(core, name)

        def load(self, key, mode):
            if not self.saved:
                self.saved = True
                store.save("x", np.ones(3), policy="pin", overwrite=True)
            return core.load(key, mode)

    target = _snapshot._C.Store.start(f"target-{os.getpid()}", 1 << 24, file=str(tmp_path / "s"))
    assert _snapshot._copy(Late(), target, lambda **what: None) == (["x"], {})
    found = target.find("x")
    assert (found["expires_in"], found["policy"]) == (None, 3)
    assert target.load("x", 0).sum() == 3
    target.stop()


def test_it_can_be_a_store_as_large_as_the_one_it_is_of(tmp_path):
    with Peer("spawn") as peer:
        name = f"settings-{os.getpid()}"
        peer.call(serve_with_settings, name, str(tmp_path / "source"))
        torchshm.connect(name).snapshot(tmp_path / "s")
    assert in_file(tmp_path / "s", settings) == (256 << 20, pytest.approx(1000.0), "drop", 2.5)
    figures = in_file(tmp_path / "s", keys_and_figures)
    assert figures["passing"]["expires_in"] > 1000 and figures["staying"]["expires_in"] is None
    assert (tmp_path / "s").stat().st_blocks * 512 < 16 << 20
    assert when_served(tmp_path / "s", filled) == 25


def serve_with_settings(name, path):
    with torchshm.start(name, limit="256MiB", policy="drop", timeout=2.5, file=path) as store:
        store["staying"] = 1
    keep("served", torchshm.start(name, ttl=1000.0, policy="drop", timeout=2.5, file=path))
    kept_value("served").save("passing", 1, ttl=3600)


def settings(file):
    figures = file.info()
    return tuple(figures[each] for each in ("limit_bytes", "ttl", "policy", "patience"))


def filled(store):
    for i in range(25):
        store.save(f"k{i}", np.full(1 << 20, i), policy="pin")
    return len(store.keys("k"))


# ---- while others write


def overwrite_until_told(name, number):
    store = torchshm.connect(name)
    stop, i = False, number
    while not stop:
        for key in ("array", "tensor", "tree"):
            x = np.full(50_000, i)
            value = {
                "array": x,
                "tensor": torch.from_numpy(x),
                "tree": {"x": x, "y": [x[:100] + 0, {"z": i}]},
            }[key]
            store.save(key, value, overwrite=True)
        if i % 5 == number:
            store.save(f"comes{number}", np.full(1000, i), overwrite=True)
            store.remove(f"comes{number}")
        i += 2
        stop = "stop" in store
    return i


def whole_values(store):
    x, tensor, tree = store["array"], store["tensor"], store["tree"]
    assert (x == x[0]).all() and len(x) == 50_000
    assert (tensor == tensor[0]).all() and len(tensor) == 50_000
    z = tree["y"][1]["z"]
    assert (tree["x"] == z).all() and (tree["y"][0] == z).all()
    for key in store.keys("comes"):
        assert (store[key] == store[key][0]).all()
    return int(x[0])


def test_every_value_in_it_was_saved_whole(store, tmp_path):
    with Peer("spawn") as one, Peer("spawn") as other:
        one.ask(overwrite_until_told, store.name, 0)
        other.ask(overwrite_until_told, store.name, 1)
        for key in ("array", "tensor", "tree"):
            store.load(key, timeout=PATIENCE)
        for i in range(4):
            store.snapshot(tmp_path / f"{i}")
        store["stop"] = True
        assert one.answer() > 4 and other.answer() > 4
    first, *_, last = [in_file(tmp_path / f"{i}", whole_values) for i in range(4)]
    assert first != last


def test_what_has_grown_since_it_was_measured_fits(store, tmp_path):
    store["a"], store["b"] = np.zeros(10), np.ones(8 << 20)  # 64 MiB
    assert _snapshot._size(store) > 64 << 20
    assert _snapshot.snapshot(store, tmp_path / "s", limit=40 << 20) == ["a", "b"]
    assert in_file(tmp_path / "s", keys_and_figures)["b"]["bytes"] >= 64 << 20


# ---- whole or not at all

WRITER = """
import sys
import torchshm
from torchshm import _snapshot

store = torchshm.connect(sys.argv[1])

def tell(*what):
    print("begun", flush=True)
    sys.stdin.read()

_snapshot.snapshot(store, sys.argv[2], overwrite=True, tell=tell)
"""


@pytest.mark.parametrize("who", ["asker", "writer"])
@pytest.mark.parametrize("there", [False, True])
def test_a_kill_in_the_middle_leaves_what_was_there(store, tmp_path, who, there):
    path = tmp_path / "s"
    for i in range(3):
        store[f"k{i}"] = np.full(1 << 16, i)
    if there:
        path.write_text("before")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, store.name, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "begun\n"
        (writer,) = psutil.Process(process.pid).children()
        (process if who == "asker" else writer).kill()
        _, errors = process.communicate(timeout=PATIENCE)
        writer.wait(PATIENCE)
    finally:
        process.kill()
        process.communicate()
    if who == "writer":
        assert "TorchshmError" in errors and "the process that writes a snapshot" in errors
    assert path.exists() == there and (not there or path.read_text() == "before")
    assert store.snapshot(path, overwrite=True) == ["k0", "k1", "k2"]
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


def test_what_is_wrong_is_said_and_leaves_nothing(store, tmp_path):
    store["x"] = np.ones(3)
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        store.snapshot(tmp_path / "there")
    with pytest.raises(FileNotFoundError):
        store.snapshot(tmp_path / "no folder" / "s")
    assert [each.name for each in tmp_path.iterdir()] == ["there"]
    with Peer("spawn") as peer:
        name = f"gone-{os.getpid()}"
        peer.call(serve, name)
        client = torchshm.connect(name)
        client["x"] = 1
        peer.kill()
        with pytest.raises(torchshm.StoreUnavailableError, match=name):
            client.snapshot(tmp_path / "s")
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


def serve(name):
    keep("served", torchshm.start(name, limit="64MiB"))


@pytest.fixture
def small(tmp_path):
    """A file system of 32 MiB."""
    with small_disk(tmp_path / "disk", 32) as disk:
        yield disk


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_a_full_disk_is_an_error_and_leaves_nothing(store, small, policy):
    for i in range(8):
        store.save(f"k{i}", np.ones(1 << 20), policy=policy)
    with pytest.raises(torchshm.PoolFullError, match=r"no room for a snapshot of .* and the file system has"):
        store.snapshot(small / "s")
    assert list(small.iterdir()) == []
    for i in range(6):
        del store[f"k{i}"]
    assert store.snapshot(small / "s") == ["k6", "k7"]


LIMITED = """
import resource
import sys
import torchshm

store = torchshm.start(sys.argv[1], limit="64GiB")
store["x"] = [1, 2, 3]
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
assert store.snapshot(sys.argv[2]) == ["x"]
assert torchshm.open(sys.argv[2])["x"] == [1, 2, 3]
"""


def test_where_files_must_not_be_long_what_fits_is_written(tmp_path):
    name = f"limited-{os.getpid()}"
    done = subprocess.run([sys.executable, "-c", LIMITED, name, str(tmp_path / "s")], timeout=PATIENCE)
    assert done.returncode == 0


READER = """
import os
import sys
import numpy as np
import torch
import torchshm

# From here on: the interpreter itself may lie where nobody else can read.
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with torchshm.open(sys.argv[1]) as file:
    assert sorted(file) == ["t", "x"] and (file["x"] == np.arange(100_000)).all()
    assert file["t"]["y"][1] == "text" and int(file["t"]["z"].sum()) == 10
    try:
        file["x"][0] = 1
    except ValueError:
        print("read")
"""


def test_another_user_reads_it(store, tmp_path):
    store["x"], store["t"] = np.arange(100_000), {"y": [1, "text"], "z": torch.ones(10)}
    with tempfile.TemporaryDirectory(prefix="torchshm-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        store.snapshot(f"{folder}/s")
        os.chmod(f"{folder}/s", 0o444)
        if os.geteuid() != 0:
            pytest.skip("only root can be another user")
        done = subprocess.run(
            [sys.executable, "-c", READER, f"{folder}/s"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "XDG_RUNTIME_DIR": "/nowhere", "HOME": "/"},
        )
        assert done.stdout == "read\n", done.stderr
        assert [each.name for each in Path(folder).iterdir()] == ["s"]


def test_it_is_exported_from(store, tmp_path):
    store["x"], store["y"] = np.arange(10), np.ones(3)
    store.snapshot(tmp_path / "s")
    with torchshm.open(tmp_path / "s") as file:
        assert file.export_to(tmp_path / "x.npz") == ["x", "y"]
        with pytest.raises(KeyError):
            file.export_to(tmp_path / "z.npz", "z")
    with np.load(tmp_path / "x.npz") as got:
        assert (got["x"] == np.arange(10)).all() and (got["y"] == 1).all()


def test_the_shell_writes_one(store, tmp_path):
    store["x"] = np.ones(3)
    path = tmp_path / "s"

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "torchshm", "snapshot", store.name, str(path), *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    assert json.loads(command("--json").stdout) == {"name": store.name, "path": str(path), "keys": ["x"]}
    done = command()
    assert done.returncode == 1 and "overwrite=True" in done.stderr
    assert "Wrote 1 name" in command("--overwrite").stdout
    assert in_file(path, keys_and_figures)["x"]["kind"] == "array"
