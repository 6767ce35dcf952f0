"""Names: saved once, found by everybody, gone when removed, and nothing left of them."""

import concurrent.futures
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import torchshm


def live(store):
    return store.info()["live_bytes"]


def test_a_name_is_taken_once_and_replaced_on_demand(store):
    store.save("a", np.arange(3))
    for value in (np.arange(4), [1], torch.ones(2)):
        with pytest.raises(torchshm.KeyExistsError, match="overwrite=True"):
            store.save("a", value)
    assert store["a"].tolist() == [0, 1, 2]
    store.save("a", [1], overwrite=True)
    assert store["a"] == [1]
    store["a"] = 2
    assert store["a"] == 2


def test_a_missing_name_is_a_key_error_or_a_timeout(store):
    with pytest.raises(KeyError, match="nothing"):
        store["nothing"]
    with pytest.raises(KeyError):
        store.remove("nothing")
    with pytest.raises(KeyError):
        store.info("nothing")
    with pytest.raises(TimeoutError, match="nothing"):
        store.load("nothing", timeout=0.05)
    with pytest.raises(TimeoutError):
        store.load(["nothing"], timeout=0.05)
    assert "nothing" not in store and store.get("nothing") is None


def test_mapping(store):
    store["b"], store["a"], store["x/1"], store["x/2"] = 1, 2, 3, 4
    assert list(store) == ["a", "b", "x/1", "x/2"] and len(store) == 4 and "a" in store
    assert store.keys("x/") == ["x/1", "x/2"]
    assert dict(store.items()) == {"a": 2, "b": 1, "x/1": 3, "x/2": 4}
    assert store.load(prefix="x/") == {"x/1": 3, "x/2": 4}
    assert store.load(["b", "a"]) == [1, 2]
    assert store.pop("a") == 2
    del store["b"]
    assert list(store) == ["x/1", "x/2"]
    assert store and store == store and store != {}


@pytest.mark.parametrize("key", ["", "\0x", 5, None, b"a"])
def test_a_key_is_text(store, key):
    with pytest.raises((ValueError, TypeError)):
        store.save(key, 1)
    with pytest.raises((ValueError, TypeError)):
        store.load(key)
    assert key not in store


def test_wrong_arguments(store):
    store["a"] = np.ones(3)
    for wrong in ({"mode": "w"}, {"mode": "w", "timeout": 1}):
        with pytest.raises(ValueError, match="mode"):
            store.load("a", **wrong)
    with pytest.raises(TypeError, match="prefix"):
        store.load()
    for ttl in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="ttl"):
            store.save("b", 1, ttl=ttl)
    assert "b" not in store
    with pytest.raises(ValueError, match="letters"):
        torchshm.connect("no/such")
    with pytest.raises(ValueError, match="limit"):
        torchshm.start("other", limit=0)


def test_long_and_foreign_names(store):
    for key in ("ä" * 10_000, "\N{GRINNING FACE}", "a b\nc"):
        store[key] = np.arange(5)
        assert store[key].tolist() == [0, 1, 2, 3, 4] and store.keys(key[:1]) == [key]
        del store[key]
    longest = "k" * 65_536
    assert store.get_or_create(longest, lambda: 7) == 7 and store.keys() == [longest]
    with pytest.raises(ValueError, match="1 to 65536 bytes"):
        store[longest + "k"] = 1


def test_modes(store):
    for value in (np.arange(10_000), {"x": np.arange(10_000)}):
        store["a"] = value

        def of(mode, value=value):
            loaded = store.load("a", mode=mode)
            return loaded["x"] if isinstance(value, dict) else loaded

        with pytest.raises(ValueError, match="read-only"):
            of(None)[0] = 1
        with pytest.raises(ValueError, match="flag"):
            of("r").flags.writeable = True
        private, shared = of("c"), of("r+")
        private[0] = 5
        assert of("r")[0] == 0
        shared[1] = 6
        assert of("r")[1] == 6


