"""Unrelated processes, one store: what one saves the others have, whoever dies."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from peer import Peer, keep, kept, kept_value
from scripts import PATIENCE, passes

import torchshm

SESSION = "session"
_known = {}


def there():
    """The session's store in this process, found by its name."""
    if SESSION not in _known:
        _known[SESSION] = torchshm.connect(SESSION)
    return _known[SESSION]


def load(key, **how):
    return np.asarray(there().load(key, **how)).copy()


def save(key, value):
    there()[key] = value


def hold(key, **how):
    value = there().load(key, **how)
    keep(key, value)
    return torchshm.is_shared(value), float(np.asarray(value).sum())


def look(key):
    return float(np.asarray(kept_value(key)).sum())


def poke(key, i, value):
    kept[key][i] = value


def exists(key):
    return key in there()


def pss(key, pool_id):
    """Proportional memory of the mappings that this process has of a pool's data, in bytes."""
    np.asarray(kept_value(key)).sum()
    return sum(m.pss for m in psutil.Process().memory_maps() if f"torchshm-{pool_id:016x}-data" in m.path)


def wait_until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_another_process_loads_the_same_memory(store, client):
    store["a"], store["t"] = np.ones(1_000_000), torch.ones(1_000_000)
    before = store.info()["live_bytes"]
    assert client.call(hold, "a") == client.call(hold, "t") == (True, 1e6)
    assert store.info()["live_bytes"] == before
    store.load("a", mode="r+")[3] = 11
    assert client.call(look, "a") == 1e6 + 10


def test_all_processes_have_one_copy(store, client):
    size = 64 << 20
    store["a"] = np.ones(size, np.uint8)
    held = store["a"]
    assert held.sum() == size
    keep("a", held)
    client.call(hold, "a")
    figures = store.info()
    theirs, mine = client.call(pss, "a", figures["pool_id"]), pss("a", figures["pool_id"])
    kept.clear()
    assert theirs > 0 and mine > 0 and theirs + mine <= figures["committed_bytes"] * 1.02


def test_a_saver_that_is_killed_leaves_what_it_saved(store):
    with Peer("spawn") as peer:
        peer.call(save, "a", np.arange(1000))
        peer.kill()
    assert store["a"].sum() == 499500


def test_private_writes_of_one_process_reach_no_other(store, client):
    store["t"] = torch.zeros(10_000)
    client.call(hold, "t")
    client.call(poke, "t", 0, 5.0)
    assert client.call(look, "t") == 5 and store["t"][0] == 0


def test_a_waiting_load_gets_what_is_saved_later(store, client):
    with pytest.raises(Exception, match="KeyError"):
        client.call(load, "later")
    client.ask(load_later, "later", -1)
    time.sleep(0.1)
    store["later"] = np.ones(5)
    assert client.answer() == 5
    client.ask(load_later, "never", 0.05)
    with pytest.raises(Exception, match="TimeoutError"):
        client.answer()


def load_later(key, timeout):
    return float(there().load(key, timeout=timeout).sum())


WAITING = """
import signal, sys, torchshm
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
{before}
print("waiting", flush=True)
try:
    {waits}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("before", "waits"),
    [
        ("store = torchshm.connect('session')", "store.load('never', timeout=-1)"),
        ("", "torchshm.connect('nobody', timeout=-1)"),
    ],
    ids=["load", "connect"],
)
def test_ctrl_c_ends_the_waiting(store, tmp_path, before, waits):
    script = tmp_path / "wait.py"
    script.write_text(WAITING.format(before=before, waits=waits))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert out == "interrupted\n" and process.returncode == 7


def make_slowly(key, mark):
    def make():
        with open(mark, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return np.full(1000, os.getpid())

    return int(there().get_or_create(key, make)[0])


def test_one_process_creates_and_the_others_wait(store, client, tmp_path):
    mark = tmp_path / "made"
    client.ask(make_slowly, "a", str(mark))
    mine = make_slowly("a", str(mark))
    assert mine == client.answer() and len(mark.read_text().splitlines()) == 1


def stick(key, mark):
    def make():
        open(mark, "w").close()
        time.sleep(1000)

    there().get_or_create(key, make)


def test_a_killed_creator_is_replaced(store, tmp_path):
    mark = tmp_path / "started"
    with Peer("spawn") as peer:
        peer.ask(stick, "a", str(mark))
        wait_until(mark.exists)
        with pytest.raises(TimeoutError, match="'a'"):
            store.get_or_create("a", lambda: 1, timeout=0.05)
        peer.kill()
        assert store.get_or_create("a", lambda: 5) == 5
    assert list(store) == ["a"] and len(store) == 1


def fail_after(key, mark, then):
    def make():
        open(mark, "w").close()
        wait_until(lambda: os.path.exists(then))
        raise OSError("out of luck")

    there().get_or_create(key, make)


def test_a_failing_creator_gets_its_error_and_is_replaced(store, client, tmp_path):
    mark, then = tmp_path / "started", tmp_path / "then"
    client.ask(fail_after, "a", str(mark), str(then))
    wait_until(mark.exists)
    with pytest.raises(TimeoutError):
        store.get_or_create("a", lambda: 1, timeout=0.05)
    then.touch()
    assert store.get_or_create("a", lambda: 5) == 5
    with pytest.raises(Exception, match="out of luck"):
        client.answer()


class Rows(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 8

    def __getitem__(self, i):
        rows = self.store["rows"]
        assert torchshm.is_shared(rows)
        return rows[i], os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_dataset_that_holds_a_store_works_in_workers(store, method):
    store["rows"] = torch.arange(8.0).reshape(8, 1)
    loader = torch.utils.data.DataLoader(Rows(store), 2, num_workers=2, multiprocessing_context=method)
    rows, pids = zip(*loader, strict=True)
    assert torch.equal(torch.cat(rows), torch.arange(8.0).reshape(8, 1))
    assert os.getpid() not in torch.cat(pids).tolist()


def test_a_fork_keeps_what_it_had_and_goes_on_with_the_store(store):
    store["a"] = np.arange(100_000)
    held = store["a"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            del store["a"]
            store["b"] = held
            ok = held.sum() == store["b"].sum() == 4999950000 and not store._core.contains("a")
            os.write(writing, b"1" if ok else b"0")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"1"
    os.close(reading), os.close(writing)
    assert "a" not in store and store["b"].sum() == 4999950000
    # The service is still the parent's.
    with torchshm.connect("session", timeout=0) as other:
        assert other["b"] is not None


def test_a_half_saved_value_is_nowhere(store, tmp_path):
    before = store.info()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, numpy as np, torchshm\n"
            "store = torchshm.connect('session')\n"
            "class Bomb:\n"
            "    def __reduce__(self):\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "store.save('a', [np.ones(1_000_000), Bomb()])\n",
        ],
        timeout=PATIENCE,
    )
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: store.info()["leases"] <= before["leases"])
    assert "a" not in store and store.info()["live_bytes"] == before["live_bytes"]


def test_a_store_of_the_same_name_elsewhere_is_another(store, tmp_path):
    store["a"] = 1
    script = "import torchshm; store = torchshm.start('session'); print(len(store), store._core.took_over)"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert passes(script, tmp_path, XDG_RUNTIME_DIR=str(elsewhere)) == "0 False\n"


def test_a_program_that_ends_with_its_store_open_leaves_no_socket(runtime, tmp_path):
    assert (
        passes(
            "import torchshm; store = torchshm.start('brief'); store['a'] = 1; print(store['a'])", tmp_path
        )
        == "1\n"
    )
    assert not list((runtime / "torchshm").glob("brief*"))
