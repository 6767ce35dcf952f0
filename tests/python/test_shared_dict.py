"""A SharedDict is a mapping of what was put in, looked up in one copy by all processes."""

from __future__ import annotations

import collections
import decimal
import enum
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import keep, kept

import torchshm
from torchshm.data import SharedDict

WORDS = {f"key {i}": {"id": i, "array": np.full(500, i)} for i in range(2000)}


@pytest.fixture(scope="module")
def words():
    return SharedDict(WORDS)


def test_values_are_found_by_their_keys(words):
    assert isinstance(words, Mapping) and len(words) == 2000
    assert list(words) == list(WORDS) == list(words.keys())
    assert all(words[key]["id"] == value["id"] for key, value in WORDS.items())
    assert (words["key 77"]["array"] == 77).all() and torchshm.is_shared(words["key 77"]["array"])
    assert [key for key, value in words.items() if value["id"] == 5] == ["key 5"]
    assert words.get("nothing") is None and words.get("nothing", 3) == 3
    assert "key 5" in words and "nothing" not in words and 5 not in words and None not in words
    with pytest.raises(KeyError, match="nothing"):
        words["nothing"]
    with pytest.raises(TypeError):
        words["a"] = 1
    with pytest.raises(TypeError, match="unhashable"):
        words.get([])


keys = st.recursive(
    st.text(st.characters(codec=None), max_size=20) | st.binary(max_size=20) | st.integers(),
    lambda key: st.lists(key, max_size=3).map(tuple),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(keys, st.integers()), max_size=60), st.lists(keys, max_size=10))
def test_it_equals_the_dict_of_the_same_pairs(pairs, others):
    wanted, got = dict(pairs), SharedDict(iter(pairs))
    assert got == wanted and list(got.items()) == list(wanted.items())
    assert [type(key) for key in got] == [type(key) for key in wanted]
    for key in others:
        assert got.get(key) == wanted.get(key) and (key in got) == (key in wanted)
    assert pickle.loads(torchshm.dumps(got)) == wanted == pickle.loads(pickle.dumps(got))


def test_equal_keys_of_other_types_are_found():
    class Number(enum.IntEnum):
        FIVE = 5

    class Text(str):
        __slots__ = ()

    items = SharedDict({5: "five", 1: "one", "text": "text", (1, 2): "pair"})
    assert items[np.int64(5)] == items[Number.FIVE] == items[5.0] == "five" and items[True] == "one"
    assert items[np.str_("text")] == items[Text("text")] == "text" and items[np.int8(1), 2] == "pair"
    assert 5.5 not in items and b"text" not in items and ("1", "2") not in items and object() not in items


def test_equal_keys_of_other_types_are_found_in_tuples():
    class Name(str, enum.Enum):
        A = "a"

    class One(enum.IntEnum):
        ONE = 1

    pair = collections.namedtuple("pair", "a b")
    plain = {(1, 2): "pair", ("a", 1): "name", 1: "one", "a": "letter", ((1, 2), "a"): "deep"}
    items = SharedDict(plain)
    keys = [
        *(pair(1, 2), (1.0, 2), (True, 2), (Name.A, 1), ("a", One.ONE), pair(pair(1, 2.0), Name.A)),
        *(np.True_, np.float32(1), np.float64(1), 1 + 0j, decimal.Decimal(1), Name.A, One.ONE),
        *(pair(1, 3), (1.5, 2), (None, 2), np.float32(1.5), 1 + 1j, float("inf"), float("nan"), (object(),)),
    ]
    for key in keys:
        assert items.get(key) == plain.get(key), key
    with pytest.raises(TypeError, match="unhashable"):
        items.get(pair([], 1))


def test_it_is_read_backwards_and_copied():
    items = SharedDict({"a": 1, "b": 2})
    assert list(reversed(items)) == ["b", "a"] and items.copy() == {"a": 1, "b": 2}


@pytest.mark.parametrize("key", [None, 1.5, frozenset(), ("a", None), object()])
def test_other_keys_are_refused(key):
    with pytest.raises(TypeError, match="a key of a SharedDict is"):
        SharedDict({key: 1})


def test_the_last_of_equal_keys_counts():
    pairs = [(i % 10, i) for i in range(1000)]
    items = SharedDict(pairs)
    assert items == dict(pairs) and list(items) == list(dict(pairs)) and repr(items).endswith("...}>")


def test_an_empty_one_is_empty():
    assert (
        dict(SharedDict()) == {} and "a" not in SharedDict() and repr(SharedDict()) == "<SharedDict of 0: {}>"
    )


def test_other_processes_look_up_in_the_same_memory(words, peer):
    live = torchshm.stats()["live_bytes"]
    assert len(torchshm.dumps(words)) < 2000
    peer.call(keep, "words", words)
    assert peer.call(_look_up, "key 1999") == (1999, True)
    assert torchshm.stats()["live_bytes"] == live


def _look_up(key):
    return kept["words"][key]["id"], "nothing" not in kept["words"]


def test_hashes_are_the_same_in_every_process(words):
    """str's hash() differs between these."""
    code = "import pickle, sys; d = pickle.load(sys.stdin.buffer); assert all(d[k]['id'] == int(k[4:]) for k in list(d))"
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps(words),
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )


def test_an_item_that_cannot_be_pickled_is_told():
    with pytest.raises(pickle.PicklingError, match="item 1 can't be pickled"):
        SharedDict({"a": 1, "b": lambda: 0})