def test_a_write_to_a_tensor_stays_private(store):
    store["t"] = torch.zeros(10_000)
    for mode in (None, "r", "c"):
        x = store.load("t", mode=mode)
        x[0] = 5
        assert store.load("t", mode="r+")[0] == 0
        del x
    store.load("t", mode="r+")[0] = 7
    assert store["t"][0] == 7


def test_loading_copies_nothing(store):
    x = np.arange(1_000_000)
    store["a"], store["t"] = x, torch.from_numpy(x)
    before = live(store)
    held = [store["a"] for _ in range(10)] + [store["t"] for _ in range(10)]
    assert live(store) == before and all(map(torchshm.is_shared, held))
    assert not torchshm.is_shared(x)


def test_what_lies_in_the_store_is_only_named(store):
    with store.storage():
        x = np.full((1000, 1000), 3.0)
    assert torchshm.is_shared(x)
    before = live(store)
    store["a"], store["b"], store["c"] = x, {"x": x[5:10, ::2]}, torch.from_numpy(x)
    assert live(store) < before + 100_000
    store["again"] = store["a"]
    assert live(store) < before + 100_000
    del x
    assert store["b"]["x"].shape == (5, 500) and store["c"].sum() == 3e6 and store["again"][5, 5] == 3
    with torchshm.pooled():
        elsewhere = np.full(100_000, 1.0)
    store["d"] = elsewhere
    elsewhere[:] = 2
    assert store["d"][0] == 1


def test_a_modified_private_view_is_copied(store):
    store["a"] = np.zeros(100_000)
    x = store.load("a", mode="c")
    x[5] = 1
    store["b"], store["c"] = x, [x]
    assert store["b"][5] == store["c"][0][5] == 1 and store["a"][5] == 0


def test_memory_returns_after_remove_and_not_before(store):
    before = live(store)
    store["a"], store["b"] = np.ones(1_000_000), {"x": torch.ones(1_000_000), "y": b"y" * 100_000}
    held = store["a"]
    del store["a"], store["b"]
    assert live(store) >= before + 8_000_000 and held.sum() == 1_000_000
    del held
    assert live(store) == before


def test_ttl(store):
    store.save("a", np.ones(10), ttl=0.2)
    held = store["a"]
    assert 0 < store.info("a")["expires_in"] <= 0.2
    while "a" in store:
        time.sleep(0.01)
    with pytest.raises(KeyError):
        store["a"]
    assert held.sum() == 10


def test_info(store):
    store["a"] = np.ones(10_000)
    figures = store.info("a")
    assert figures["kind"] == "array" and figures["bytes"] >= 80_000 and figures["pid"] == os.getpid()
    assert abs(figures["created"] - time.time()) < 3600 and figures["expires_in"] is None
    whole = store.info()
    assert whole["name"] == "session" and whole["names"] == 1 and whole["service_pid"] == os.getpid()
    assert whole["limit_bytes"] == 1 << 30


def test_a_full_store_says_so_and_keeps_what_it_has(store):
    store["a"] = np.ones(1000)
    for value in (np.empty(1 << 30, np.uint8), [np.empty(1 << 30, np.uint8)]):
        with pytest.raises(torchshm.PoolFullError):
            store["a"] = value
    assert store["a"].sum() == 1000


def test_threads(store):
    def work(i):
        for round in range(30):
            store[f"{i}"] = np.full(1000, round)
            assert store[f"{i}"][0] == round
            store["same"] = [np.full(100, i), np.full(100, i)]
            a, b = store["same"]
            assert a[0] == b[0]
        return i

    store["same"] = [np.zeros(100), np.zeros(100)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 1, 2, 3]


def test_get_or_create_in_threads_makes_it_once(store):
    made = []

    def make():
        made.append(threading.get_ident())
        time.sleep(0.1)
        return np.arange(10)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: store.get_or_create("a", make), range(6)))
    assert len(made) == 1 and all(x.tolist() == list(range(10)) for x in found)
    assert list(store) == ["a"] and len(store) == 1


