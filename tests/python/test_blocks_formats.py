"""torchshm.data.blocks: values of all types go from rows to columns and from format to format without becoming others."""

from __future__ import annotations

import datetime
import functools

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xarray as xr

from torchshm.data import blocks
from torchshm.data.blocks._formats import FORMATS, convert
from torchshm.data.blocks._rows import column, size_of

pytestmark = pytest.mark.apart

NUMERIC = [*"bhilqBHILQefd?"]


def little(dataset, **more):
    return dataset.options(**{"memory": "64MiB", "block_size": "4KiB", "num_workers": 2, "seed": 1, **more})


def values(dataset, name="item"):
    return [row[name] for row in dataset.iter_rows()]


# ---- rows to columns


@pytest.mark.parametrize(
    "given",
    [
        [b"a\0", b"\0\0", b"", b"abc"],
        ["a\0", "b", ""],
        [1, "a", 2.5],
        [b"a", "a"],
        [None, 1, "x"],
        [{"a": 1}, [1, 2], (1, 2)],
        [["a", 1], ["b", 2]],
        [["a\0", "b"], ["c", "d"]],
        [2**63, -1],
        [2**53 + 1, 0.5],
        [2**70, 1],
        [np.uint64(2**63), np.int64(-1)],
        [datetime.date(2024, 1, 1), None],
        [np.datetime64("2024-01-01"), 3],
        [[1, 2], [3]],
    ],
    ids=str,
)
def test_a_column_has_the_values_of_its_rows_and_no_others(given):
    found = column(given)
    assert len(found) == len(given)
    assert [type(each) for each in found] == [type(each) for each in given]
    assert list(found) == given


