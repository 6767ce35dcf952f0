"""Arrow memory in pickles: slices ship themselves, pooled memory stays where it is, and what is odd pickles as it always did."""

from __future__ import annotations

import gc
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from peer import give
from scripts import passes
from shareable import N, buffers, rng, table, words

import torchshm

pytestmark = pytest.mark.usefixtures("registered")


def live() -> int:
    gc.collect()
    return torchshm.stats()["live_bytes"]


class Half(pa.ExtensionType):
    """Known by its class, and not registered under its name."""

    def __init__(self) -> None:
        super().__init__(pa.float64(), "tests.half")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage, serialized):
        return cls()


def arrays():
    texts = pa.array([None, *words(20 * N - 1)])
    numbers = pa.array(np.arange(20.0 * N))
    return {
        "numbers": numbers,
        "missing": pa.array(np.arange(20 * N), mask=np.arange(20 * N) % 3 == 0),
        "text": texts,
        "large text": texts.cast(pa.large_string()),
        "flags": pa.array(np.arange(20 * N) % 3 == 0),
        "dictionary": texts.dictionary_encode(),
        "lists": pa.ListArray.from_arrays(np.arange(0, 10 * N + 1, dtype="i4"), numbers),
        "structs": pa.StructArray.from_arrays([numbers, texts], ["a", "b"]),
        "extension": pa.ExtensionArray.from_storage(Half(), numbers),
    }


ARRAYS = arrays()
several = pytest.mark.parametrize("kind", ARRAYS)


@several
@pytest.mark.parametrize("length", [10, 5 * N])
def test_slice_ships_its_slice(kind, length):
    whole = ARRAYS[kind]
    part = whole[N + 3 : N + 3 + length]
    stock = len(pickle.dumps(part))
    before = live()
    b = torchshm.dumps(part)
    shipped = len(b) + live() - before
    assert shipped < 1.3 * part.nbytes + 40_000 < stock
    got = torchshm.loads(b)
    assert got.equals(part) and got.type == part.type
    got.validate(full=True)


def test_large_slice_is_written_straight_into_one_block():
    part = ARRAYS["missing"][N + 3 : 15 * N]
    blocks = torchshm.stats()["blocks"]
    y = torchshm.share(part)
    assert torchshm.stats()["blocks"] == blocks + 1
    assert y.equals(part)


@several
def test_shared_slice_is_in_the_pool(peer, kind):
    part = ARRAYS[kind][N + 3 : 6 * N]
    before = live()
    y = torchshm.share(part)
    assert y.equals(part) and y.type == part.type
    assert all(map(torchshm.is_shared, buffers(y)))
    assert live() - before < 1.3 * part.nbytes + 100_000
    before = live()
    if kind != "extension":  # the peer does not know the class
        assert peer.call(give, y).equals(part)
    assert live() == before


def test_slice_of_a_table_ships_its_slice(peer):
    whole = pa.concat_tables([table()] * 5).combine_chunks().drop_columns(["view"])
    whole = whole.append_column("rare", pa.array(range(5 * N)).cast(pa.decimal128(20)))
    part = whole[N : N + 50]
    before = live()
    b = torchshm.dumps(part)
    assert len(b) + live() - before < 60_000
    assert peer.call(give, part).equals(part)
    frame = whole.to_pandas(types_mapper=pd.ArrowDtype)[N : N + 50]
    before = live()
    b = torchshm.dumps(frame)
    assert len(b) + live() - before < 60_000
    pd.testing.assert_frame_equal(peer.call(give, frame), frame)


def test_slice_of_a_shared_array_is_sent_by_reference(peer):
    y = torchshm.share(ARRAYS["text"])
    part = y[N : 9 * N]
    before = live()
    b = torchshm.dumps(part)
    assert live() == before
    got = torchshm.loads(b)
    assert [x.address for x in buffers(got)] == [x.address for x in buffers(part)]
    assert peer.call(give, part).equals(part)


def test_slice_of_what_came_in_a_message_ships_its_slice(peer):
    whole = peer.call(give, ARRAYS["numbers"])
    assert all(map(torchshm.is_shared, buffers(whole)))
    peer.call(give, None)  # it has dropped what it sent
    before = live()
    b = torchshm.dumps(whole[5:10])
    assert len(b) + live() - before < 10_000
    assert torchshm.loads(b).equals(whole[5:10])


@pytest.mark.parametrize("mode", ["c", "r", "r+"])
def test_immutable_buffers_stay_immutable(peer, mode):
    fixed = pa.py_buffer(bytes(N))
    open_ = pa.py_buffer(bytearray(N))
    assert not torchshm.share(fixed, mode).is_mutable
    assert torchshm.share(open_, mode).is_mutable == (mode != "r")
    assert not peer.call(give, fixed).is_mutable
    assert peer.call(give, open_).is_mutable