def test_get_or_create_refuses_a_mode_that_is_none(store):
    with pytest.raises(ValueError, match="mode is"):
        store.get_or_create("a", lambda: 1, mode="rw")
    assert len(store) == 0


def test_get_or_create_hands_on_the_error_and_leaves_no_mark(store):
    with pytest.raises(ZeroDivisionError):
        store.get_or_create("a", lambda: 1 // 0)
    assert len(store) == 0 and store.get_or_create("a", lambda: 5) == 5
    assert store.get_or_create("a", lambda: 6) == 5


def test_what_came_just_before_the_mark_is_not_made_again(store):
    class SavesFirst:
        serving = False

        def save(self, *arguments):
            store.save("a", 5)
            store._core.save(*arguments)

        def __getattr__(self, name):
            return getattr(store._core, name)

    late = torchshm.Store("session", 10, SavesFirst())
    assert late.get_or_create("a", lambda: 1 // 0) == 5
    assert len(store) == 1


def test_a_store_is_pickled_by_its_name(store):
    store["a"] = np.arange(5)
    copy = pickle.loads(pickle.dumps(store))
    assert copy["a"].tolist() == [0, 1, 2, 3, 4] and copy.name == store.name


def test_a_closed_client_says_so_and_its_arrays_stay(store):
    store["a"] = np.arange(5)
    with torchshm.connect("session") as other:
        x = other["a"]
    assert x.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(torchshm.StoreUnavailableError, match="closed"):
        other["a"]
    assert "closed" in repr(other) and "serving" in repr(store)
    assert store["a"] is not None


def test_a_running_store_is_refused_by_name(store):
    with pytest.raises(torchshm.KeyExistsError, match="session is being served already"):
        torchshm.start("session")


def test_no_store_says_how_to_start_one(runtime):
    for timeout in (0, 0.05):
        with pytest.raises(torchshm.StoreUnavailableError, match="torchshm serve --name nowhere"):
            torchshm.connect("nowhere", timeout=timeout)


def test_several_stores_and_a_stop_that_leaves_them_usable(store):
    first, second = torchshm.start("first"), torchshm.start("second")
    first["a"], second["a"] = np.ones(3), np.zeros(3)
    assert first["a"].sum() == 3 and second["a"].sum() == 0
    client = torchshm.connect("second")
    second.close()
    assert client["a"].sum() == 0
    client["b"] = 1
    with pytest.raises(torchshm.StoreUnavailableError):
        torchshm.connect("second", timeout=0)
    with torchshm.start("second") as again:  # takes over what this process still has
        assert again["b"] == 1 and again._core.took_over
    first.close()


def test_a_key_says_the_same_everywhere():
    values = [
        (),
        (None,),
        (True,),
        (1,),
        (1.0,),
        (1j,),
        ("1",),
        (b"1",),
        ((1,),),
        ([1],),
        ({1},),
        ({1: 2},),
        ({2: 1},),
        (1, 2),
        ((1, 2),),
        ("ab", "c"),
        ("a", "bc"),
        (pathlib.Path("a"),),
        (np.dtype("f4"),),
        (np.dtype("f8"),),
        (np.arange(3),),
        (np.arange(3.0),),
        (np.arange(3).reshape(3, 1),),
    ]
    names = [torchshm.key(*value) for value in values]
    assert len(set(names)) == len(values) and all(len(name) == 32 for name in names)
    assert torchshm.key(np.int64(1)) == torchshm.key(1) and torchshm.key(0.0) == torchshm.key(-0.0)
    assert torchshm.key({"a": 1, "b": {2, 3}}) == torchshm.key({"b": {3, 2}, "a": 1})
    script = "import torchshm; print(torchshm.key('era5', 2020, ['t2m', 1.5], {'a', 'b', 'c'}))"
    wanted = torchshm.key("era5", 2020, ["t2m", 1.5], {"a", "b", "c"})
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        assert (
            subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).strip()
            == wanted
        )
    with pytest.raises(TypeError, match="object"):
        torchshm.key(object())
