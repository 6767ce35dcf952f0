"""A store that holds more than its memory: what goes, in which order, and that it comes back, whoever dies."""

import ctypes
import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from disks import small_disk
from peer import Peer, keep
from program import until
from scripts import PATIENCE, passes, run_script

import torchshm
from torchshm import _C
from torchshm._check import check_descriptors

pytestmark = pytest.mark.apart

MIB = 1 << 20
LIMIT = 64 * MIB


@pytest.fixture(scope="module", autouse=True)
def runtime(tmp_path_factory):
    """A directory of sockets of this module's own."""
    folder = tmp_path_factory.mktemp("runtime")
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before


def array(number, size=8 * MIB):
    """Bytes that tell which value they are of, all over."""
    return np.arange(number, number + size // 8, dtype=np.int64)


def is_array(found, number):
    return np.array_equal(found, array(number, found.nbytes))


def files(folder):
    return sorted(f.name for place in folder.iterdir() if place.is_dir() for f in place.iterdir())


def no_file_is_left(folder):
    """The service gives back the room of files that values are done with."""
    deadline = time.monotonic() + PATIENCE
    while not set(files(folder)) <= {"alive", "unsynced"}:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def where(store, *keys):
    return [store.info(key)["where"] for key in keys]


# Stores of peers: one pool a process.
_known = {}


def of(name):
    if name not in _known:
        _known[name] = torchshm.connect(name)
    return _known[name]


def serve(name, folder, sync=True):
    _known[name] = torchshm.start(name, limit=LIMIT, spill=folder, spill_sync=sync)
    return os.getpid()


def save(name, key, number, size=8 * MIB, **how):
    of(name).save(key, array(number, size), **how)


def check(name, key, number):
    return is_array(of(name).load(key), number)


def hold(name, key, mode="r"):
    keep(key, of(name).load(key, mode=mode))


def write(name, key, value):
    of(name).load(key, mode="r+")[:] = value


def first(name, key):
    return int(of(name).load(key)[0])


@pytest.fixture(scope="module", params=[True, False], ids=["disk", "kernel"])
def big(tmp_path_factory, request):
    """A store of 64 MiB served by a peer, with its folder; files are with the disk, or with the kernel, when memory goes."""
    folder = tmp_path_factory.mktemp("spill")
    with Peer() as peer:
        peer.call(serve, "big", folder, request.param)
        yield folder
        peer.kill()
        _known.pop("big").close()


@pytest.fixture
def store(big):
    store = of("big")
    yield store
    for key in list(store):
        store.remove(key)
    gc.collect()


@pytest.fixture
def quiet(tmp_path):
    """A store without a service, which would write ahead in an order of its own."""
    with Peer() as peer:
        peer.call(serve, "quiet", tmp_path / "spill")
        store = of("quiet")
        peer.kill()
    yield store
    _known.pop("quiet").close()


def test_four_times_the_limit_is_all_there(store, big):
    for i in range(32):
        store[f"k{i}"] = array(i)
    for _ in range(2):
        for i in range(32):
            assert is_array(store[f"k{i}"], i)
            assert store.info()["committed_bytes"] <= LIMIT
    figures = store.info()
    assert figures["spilled_names"] >= 24 and figures["spilled_bytes"] == 8 * MIB * figures["spilled_names"]
    assert figures["spills"] >= figures["restores"] >= 48
    # What comes back unchanged keeps its file, and goes again without writing it.
    assert figures["written"] <= 32
    assert len(store) == 32 and sorted(store) == sorted(f"k{i}" for i in range(32))


def cached(path):
    """Pages of a file that are in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        start = np.frombuffer(pages, np.uint8).ctypes.data
        found = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(start), len(pages), found) == 0
        return sum(page & 1 for page in found)


def goes_past_the_page_cache(folder):
    try:
        os.close(os.open(folder / "direct", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    (folder / "direct").unlink()
    return True


def test_a_file_is_read_through_the_page_cache_from_the_second_time_on(quiet, tmp_path):
    quiet["value"] = array(7)
    for i in range(8):
        quiet[f"filler{i}"] = array(i)
    for file in tmp_path.rglob("*.spill"):  # of a file system that can't be written past the page cache
        with open(file, "rb") as opened:
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert where(quiet, "value") == ["disk"] and is_array(quiet["value"], 7)
    files = list(tmp_path.rglob("*.spill"))
    first = max(cached(f) for f in files if f.exists())
    for i in range(8):
        quiet[f"filler{i}"] = array(i)
    assert where(quiet, "value") == ["disk"] and is_array(quiet["value"], 7)
    second = max(cached(f) for f in files if f.exists())
    if goes_past_the_page_cache(tmp_path):
        assert first == 0
    assert second >= 8 * MIB // mmap.PAGESIZE


def test_what_is_removed_or_replaced_leaves_no_file(store, big):
    for i in range(16):
        store[f"k{i}"] = array(i)
    assert len(files(big)) > 8
    for i in range(16):
        store[f"k{i}"] = array(100 + i, 1 * MIB)
    for i in range(16):
        assert is_array(store[f"k{i}"], 100 + i)
        store.remove(f"k{i}")
    assert no_file_is_left(big)


def test_all_kinds_of_values_come_back_as_they_were(store):
    values = {
        "tree": {"a": array(1, MIB), "b": [np.arange(10.0), "text", None], "c": (1, 2.5)},
        "tensor": torch.arange(300_000.0).reshape(3, 100_000).t(),
        "fortran": np.asfortranarray(array(3, MIB).reshape(2, -1)),
        "reversed": array(4, MIB)[::-1],
        "bytes": bytes(range(256)) * 5000,
        "object": np.datetime64("2026-01-01") + np.arange(100_000),
        "long " + "k" * 5000: array(5, MIB),
        "unicode ☃": array(6, 4096),
    }
    for key, value in values.items():
        store[key] = value
    kinds = {key: store.info(key)["kind"] for key in values}
    for i in range(200):  # who goes first is not told exactly
        store[f"filler{i % 16}"] = array(i)
        if where(store, *values) == ["disk"] * len(values):
            break
    assert where(store, *values) == ["disk"] * len(values)
    assert {key: store.info(key)["kind"] for key in values} == kinds
    tree = store["tree"]
    assert is_array(tree["a"], 1) and tree["b"][1:] == ["text", None] and tree["c"] == (1, 2.5)
    assert np.array_equal(tree["b"][0], np.arange(10.0))
    assert torch.equal(store["tensor"], values["tensor"])
    assert store["tensor"].stride() == values["tensor"].stride()
    for key in ("fortran", "reversed", "object", "long " + "k" * 5000, "unicode ☃"):
        assert np.array_equal(store[key], values[key]), key
    assert store["fortran"].flags.f_contiguous
    assert store["bytes"] == values["bytes"]


def test_policies_say_who_goes_first(quiet):
    store = quiet
    store.save("keep", array(1))
    store.save("spill", array(2), policy="spill")
    store.save("drop", array(3), policy="drop")
    store.save("pin", array(4), policy="pin")
    for i in range(5):  # the eighth and the ninth
        store.save(f"more{i}", array(i))
    assert "drop" not in store
    assert where(store, "pin", "keep") == ["memory", "memory"]
    with pytest.raises(KeyError):
        store.load("drop")
    store.save("another", array(5))
    assert where(store, "spill", "keep", "pin") == ["disk", "memory", "memory"]
    store.save("a third", array(5))
    assert where(store, "spill", "keep", "pin") == ["disk", "disk", "memory"]
    assert store.info()["evictions"] >= 1
    assert store.info("pin")["policy"] == "pin"
    store.set_policy("pin", "keep")
    for i in range(8):
        store.save(f"x{i}", array(i))
    assert where(store, "pin") == ["disk"] and is_array(store["pin"], 4)
    with pytest.raises(KeyError):
        store.set_policy("nobody", "keep")
    with pytest.raises(ValueError, match="policy is one of"):
        store.save("y", 1, policy="now")


def test_least_recently_used_goes_first(quiet):
    store = quiet
    for i in range(7):
        store.save(f"k{i}", array(i))
    store.load("k0")
    store.save("new0", array(7))
    store.load("k0")
    store.save("new1", array(8))
    assert where(store, "k0", "k1") == ["memory", "disk"]


def test_what_somebody_holds_stays(store, big):
    with Peer() as peer:
        store.save("mine", array(1))
        mine = store.load("mine")
        store.save("theirs", array(2))
        peer.call(hold, "big", "theirs")
        for i in range(16):
            store.save(f"k{i}", array(i))
        assert where(store, "mine", "theirs") == ["memory", "memory"]
        assert is_array(mine, 1) and peer.call(check, "big", "theirs", 2)
        peer.kill()
        del mine
        for i in range(16):
            store.save(f"l{i}", array(i))
        assert where(store, "mine", "theirs") == ["disk", "disk"]


def test_full_of_what_is_held_is_an_error_that_says_so_and_in_time(store):
    held = []
    for i in range(7):
        store.save(f"k{i}", array(i))
        held.append(store.load(f"k{i}"))
    begun = time.monotonic()
    with pytest.raises(torchshm.errors.PoolFullError, match=rf"pid {os.getpid()} .* holds"):
        store.save("one too many", array(1, 16 * MIB), timeout=0.2)
    with pytest.raises(torchshm.errors.PoolFullError, match="holds"):
        store.save("so many", {"a": array(1, 6 * MIB), "b": array(2, 6 * MIB)}, timeout=0.2)
    assert time.monotonic() - begun < 9
    assert "one too many" not in store and len(store) == 7
    # Room that comes while somebody waits for it.
    threading.Timer(0.3, held.clear).start()
    store.save("in time", array(9, 16 * MIB))
    assert is_array(store["in time"], 9) and store.info()["room_waits"] >= 1


def test_savers_of_several_parts_do_not_wait_for_one_another_for_ever(store, big):
    """Each needs more than half of the memory, in two parts."""

    def work(number, failed):
        try:
            for i in range(5):
                store.save(
                    f"w{number}",
                    {"a": array(i, 20 * MIB), "b": array(-i, 20 * MIB)},
                    overwrite=True,
                    timeout=60,
                )
        except BaseException as error:
            failed.append(error)

    failed = []
    threads = [threading.Thread(target=work, args=(n, failed)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failed and not any(thread.is_alive() for thread in threads)
    for n in range(3):
        found = store[f"w{n}"]
        assert is_array(found["a"], 4) and is_array(found["b"], -4)
        del found


def test_what_two_names_have_stays_and_stays_one(store):
    with store.storage():
        both = np.empty(MIB, np.int64)
    both[:] = array(1)
    store.save("one", both)
    store.save("two", both)
    del both
    for i in range(16):
        store.save(f"k{i}", array(i))
    assert where(store, "one", "two") == ["memory", "memory"]
    store.load("one", mode="r+")[0] = 77
    assert store["two"][0] == 77


def test_what_was_written_to_goes_as_it_is_now(store):
    store.save("k", array(0))
    for turn in range(1, 4):
        written = store.load("k", mode="r+")
        written[:] = array(1000 * turn)
        del written
        for i in range(12):
            store.save(f"f{i}", array(i), overwrite=True)
        assert where(store, "k") == ["disk"]
        assert is_array(store["k"], 1000 * turn)
    store.save("t", torch.zeros(MIB))
    store.load("t", mode="r+").fill_(3)
    for i in range(12):
        store.save(f"f{i}", array(i), overwrite=True)
    assert where(store, "t") == ["disk"] and bool((store["t"] == 3).all())


def test_writers_and_those_who_need_room_at_once(store, big):
    """Every write that somebody made through r+ is there in the end, though the value goes to disk between and meanwhile."""
    store.save("counter", np.zeros(MIB, np.int64))
    stop = threading.Event()

    def press():
        i = 0
        while not stop.is_set():
            store.save(f"f{i % 24}", array(i), overwrite=True)
            i += 1

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        for i in range(200):
            counter = store.load("counter", mode="r+")
            assert counter[0] == counter[-1] == i
            counter += 1
            del counter
    finally:
        stop.set()
        pressing.join()
    assert (store["counter"] == 200).all()
    assert store.info()["spills"] > 0


def test_copy_on_write_is_never_in_the_file(store):
    store.save("k", array(5))
    private = store.load("k", mode="c")
    private[:] = 0
    del private
    for i in range(12):
        store.save(f"f{i}", array(i))
    assert where(store, "k") == ["disk"] and is_array(store["k"], 5)


def test_prefetch_brings_values_back(store):
    for i in range(24):
        store.save(f"k{i}", array(i, 4 * MIB))
    gone = [key for key in store if where(store, key) == ["disk"]]
    assert gone
    store.prefetch(["nobody", *gone[:2]])
    store.prefetch("nobody")
    deadline = time.monotonic() + PATIENCE
    while where(store, *gone[:2]) != ["memory"] * 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_expiry_goes_on_on_disk(store, big):
    store.save("brief", array(1), ttl=0.5)
    created = store.info("brief")["created"]
    for i in range(12):
        store.save(f"f{i}", array(i))
    assert where(store, "brief") == ["disk"] and store.info("brief")["created"] == created
    deadline = time.monotonic() + PATIENCE
    while "brief" in store:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for i in range(12):
        store.remove(f"f{i}")
    assert no_file_is_left(big)


def test_several_processes_share_what_one_brings_back(store):
    for i in range(16):
        store.save(f"k{i}", array(i))
    with Peer() as a, Peer() as b:
        for turn in range(3):
            for i in range(16):
                a.ask(check, "big", f"k{i}", i)
                b.ask(check, "big", f"k{15 - i}", 15 - i)
                assert a.answer() and b.answer(), (turn, i)


# ---- faults


@pytest.fixture
def small(tmp_path):
    """A file system of 48 MiB."""
    with small_disk(tmp_path / "small", 48) as folder:
        yield folder


def test_a_full_disk_fails_what_needs_it_and_nothing_else(small):
    with Peer() as peer:
        peer.call(serve, "cramped", small / "spill")
        store = of("cramped")
        saved = {}

        def fill():
            for i in range(40):
                store.save(f"k{i}", array(i), timeout=0.3)
                saved[f"k{i}"] = i

        with pytest.raises(torchshm.errors.PoolFullError, match=os.strerror(errno.ENOSPC)):
            fill()
        assert len(saved) >= 10 and sorted(store) == sorted(saved)
        assert store.info()["spill_errors"] > 0
        for key, number in saved.items():
            if where(store, key) == ["memory"]:
                assert is_array(store[key], number)
        # With room in memory what is on the disk comes back, and a value that is removed makes room on the disk.
        for key in list(saved)[-4:]:
            store.remove(key)
            del saved[key]
        for key, number in saved.items():
            assert is_array(store[key], number), key
        store.save("again", array(99))
        assert is_array(store["again"], 99)
        peer.kill()


def found_wrong(name):
    """What ``torchshm check --store`` finds wrong."""
    data, control, catalogue = opened = _C.store_files(name)
    try:
        return check_descriptors(data, control, catalogue).violations
    finally:
        for fd in opened:
            os.close(fd)


def test_a_damaged_file_is_an_error_of_its_key_alone(tmp_path):
    with Peer() as peer:
        peer.call(serve, "hurt", tmp_path / "spill")
        store = of("hurt")
        for i in range(12):
            store.save(f"k{i}", array(i))
        gone = [key for key in store if where(store, key) == ["disk"]]
        (place,) = [p for p in (tmp_path / "spill").iterdir() if p.is_dir()]
        for path in place.glob("*.spill"):
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                was = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([was[0] ^ 1]))
        for key in gone:
            with pytest.raises(torchshm.TorchshmError, match=f"'{key}'"):
                store.load(key)
            assert key in store  # it may be looked at, and removed
        assert found_wrong("hurt") == []
        for path in place.glob("*.spill"):
            path.unlink()
        with pytest.raises(torchshm.TorchshmError, match=f"'{gone[0]}'.*gone"):
            store.load(gone[0])
        assert [what.split("'")[1] for _, what in found_wrong("hurt")] == sorted(gone)
        store.save(gone[0], array(50), overwrite=True)
        assert is_array(store[gone[0]], 50)
        peer.kill()


def test_savers_and_loaders_are_killed_and_the_service_too(tmp_path):
    folder = tmp_path / "spill"
    with Peer() as one:
        pid = one.call(serve, "mortal", folder)
        store = of("mortal")
        for i in range(24):
            store.save(f"k{i}", array(i))
        for turn in range(6):
            with Peer() as victim:
                victim.call(check, "mortal", "k0", 0)
                victim.ask(_churn, "mortal", turn)
                time.sleep(0.1 + 0.05 * turn)  # in the middle of it
                victim.kill()
            if turn == 5:
                os.kill(pid, signal.SIGKILL)
                one.process.join()
            for i in range(24):
                assert is_array(store[f"k{i}"], i), (turn, i)
        # Without a service room is made all the same. The next one takes the store over, with its directory.
        for i in range(8):
            store.save(f"m{i}", array(100 + i))
        with Peer() as two:
            two.call(_take_over, "mortal")
            for i in range(24):
                assert two.call(check, "mortal", f"k{i}", i)
            for i in range(8):
                assert two.call(check, "mortal", f"m{i}", 100 + i)
            report = subprocess.run(
                ["torchshm", "check", "--store", "mortal"], capture_output=True, text=True, timeout=PATIENCE
            )
            assert report.returncode == 0, report.stdout
            for key in list(store):
                store.remove(key)
            store._core.sweep_files()
            assert no_file_is_left(folder)
            two.kill()


def _churn(name, turn):
    i = 0
    while True:
        of(name).save(f"v{i % 6}", array(i), overwrite=True)
        check(name, f"k{(i * 7) % 24}", (i * 7) % 24)
        i += 1


def _take_over(name):
    _known[name] = torchshm.start(name)
    assert _known[name]._core.took_over


def test_files_of_a_store_that_is_gone_are_swept_by_the_next(tmp_path):
    folder = tmp_path / "spill"
    script = f"""
    import os, signal
    import numpy as np
    import torchshm
    store = torchshm.start("brief", limit="32MiB", spill={str(folder)!r})
    for i in range(16):
        store[f"k{{i}}"] = np.full(1 << 20, i, np.int64)
    print(len(os.listdir(next(os.scandir({str(folder)!r})))) > 8, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run_script(script, tmp_path)
    assert done.returncode == -signal.SIGKILL and done.stdout == "True\n"
    assert any(files(folder))
    with Peer() as peer:
        peer.call(serve, "next", folder)
        assert files(folder) == ["alive"]
        peer.kill()


@pytest.mark.parametrize("sync", [True, False])
def test_a_clean_end_leaves_nothing(tmp_path, sync):
    folder = tmp_path / "spill"
    script = f"""
    import pathlib
    import numpy as np
    import torchshm
    with torchshm.start("clean", limit="32MiB", spill={str(folder)!r}, spill_sync={sync}) as store:
        for i in range(16):
            store[f"k{{i}}"] = np.full(1 << 20, i, np.int64)
        print((store["k0"] == 0).all(), store.info()["spilled_names"] > 8)
        print(any(path.name == "unsynced" for path in pathlib.Path({str(folder)!r}).rglob("*")))
    """
    assert passes(script, tmp_path) == f"True True\n{not sync}\n"
    assert list(folder.iterdir()) == []


def test_without_a_directory_drop_is_all_that_can_go(tmp_path):
    script = """
    import numpy as np
    import torchshm
    with torchshm.start("cache", limit="32MiB", policy="drop") as store:
        for i in range(64):
            store[f"k{i}"] = np.full(1 << 20, i, np.int64)
        assert "k63" in store and "k0" not in store and 2 <= len(store) <= 4, list(store)
        store.save("kept", np.zeros(1 << 20), policy="keep")
        store.save("to disk", np.zeros(1 << 20), policy="spill")
        for i in range(8):
            store[f"l{i}"] = np.full(1 << 20, i, np.int64)
        print(store.info("kept")["where"], store.info("to disk")["where"])
        try:
            store.save("pinned", np.zeros(5 << 20), policy="pin", timeout=0)
        except torchshm.errors.PoolFullError as error:
            print("larger" in str(error))
    """
    assert passes(script, tmp_path) == "memory memory\nTrue\n"


def test_another_directory_for_a_store_that_has_one_is_refused(tmp_path):
    with Peer() as peer:
        peer.call(serve, "settled", tmp_path / "a")
        store = of("settled")
        store["k"] = 1
        peer.kill()
        with pytest.raises((ValueError, torchshm.TorchshmError), match="start it with that one"):
            torchshm.start("settled", spill=tmp_path / "b")


def test_messages_make_room_as_saves_do(tmp_path):
    script = f"""
    import multiprocessing
    import numpy as np
    import torchshm
    def produce(queue):
        for i in range(40):
            queue.put(np.full(1 << 20, i, np.int64))
    if __name__ == "__main__":
        store = torchshm.start("mixed", limit="64MiB", spill={str(tmp_path / "spill")!r})
        for i in range(7):
            store[f"k{{i}}"] = np.full(1 << 20, i, np.int64)
        torchshm.register(store=store)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue(2)
        process = context.Process(target=produce, args=(queue,))
        process.start()
        print(all(torchshm.is_shared(x := queue.get()) and (x == i).all() for i in range(40)))
        process.join()
        print(all((store[f"k{{i}}"] == i).all() for i in range(7)), store.info()["spills"] > 0)
        store.close()
    """
    assert passes(script, tmp_path) == "True\nTrue True\n"


def test_who_waits_for_the_last_of_its_room_gives_up_the_first_of_it(tmp_path):
    """All parts have been placed, and the list of them finds no room."""
    script = """
    import threading
    import numpy as np
    import torchshm
    store = torchshm.start("tight", limit="16MiB")
    refused = []
    def wait():
        try:
            store.save("parts", {"a": np.zeros(1 << 20), "b": np.zeros(1 << 20)}, timeout=20)
        except torchshm.errors.PoolFullError:
            refused.append(True)
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while store.info()["room_waits"] == 0:
        pass
    store.save("small", np.zeros(1 << 17), timeout=15)
    print(store["small"].nbytes, refused)
    """
    assert passes(script, tmp_path) == "1048576 []\n"


def test_a_name_that_finds_no_room_waits_for_it_as_its_value_does(tmp_path):
    script = """
    import threading
    import numpy as np
    import torchshm
    store = torchshm.start("names", limit="16MiB")
    store.save("all", np.zeros(2 << 20))
    held = [store["all"]]
    def free():
        store.remove("all")
        held.clear()
    while store.info()["room_waits"] == 0:
        if not threading.active_count() > 1:
            saving = threading.Thread(target=store.save, args=("k" * 300, np.zeros(0)), kwargs={"timeout": 60})
            saving.start()
    free()
    saving.join()
    print(len(store), store["k" * 300].size)
    """
    assert passes(script, tmp_path) == "1 0\n"


def test_a_program_whose_workers_are_ended_at_its_end_leaves_nothing(tmp_path):
    folder = tmp_path / "spill"
    script = f"""
    import multiprocessing
    import time
    import numpy as np
    import torchshm
    store = torchshm.start("parent", limit="32MiB", spill={str(folder)!r})
    for i in range(16):
        store[f"k{{i}}"] = np.full(1 << 20, i, np.int64)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
    child.start()
    print((store["k0"] == 0).all())
    """
    assert passes(script, tmp_path) == "True\n"
    assert list(folder.iterdir()) == []


def test_the_command_leaves_files_to_the_kernel_where_it_is_told(runtime, tmp_path):
    for number, flag in enumerate(["--spill-sync", "--no-spill-sync"]):
        name, folder = f"told-{number}", tmp_path / str(number)
        serve_it = ["serve", name, "--limit", "64MiB", "--spill", str(folder), flag]
        subprocess.run([sys.executable, "-m", "torchshm", *serve_it], check=True, capture_output=True)
        assert files(folder) == ["alive", "unsynced"][: 1 + number]
        subprocess.run([sys.executable, "-m", "torchshm", "stop", name], check=True, capture_output=True)
        until(lambda folder=folder: not list(folder.iterdir()))
