"""A store as a mapping while others save and remove its names."""

import contextlib
import time

import numpy as np
import pytest
from peer import Peer

import torchshm
from torchshm.data.blocks._sources import StoreSource

NAMES = [f"k{i:04d}" for i in range(2000)]
PATIENCE = 60


def remove(name, key):
    torchshm.connect(name).remove(key)


def wait(moment):
    while time.monotonic() < moment:
        pass


def pop_all(name, begin):
    wait(begin)
    store = torchshm.connect(name)
    found = [store.pop(key, None) for key in NAMES]
    return [each for each in found if each is not None]


def pop_items(name, begin):
    wait(begin)
    store, found = torchshm.connect(name), []
    with contextlib.suppress(KeyError):
        while True:
            found.append(store.popitem())
    return found


def set_defaults(name, begin, mine):
    wait(begin)
    store = torchshm.connect(name)
    return [store.setdefault(key, mine) for key in NAMES]


def come_and_go(name):
    store = torchshm.connect(name)
    rounds = 0
    while "stop" not in store:
        for key in NAMES[:100]:
            store.save(key, rounds, overwrite=True)
        for key in NAMES[:100]:
            store.remove(key)
        rounds += 1
    return rounds


def replace_all_the_time(name, mebibytes):
    store = torchshm.connect(name)
    i = 0
    while "stop" not in store:
        store["parts"] = {j: np.full(mebibytes << 17, i) for j in range(8)}
        i += 1
    return i


def both(store, function, *arguments):
    """What two processes that do it at once return."""
    with Peer() as one, Peer() as other:
        for peer in (one, other):
            peer.call(torchshm.connect, store.name)
        begin = time.monotonic() + 0.2
        for i, peer in enumerate((one, other)):
            peer.ask(function, store.name, begin, *[each[i] for each in arguments])
        return one.answer(), other.answer()


def test_names_that_go_meanwhile_are_left_out(store):
    store.update(a=1, b=2, c=3, d=4)
    with Peer() as peer:
        items, values = iter(store.items()), iter(store.values())
        assert next(items) == ("a", 1) and next(values) == 1
        peer.call(remove, store.name, "b")
        assert list(items) == [("c", 3), ("d", 4)] and list(values) == [3, 4]


def test_of_several_that_pop_a_name_one_gets_it(store):
    store.update(zip(NAMES, range(len(NAMES)), strict=True))
    one, other = both(store, pop_all)
    assert sorted(one + other) == list(range(len(NAMES))) and not list(store)
    with pytest.raises(KeyError, match="k0000"):
        store.pop("k0000")


def test_of_several_that_pop_names_each_gets_others(store):
    store.update(zip(NAMES, range(len(NAMES)), strict=True))
    one, other = both(store, pop_items)
    assert sorted(one + other) == [(key, i) for i, key in enumerate(NAMES)]


def test_of_several_that_set_a_default_all_have_one(store):
    one, other = both(store, set_defaults, [1, 2])
    assert one == other == [store[key] for key in NAMES]


class Trap:
    def __setstate__(self, state):
        raise KeyError("of its own")

    def __getstate__(self):
        return {"a": 1}


def test_clearing_loads_nothing(store):
    store["a"], store["trap"] = 1, Trap()
    store.clear()
    assert not list(store)


def test_an_error_of_a_value_is_not_taken_for_a_name_that_has_gone(store):
    store["x/a"], store["x/trap"] = 1, Trap()
    with pytest.raises(KeyError, match="of its own"):
        store.load(prefix="x/", allow_pickle=True)


def test_a_plan_over_all_names_takes_those_that_stay(store):
    store["stays"] = np.arange(3)
    with Peer() as peer:
        peer.ask(come_and_go, store.name)
        try:
            store.load(NAMES[0], timeout=PATIENCE)
            for _ in range(100):
                planned = StoreSource(store.name, None, False, False).plan(1 << 20)
                assert "stays" in planned._keys and len(planned) == len(planned._keys)
        finally:
            store["stop"] = True
        assert peer.answer() > 0


def test_a_snapshot_of_many_arrays_that_are_replaced_all_the_time_ends(store, tmp_path):
    with Peer() as peer:
        peer.ask(replace_all_the_time, store.name, 4)
        try:
            store.load("parts", timeout=PATIENCE)
            before = time.monotonic()
            for i in range(3):
                store.snapshot(tmp_path / f"{i}")
            assert time.monotonic() < before + PATIENCE
        finally:
            store["stop"] = True
        assert peer.answer() > 0
    for i in range(3):
        with torchshm.open(tmp_path / f"{i}") as file:
            parts = file["parts"]
            assert len({part[0] for part in parts.values()}) == 1
            assert all((part == part[0]).all() for part in parts.values())
        # Nothing is in it of what was tried in vain.
        assert (tmp_path / f"{i}").stat().st_blocks * 512 < 3 * (32 << 20)