@pytest.mark.parametrize("size", [0, 1, 100, N])
def test_buffers_of_any_size(peer, size):
    x = pa.py_buffer(bytes(size))
    assert peer.call(give, x).equals(x)
    assert torchshm.share(x).equals(x)


def test_text_of_pandas_is_not_copied_to_be_pickled():
    y = torchshm.share(pd.Series(words(), dtype="str"))
    got = torchshm.loads(torchshm.dumps(y))
    places = [[b.address for b in buffers(x.array._pa_array)] for x in (y, got)]
    assert places[0] == places[1]


def test_text_of_pandas_keeps_its_chunks():
    x = pd.concat([pd.Series(words(), dtype="str")] * 3, ignore_index=True)
    assert x.array._pa_array.num_chunks == 3
    y = torchshm.share(x)
    pd.testing.assert_series_equal(y, x)
    y.iloc[N] = "changed"
    assert (y.iloc[N], x.iloc[N]) == ("changed", words()[0])
    pd.testing.assert_series_equal(torchshm.share(x[:0]), x[:0])


def test_polars_slice_ships_its_slice(peer):
    pl = pytest.importorskip("polars")
    x = pl.DataFrame({"f": rng().random(20 * N), "text": ["x" * 30 + w for w in words(20 * N)]})
    part = x[N : N + 100]
    before = live()
    b = torchshm.dumps(part)
    assert len(b) + live() - before < 50_000
    assert peer.call(give, part).equals(part)


def test_polars_types_that_arrow_does_not_keep_pickle_as_they_did(peer):
    pl = pytest.importorskip("polars")
    x = pl.DataFrame(
        {
            "enum": pl.Series(["a", "b"] * N, dtype=pl.Enum(["a", "b"])),
            "category": pl.Series(["a", "b"] * N, dtype=pl.Categorical),
            "wide": pl.Series(range(2 * N), dtype=pl.Int128),
            "f": rng().random(2 * N),
        }
    )
    for got in (peer.call(give, x), torchshm.share(x)):
        assert got.equals(x) and got.schema == x.schema
    for odd in (pl.DataFrame(), pl.DataFrame({"a": []}), pl.Series(), x.lazy()):
        got = peer.call(give, odd)
        assert type(got) is type(odd)
        assert isinstance(odd, pl.LazyFrame) or got.equals(odd)


def test_unregister_takes_the_reducers_of_arrow_away():
    kinds = (pa.Buffer, pa.Table, pa.Int64Array, pd.arrays.ArrowStringArray)
    assert [kind in ForkingPickler._extra_reducers for kind in kinds] == [True, False, True, True]
    torchshm.unregister()
    assert not any(kind in ForkingPickler._extra_reducers for kind in kinds)


def test_reducers_come_when_their_library_is_imported(tmp_path):
    passes(
        """
        import sys
        from multiprocessing.reduction import ForkingPickler
        import pickle, torchshm
        def own(x):
            return x.__reduce__()
        torchshm.register()
        assert not {"pyarrow", "pandas", "polars"} & set(sys.modules)
        table = ForkingPickler._extra_reducers
        before = dict(table)
        import pyarrow as pa
        assert pa.Buffer in table and pa.DoubleArray in table
        torchshm.unregister()
        assert pa.Buffer not in table
        ForkingPickler.register(pa.DoubleArray, own)
        torchshm.register()
        assert table[pa.DoubleArray] is not own
        x = pa.array(range(100_000))
        y = pickle.loads(ForkingPickler.dumps(x))
        assert y.equals(x) and torchshm.is_shared(y.buffers()[1])
        torchshm.unregister()
        assert table[pa.DoubleArray] is own
        assert not torchshm.is_shared(pickle.loads(ForkingPickler.dumps(x)).buffers()[1])
        """,
        tmp_path,
    )


@pytest.mark.parametrize(
    "before",
    [
        "import importlib.util; assert all(map(importlib.util.find_spec, ('pyarrow', 'pandas', 'polars')))",
        "import polars",
        "import pandas",
        "import pyarrow, polars",
    ],
)
def test_reducers_come_however_their_libraries_are_looked_for(tmp_path, before):
    """Libraries ask for the specs of others, to know whether they are there; the loader of that spec is never run."""
    pytest.importorskip("polars")
    passes(
        f"""
        from multiprocessing.reduction import ForkingPickler
        import torchshm
        torchshm.register()
        {before}
        import pyarrow as pa, pandas as pd, polars as pl
        table = ForkingPickler._extra_reducers
        assert all(kind in table for kind in (pa.Buffer, pd.arrays.ArrowStringArray, pl.DataFrame))
        for x in (pa.table({{"a": range(100_000)}}), pl.DataFrame({{"a": range(100_000)}})):
            assert len(ForkingPickler.dumps(x)) < 5000
        """,
        tmp_path,
    )


