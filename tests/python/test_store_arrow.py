"""Arrow's tables, and the frames of polars and pandas over it, lie in a store buffer by buffer, and are loaded without a copy."""

import gc
import os
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing.parametric import dataframes
from scripts import passes

import torchshm

pytestmark = pytest.mark.apart

N = 200_000
TEXTS = pa.array([f"text {i}" for i in range(N)])


def buffers_of(array):
    return [each for each in array.buffers() if each is not None and each.size > 0]


def lies_in_store(array):
    found = buffers_of(array)
    return len(found) > 0 and all(torchshm._C.holds_address(each.address) for each in found)


def tables():
    numbers = pa.array(np.arange(N))
    return {
        "plain": pa.table({"n": numbers, "s": TEXTS}),
        "with nulls": pa.table({"n": pa.array([None, 1, 2] * 30_000), "s": pa.array([None, "a"] * 45_000)}),
        "chunked": pa.table({"n": pa.chunked_array([numbers[: N // 2], numbers[: N // 2]])}),
        "dictionary": pa.table({"d": pa.array(["a", "b"] * N).dictionary_encode()}),
        "nested": pa.table({"l": pa.array([[1, 2], None, []] * 9000), "r": pa.array([{"x": 1.5}] * 27_000)}),
        "empty": pa.table({"n": numbers[:0]}),
        "no columns": pa.table({}),
    }


@pytest.mark.parametrize("name", list(tables()))
def test_tables_come_back(store, name):
    table = tables()[name].replace_schema_metadata({"k": "v"})
    store["t"] = table
    got = store.load("t", allow_pickle=True)
    assert got.equals(table) and got.schema.equals(table.schema, check_metadata=True)
    got.validate(full=True)
    for column in got.columns:
        assert all(lies_in_store(chunk) for chunk in column.chunks if len(chunk))


def test_a_batch_an_array_and_a_buffer_come_back(store):
    batch = pa.record_batch({"n": np.arange(N)})
    for value in (batch, TEXTS, pa.array([1.5, None] * N), pa.chunked_array([TEXTS])):
        store["v"] = value
        assert store.load("v", allow_pickle=True).equals(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the version of DLPack that NumPy asks for
        store["v"] = pa.array([1.5] * N)
    assert type(store["v"]) is np.ndarray  # as of other exporters of DLPack
    store["v"] = [pa.py_buffer(b"0" * N)]
    (got,) = store.load("v", allow_pickle=True)
    assert bytes(got) == b"0" * N


def test_saving_holds_nothing_afterwards(store):
    """Not until the garbage collector comes either."""

    def held():
        (mine,) = (each for each in store.info()["processes"] if each["pid"] == os.getpid())
        return mine["held_blocks"]

    gc.collect()
    gc.disable()
    try:
        before = held()
        store.save("table", tables()["plain"])
        assert held() == before
        loaded = store.load("table", allow_pickle=True)
        assert held() > before
        del loaded
        assert held() == before
    finally:
        gc.enable()


def test_what_is_loaded_is_named_again_without_a_copy(store):
    store["t"] = tables()["plain"]
    before = store.info()["blocks"], store.info()["live_bytes"]
    store["again"] = store.load("t", allow_pickle=True)
    after = store.info()["blocks"], store.info()["live_bytes"]
    assert after[1] - before[1] < 1 << 16  # the text, and what is smaller than it is worth to name
    assert store.load("again", allow_pickle=True).equals(tables()["plain"])


@pytest.mark.parametrize("rows", [10, 100_000])
def test_a_slice_takes_what_it_looks_at(store, rows):
    table = pa.table({"s": TEXTS, "n": np.arange(N)}).slice(1000, rows)
    store["t"] = table
    assert store.info("t")["bytes"] < 2 * table.nbytes + (64 << 10)
    assert store.load("t", allow_pickle=True).equals(table)


def frame():
    return pl.DataFrame(
        {"n": np.arange(N), "s": [f"text number {i} that is long" for i in range(N)], "f": np.ones(N)}
    )


def test_a_frame_of_polars_comes_back_in_place(store):
    wanted = frame().with_columns(pl.col("n").set_sorted())
    store["f"] = wanted
    got = store.load("f", allow_pickle=True)
    assert got.equals(wanted) and got.schema == wanted.schema and got["n"].flags["SORTED_ASC"]
    assert len(store._core.find("f")["text"]) < 4096
    assert torchshm.is_shared(got["n"].to_numpy()) and torchshm.is_shared(got["f"].to_numpy())
    store["series"] = wanted["s"]
    assert store.load("series", allow_pickle=True).equals(wanted["s"])


def test_a_slice_of_polars_takes_what_it_looks_at(store):
    store["f"] = part = frame().slice(5000, 100)
    assert store.info("f")["bytes"] < 64 << 10
    assert store.load("f", allow_pickle=True).equals(part)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(dataframes(max_cols=4, max_size=9, excluded_dtypes=[pl.Object]), st.booleans())
def test_frames_of_every_type_come_back(store, wanted, more):
    wanted = pl.concat([wanted, wanted], rechunk=False) if more else wanted
    store["f"] = wanted
    got = store.load("f", allow_pickle=True)
    assert got.schema == wanted.schema and got.equals(wanted, null_equal=True)


def test_a_frame_of_pandas_over_arrow_comes_back(store):
    wanted = pd.DataFrame({"s": pd.array(TEXTS.to_pylist(), dtype="string[pyarrow]"), "n": np.arange(N)})
    wanted["a"] = pd.array(np.arange(N), dtype="int64[pyarrow]")
    store["f"] = wanted
    got = store.load("f", allow_pickle=True)
    pd.testing.assert_frame_equal(got, wanted)
    (chunk,) = got["a"].array._pa_array.chunks
    assert lies_in_store(chunk)


def test_polars_alone_is_saved_by_arrow_too_and_inline_changes_nothing(store, tmp_path):
    passes(
        f"""
        import sys
        import polars as pl
        import torchshm

        store = torchshm.connect({store.name!r})
        with torchshm.inline():
            store["f"] = pl.DataFrame({{"n": range(100_000), "s": ["some text"] * 100_000}})
        assert len(store._core.find("f")["text"]) < 4096
        got = store.load("f", allow_pickle=True)
        assert got["n"].sum() == 4999950000 and torchshm.is_shared(got["n"].to_numpy())
        """,
        tmp_path,
    )


def test_messages_go_where_they_went(store, registered):
    """While one thread saves and afterwards, another one's slices are written into its own pool."""
    table = tables()["plain"]
    store["t"] = table.slice(1000, N // 2)
    from torchshm import _arrow

    assert _arrow._saving.core is None
    block = _arrow._write(TEXTS[100:])
    assert store._core.refer(block.__array_interface__["data"][0], block.nbytes) is None
    with _arrow.saving(store._core):
        block = _arrow._write(TEXTS[100:])
        assert store._core.refer(block.__array_interface__["data"][0], block.nbytes) is not None
