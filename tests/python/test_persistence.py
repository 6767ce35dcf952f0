"""Persistent stores: what is in the file survives its processes, a full disk is an exception, and what is no file of ours is refused."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from scripts import PATIENCE, passes

import torchshm
from torchshm import _check, _persistence
from torchshm.errors import (
    KeyExistsError,
    PoolFullError,
    StoreUnavailableError,
    TorchshmError,
)

pytestmark = pytest.mark.apart

CHUNK = 2 << 20
# Offsets in the superblock (csrc/store/file_layout.h).
VERSION, READY, STATE, BOOT = 8, 28, 96, 104

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def _runtime(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.store"


def child(work, *arguments):
    """The exit status of a forked process that does it; -9 where it was killed."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def save(path, values, limit="64MiB", how="clean", ttl=None):
    """Make a file, or add to it, by a process that then closes it, or is killed."""

    def work():
        store = torchshm.start("maker", limit, ttl, file=path)
        for key, value in values.items():
            store.save(key, value, overwrite=True)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        store.close()

    assert child(work) == (-9 if how == "killed" else 0)


def holes(path):
    """A copy keeps them."""
    copy = path.with_suffix(".copy")
    subprocess.run(["cp", "--sparse=always", path, copy], check=True)
    return copy


def patch(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def other_boot(path):
    patch(path, BOOT, b"another machine!")


# ---- serving


@pytest.mark.parametrize("how", ["clean", "killed"])
def test_what_was_saved_is_there_for_the_next_service(path, how):
    many = {f"k{i}": np.full(100, i) for i in range(300)}
    save(path, {**many, "dict": {"a": np.arange(50_000), "b": [1, "x"]}, "long" * 200: 5}, how=how)

    def work():
        store = torchshm.start("next", file=path)
        assert store._core.took_over
        assert len(store) == 302
        for key, value in many.items():
            assert np.array_equal(store[key], value)
        assert store["dict"]["b"] == [1, "x"]
        assert np.array_equal(store["dict"]["a"], np.arange(50_000))
        assert store["long" * 200] == 5
        assert store.info()["leases"] == 1
        assert _check.check_file(path, at_rest=True).sound
        for key in store.keys():  # noqa: SIM118
            del store[key]
        assert store.info()["live_bytes"] == 0

    assert child(work) == 0
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_clients_use_it_and_a_living_one_keeps_it_for_the_next_service(path, tmp_path):
    out = passes(
        """
        import os, signal, sys, numpy as np, torchshm
        path = sys.argv[1]
        reading, writing = os.pipe()
        service = os.fork()
        if service == 0:
            store = torchshm.start("files", "64MiB", file=path)
            store["a"] = np.arange(10)
            os.write(writing, b"x")
            signal.pause()
        os.read(reading, 1)
        client = torchshm.connect("files")
        assert client["a"].sum() == 45
        held = client["a"]
        os.kill(service, signal.SIGKILL)
        os.waitpid(service, 0)
        client["b"] = np.ones(1000)          # needs no service
        for name in ("files", "another"):
            if os.fork() == 0:
                try:
                    store = torchshm.start(name, file=path)
                    print(name, sorted(store), store["b"].sum())
                except torchshm.KeyExistsError as error:
                    print(name, "refused" if "living processes" in str(error) else error)
                try:
                    torchshm.open(path)
                except torchshm.StoreUnavailableError as error:
                    print("open", "by its name" in str(error))
                sys.stdout.flush()
                os._exit(0)
            os.wait()
        assert held.sum() == 45
        """,
        tmp_path,
        str(path),
    )
    assert out.splitlines() == ["files ['a', 'b'] 1000.0", "open True", "another refused", "open True"]


def test_two_services_of_one_file_are_refused(path):
    def work():
        store = torchshm.start("one", "16MiB", file=path)
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                torchshm.start("two", file=path)
            except KeyExistsError as error:
                os.write(writing, str(error).encode())
            os._exit(0)
        assert b"torchshm stop" in os.read(reading, 1000)
        os.wait()
        assert torchshm.connect("one").name == store.name

    assert child(work) == 0


def test_a_service_in_the_background_has_a_file(path):
    command = [sys.executable, "-m", "torchshm"]
    subprocess.run(
        [*command, "serve", "bg", "--limit", "16MiB", "--file", path], check=True, timeout=PATIENCE
    )

    def work():
        torchshm.connect("bg")["x"] = 7

    assert child(work) == 0
    subprocess.run([*command, "stop", "bg"], check=True, timeout=PATIENCE)
    with torchshm.open(path) as file:
        assert file["x"] == 7
    done = subprocess.run(
        [*command, "check", "--file", path, "--json"], capture_output=True, timeout=PATIENCE
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["pools"][0]["catalogue"]["names"] == 1


def test_names_expire_by_the_clock_of_the_day_over_boots(path):
    save(path, {"short": 1}, ttl=3600.0)
    save(path, {}, ttl=None)
    with torchshm.open(path) as file:
        assert 3500 < file.info("short")["expires_in"] <= 3600
    other_boot(path)

    def work():
        store = torchshm.start("later", file=path)
        assert 3500 < store.info("short")["expires_in"] <= 3600

    assert child(work) == 0


def test_a_message_that_nobody_can_receive_keeps_nothing(path):
    def work():
        store = torchshm.start("m", "64MiB", file=path)
        with store.storage():
            array = np.empty(100_000)
        torchshm.register(store=store)
        ForkingPickler.dumps(array)
        assert store.info()["live_bytes"] >= 800_000
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(work) == -9

    def after():
        assert torchshm.start("m", file=path).info()["live_bytes"] == 0

    assert child(after) == 0


def test_settings_that_are_not_given_stay(path):
    def work(*settings):
        store = torchshm.start("s", "16MiB", file=path, **dict(settings))
        figures = store.info()
        assert (figures["policy"], figures["ttl"], store._core.patience) == (
            "drop",
            pytest.approx(100.0),
            2.5,
        )

    assert child(work, ("policy", "drop"), ("ttl", 100.0), ("timeout", 2.5)) == 0
    assert child(work) == 0


# ---- a loss of power


def test_repair_keeps_what_was_synced_and_reports_the_rest(path):
    def work():
        store = torchshm.start("p", "64MiB", file=path)
        store["array"] = np.arange(100_000.0).reshape(100, 1000).T
        store["dict"] = {"a": np.ones(1000), "b": "text"}
        store["changed"] = np.zeros(1000)
        store["damaged"] = np.zeros(100_000)
        store.sync()
        store["changed"] = np.ones(1000)
        store["late"] = 5
        del store["damaged"]
        store["other"] = np.zeros(100_000)
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(work) == -9
    copy = holes(path)
    other_boot(path)
    for attempt in (lambda: torchshm.open(path), lambda: torchshm.start("p", file=path)):
        with pytest.raises(TorchshmError, match="check --repair"):
            attempt()
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", "--repair", path, "--json"],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["kept"] == ["array", "dict"]
    assert set(found["lost"]) == {"changed", "late", "damaged", "other"}
    assert os.path.exists(found["damaged"])
    with torchshm.open(path) as file:
        assert sorted(file) == ["array", "dict"]
        assert np.array_equal(file["array"], np.arange(100_000.0).reshape(100, 1000).T)
        assert file["dict"]["b"] == "text"
        assert file["dict"]["a"].sum() == 1000
    # The machine did not go down: nothing to repair.
    with torchshm.open(copy) as file:
        assert sorted(file) == ["array", "changed", "dict", "late", "other"]
    # Without a record, only by request.
    os.unlink(f"{path}.synced")
    other_boot(copy)
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", "--repair", copy, "--unverified", "--json"],
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["unverified"] == ["array", "changed", "dict", "late", "other"]


def synced_then_changed(path):
    """Of names "a", "b" and "late" only "a" is as it was recorded, and the machine has gone down."""

    def work():
        store = torchshm.start("p", "16MiB", file=path)
        store["a"], store["b"] = np.full(1000, 1), np.full(1000, 1)
        store.sync()
        store["b"], store["late"] = np.full(1000, 2), np.full(1000, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(work) == -9
    other_boot(path)


def in_child(work):
    """What it returns, in a forked process: who joins a pool never leaves it."""
    reading, writing = os.pipe()
    assert child(lambda: os.write(writing, json.dumps(work()).encode())) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return json.load(pipe)


def repaired(path, unverified=False):
    return in_child(lambda: _persistence.repair(path, unverified=unverified).as_json())


def values(path):
    with torchshm.open(path) as file:
        return {key: int(file[key][0]) for key in file}


def test_repair_replaces_no_file_that_an_earlier_one_has_kept(path):
    synced_then_changed(path)
    before = os.stat(path).st_ino
    first = repaired(path)
    assert first["kept"] == ["a"]
    assert first["damaged"] == f"{path}.damaged"
    second = repaired(path)
    assert (second["kept"], second["lost"]) == (["a"], {})
    assert second["damaged"] == f"{path}.damaged-2"
    assert os.stat(first["damaged"]).st_ino == before
    assert repaired(first["damaged"])["kept"] == ["a"]  # by the record that lies beside it
    assert repaired(first["damaged"] + ".damaged", unverified=True)["unverified"] == ["b", "late"]
    assert values(first["damaged"] + ".damaged") == {"a": 1, "b": 2, "late": 2}


def test_repair_without_links(path, monkeypatch):
    synced_then_changed(path)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert [repaired(path)["damaged"] for _ in range(3)] == [
        f"{path}.damaged",
        f"{path}.damaged-2",
        f"{path}.damaged-3",
    ]
    assert repaired(f"{path}.damaged", unverified=True)["kept"] == ["a"]


def test_a_kill_of_repair_leaves_the_old_file_or_the_new_one(path, tmp_path):
    synced_then_changed(path)
    calls = ("link", "rename", "fchmod", "mkdir")
    for n in range(1, 100):
        place = tmp_path / f"killed-{n}"
        place.mkdir()
        copy = place / "a.store"
        subprocess.run(["cp", "--sparse=always", path, copy], check=True)
        shutil.copy(f"{path}.synced", f"{copy}.synced")
        old = os.stat(copy).st_ino

        def work(copy=copy, n=n):
            left = n

            def counted(real):
                def call(*arguments, **named):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **named)

                return call

            for name in calls:
                setattr(os, name, counted(getattr(os, name)))
            _persistence.repair(copy)

        how = child(work)
        if os.stat(copy).st_ino == old:
            assert repaired(copy)["kept"] == ["a"]
        assert values(copy) == {"a": 1}
        kept = [each for each in place.glob("*.damaged*") if os.stat(each).st_ino == old]
        assert kept
        assert all(os.path.exists(f"{each}.synced") for each in kept)
        shutil.rmtree(place)
        if how == 0:
            break
        assert how == -9
    assert 5 < n < 99


def test_repair_that_would_keep_nothing_changes_nothing(path):
    def work():
        store = torchshm.start("p", "16MiB", file=path)
        store["a"] = np.full(1000, 1)
        if os.path.exists(f"{path}.sync"):
            store.sync()
            store["a"] = np.full(1000, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    for why in ("no sync() was ever recorded", "it has changed since the last sync()"):
        assert child(work) == -9
        other_boot(path)
        before, listed = os.stat(path), sorted(os.listdir(path.parent))
        done = subprocess.run(
            [sys.executable, "-m", "torchshm", "check", "--repair", path],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 2
        assert f"{why}. It is as it was; --unverified (unverified=True) keeps" in done.stderr
        after = os.stat(path)
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert sorted(os.listdir(path.parent)) == listed
        assert repaired(path, unverified=True)["unverified"] == ["a"]
        Path(f"{path}.sync").touch()
        os.unlink(path)


@pytest.mark.parametrize("how", ["clean", "killed"])
def test_repair_of_a_file_in_order_loses_nothing(path, how):
    save(path, {"a": np.full(10, 1), "b": np.full(10, 1)}, how=how)
    assert repaired(path)["kept"] == ["a", "b"]
    save(path, {"b": np.full(10, 2), "c": np.full(10, 3)}, how=how)
    result = repaired(path)
    assert (result["kept"], result["lost"]) == (["a", "b", "c"], {})
    assert values(path) == {"a": 1, "b": 2, "c": 3}


def test_repair_by_a_symbolic_link_repairs_what_it_leads_to(path, tmp_path):
    synced_then_changed(path)
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(path)
    result = repaired(link)
    assert (result["kept"], result["path"], result["damaged"]) == (["a"], str(path), f"{path}.damaged")
    assert link.is_symlink()
    assert os.listdir(link.parent) == ["link"]
    assert values(link) == {"a": 1}


def test_repair_keeps_what_is_shared_shared_and_the_settings(path):
    def work():
        store = torchshm.start("p", "64MiB", policy="spill", timeout=3.0, file=path)
        store.save("whole", np.arange(1_000_000), policy="pin")
        store.save("passing", 5, ttl=3600)
        lying = store["whole"]
        for i in range(40):
            store[f"part{i:02}"] = lying[i:][:: -1 if i % 2 else 1]
            store[f"tree{i:02}"] = {"all": lying, "i": [i, lying[i : i + 5]]}
        store.sync()
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(work) == -9

    def lower():  # below what there is; and a ttl that the names do not have
        store = torchshm.start("p", "4MiB", 1000.0, policy="spill", timeout=3.0, file=path)
        os.kill(os.getpid(), signal.SIGKILL)
        assert store

    assert child(lower) == -9
    other_boot(path)
    result = repaired(path)
    assert (len(result["kept"]), result["lost"]) == (82, {})
    with torchshm.open(path) as file:
        figures = file.info()
        assert figures["data_bytes"] < 16 << 20
        assert figures["data_size"] == 128 << 20
        assert [figures[each] for each in ("limit_bytes", "ttl", "policy", "patience")] == [
            4 << 20,
            pytest.approx(1000.0),
            "spill",
            3.0,
        ]
        assert file.info("whole")["expires_in"] is None
        assert 3000 < file.info("passing")["expires_in"] <= 3600
        assert [file.info(key)["policy"] for key in ("whole", "part00")] == ["pin", "spill"]
        for i in range(40):
            assert np.array_equal(file[f"part{i:02}"], np.arange(i, 1_000_000)[:: -1 if i % 2 else 1])
            assert file[f"tree{i:02}"]["all"][-1] == 999_999
            assert file[f"tree{i:02}"]["i"][1].tolist() == [*range(i, i + 5)]


def test_two_syncs_at_once_leave_the_later_record(path, monkeypatch):
    def work():
        store = torchshm.start("p", "16MiB", file=path)
        store["x"] = 1
        writing, go, real = threading.Event(), threading.Event(), _persistence._write_whole

        def slowly(*arguments):
            if not writing.is_set():
                writing.set()
                assert go.wait(PATIENCE)
            real(*arguments)

        monkeypatch.setattr(_persistence, "_write_whole", slowly)
        first = threading.Thread(target=store.sync)
        first.start()
        assert writing.wait(PATIENCE)
        store["x"] = 2
        second = threading.Thread(target=store.sync)
        second.start()
        second.join(0.3)
        # From a signal's handler: who waits can be interrupted.
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            store.sync()
        go.set()
        first.join(PATIENCE)
        second.join(PATIENCE)
        recorded = json.loads(Path(f"{path}.synced").read_text())["names"]
        assert recorded == {"x": _persistence._digest(store._core, "x")}

    assert child(work) == 0


def test_a_sync_that_is_killed_keeps_nobody_out(path):
    def work():
        store = torchshm.start("p", "16MiB", file=path)
        store["x"] = 1
        if os.fork() == 0:
            _persistence._write_whole = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            torchshm.connect("p").sync()
        os.wait()
        assert not os.path.exists(f"{path}.synced")
        store.sync()
        assert os.path.exists(f"{path}.synced")

    assert child(work) == 0


@pytest.mark.parametrize("how", ["removed", "replaced", "moved"])
def test_sync_records_nothing_for_a_file_that_is_gone(path, how):
    def work():
        store = torchshm.start("p", "16MiB", file=path)
        store["x"] = 1
        store.sync()
        before = Path(f"{path}.synced").read_text()
        elsewhere = path.with_name("b.store")
        if how == "moved":
            os.rename(path, elsewhere)
            os.rename(f"{path}.synced", f"{elsewhere}.synced")
            store["x"] = 2
            store.sync()
            assert Path(f"{elsewhere}.synced").read_text() != before
            assert not os.path.exists(f"{path}.synced")
            return
        os.unlink(path)
        if how == "replaced":
            torchshm.start("q", "16MiB", file=path).close()
        with pytest.raises(TorchshmError, match=r"not at .*a\.store any more"):
            store.sync()
        assert Path(f"{path}.synced").read_text() == before

    assert child(work) == 0


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_the_record_is_for_those_who_may_read_the_file(path, mode):
    def work():
        os.umask(0o022)
        store = torchshm.start("p", "16MiB", file=path)
        os.chmod(path, mode)
        store.sync()
        assert os.stat(f"{path}.synced").st_mode & 0o777 == mode

    assert child(work) == 0


def checked(path, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", *arguments, path, "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, json.loads(done.stdout)["pools"][0]


def test_check_reads_values_where_it_is_told_to(path):
    def work():
        store = torchshm.start("p", "16MiB", file=path)
        for key in "abcd":
            store[key] = np.full(100_000, 7)
        store.sync()
        store["b"] = np.full(1000, 8)
        store["late"] = 5
        del store["c"]
        store.close()

    assert child(work) == 0
    before = os.stat(path)
    status, found = checked(path, "--data", "--file")
    assert status == 0
    assert found["data"] == {
        "same": 2,
        "differing": {},
        "unrecorded": ["b", "late"],
        "gone": ["c"],
        "missing": None,
    }
    with torchshm.open(path) as file:
        bytes_of_a = file["a"].tobytes()
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    data = struct.unpack("<Q", _read(path, 72, 8))[0]
    patch(path, data + _read(path, data, 2 * CHUNK).index(bytes_of_a) + 1234, b"!")
    before = os.stat(path)
    assert checked(path, "--file")[0] == 0
    status, found = checked(path, "--data", "--file")
    assert status == 1
    assert not found["sound"]
    assert len(found["data"]["differing"]) == 1
    assert "are damaged" in next(iter(found["data"]["differing"].values()))
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns
    os.unlink(f"{path}.synced")
    status, found = checked(path, "--data", "--file")
    assert (status, found["data"]["missing"]) == (1, "no sync() was ever recorded")


def test_check_says_what_it_can_not_compare(path):
    def work():
        store = torchshm.start("p", "16MiB", file=path)
        store["a"] = 1
        assert _check.check_file(path).sound
        found = _check.check_file(path, data=True)
        assert not found.sound
        assert "is being served" in found.error

    assert child(work) == 0


@pytest.mark.parametrize("option", ["--repair", "--file"])
def test_an_option_is_no_path(path, option):
    save(path, {"a": 1})
    other = {"--repair": "--unverified", "--file": "--data"}[option]
    done = subprocess.run(
        [sys.executable, "-m", "torchshm", "check", option, other, path],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert f"torchshm check {option} PATH {other}" in done.stderr


def test_a_file_that_was_closed_needs_no_repair_after_a_boot(path):
    save(path, {"a": 1})
    other_boot(path)
    with torchshm.open(path) as file:
        assert file["a"] == 1
    save(path, {"b": 2}, how="killed")  # which opens it again
    other_boot(path)
    with pytest.raises(TorchshmError, match="check --repair"):
        torchshm.open(path)


def test_sync_of_a_store_in_memory_says_that_it_keeps_nothing(path):
    def work():
        with pytest.raises(TorchshmError, match="file=path"):
            torchshm.start("memory", "16MiB").sync()

    assert child(work) == 0


# ---- full disks


def _save_many(store, key, value, count=1_000_000):
    for i in range(count):
        store.save(f"{key}-{i}", value)


def _fill(path):
    """Save until it is full, in blocks and in names; exceptions only. Then make room, and go on."""
    store = torchshm.start("full", "1GiB", file=path)
    _save_many(store, "small", np.arange(4), 1000)
    _save_many(store, "middle", np.ones(5_000), 100)
    with pytest.raises(PoolFullError, match="is full"):
        _save_many(store, "big", np.ones(200_000))
    with pytest.raises(PoolFullError, match="is full"):
        _save_many(store, "rest", np.ones(60_000))
    # Names without blocks of their own, until the tables can't grow either.
    with pytest.raises(PoolFullError, match=r"is full|in the store's file"):
        _save_many(store, "name", store["small-0"])
    names = store.keys()
    for key in names:
        assert store[key].sum() in (200_000, 60_000, 5_000, 6)
    for key in names:
        if key.startswith("big"):
            del store[key]
    store._core.sweep()
    for i in range(3):
        store.save(f"again-{i}", np.ones(200_000))
    assert store["again-2"].sum() == 200_000


@root
@pytest.mark.parametrize("system", ["ext4", "tmpfs"])
def test_a_full_disk_is_an_exception(tmp_path, system):
    mount = tmp_path / "small"
    mount.mkdir()
    image = tmp_path / "image"
    if system == "ext4":
        with open(image, "wb") as file:
            file.truncate(96 << 20)
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("there is no mkfs.ext4")
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        how = ["-o", "loop", image, mount]
    else:
        how = ["-t", "tmpfs", "-o", "size=64m", "none", mount]
    done = subprocess.run(["mount", *how], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is refused: {done.stderr.strip()}")
    try:
        path = mount / "full.store"
        assert child(_fill, path) == 0
        checked = _check.check_file(path)
        assert checked.sound, checked
        # There is no room for one more thing: whoever comes is told so, or works.
        with contextlib.suppress(OSError), open(mount / "filler", "wb", 0) as file:
            while True:
                file.write(b"x" * 4096)

        def after():
            try:
                store = torchshm.start("full", file=path)
            except PoolFullError:
                return
            assert store["again-2"].sum() == 200_000
            with pytest.raises(PoolFullError):
                _save_many(store, "more", np.ones(200_000))

        assert child(after) == 0
        with torchshm.open(path) as file:
            assert file["again-1"].sum() == 200_000
        fresh = mount / "fresh.store"

        def make():
            with pytest.raises(PoolFullError, match="is full"):
                torchshm.start("fresh", "1MiB", file=fresh)

        assert child(make) == 0
        assert not fresh.exists()
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


# ---- reading with no service


def test_open_is_a_read_only_mapping(path):
    import torch

    save(path, {"a": np.arange(10), "t": torch.arange(5), "d": {"x": np.ones(3)}, "o": {1, 2}}, how="killed")
    file = torchshm.open(path)
    assert len(file) == 4
    assert sorted(file) == ["a", "d", "o", "t"]
    assert file.keys("a") == ["a"]
    assert "a" in file
    assert "b" not in file
    assert 3 not in file
    assert file.info("a")["kind"] == "array"
    assert file.info()["name"] == "maker"
    with pytest.raises(KeyError):
        file["b"]
    with pytest.raises(ValueError, match="read-only"):
        file["a"][0] = 1
    copy = file.load("a", mode="c")
    copy[0] = 100
    file["t"][0] = 100
    assert file["a"][0] == file["t"][0] == file.load("a", mode="c")[0] == 0
    with pytest.raises(ValueError, match="allow_pickle"):
        file["o"]
    assert file.load("o", allow_pickle=True) == {1, 2}
    for wrong in (lambda: file.load("a", mode="r+"), lambda: torchshm.open(path, "w")):
        with pytest.raises(ValueError, match="start"):
            wrong()
    assert pickle.loads(pickle.dumps(file))["a"].sum() == 45
    array = file["a"]
    assert child(lambda: exit(int(file["a"].sum() + array.sum()))) == 90
    file.close()
    assert array.sum() == 45
    with pytest.raises(StoreUnavailableError, match="closed"):
        file["a"]
    with pytest.raises(KeyExistsError, match=r"torchshm\.open"):
        torchshm.start("maker", file=path)
    assert (copy[0], array[0]) == (100, 0)


def test_open_of_a_missing_file_is_the_system_s_error(path, tmp_path):
    with pytest.raises(FileNotFoundError):
        torchshm.open(path)
    with pytest.raises(ValueError, match="ordinary file"):
        torchshm.open(tmp_path)


@root
def test_another_user_may_read_what_is_readable(path, tmp_path):
    save(path, {"a": np.arange(10)})
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if os.stat(folder).st_uid == os.getuid() and str(folder) != "/tmp":
            os.chmod(folder, 0o755)

    def work():
        os.setgid(65534)
        os.setuid(65534)
        with torchshm.open(path) as file:
            assert file["a"].sum() == 45

    os.chmod(path, 0o644)
    assert child(work) == 0

    def refused():
        os.setgid(65534)
        os.setuid(65534)
        with pytest.raises(PermissionError):
            torchshm.open(path)

    os.chmod(path, 0o600)
    assert child(refused) == 0


@root
def test_a_read_only_mount_will_do(path, tmp_path):
    save(path, {"a": np.arange(10)})
    mount = tmp_path / "ro"
    mount.mkdir()
    done = subprocess.run(["mount", "--bind", path.parent, mount], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is refused: {done.stderr.strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mount], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (mount / "x").touch()
        with torchshm.open(mount / path.name) as file:
            assert file["a"].sum() == 45
            assert file.load("a", mode="c").sum() == 45
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_readers_share_its_pages(path):
    save(path, {"big": np.ones(8 << 20, np.uint8), "other": 1})
    readers = 8
    context = multiprocessing.get_context("fork")
    barrier, told = context.Barrier(readers), context.Queue()

    def read():
        file = torchshm.open(path)
        assert int(file["big"].sum(dtype=np.int64)) == 8 << 20
        barrier.wait(PATIENCE)
        pss = 0
        for block in Path("/proc/self/smaps").read_text().split("VmFlags:"):
            if str(path) in block:
                pss += sum(int(line.split()[1]) for line in block.splitlines() if line.startswith("Pss:"))
        told.put(pss)
        barrier.wait(PATIENCE)

    processes = [context.Process(target=read) for _ in range(readers)]
    for process in processes:
        process.start()
    sizes = [told.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert sum(sizes) < 12 << 10  # KiB: the 8 MiB once, and tables
    assert sum(sizes) > 8 << 10


# ---- what is refused


def _uses(path):
    """All that may be done with a file; exceptions only."""
    for attempt in (lambda: torchshm.open(path), lambda: torchshm.start("x", file=path)):
        with pytest.raises((TorchshmError, ValueError)) as caught:
            attempt()
        assert caught.type is not KeyExistsError, caught.value
    checked = _check.check_file(path)
    assert not checked.sound


def test_a_file_cut_short_is_refused(path):
    save(path, {"a": np.ones(400_000), "b": 5})
    whole = os.stat(path).st_size
    data = struct.unpack("<Q", path.read_bytes()[72:80] if whole < 1 << 20 else _read(path, 72, 8))[0]
    for length in (1, 100, 191, 192, 4096, CHUNK, CHUNK + 5000, data - 1, data, data + CHUNK):
        copy = holes(path)
        os.truncate(copy, length)
        assert child(_uses, copy) == 0, length
    # What was never used may be missing for those who read.
    os.truncate(copy := holes(path), data + 3 * CHUNK)
    with torchshm.open(copy) as file:
        assert file["a"].sum() == 400_000


def _read(path, at, length):
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(length)


def test_what_is_no_store_s_file_is_refused_and_left_alone(tmp_path):
    rng = np.random.default_rng(1)
    for i, content in enumerate((b"x", b"\0" * 5000, rng.bytes(100_000), b"TRHSFILE")):
        path = tmp_path / f"garbage-{i}"
        path.write_bytes(content)
        assert child(_uses, path) == 0
        assert path.read_bytes() == content


def test_damaged_superblocks_are_refused(path):
    save(path, {"a": 1})
    header = _read(path, 0, 96)
    rng = np.random.default_rng(2)
    for at in range(88):
        if READY <= at < READY + 4:
            continue  # one that was never finished is made anew
        copy = bytearray(header)
        copy[at] ^= int(rng.integers(1, 256))
        patch(path, 0, copy)
        assert child(_uses, path) == 0, at
    patch(path, 0, header)
    with torchshm.open(path) as file:
        assert file["a"] == 1


def test_damaged_tables_end_in_exceptions_or_other_values(path):
    keys = [*"abcdefgh", *(c * 300 for c in "abcd")]
    save(
        path, {key: {"x": np.arange(20_000), "y": [key]} if len(key) > 1 else np.arange(100) for key in keys}
    )
    catalogue, control, data = (struct.unpack("<Q", _read(path, at, 8))[0] for at in (40, 56, 72))

    def work():
        rng = np.random.default_rng(3)
        read = refused = 0
        for _ in range(150):
            copy = bytearray()
            with open(path, "r+b") as file:
                # Somewhere in what is used of a table; put back afterwards.
                low = int(rng.choice([catalogue, catalogue + (70 << 20), control + (4 << 20), control, data]))
                at, copy = _used(file, low, rng)
                file.seek(at)
                file.write(rng.bytes(len(copy)))
            try:
                with torchshm.open(path) as file:
                    for key in {*keys, *file.keys()}:
                        try:
                            np.asarray(file[key] if len(key) == 1 else file[key]["x"]).sum()
                            read += 1
                        except (KeyError, ValueError, TypeError, TorchshmError):
                            refused += 1
            except (ValueError, TorchshmError):
                refused += 1
            patch(path, at, copy)
        assert read > 0
        assert refused > 0

    assert child(work) == 0


def _used(file, low, rng):
    """The place and the content of 64 bytes that are not all zero, at or after `low`."""
    while True:
        low = os.lseek(file.fileno(), low, os.SEEK_DATA)
        page = os.pread(file.fileno(), 4096, low)
        places = [i for i in range(0, len(page), 64) if any(page[i : i + 64])]
        if places:
            at = int(rng.choice(places))
            return low + at, page[at : at + 64]
        low += 4096


def test_a_newer_layout_is_named(path):
    save(path, {"a": 1})
    version = struct.unpack("<I", _read(path, VERSION, 4))[0]
    patch(path, VERSION, struct.pack("<I", version + 1))
    for attempt in (lambda: torchshm.open(path), lambda: torchshm.start("x", file=path)):
        with pytest.raises(TorchshmError, match=rf"layout {version + 1}\..*reads layout {version}\..*newer"):
            attempt()


def test_a_file_that_was_not_finished_is_made_anew(path):
    save(path, {"a": 1})
    patch(path, READY, b"\0\0\0\0")
    with pytest.raises(TorchshmError, match="never finished"):
        torchshm.open(path)
    save(path, {"b": 2})
    with torchshm.open(path) as file:
        assert sorted(file) == ["b"]


@root
def test_hugetlbfs_is_refused(tmp_path):
    mount = tmp_path / "huge"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "hugetlbfs", "none", mount], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is refused: {done.stderr.strip()}")
    try:

        def work():
            with pytest.raises(TorchshmError, match="hugepages="):
                torchshm.start("x", file=mount / "a.store")

        assert child(work) == 0
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_a_file_that_a_client_here_goes_on_with_is_not_at_rest(path):
    def work():
        store = torchshm.start("p", "64MiB", file=path)
        client = torchshm.connect("p")
        store["a"] = np.full(100_000, 7)
        store.close()
        with pytest.raises(StoreUnavailableError):
            torchshm.open(path)
        client["a"] = np.full(100_000, 8)
        client.close()
        held = torchshm.start("p", file=path)
        array = held.load("a", mode="r+")
        held.close()
        with pytest.raises(StoreUnavailableError):
            torchshm.open(path)
        array[:] = 9

    assert child(work) == 0
    with torchshm.open(path) as file:
        assert (file["a"] == 9).all()