def test_reducers_come_after_an_import_that_failed(tmp_path):
    passes(
        """
        import pathlib, sys
        from torchshm._arrivals import WhenImported
        came = []
        waiting = WhenImported("late", lambda: came.append(sys.modules["late"].done))
        waiting.wait()
        def fails(kind):
            try:
                import late
            except kind:
                return not came
        assert fails(ImportError)
        here = pathlib.Path(sys.path[0])
        sys.path_importer_cache.clear()
        (here / "late.py").write_text("raise ValueError")
        assert fails(ValueError)
        (here / "late.py").unlink()
        (here / "late").mkdir()
        (here / "late" / "__init__.py").write_text("done = True")
        sys.path_importer_cache.clear()
        import late
        assert came == [True] and waiting not in sys.meta_path
        """,
        tmp_path,
    )


def test_other_finders_may_ask_all_finders(tmp_path):
    """As those of tracing tools do; the reducers come once."""
    passes(
        """
        import importlib.util, pathlib, sys
        from torchshm._arrivals import WhenImported
        class Asks:
            asking = False
            def find_spec(self, name, path=None, target=None):
                if name != "asked" or self.asking:
                    return None
                self.asking = True
                try:
                    return importlib.util.find_spec(name)
                finally:
                    self.asking = False
        came = []
        sys.meta_path.insert(0, Asks())
        WhenImported("asked", lambda: came.append(sys.modules["asked"].done)).wait()
        (pathlib.Path(sys.path[0]) / "asked.py").write_text("done = True")
        import asked
        assert came == [True]
        """,
        tmp_path,
    )


def test_nothing_comes_after_unregister(tmp_path):
    passes(
        """
        import importlib.util
        from multiprocessing.reduction import ForkingPickler
        import torchshm
        before = dict(ForkingPickler._extra_reducers)
        torchshm.register()
        spec = importlib.util.find_spec("pyarrow")
        torchshm.unregister()
        import pyarrow
        spec.loader.exec_module(pyarrow)
        assert ForkingPickler._extra_reducers == before
        """,
        tmp_path,
    )


@pytest.mark.parametrize("registered", [False, True])
def test_share_and_dumps_know_what_was_imported_unnoticed(tmp_path, registered):
    passes(
        f"""
        import sys
        import torchshm
        if {registered}:
            torchshm.register()
        finders = list(sys.meta_path)
        sys.meta_path[:] = [each for each in finders if "torchshm" not in type(each).__module__]
        import pyarrow as pa
        part = pa.array(range(1_000_000))[5:1000]  # imports pandas
        sys.meta_path[:] = finders
        assert len(torchshm.dumps(part)) < 1000
        with torchshm.inline():
            assert len(torchshm.dumps(part)) < 10_000_000
        before = torchshm.stats()["live_bytes"]
        y = torchshm.share(part)
        assert y.equals(part) and torchshm.is_shared(y.buffers()[1])
        assert torchshm.stats()["live_bytes"] - before < 50_000
        """,
        tmp_path,
    )


def test_full_pool_pickles_arrow_as_it_always_was(tmp_path):
    passes(
        """
        import warnings
        import pyarrow as pa, torchshm
        torchshm.register(limit="8MiB")
        x = pa.array([float(i) for i in range(4 << 20)])
        warnings.simplefilter("ignore")
        for part in (x, x[5 : 2 << 20]):
            got = torchshm.loads(torchshm.dumps(part))
            assert got.equals(part) and not torchshm.is_shared(got.buffers()[1])
            try:
                torchshm.share(part)
            except torchshm.PoolFullError:
                pass
            else:
                raise AssertionError
        """,
        tmp_path,
    )


def test_process_without_a_pool_pickles_slices_too(tmp_path):
    """A child that found no free lease has the reducers, and no pool."""
    passes(
        """
        import pickle
        from multiprocessing.reduction import ForkingPickler
        import pyarrow as pa
        from torchshm import _C, _arrow
        _arrow.install()
        whole = pa.array([float(i) for i in range(1 << 20)])
        for part in (whole, whole[5:100], whole[5 : 1 << 19]):
            b = ForkingPickler.dumps(part)
            assert len(b) < part.nbytes + 1000
            assert pickle.loads(b).equals(part)
        assert not _C.is_member()
        """,
        tmp_path,
    )