def test_masked_values_are_refused_where_a_column_would_lose_the_mask():
    masked = np.ma.masked_array(np.arange(6.0), mask=[0, 1, 0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"'x' is a masked array.*filled"):
        blocks.from_arrays({"x": masked})
    plain = little(blocks.from_arrays({"x": masked.data}))
    with pytest.raises(ValueError, match=r"returned a column 'x' that is a masked array"):
        plain.map_batches(lambda batch: {"x": np.ma.masked_less(batch["x"], 3)}).count()
    with pytest.raises(ValueError, match="masked array"):
        plain.filter(lambda batch: np.ma.masked_less(batch["x"], 3) > 4).count()
    assert values(plain.map_batches(lambda batch: {"x": np.ma.masked_less(batch["x"], -1)}), "x") == [
        *range(6)
    ]
    structured = np.ma.masked_array(np.zeros(3, "i4,f8"), mask=[(0, 0), (0, 1), (0, 0)])
    with pytest.raises(ValueError, match="masked array"):
        blocks.from_arrays({"x": structured})
    assert values(little(blocks.from_arrays({"x": np.ma.masked_array(structured.data)})), "x")[1]["f0"] == 0
    inner = column([[masked[:2], masked[:2]], [masked[:2], masked[:2]]])
    assert inner.dtype == object and np.ma.is_masked(inner[0][0])
    assert column([(np.ma.masked, 1), (2, 3)]).dtype == object
    (row,) = values(little(blocks.from_iter([masked])))
    assert np.ma.is_masked(row) and row.mask[1]


def test_what_numpy_has_a_type_for_is_an_array_of_it():
    assert column([1, 2]).dtype == np.int64
    assert column([1, 2.5]).dtype == np.float64
    assert column([True, False]).dtype == np.bool_
    assert column(["a", "bc"]).dtype == "<U2"
    assert column([np.float32(1), np.float32(2)]).dtype == np.float32
    assert column([[1, 2], [3, 4]]).shape == (2, 2)
    assert column([["a", "b"], ["c", "d"]]).dtype == "<U1"
    assert column([np.zeros((2, 3)), np.ones((2, 3))]).shape == (2, 2, 3)
    assert column([np.array([b"a"]), np.array([b"b"])]).dtype == "S1"
    assert column([np.array([1]), np.array(["a"])]).dtype == object
    assert column([np.datetime64("2024-01-01"), np.datetime64("NaT")]).dtype.kind == "M"


def test_rows_of_other_types_that_come_later_stay_what_they_are():
    given = [*range(1500), *(f"w{n}" for n in range(1500)), *(n / 2 for n in range(1500)), b"end\0", None]
    dataset = little(blocks.from_iter(given, rows_per_batch=500))
    assert values(dataset) == given
    assert [row for batch in dataset.iter_batches(700) for row in batch["item"]] == given
    shuffled = [row for batch in dataset.shuffle().iter_batches(700) for row in batch["item"]]
    assert len(shuffled) == len(given) and set(shuffled) == set(given)


def test_bytes_come_back_from_workers_with_the_nuls_at_their_end():
    given = [bytes([n % 7, 0, 0][: n % 4]) for n in range(500)]
    assert values(little(blocks.from_iter(given))) == given
    assert values(little(blocks.from_iter(given)).shuffle(), "item").count(b"") == given.count(b"")
    returned = little(blocks.from_arrays({"i": np.arange(500)})).map_batches(
        lambda batch: {"i": batch["i"], "b": [bytes([n % 7, 0]) for n in batch["i"]]}
    )
    assert values(returned, "b") == [bytes([n % 7, 0]) for n in range(500)]


def test_objects_are_as_large_as_what_they_hold():
    words = np.array([b"x" * 1000] * 500, object)
    found = FORMATS["numpy"].nbytes({"word": words, "i": np.arange(500)})
    assert 500_000 < found < 600_000
    assert size_of([np.zeros(1000)] * 10) > 80_000
    assert size_of([["y" * 100] * 100] * 10) > 100_000
    assert size_of([{"a": b"z" * 1000}] * 10) > 10_000
    one = "ä" * 100
    before = size_of([one])
    one.encode()
    assert size_of([one]) == before  # its cached bytes do not count: blocks are cut by it


def test_blocks_of_objects_have_the_size_that_was_asked_for():
    given = np.array([bytes(100) for _ in range(2000)], object)
    found = list(little(blocks.from_arrays({"b": given}), block_size="20KiB").iter_blocks())
    assert 8 < len(found) < 20
    assert [row for block in found for row in block["b"]] == list(given)


def test_batches_of_an_iterator_are_checked():
    def uneven():
        yield {"a": np.arange(3), "b": np.arange(4)}

    with pytest.raises(ValueError, match="from_iter yielded columns that differ"):
        blocks.from_iter(uneven, batched=True).count()
    with pytest.raises(TypeError, match="from_iter yielded int"):
        blocks.from_iter(lambda: iter([3]), batched=True).count()
    assert values(blocks.from_iter(lambda: iter([{"a": [1, 2]}]), batched=True), "a") == [1, 2]


# ---- iterators


def test_an_iterator_is_gone_through_once_and_said_to_be():
    def rows():
        return ({"i": n} for n in range(100))

    assert blocks.from_iter(rows()).count() == 100
    assert blocks.from_iter(rows()).repeat(1).count() == 100
    assert blocks.from_iter(rows).repeat(2).count() == 200
    assert blocks.from_iter(list(rows())).repeat(2).count() == 200
    for repeated in (blocks.from_iter(rows()).repeat(2), blocks.from_iter(rows()).shuffle().repeat()):
        with pytest.raises(ValueError, match="only once: give from_iter a function"):
            repeated.count()
    twice = blocks.from_iter(rows())
    with pytest.raises(ValueError, match="only once"):
        twice.zip(twice).count()


def test_an_iterator_has_no_second_epoch():
    for make in (
        lambda dataset: dataset.split(1)[0],
        lambda dataset: dataset.to_dataset(batch_size=10, batch_format="numpy"),
    ):
        consumer = make(blocks.from_iter(iter(range(100))))
        stream = consumer.iter_batches(10) if hasattr(consumer, "iter_batches") else iter(consumer)
        assert sum(len(batch["item"]) for batch in stream) == 100
        with pytest.raises(ValueError, match="only once"):
            next(consumer.iter_batches(10) if hasattr(consumer, "iter_batches") else iter(consumer))


# ---- arrow


def there_and_back(arrays, change=lambda table: table):
    return FORMATS["arrow"].to_numpy(change(FORMATS["arrow"].from_numpy(arrays)))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("code", [*NUMERIC, ">f8", "M8[ms]", "m8[s]"])
def test_arrays_that_become_arrow_and_arrays_again_are_the_same(code, shape):
    count = 10 * int(np.prod(shape, dtype=int))
    given = np.arange(count).astype(np.int64).astype(code).reshape(10, *shape)
    (found,) = there_and_back({"x": given}).values()
    assert found.dtype == given.dtype.newbyteorder("=") and found.shape == given.shape
    np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("code", ["i4", "?", "U3", "O", "f8"])
@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.slice(3, 4),
        lambda table: pa.concat_tables([table.slice(2, 3), table.slice(7, 2)]),
        lambda table: table.take([5, 1, 1, 9]),
        lambda table: table.slice(4, 0),
        lambda table: table.schema.empty_table(),
        lambda table: FORMATS["arrow"].concat([table.slice(2, 3), table.slice(7, 2)]),
    ],
    ids=["sliced", "chunked", "taken", "none", "empty", "joined"],
)
def test_parts_of_arrow_tables_become_arrays_of_their_shape(code, shape, change):
    numbers = np.arange(10 * int(np.prod(shape, dtype=int))).reshape(10, *shape)
    given = numbers.astype(str).astype(object) if code == "O" else numbers.astype(code)
    indices = change(pa.table({"i": np.arange(10)}))["i"].to_numpy()
    (found,) = there_and_back({"x": given}, change).values()
    assert found.shape == (len(indices), *shape)
    np.testing.assert_array_equal(found, given[indices])


