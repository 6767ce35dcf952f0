"""torchshm.data.blocks: what datasets write is what they read, and nothing has its name before it is complete."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
from scripts import PATIENCE

from torchshm.data import blocks

pytestmark = [
    pytest.mark.apart,
    # Of strings and times in arrays of version 3, which others may read as they like.
    pytest.mark.filterwarnings("ignore:The data type"),
]

ROWS = 5000


def little(dataset, **more):
    return dataset.options(**{"memory": "64MiB", "block_size": "40KiB", "num_workers": 2, "seed": 1, **more})


def given(rows=ROWS):
    return {
        "i": np.arange(rows),
        "x": np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3),
        "flag": np.arange(rows) % 3 == 0,
        "half": np.arange(rows).astype(np.float16),
        "word": np.array([f"w{n % 100}" for n in range(rows)]),
        "when": np.datetime64("2024-01-01", "s") + np.arange(rows),
    }


def arrays_of(dataset):
    """All rows, by column."""
    found = [*dataset.iter_blocks(batch_format="numpy")]
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def nothing_hidden(folder):
    return not [path for path in folder.rglob(".*") if path.is_file()]


class OwnError(Exception):
    """Of a user."""


def bad(batch):
    if (batch["i"] == ROWS - 10).any():
        raise OwnError
    return batch


# ---- parquet


def test_parquet_files_are_the_blocks_in_order(tmp_path):
    dataset = little(blocks.from_arrays(given()))
    sizes = [len(block["i"]) for block in dataset.iter_blocks()]
    paths = dataset.write_parquet(tmp_path / "new" / "folder")
    assert [os.path.basename(path) for path in paths] == [f"part-{n:05d}.parquet" for n in range(len(sizes))]
    assert len(sizes) > 4 and [pq.read_metadata(path).num_rows for path in paths] == sizes
    assert_same(arrays_of(little(blocks.read_parquet(tmp_path / "new" / "folder"))), given())
    assert nothing_hidden(tmp_path)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_parquet_files_of_shuffled_tables_with_strings(tmp_path, method):
    table = pa.table(
        {"i": np.arange(ROWS), "text": [None if n % 7 == 0 else "x" * (n % 50) for n in range(ROWS)]}
    )
    pq.write_table(table, tmp_path / "given.parquet", row_group_size=500)
    dataset = little(blocks.read_parquet(tmp_path / "given.parquet"), start_method=method).shuffle()
    paths = dataset.write_parquet(tmp_path / "out", compression="zstd")
    assert pq.read_metadata(paths[0]).row_group(0).column(0).compression == "ZSTD"
    found = pa.concat_tables([pq.read_table(path) for path in paths])
    assert found["i"].to_pylist() != list(range(ROWS))
    assert found["i"].to_pylist() == [i for block in dataset.iter_blocks() for i in block["i"].to_pylist()]
    assert found.sort_by("i").equals(table)


def test_parquet_files_of_functions_that_return_frames_and_of_repeated_rows(tmp_path):
    frames = little(blocks.from_arrays({"i": np.arange(100)})).map_batches(
        lambda frame: frame.assign(name=frame["i"].astype(str)), batch_format="pandas"
    )
    paths = frames.repeat(2).write_parquet(tmp_path)
    found = pd.concat([pd.read_parquet(path) for path in paths])
    assert found["name"].tolist() == [str(n) for n in range(100)] * 2


def test_what_exists_is_replaced_only_if_that_was_said(tmp_path):
    dataset = little(blocks.from_arrays(given()))
    assert len(dataset.write_parquet(tmp_path)) > 4
    (tmp_path / "part-of-mine.parquet").touch()
    short = blocks.from_arrays({"i": np.arange(10)}).options(num_workers=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        short.write_parquet(tmp_path)
    assert short.write_parquet(tmp_path, overwrite=True) == [str(tmp_path / "part-00000.parquet")]
    assert sorted(os.listdir(tmp_path)) == ["part-00000.parquet", "part-of-mine.parquet"]
    (tmp_path / "part-of-mine.parquet").unlink()
    # Also where it is read from itself.
    blocks.read_parquet(tmp_path).map_batches(lambda batch: {"i": batch["i"] + 1}).write_parquet(
        tmp_path, overwrite=True
    )
    np.testing.assert_array_equal(arrays_of(blocks.read_parquet(tmp_path))["i"], np.arange(1, 11))
    assert nothing_hidden(tmp_path)


def test_no_rows_are_no_parts(tmp_path):
    empty = (
        blocks.from_arrays({"i": np.arange(5)}).filter(lambda batch: batch["i"] > 9).options(num_workers=1)
    )
    assert empty.write_parquet(tmp_path) == []
    assert empty.write_npy(tmp_path) == {}
    empty.write_zarr(tmp_path / "z")
    assert blocks.read_zarr(tmp_path / "z").count() == 0


def test_the_file_of_a_killed_worker_is_written_again(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()

    def deadly(table):
        import pyarrow.parquet

        write = pyarrow.parquet.write_table

        def half(table, path, **options):
            write(table.slice(0, 3), path, **options)
            mark = marks / str(table["i"][0])
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            write(table, path, **options)

        if write.__name__ != "half":
            pyarrow.parquet.write_table = half  # of this worker
        return table

    dataset = little(blocks.from_arrays({"i": np.arange(2000)}), block_size="4KiB")
    dataset = dataset.map_batches(deadly, batch_format="arrow").options(max_retries=50)
    out = tmp_path / "out"
    paths = dataset.write_parquet(out)
    assert len(list(marks.iterdir())) > 2
    np.testing.assert_array_equal(arrays_of(blocks.read_parquet(out))["i"], np.arange(2000))
    assert sorted(os.listdir(out)) == [os.path.basename(path) for path in paths]


@pytest.mark.parametrize("what", ["write_parquet", "write_npy", "write_zarr"])
def test_an_exception_leaves_nothing(tmp_path, what):
    dataset = little(blocks.from_arrays({"i": np.arange(ROWS)}), block_size="4KiB").map_batches(bad)
    out = tmp_path / "out"
    with pytest.raises(OwnError):
        getattr(dataset, what)(out)
    assert not out.exists() or os.listdir(out) == []
    assert os.listdir(tmp_path) in ([], ["out"])
    before = blocks.from_arrays({"i": np.arange(7)}).options(num_workers=1)
    getattr(before, what)(out)
    with pytest.raises(OwnError):
        getattr(dataset, what)(out, overwrite=True)
    read = {
        "write_parquet": blocks.read_parquet,
        "write_npy": lambda path: blocks.read_npy(path, column="i"),
        "write_zarr": blocks.read_zarr,
    }
    np.testing.assert_array_equal(arrays_of(read[what](out))["i"], np.arange(7))


SCRIPT = """
import sys, time
import numpy as np
from torchshm.data import blocks

