"""Python objects are never in the pool, whatever way an object array is made inside pooled()."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from peer import give

import torchshm
from torchshm import _C

pytestmark = pytest.mark.usefixtures("registered")

ITEMS = [1, "two", None, [3], 2.5]
STRUCT = np.dtype([("n", "i4"), ("o", object)])


def grown():
    x = np.empty(3, object)
    x[:] = ITEMS[:3]
    x.resize(10_000, refcheck=False)
    return x


def shrunk():
    x = np.empty(10_000, object)
    x[:5] = ITEMS
    x.resize(4, refcheck=False)
    return x


def stored():
    file = io.BytesIO()
    np.save(file, np.array(ITEMS * 1000, object), allow_pickle=True)
    return file.getvalue()


def received():
    ours, theirs = multiprocessing.Pipe()
    ours.send(np.array(ITEMS * 100, object))
    return theirs.recv()


STORED = stored()
WAYS = {
    "array": lambda: np.array(ITEMS, dtype=object),
    "ragged": lambda: np.array([[1, 2], [3, 4, 5]], dtype=object),
    "empty": lambda: np.empty(5000, object),
    "full": lambda: np.full(5000, "a text", object),
    "ones": lambda: np.ones(5000, object),
    "zeros": lambda: np.zeros(5000, object),
    "astype": lambda: np.arange(5000).astype(object),
    "astype of text": lambda: np.array(["one", "two"]).astype("O"),
    "fromiter": lambda: np.fromiter(({"n": n} for n in range(5000)), object),
    "concatenate": lambda: np.concatenate([np.arange(5000), np.array(ITEMS, object)]),
    "stack": lambda: np.stack([np.array(ITEMS, object)] * 50),
    "copy": lambda: np.array(ITEMS, object).copy(),
    "deep copy": lambda: copy.deepcopy(np.array(ITEMS, object)),
    "sum": lambda: np.array([1, 2.5, 2**100] * 1000, object) + 1,
    "ufunc of objects": lambda: np.frompyfunc(lambda n: [n], 1, 1)(np.arange(5000)),
    "vectorize": lambda: np.vectorize(lambda n: [n], otypes=[object])(np.arange(5000)),
    "fancy index": lambda: np.array(ITEMS, object)[np.zeros(5000, int)],
    "mask": lambda: np.array(ITEMS, object)[[True, False, True, True, False]],
    "sort": lambda: np.sort(np.array([3, 1, 2] * 1000, object)),
    "repeat": lambda: np.repeat(np.array(ITEMS, object), 1000),
    "where": lambda: np.where(np.arange(5000) > 7, "a", None),
    "struct": lambda: np.empty(5000, STRUCT),
    "struct of values": lambda: np.array([(1, "one"), (2, None)] * 1000, STRUCT),
    "field of a struct": lambda: np.array([(1, "one"), (2, None)], STRUCT)["o"].copy(),
    "sub-array": lambda: np.empty(500, [("o", object, (3,))]),
    "empty_like": lambda: np.empty_like(np.arange(5000), dtype=object),
    "strings": lambda: np.array(["a long enough text to be kept apart"] * 100, dtype=np.dtypes.StringDType()),
    "flatten": lambda: np.array([[1, None], ["a", 2.5]], object).flatten(),
    "F order": lambda: np.empty((50, 60), object, order="F"),
    "put together": lambda: np.block([[np.array(ITEMS, object)], [np.array(ITEMS, object)]]),
    "delete": lambda: np.delete(np.array(ITEMS, object), 1),
    "grown": grown,
    "shrunk": shrunk,
}


UNPICKLED = {
    "unpickled": lambda: pickle.loads(pickle.dumps(np.array(ITEMS * 1000, object))),
    "loaded": lambda: np.load(io.BytesIO(STORED), allow_pickle=True),
    "received": received,
}


@pytest.mark.parametrize("name", WAYS)
def test_object_array_is_never_in_the_pool(name):
    wanted = WAYS[name]()
    with torchshm.pooled():
        got = WAYS[name]()
    assert not torchshm.is_shared(got)
    assert not _C.holds_address(got.ctypes.data)
    assert repr(got.tolist()) == repr(wanted.tolist())
    assert repr(torchshm.loads(torchshm.dumps(got)).tolist()) == repr(wanted.tolist())


@pytest.mark.parametrize("name", UNPICKLED)
def test_object_array_that_is_unpickled_inside_is_never_sent_by_handle(peer, name):
    """NumPy does not say what it wants this memory for: docs/differences.md lists it."""
    wanted = UNPICKLED[name]()
    before = torchshm.stats()["blocks"]
    with torchshm.pooled():
        got = UNPICKLED[name]()
    assert not torchshm.is_shared(got)
    assert bytes(ForkingPickler.dumps(got)) == pickle.dumps(got)
    back = peer.call(give, got)
    assert repr(back.tolist()) == repr(got.tolist()) == repr(wanted.tolist())
    got[:] = None
    del got
    assert torchshm.stats()["blocks"] == before