def test_nested_lists_and_turned_tensors_of_others_become_arrays_too():
    flat = pa.array(np.arange(24))
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 3), 2)
    turned = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int64(), [2, 3], permutation=[1, 0]),
        pa.FixedSizeListArray.from_arrays(flat, 6),
    )
    found = FORMATS["arrow"].to_numpy(pa.table({"n": nested, "t": turned}))
    np.testing.assert_array_equal(found["n"], np.arange(24).reshape(4, 2, 3))
    np.testing.assert_array_equal(found["t"], turned.to_numpy_ndarray())


def test_lists_with_nulls_stay_objects():
    table = pa.table(
        {
            "a": pa.array([[1, 2], None], pa.list_(pa.int64(), 2)),
            "b": pa.array([[1, None], [3, 4]], pa.list_(pa.int64(), 2)),
        }
    )
    found = FORMATS["arrow"].to_numpy(table)
    assert found["a"].dtype == object and found["a"][1] is None and list(found["a"][0]) == [1, 2]
    assert found["b"].dtype == object and list(found["b"][1]) == [3, 4]


def test_images_go_through_functions_of_tables():
    given = np.arange(500 * 12, dtype=np.uint8).reshape(500, 2, 2, 3)
    dataset = little(blocks.from_arrays({"x": given}), block_size="1KiB")
    tables = dataset.map_batches(lambda table: table, batch_format="arrow", batch_size=7)
    found = np.concatenate([batch["x"] for batch in tables.iter_batches(100)])
    np.testing.assert_array_equal(found, given)


# ---- xarray


def fields(rows=60):
    return xr.Dataset(
        {
            "t": (("lat", "time", "lon"), np.arange(4 * rows * 3.0).reshape(4, rows, 3)),
            "height": ("lat", np.arange(4.0)),
        },
        coords={"time": np.arange(rows), "lon": [1, 2, 3]},
        attrs={"title": "made up"},
    )


def test_a_dataset_comes_back_as_it_was():
    given = fields()
    (whole,) = blocks.from_xarray(given, "time").iter_batches(1000, batch_format="xarray")
    xr.testing.assert_identical(whole, given)
    parts = list(little(blocks.from_xarray(given, "time"), block_size="1KiB").iter_blocks())
    assert len(parts) > 3
    for part in parts:
        xr.testing.assert_identical(part, given.sel(time=part["time"]))
    assert "torchshm_rows" in next(iter(blocks.from_xarray(given, "time")._blocks())).attrs
    (shard,) = blocks.from_xarray(given, "time").split(1)
    xr.testing.assert_identical(next(shard.iter_batches(None, batch_format=None)), given)


@pytest.mark.parametrize(
    ("function", "dim"),
    [
        (lambda ds: ds.rename(t="temperature"), "time"),
        (lambda ds: ds.rename(time="when"), "when"),
        (lambda ds: xr.Dataset({"t": ds["t"] * 1, "lat": np.arange(4)}), "time"),
        (lambda ds: xr.Dataset({"lat": np.arange(4), "t": ds["t"].transpose("lon", "time", "lat")}), "time"),
        (lambda ds: ds.assign_attrs({}).drop_attrs(), "time"),
        (lambda ds: ds[["t"]].mean("lon"), "time"),
        (functools.partial(xr.Dataset.isel, lat=0), "time"),
    ],
    ids=[
        "renamed",
        "renamed rows",
        "made anew",
        "in another order",
        "without attributes",
        "mean",
        "selected",
    ],
)
def test_rows_stay_where_they_are_whatever_a_function_does_with_a_dataset(function, dim):
    given = fields()
    dataset = little(blocks.from_xarray(given, "time"), block_size="1KiB").map_batches(
        function, batch_format="xarray"
    )
    assert dataset.count() == 60
    expected = function(given)
    found = list(dataset.map_batches(lambda ds: ds, batch_size=7, batch_format="xarray").iter_batches(25))
    assert sum(len(batch[next(iter(batch))]) for batch in found) == 60
    batches = list(dataset.iter_batches(25, batch_format="xarray"))
    assert [batch.sizes[dim] for batch in batches] == [25, 25, 10]
    whole = xr.concat(batches, dim, data_vars="minimal", coords="minimal", compat="override")
    xr.testing.assert_equal(whole, expected.drop_attrs())


def test_a_dataset_without_rows_is_refused():
    dataset = blocks.from_xarray(fields(), "time").map_batches(lambda ds: ds.mean(), batch_format="xarray")
    with pytest.raises(ValueError, match=r"map_batches\(<lambda>\) returned a Dataset without a dimension"):
        dataset.count()


def test_frames_and_tables_convert_to_one_another():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert convert(convert(frame, "arrow"), "pandas").equals(frame)
