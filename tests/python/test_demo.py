"""The demo at a small size: it ends, its ways deliver the same, its table, JSON and picture say so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from torchshm.demo.libraries import missing

if lacking := missing():
    pytest.skip(f"the demo needs {', '.join(lacking)}", allow_module_level=True)

# A hang is a failure too; a quick demo takes about half a minute, most of it imports of thirteen processes.
PATIENCE = 300

WAYS = {
    "numpy": ["stock", "register", "pooled"],
    "tensor": ["stock", "register"],
    "xarray": ["stock", "register", "share"],
    "pandas": ["stock", "register"],
    "train": ["stock", "register", "pooled"],
}


def torchshm(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder` as another process group, so that a hang leaves nobody behind."""
    process = subprocess.Popen(
        [sys.executable, "-m", "torchshm", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "COLUMNS": "80",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end after {PATIENCE} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """Output, JSON and picture of one quick demo."""
    folder = tmp_path_factory.mktemp("demo")
    done = torchshm("demo", "--quick", "--json", "demo.json", "--output", "demo.png", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "demo.json").read_text()), folder / "demo.png"


@pytest.mark.timeout(PATIENCE + 60)
def test_every_way_of_every_case_is_measured(quick):
    results = quick[1]["results"]
    assert [(one["case"], one["way"]) for one in results] == [
        (case, way) for case in WAYS for way in WAYS[case]
    ]
    for one in results:
        assert one["batch_bytes"] > 100_000
        for figure in ("batches_per_s", "mb_per_s", "speedup", "cpu_s_per_gb", "peak_pss_bytes"):
            assert one[figure] > 0, (one["case"], one["way"], figure)
        if one["way"] == "stock":
            assert one["speedup"] == 1.0


def test_batches_arrive_in_the_pool_unless_stock(quick):
    for one in quick[1]["results"]:
        assert one["pooled"] == (one["way"] != "stock"), (one["case"], one["way"])


def test_every_way_trains_to_the_same_losses(quick):
    losses = {one["way"]: one["losses"] for one in quick[1]["results"] if one["case"] == "train"}
    assert len(losses["stock"]) == quick[1]["settings"]["loss_steps"]
    assert losses["register"] == losses["pooled"] == losses["stock"]
    assert losses["stock"][-1] < losses["stock"][0]


def test_table_fits_eighty_columns_and_says_what_was_checked(quick):
    out = quick[0]
    assert max(map(len, out.splitlines())) <= 80
    for heading in ("batches", "MB/s", "stock", "s/GB", "peak PSS", "stock PyTorch", "register()"):
        assert heading in out
    assert "Every way delivered equal batches." in out
    assert "the same losses" in out


def test_without_a_terminal_progress_is_plain_lines(quick):
    out = quick[0]
    assert "\x1b" not in out
    assert "\r" not in out
    assert re.search(r"^ +[\d.]+ s  39/39  train: ", out, re.MULTILINE)


def test_picture_is_a_png_that_shows_something(quick):
    from matplotlib.image import imread

    picture = imread(quick[2])
    rows, columns = picture.shape[:2]
    assert rows > 400
    assert columns > 600
    assert picture.std() > 0.05


@pytest.mark.parametrize("end", ["raises", "is killed"])
def test_an_arm_that_fails_ends_the_demo_and_says_why(tmp_path, end):
    from torchshm.demo.conductor import Arm
    from torchshm.demo.flights import read
    from torchshm.demo.result import DemoError
    from torchshm.demo.settings import quick as quick_settings

    if end == "is killed":
        read(100).to_pickle(tmp_path / "flights.pickle")
    with Arm("pandas", "stock", tmp_path, quick_settings(2, "fork")) as arm:
        if end == "is killed":
            arm.settle()
            os.kill(arm.pid, signal.SIGKILL)
        with pytest.raises(DemoError, match="status -9" if end == "is killed" else "FileNotFoundError"):
            arm.round()


@pytest.mark.timeout(PATIENCE + 60)
def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'netCDF4' else find(name, package)\n"
    )
    places = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = torchshm("demo", "--quick", folder=tmp_path, PYTHONPATH=places)
    assert done.returncode == 1
    assert "netCDF4" in done.stderr
    assert "pip install 'torchshm[demo]'" in done.stderr
    assert not (tmp_path / "torchshm-demo.png").exists()


def test_interpolation_keeps_the_known_points():
    import numpy as np
    import xarray as xr

    from torchshm.demo.climate import SOURCE, VARIABLE, _folder, interpolate

    stored = xr.load_dataset(_folder("iris_sample_data") / "sample_data" / SOURCE)
    rows, columns = stored[VARIABLE].shape[1:]
    fine = interpolate(3, (2 * rows - 1, 2 * columns - 1))
    assert fine[VARIABLE].dtype == np.float32
    assert fine[VARIABLE].values.flags.c_contiguous
    np.testing.assert_allclose(fine[VARIABLE].values[:, ::2, ::2], stored[VARIABLE].values[:3], rtol=1e-6)
    halfway = stored[VARIABLE].interp(latitude=fine.latitude.values, longitude=fine.longitude.values)
    np.testing.assert_allclose(fine[VARIABLE].values, halfway.values[:3], rtol=1e-6)
    assert len(fine["time"]) == 3
    assert fine["time"].dtype == object


def test_flights_are_all_there():
    from torchshm.demo.flights import read

    frame = read()
    assert frame.shape == (336_776, 19)
    assert str(frame["time_hour"].dtype).endswith("UTC]")
    assert frame["carrier"].dtype == "category"


def test_importing_the_package_does_not_import_the_demo():
    code = "import sys, torchshm; print([name for name in sys.modules if name.startswith('torchshm.demo')])"
    places = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
