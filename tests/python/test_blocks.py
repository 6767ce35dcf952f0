"""torchshm.data.blocks: what plans give, whatever the source, the format and the number of workers."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr

from torchshm.data import blocks

pytestmark = pytest.mark.apart

ROWS = 20_000


def little(dataset, **more):
    """In small blocks, so that there are many."""
    return dataset.options(**{"memory": "96MiB", "block_size": "100KiB", "num_workers": 2, "seed": 1, **more})


def numbered(rows=ROWS):
    return {"i": np.arange(rows), "x": np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)}


def numbers(dataset, column="i"):
    return np.concatenate([np.asarray(block[column]) for block in dataset.iter_blocks(batch_format="numpy")])


# ---- sources


def test_arrays_come_back_in_order_and_in_many_blocks():
    given = numbered()
    found = list(little(blocks.from_arrays(given)).iter_blocks())
    assert len(found) >= 5
    for block in found:
        np.testing.assert_array_equal(block["x"], given["x"][block["i"]])
    np.testing.assert_array_equal(numbers(little(blocks.from_arrays(given))), given["i"])


def test_a_memory_map_is_read_by_the_workers(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(ROWS))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(numbers(little(blocks.from_arrays({"i": mapped}))), np.arange(ROWS))


def test_parquet_files(tmp_path):
    for part in range(3):
        table = pa.table(
            {"i": np.arange(part * 1000, part * 1000 + 1000), "name": [f"n{n}" for n in range(1000)]}
        )
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=100)
    dataset = blocks.read_parquet(tmp_path).options(block_size="4KiB", num_workers=2)
    found = list(dataset.iter_blocks())
    assert len(found) > 3 and all(isinstance(block, pa.Table) for block in found)
    whole = pa.concat_tables(found)
    assert whole["i"].to_pylist() == list(range(3000))
    assert whole["name"].to_pylist()[:2] == ["n0", "n1"]
    only = blocks.read_parquet([tmp_path / "1.parquet"], columns=["i"])
    assert next(only.iter_blocks()).column_names == ["i"]


def test_a_large_row_group_comes_in_blocks_of_the_size_that_was_asked_for(tmp_path):
    rows = 50_000
    given = {
        "few": np.arange(rows) // 10_000,  # takes next to nothing in the file
        "a.b": np.arange(rows),
        "word": [f"word {n}" for n in range(rows)],
        "nested": [{"x": n, "y": [n, n]} for n in range(rows)],
    }
    table = pa.table(given)
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=rows)
    dataset = little(blocks.read_parquet(tmp_path), block_size="256KiB")
    found = list(dataset.iter_blocks())
    assert table.nbytes > 10 * (256 << 10)
    assert all(128 << 10 < block.nbytes < 512 << 10 for block in found[:-1])
    assert pa.concat_tables(found).combine_chunks().equals(table.combine_chunks())
    nested = blocks.read_parquet(tmp_path, columns=["nested.x"])
    read = pa.concat_tables(little(nested, block_size="64KiB").iter_blocks())
    assert read["nested"].combine_chunks().field("x").to_pylist() == [*range(rows)]
    only = pa.concat_tables(
        little(blocks.read_parquet(tmp_path, columns=["a.b"]), block_size="64KiB").iter_blocks()
    )
    assert only.equals(table.select(["a.b"]))


@pytest.mark.parametrize("nullable", [False, True])
def test_blocks_of_parquet_files_are_as_large_as_was_asked_for_whatever_they_take_there(tmp_path, nullable):
    rows = 200_000
    schema = pa.schema([pa.field("x", pa.float64(), nullable=nullable), pa.field("word", pa.string())])
    words = pa.array(["a word of some length, the same in each row"] * rows)
    pq.write_table(
        pa.table([np.arange(rows, dtype=np.float64), words], schema=schema),
        tmp_path / "a.parquet",
        row_group_size=rows,
    )
    for columns in (None, ["x"], ["word"]):
        dataset = little(blocks.read_parquet(tmp_path, columns=columns), block_size="256KiB")
        sizes = [block.nbytes for block in dataset.iter_blocks()]
        assert len(sizes) > 4
        assert all(0.5 * (256 << 10) < size <= 1.3 * (256 << 10) for size in sizes[:-1])


def test_row_groups_of_a_nested_column_are_several_tasks(tmp_path):
    from torchshm.data.blocks._parquet import ParquetSource

    table = pa.table({"s": [{"a": n, "b": str(n)} for n in range(10_000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    for columns in (["s.a"], ["s"], None):
        planned = ParquetSource([str(tmp_path / "a.parquet")], columns).plan(4 << 10)
        assert len(planned) == 10
        assert all(4 << 10 < planned.nbytes(task) < 64 << 10 for task in range(10))


def test_netcdf_files_of_a_climate_model():
    import iris_sample_data

    path = f"{iris_sample_data.path}/A1B_north_america.nc"
    with xr.open_dataset(path) as expected:
        expected.load()
    dataset = blocks.read_netcdf(path, dim="time", columns=["air_temperature"]).options(
        block_size="200KiB", num_workers=2
    )
    found = list(dataset.iter_blocks())
    assert len(found) > 3
    whole = xr.concat(found, "time")
    np.testing.assert_array_equal(whole["air_temperature"], expected["air_temperature"])
    np.testing.assert_array_equal(whole["time"], expected["time"])
    means = numbers(
        dataset.map_batches(
            lambda ds: ds[["air_temperature"]].mean(["latitude", "longitude"]), batch_format="xarray"
        ),
        "air_temperature",
    )
    np.testing.assert_allclose(means, expected["air_temperature"].mean(["latitude", "longitude"]), rtol=1e-6)


def test_npy_files(tmp_path):
    for part in range(3):
        np.save(tmp_path / f"{part}.npy", np.arange(part * 1000, part * 1000 + 1000).reshape(500, 2))
    found = numbers(blocks.read_npy(tmp_path, column="x").options(block_size="1KiB", num_workers=2), "x")
    np.testing.assert_array_equal(found, np.arange(3000).reshape(1500, 2))
    np.save(tmp_path / "z.npy", np.float64(3))
    with pytest.raises(ValueError, match=r"z\.npy holds a single value"):
        blocks.read_npy(tmp_path / "z.npy").count()


def test_an_xarray_dataset_and_a_zarr_group(tmp_path):
    import zarr

    given = numbered(1000)
    dataset = xr.Dataset({"x": (("row", "channel"), given["x"]), "i": ("row", given["i"])})
    np.testing.assert_array_equal(
        numbers(blocks.from_xarray(dataset, "row").options(block_size="2KiB"), "x"), given["x"]
    )
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    for name, array in given.items():
        group.create_array(name, data=array, chunks=(100, *array.shape[1:]))
    read = blocks.read_zarr(tmp_path / "g.zarr").options(block_size="4KiB", num_workers=2)
    np.testing.assert_array_equal(numbers(read, "x"), given["x"])
    np.testing.assert_array_equal(numbers(read), given["i"])


@pytest.mark.parametrize(
    "items",
    [
        [{"i": n} for n in range(3000)],
        lambda: ({"i": n} for n in range(3000)),
        lambda: ({"i": np.arange(n, n + 1000)} for n in range(0, 3000, 1000)),
    ],
    ids=["rows", "generator", "batches"],
)
def test_iterators(items, request):
    dataset = blocks.from_iter(items, batched="batches" in request.node.name).options(
        block_size="2KiB", num_workers=2
    )
    np.testing.assert_array_equal(numbers(dataset), np.arange(3000))


def test_single_values_are_a_column_of_their_own():
    np.testing.assert_array_equal(numbers(blocks.from_iter(range(10)), "item"), np.arange(10))


def test_nothing_is_an_empty_dataset():
    assert list(blocks.from_arrays({"i": np.arange(0)}).iter_batches(10)) == []
    assert blocks.from_arrays({"i": np.arange(5)}).filter(lambda batch: batch["i"] > 9).count() == 0
    assert blocks.from_iter([]).shuffle().count() == 0


def test_what_is_no_dataset_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="same number of rows"):
        blocks.from_arrays({"a": np.arange(3), "b": np.arange(4)})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        blocks.read_parquet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no dimension 'y'"):
        blocks.from_xarray(xr.Dataset({"x": ("row", np.arange(3))}), "y")
    with pytest.raises(TypeError, match="takes a function"):
        blocks.from_arrays(numbered(3)).map_batches(3)
    with pytest.raises(ValueError, match="batch_format"):
        blocks.from_arrays(numbered(3)).map_batches(len, batch_format="polars")


# ---- functions


def test_map_batches_may_write_to_its_batch_and_the_source_stays():
    given = numbered()

    def doubled(batch):
        batch["x"] *= 2
        return batch

    np.testing.assert_array_equal(
        numbers(little(blocks.from_arrays(given)).map_batches(doubled), "x"), 2 * given["x"]
    )
    np.testing.assert_array_equal(given["x"], numbered()["x"])
    shuffled = little(blocks.from_arrays(given)).shuffle().map_batches(doubled).map_batches(doubled)
    assert numbers(shuffled, "x").sum() == pytest.approx(4 * given["x"].sum(dtype=float), rel=1e-6)


def test_functions_after_a_filter_or_of_single_rows_may_write_too():
    def doubled(row):
        row["x"] *= 2
        return row

    given = numbered(500)
    everything = blocks.from_arrays(given).filter(lambda batch: batch["i"] >= 0)
    for dataset in (
        everything.map_batches(doubled),
        blocks.from_arrays(given).flat_map(lambda row: [doubled(row)]),
    ):
        twice = dataset.repeat(2).options(num_workers=1)
        np.testing.assert_array_equal(numbers(twice, "x"), np.tile(2 * numbered(500)["x"], (2, 1)))
    arrow = blocks.from_arrays({"x": np.arange(500)}).map_batches(lambda table: table, batch_format="arrow")
    np.testing.assert_array_equal(numbers(arrow.map_batches(doubled), "x"), 2 * np.arange(500))


def test_functions_get_no_empty_batches():
    rare = little(blocks.from_arrays(numbered())).filter(lambda batch: batch["i"] == 12_345)
    found = rare.map_batches(lambda batch: {"i": np.stack(list(batch["i"]))})
    np.testing.assert_array_equal(numbers(found), [12_345])


def test_columns_of_several_types_keep_their_values_when_they_are_shuffled():
    def typed(batch):
        first = batch["i"][0]
        return {
            "i": batch["i"],
            "text": np.array([f"{'x' * int(n // 5000)}{n}" for n in batch["i"]]),
            "n": batch["i"] if first % 2 else batch["i"] + 0.5,
        }

    dataset = little(blocks.from_arrays({"i": np.arange(ROWS)})).map_batches(typed, batch_size=999).shuffle()
    for block in dataset.iter_blocks():
        assert [text.lstrip("x") for text in block["text"]] == [str(n) for n in block["i"]]
        assert set(np.unique(block["n"] - block["i"])) <= {0.0, 0.5}
    mixed = (
        blocks.from_arrays({"i": np.arange(2000)})
        .options(num_workers=1, block_size="4KiB", memory="64MiB")
        .map_batches(lambda batch: {"a" if batch["i"][0] < 1000 else "b": batch["i"]})
    )
    with pytest.raises(ValueError, match="different columns"):
        mixed.shuffle().count()


def test_batch_sizes_are_checked():
    dataset = blocks.from_arrays(numbered(3))
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            next(dataset.iter_batches(wrong))
        with pytest.raises(ValueError, match="batch_size"):
            dataset.map_batches(len, batch_size=wrong)


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_batches_have_the_size_that_was_asked_for(size):
    sizes = (
        blocks.from_arrays(numbered())
        .options(num_workers=1)
        .map_batches(lambda batch: {"rows": np.array([len(batch["i"])])}, batch_size=size)
    )
    found = numbers(sizes, "rows")
    assert found.sum() == ROWS
    assert (found[:-1] == size).all() and 0 < found[-1] <= size


@pytest.mark.parametrize(
    ("name", "kind"),
    [("numpy", dict), ("torch", dict), ("arrow", pa.Table), ("pandas", pd.DataFrame), ("xarray", xr.Dataset)],
)
def test_functions_get_the_format_that_they_want(name, kind):
    import torch

    def check(batch):
        assert isinstance(batch, kind)
        if name == "torch":
            assert isinstance(batch["i"], torch.Tensor)
        return batch

    dataset = little(blocks.from_arrays({"i": np.arange(ROWS), "y": np.ones(ROWS)})).map_batches(
        check, batch_format=name
    )
    np.testing.assert_array_equal(numbers(dataset), np.arange(ROWS))
    assert isinstance(next(dataset.iter_batches(10, batch_format=name)), kind)


def test_filter_and_flat_map():
    dataset = little(blocks.from_arrays(numbered()))
    even = dataset.filter(lambda batch: batch["i"] % 2 == 0)
    np.testing.assert_array_equal(numbers(even), np.arange(0, ROWS, 2))
    few = little(blocks.from_arrays({"i": np.arange(300)}), block_size="1KiB")
    twice = few.flat_map(lambda row: [row] * int(row["i"] % 3))
    np.testing.assert_array_equal(numbers(twice), np.repeat(np.arange(300), np.arange(300) % 3))
    tables = few.filter(lambda table: table["i"].to_numpy() < 7, batch_format="arrow")
    np.testing.assert_array_equal(numbers(tables), np.arange(7))


def test_functions_that_follow_one_another_are_one_stage():
    dataset = blocks.from_arrays(numbered())
    for _ in range(3):
        dataset = dataset.map_batches(lambda batch: {"i": batch["i"] + 1})
    text = dataset.shuffle(window="1MiB").filter(lambda batch: batch["i"] > 0).explain()
    assert text.count("stage ") == 2
    np.testing.assert_array_equal(numbers(dataset), np.arange(3, ROWS + 3))


def test_further_arguments_reach_the_function():
    dataset = blocks.from_arrays(numbered(100)).map_batches(
        lambda batch, add, *, times: {"i": (batch["i"] + add) * times}, fn_args=[3], fn_kwargs={"times": 2}
    )
    np.testing.assert_array_equal(numbers(dataset), (np.arange(100) + 3) * 2)


def test_a_block_that_grows_is_split():
    dataset = little(blocks.from_arrays({"i": np.arange(1000)})).map_batches(
        lambda batch: {"i": np.repeat(batch["i"], 100), "x": np.zeros((len(batch["i"]) * 100, 8))}
    )
    sizes = [sum(array.nbytes for array in block.values()) for block in dataset.iter_blocks()]
    assert len(sizes) > 20 and max(sizes) < 3 * (100 << 10)
    np.testing.assert_array_equal(numbers(dataset), np.repeat(np.arange(1000), 100))


# ---- order


@pytest.mark.parametrize("window", [None, "300KiB"])
def test_the_order_is_the_same_with_any_number_of_workers_and_another_one_by_another_seed(window):
    dataset = little(blocks.from_arrays(numbered())).shuffle(window=window)
    first = numbers(dataset)
    np.testing.assert_array_equal(np.sort(first), np.arange(ROWS))
    for workers in (1, 2, 4):
        np.testing.assert_array_equal(numbers(dataset.options(num_workers=workers)), first)
    other = numbers(dataset.options(seed=2))
    assert (other != first).mean() > 0.9
    np.testing.assert_array_equal(np.sort(other), np.arange(ROWS))


def test_a_full_shuffle_takes_every_row_anywhere():
    """Of more than one window, which goes by way of partitions."""
    rows = 40_000
    dataset = little(blocks.from_arrays({"i": np.arange(rows), "x": np.zeros((rows, 100))})).shuffle()
    found = numbers(dataset)
    np.testing.assert_array_equal(np.sort(found), np.arange(rows))
    assert abs(np.corrcoef(found, np.arange(rows))[0, 1]) < 0.03
    tenths = found[: rows // 10] * 10 // rows
    counts = np.bincount(tenths, minlength=10)
    assert counts.min() > 0.8 * rows / 100 and counts.max() < 1.2 * rows / 100


def test_a_window_is_as_far_as_a_row_goes():
    dataset = little(blocks.from_arrays({"i": np.arange(ROWS * 4)})).window("100KiB").shuffle()
    found = numbers(dataset)
    distance = np.abs(found - np.arange(len(found)))
    assert distance.max() < 3 * (100 << 10) / 8 and distance.mean() > 1000


def test_what_is_random_in_functions_depends_on_the_seed_alone():
    def noisy(batch):
        return {"i": batch["i"], "noise": np.random.random(len(batch["i"]))}  # noqa: NPY002

    dataset = little(blocks.from_arrays(numbered())).map_batches(noisy)
    first = numbers(dataset, "noise")
    np.testing.assert_array_equal(numbers(dataset.options(num_workers=1), "noise"), first)
    assert len(np.unique(first)) == ROWS
    assert (numbers(dataset.options(seed=2), "noise") != first).any()


def test_repeat_draws_anew_each_time():
    dataset = little(blocks.from_arrays(numbered(5000)))
    np.testing.assert_array_equal(numbers(dataset.repeat(3)), np.tile(np.arange(5000), 3))
    epochs = numbers(dataset.shuffle().repeat(2)).reshape(2, -1)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(5000), (2, 1)))
    assert (epochs[0] != epochs[1]).any()
    after = numbers(dataset.repeat(2).map_batches(lambda batch: {"i": batch["i"] + 1}))
    np.testing.assert_array_equal(after, np.tile(np.arange(1, 5001), 2))
    endless = itertools.islice(dataset.repeat().iter_batches(1000), 12)
    np.testing.assert_array_equal(np.concatenate([b["i"] for b in endless]), np.arange(12_000) % 5000)


def test_repartition():
    dataset = little(blocks.from_arrays(numbered()))
    sizes = [len(block["i"]) for block in dataset.repartition(rows_per_block=777).iter_blocks()]
    assert sizes == [777] * (ROWS // 777) + [ROWS % 777]
    sizes = [len(block["i"]) for block in dataset.repartition(7).iter_blocks()]
    assert len(sizes) == 7 and max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(numbers(dataset.repartition(7)), np.arange(ROWS))


def test_zip():
    left = little(blocks.from_arrays(numbered()))
    right = little(blocks.from_arrays({"i": np.arange(ROWS) * 2, "y": np.arange(ROWS)}), block_size="30KiB")
    for block in left.zip(right.map_batches(lambda batch: batch)).iter_blocks():
        np.testing.assert_array_equal(block["i_1"], 2 * block["i"])
        np.testing.assert_array_equal(block["y"], block["i"])
    short = blocks.from_arrays({"z": np.arange(ROWS - 1)})
    with pytest.raises(ValueError, match=f"{ROWS} rows.*{ROWS - 1}"):
        left.zip(short).count()


# ---- batches


@pytest.mark.parametrize(
    ("size", "drop"), [(256, False), (256, True), (3333, False), (10 * ROWS, False), (None, False)]
)
def test_iter_batches_gives_all_rows_in_batches_of_that_size(size, drop):
    found = list(little(blocks.from_arrays(numbered())).iter_batches(size, drop_last=drop))
    sizes = [len(batch["i"]) for batch in found]
    if size is not None:
        assert set(sizes[:-1]) <= {size}
        assert sizes[-1] == size if drop else sizes[-1] <= size
    np.testing.assert_array_equal(
        np.concatenate([batch["i"] for batch in found]), np.arange(ROWS // size * size if drop else ROWS)
    )


def test_rows_take_and_count():
    dataset = little(blocks.from_arrays(numbered()))
    assert [int(row["i"]) for row in dataset.take(5)] == list(range(5))
    assert dataset.count() == ROWS
    assert [int(row["i"]) for row in itertools.islice(dataset.iter_rows(), 3)] == [0, 1, 2]
    assert dataset.take(0) == []


def test_explain_says_what_was_done():
    dataset = little(blocks.from_arrays(numbered())).shuffle(window="300KiB")
    before = dataset.explain()
    assert (
        "stage 0: from_arrays" in before
        and "stage 1: shuffle in windows" in before
        and "spilled" not in before
    )
    assert dataset.count() == ROWS
    after = dataset.explain()
    assert after.startswith(before) and f"{ROWS:,}" in after and "spilled" in after


def test_columns_of_objects_and_of_ragged_rows():
    words = np.array([f"word {n}" for n in range(3000)], object)
    dataset = little(blocks.from_arrays({"word": words}), block_size="4KiB").map_batches(
        lambda batch: {"word": np.array([word.upper() for word in batch["word"]], object)}
    )
    assert numbers(dataset, "word").tolist() == [word.upper() for word in words]
    ragged = blocks.from_iter([{"x": np.arange(n % 4)} for n in range(50)])
    assert [len(row["x"]) for row in ragged.iter_rows()] == [n % 4 for n in range(50)]
