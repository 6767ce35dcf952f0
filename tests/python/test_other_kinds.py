"""What is not a plain ndarray of plain data crosses as it always did: objects, StringDType, subclasses, masked arrays."""

from __future__ import annotations

import copyreg
import multiprocessing.reduction
import pickle
import warnings

import numpy as np
import pytest
from numpy.ma import mrecords
from peer import give
from same import assert_same, assert_same_values

import torchshm

pytestmark = pytest.mark.usefixtures("all_pooled")


class Measured(np.ndarray):
    """A subclass whose state is an attribute, as in numpy's guide to subclassing."""

    def __new__(cls, values, unit):
        self = np.asarray(values).view(cls)
        self.unit = unit
        return self

    def __array_finalize__(self, source):
        self.unit = getattr(source, "unit", None)

    def __reduce__(self):
        function, arguments, state = super().__reduce__()
        return function, arguments, (state, self.unit)

    def __setstate__(self, state):
        super().__setstate__(state[0])
        self.unit = state[1]


class Bare(np.ndarray):
    """A subclass that says nothing about pickling."""


class Counted(np.ndarray):
    """A subclass whose pickling is set through copyreg."""


def _rebuild_counted(values):
    return np.asarray(values, dtype="f8").view(Counted)


copyreg.pickle(Counted, lambda array: (_rebuild_counted, (array.tolist(),)))


def masked(fill_value=None, mask=True, dtype="f8", hard=False, subclass=None):
    data = np.arange(600).astype(dtype).reshape(20, 30)
    array = np.ma.MaskedArray(data, mask=(data.astype("i8") % 7 == 0) if mask else np.ma.nomask)
    if fill_value is not None:
        array.fill_value = fill_value
    if hard:
        array.harden_mask()
    return array


STRUCT = np.dtype([("a", "i4"), ("b", "f8", (2,))])
AS_STOCK = {
    "objects": np.array([1, "two", None, [3], {"four": 4.0}], dtype=object),
    "objects in two dimensions": np.array([[1, "two"], [None, 2**100]], dtype=object)[:, ::-1],
    "objects in a struct": np.array([(1, "one"), (2, None)], dtype=[("n", "i4"), ("o", object)]),
    "objects in a sub-array": np.array([(["one", "two"],)], dtype=[("o", object, (2,))]),
    "strings": np.array(
        ["a", "a longer string than is kept inside the array", ""], dtype=np.dtypes.StringDType()
    ),
    "missing strings": np.array(["a", None], dtype=np.dtypes.StringDType(na_object=None)),
    "subclass with state": Measured(np.arange(3000.0).reshape(30, 100), "kPa"),
    "bare subclass": np.arange(3000.0).view(Bare),
    "copyreg": np.arange(3000.0).view(Counted),
    "chararray": np.char.array(["one", "two", "three"] * 100),
    "scalar": np.float32(1.5),
    "scalar struct": np.array([(1, (2.0, 3.0))], dtype=STRUCT)[0],
    "dtype": STRUCT,
    "empty": np.empty((0, 3), "f4"),
    "items without bytes": np.zeros((4,), "V0"),
}
MASKED = {
    "some": masked(),
    "nomask": masked(mask=False),
    "fill value": masked(fill_value=-999.0),
    "ints": masked(fill_value=7, dtype="i2"),
    "text": np.ma.array(["a", "b", "c"] * 200, mask=[True, False, False] * 200, fill_value="?"),
    "hard mask": masked(hard=True),
    "view": masked()[::2, 5:],
    "transposed": masked().T,
    "read-only": masked(),
    "0-d": np.ma.array(3.0, mask=True),
    "dates": np.ma.array(np.arange(500).astype("M8[h]"), mask=np.arange(500) % 3 == 0),
    "structured": np.ma.array(
        np.zeros(200, STRUCT),
        mask=np.array([(True, (False, True))] * 200, dtype=[("a", "?"), ("b", "?", (2,))]),
    ),
    "records": mrecords.fromarrays(
        [np.arange(300), np.ma.array(np.arange(300.0), mask=[True, False] * 150)], names="a,b"
    ),
    "objects": np.ma.array([1, None, "three"], mask=[False, True, False], dtype=object),
}
MASKED["read-only"].flags.writeable = False