def slow(batch):
    time.sleep(0.05)
    return batch

dataset = blocks.from_arrays({"i": np.arange(1_000_000)}).options(
    memory="64MiB", block_size="100KiB", num_workers=2
).map_batches(slow)
getattr(dataset, sys.argv[1])(sys.argv[2])
"""


@pytest.mark.parametrize("what", ["write_parquet", "write_npy", "write_zarr"])
def test_ctrl_c_leaves_nothing(tmp_path, what):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, script, what, out], stderr=subprocess.PIPE, start_new_session=True
    )

    def written():
        with contextlib.suppress(FileNotFoundError):  # they come and go
            found = [path for path in tmp_path.rglob("*") if ".part" in str(path) and path.is_file()]
            return sum(path.stat().st_size for path in found) > 20_000
        return False

    while not written():
        assert process.poll() is None, process.stderr.read()
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.npy"))
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=PATIENCE)
    assert b"KeyboardInterrupt" in errors
    psutil.wait_procs(family, timeout=10)
    assert not out.exists() or os.listdir(out) == []
    assert set(os.listdir(tmp_path)) <= {"script.py", "out"}


# ---- npy


def test_npy_files_are_maps_of_all_rows(tmp_path):
    paths = little(blocks.from_arrays(given())).write_npy(tmp_path / "out")
    assert paths == {name: str(tmp_path / "out" / f"{name}.npy") for name in given()}
    mapped = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    assert_same(mapped, given())
    assert {name: array.dtype for name, array in mapped.items()} == {
        name: array.dtype for name, array in given().items()
    }
    assert_same(arrays_of(little(blocks.from_arrays(mapped))), given())
    read = arrays_of(little(blocks.read_npy(paths["x"], column="x")))
    np.testing.assert_array_equal(read["x"], given()["x"])
    assert nothing_hidden(tmp_path)


def test_npy_files_after_a_shuffle_and_of_structured_rows(tmp_path):
    rows = np.zeros(ROWS, [("a", "i8"), ("längen", "f4", (3,))])
    rows["a"] = np.arange(ROWS)
    dataset = little(blocks.from_arrays({"i": np.arange(ROWS), "s": rows})).shuffle()
    paths = dataset.write_npy(tmp_path)
    i, s = (np.load(paths[name]) for name in ("i", "s"))
    np.testing.assert_array_equal(s["a"], i)
    np.testing.assert_array_equal(np.sort(i), np.arange(ROWS))
    assert (i != np.arange(ROWS)).any() and s.dtype == rows.dtype


@pytest.mark.parametrize("what", ["write_npy", "write_zarr"])
def test_what_arrays_cannot_hold_is_said(tmp_path, what):
    def write(function):
        dataset = little(blocks.from_arrays({"i": np.arange(2000)}), block_size="4KiB", num_workers=1)
        getattr(dataset.map_batches(function), what)(tmp_path / "out")

    with pytest.raises(TypeError, match="can't write objects, which column 'b' has"):
        write(lambda batch: {"b": np.array([None] * len(batch["i"]))})
    with pytest.raises(ValueError, match=r"'i' are int64 of shape \(\) at first, and float64 of shape \(\)"):
        write(lambda batch: {"i": batch["i"] if batch["i"][0] < 1000 else batch["i"] * 0.5})
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        write(lambda batch: {"i": np.zeros((len(batch["i"]), 1 if batch["i"][0] < 1000 else 2))})
    with pytest.raises(ValueError, match=r"different columns|same columns"):
        write(lambda batch: {"i" if batch["i"][0] < 1000 else "j": batch["i"]})
    for name in ("a/b", "", ".."):
        with pytest.raises(ValueError, match="can't be a file"):
            write(lambda batch, name=name: {name: batch["i"]})
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_npy_files_are_replaced_only_if_that_was_said(tmp_path):
    dataset = blocks.from_arrays({"i": np.arange(10)}).options(num_workers=1)
    dataset.write_npy(tmp_path)
    with pytest.raises(FileExistsError, match=r"i\.npy exists"):
        dataset.write_npy(tmp_path)
    paths = dataset.map_batches(lambda batch: {"i": batch["i"] * 2}).write_npy(tmp_path, overwrite=True)
    np.testing.assert_array_equal(np.load(paths["i"]), np.arange(10) * 2)
    assert nothing_hidden(tmp_path)


# ---- zarr


@pytest.mark.parametrize("chunk", [None, 7, 100_000])
def test_zarr_groups_have_the_columns(tmp_path, chunk):
    dataset = little(blocks.from_arrays(given()))
    first = len(next(dataset.iter_blocks())["i"])
    dataset.write_zarr(tmp_path / "new" / "g.zarr", rows_per_chunk=chunk)
    group = zarr.open_group(tmp_path / "new" / "g.zarr", mode="r")
    assert_same({name: array[:] for name, array in group.arrays()}, dict(sorted(given().items())))
    assert group["x"].chunks == (chunk or first, 2, 3)
    read = arrays_of(little(blocks.read_zarr(tmp_path / "new" / "g.zarr")))
    assert_same({name: read[name] for name in given()}, given())
    assert os.listdir(tmp_path / "new") == ["g.zarr"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The data type")
        opened = xr.open_zarr(tmp_path / "new" / "g.zarr", consolidated=False)
    np.testing.assert_array_equal(opened["x"], given()["x"])
    assert opened["x"].dims[0] == opened["i"].dims[0] == "row"


def test_zarr_groups_of_shuffled_rows(tmp_path):
    little(blocks.from_arrays({"i": np.arange(ROWS), "x": np.arange(ROWS) * 2.0})).shuffle().write_zarr(
        tmp_path / "z"
    )
    found = arrays_of(blocks.read_zarr(tmp_path / "z"))
    np.testing.assert_array_equal(found["x"], found["i"] * 2.0)
    np.testing.assert_array_equal(np.sort(found["i"]), np.arange(ROWS))


def test_datasets_of_xarray_are_written_as_xarray_does(tmp_path):
    times = np.datetime64("2024-01-01", "ns") + np.cumsum(np.arange(300)) * 1_000_000_007
    expected = xr.Dataset(
        {
            "t": (("lat", "time"), np.arange(1200.0).reshape(4, 300), {"units": "K"}),
            "height": ("lat", np.arange(4.0)),
            "step": ("time", np.diff(times, prepend=times[0])),
        },
        coords={"time": times, "lat": [1, 2, 3, 4]},
        attrs={"title": "made up"},
    )
    dataset = little(blocks.from_xarray(expected, "time"), block_size="2KiB")
    assert len(list(dataset.iter_blocks())) > 3
    dataset.write_zarr(tmp_path / "x.zarr")
    with xr.open_zarr(tmp_path / "x.zarr", consolidated=False, decode_timedelta=True) as found:
        xr.testing.assert_equal(found.load(), expected)
        assert found.attrs == {"title": "made up"} and found["t"].attrs == {"units": "K"}
    read = blocks.read_zarr(tmp_path / "x.zarr", columns=["time"])
    assert read.count() == 300


def test_a_climate_model_goes_to_zarr(tmp_path):
    import iris_sample_data

    path = f"{iris_sample_data.path}/A1B_north_america.nc"
    blocks.read_netcdf(path, dim="time").options(block_size="500KiB", num_workers=2).write_zarr(
        tmp_path / "a.zarr"
    )
    with xr.open_dataset(path) as expected, xr.open_zarr(tmp_path / "a.zarr", consolidated=False) as found:
        xr.testing.assert_equal(found.load(), expected.load())


def test_only_zarr_groups_are_replaced_by_one(tmp_path):
    dataset = blocks.from_arrays({"i": np.arange(10)}).options(num_workers=1)
    dataset.write_zarr(tmp_path / "z")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        dataset.write_zarr(tmp_path / "z")
    blocks.read_zarr(tmp_path / "z").map_batches(lambda batch: {"i": batch["i"] + 1}).write_zarr(
        tmp_path / "z", overwrite=True
    )
    np.testing.assert_array_equal(arrays_of(blocks.read_zarr(tmp_path / "z"))["i"], np.arange(1, 11))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    for target in (mine, mine / "thesis.txt"):
        with pytest.raises(FileExistsError, match="no Zarr group"):
            dataset.write_zarr(target, overwrite=True)
    assert (mine / "thesis.txt").exists() and sorted(os.listdir(tmp_path)) == ["mine", "z"]
    (mine / "thesis.txt").unlink()
    dataset.write_zarr(mine, overwrite=True)
    with pytest.raises(ValueError, match="rows_per_chunk"):
        dataset.write_zarr(tmp_path / "y", rows_per_chunk=0)


@pytest.mark.parametrize(
    ("what", "module"),
    [("write_parquet", "pyarrow.parquet"), ("write_zarr", "zarr")],
    ids=["pyarrow", "zarr"],
)
def test_what_is_not_installed_is_said(tmp_path, what, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{what}\(\) needs {module.partition('.')[0]}: pip install"):
        getattr(blocks.from_arrays({"i": np.arange(3)}), what)(tmp_path / "out")
    assert os.listdir(tmp_path) == []