def matrix(values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(values)


VIEWS = {
    "matrix": matrix(np.arange(900.0).reshape(30, 30)),
    "matrix, Fortran": matrix(np.asfortranarray(np.arange(900.0).reshape(30, 30))),
    "matrix, strided": matrix(np.arange(900.0).reshape(30, 30))[::2, ::-1],
    "recarray": np.rec.array(
        [(i, i / 2, str(i)) for i in range(300)], dtype=[("a", "i4"), ("b", "f8"), ("c", "U4")]
    ),
    "recarray, strided": np.rec.array([(i, i / 2) for i in range(300)], dtype=[("a", "i4"), ("b", "f8")])[
        ::-2
    ],
    "recarray of records": np.recarray((50,), dtype=[("a", "i4"), ("in", [("x", "f4"), ("y", "f4")])]),
}
VIEWS["recarray of records"].view("u1")[:] = 3


def assert_equal_objects(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(wanted, np.ndarray):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.strides == wanted.strides
        assert repr(got.tolist()) == repr(wanted.tolist())
        assert got.flags.writeable == wanted.flags.writeable
        assert getattr(got, "__dict__", None) == getattr(wanted, "__dict__", None)
    else:
        assert got == wanted


@pytest.mark.parametrize("name", AS_STOCK)
def test_what_cannot_be_pooled_is_pickled_as_ever_and_equal(peer, name):
    x = AS_STOCK[name]
    ours = bytes(multiprocessing.reduction.ForkingPickler.dumps(x))
    assert ours == pickle.dumps(x)
    assert_equal_objects(peer.call(give, x), pickle.loads(pickle.dumps(x)))


@pytest.mark.parametrize("name", AS_STOCK)
def test_share_of_what_cannot_be_pooled_gives_an_equal_copy(name):
    got = torchshm.share(AS_STOCK[name])
    assert_equal_objects(got, pickle.loads(pickle.dumps(AS_STOCK[name])))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("way", ["message", "share"])
def test_masked_array_arrives_as_pickle_delivers_it(peer, name, way):
    x = MASKED[name]
    wanted = pickle.loads(pickle.dumps(x))
    if way == "message":  # there and back
        wanted = pickle.loads(pickle.dumps(wanted))
    got = peer.call(give, x) if way == "message" else torchshm.share(x)
    assert type(got) is type(wanted)
    assert (got.mask is np.ma.nomask) == (wanted.mask is np.ma.nomask)
    assert got.mask.dtype == wanted.mask.dtype
    assert repr(got.mask.tolist()) == repr(wanted.mask.tolist())
    assert repr(got.data.tolist()) == repr(wanted.data.tolist())
    assert type(got.data) is type(wanted.data)
    assert got.dtype == wanted.dtype
    assert got.data.strides == wanted.data.strides
    assert repr(got.fill_value) == repr(wanted.fill_value)
    assert got._hardmask == wanted._hardmask
    assert got._sharedmask == wanted._sharedmask
    assert got._baseclass is wanted._baseclass
    assert got.flags.writeable == wanted.flags.writeable
    assert got._optinfo == wanted._optinfo


def test_large_masked_array_takes_its_buffers_through_the_pool(peer):
    got = peer.call(give, np.ma.masked_less(np.arange(5000.0), 7))
    assert torchshm.is_shared(got.data)
    assert torchshm.is_shared(got.mask)


@pytest.mark.parametrize("name", VIEWS)
def test_matrix_and_recarray_arrive_through_the_pool_as_pickle_delivers_them(peer, name):
    x = VIEWS[name]
    wanted = pickle.loads(pickle.dumps(x))
    got = peer.call(give, x)
    assert_same(got, wanted)
    assert got.__dict__ == wanted.__dict__
    if isinstance(x, np.recarray):
        assert type(got[0]) is type(wanted[0]) is np.record
        assert got["a"].tolist() == got.a.tolist() == wanted.a.tolist()


@pytest.mark.parametrize("name", VIEWS)
def test_shared_matrix_and_recarray_keep_their_type_over_the_pool(name):
    shared = torchshm.share(VIEWS[name])
    assert torchshm.is_shared(shared)
    assert_same(shared, pickle.loads(pickle.dumps(VIEWS[name])))


def test_memmap_arrives_as_pickle_delivers_it(peer, tmp_path):
    """A mapped file's array is a subclass, pickled by value as ever."""
    x = np.memmap(tmp_path / "numbers", "f8", "w+", shape=(40, 50))
    x[:] = np.arange(2000).reshape(40, 50)
    wanted = pickle.loads(pickle.dumps(x))
    got = peer.call(give, x)
    assert type(got) is type(wanted)
    assert_same_values(got, wanted)
    plain = peer.call(give, np.asarray(x))
    assert_same(plain, pickle.loads(pickle.dumps(np.asarray(x))))


def test_objects_hold_arrays_that_are_pooled():
    """An object array is pickled as ever, and what its items are goes their own way."""
    inner = np.arange(5000.0)
    x = np.array([inner, None], dtype=object)
    got = torchshm.share(x)
    assert torchshm.is_shared(got[0])
    assert_same(got[0], pickle.loads(pickle.dumps(inner)))
