"""Files that are larger than a store's memory: what does not fit is on disk, on the way in and on the way out."""

import subprocess
import sys

import numpy as np
import pytest
from scripts import PATIENCE

import torchshm

pytestmark = pytest.mark.apart

N = 12
COUNT = 1 << 19  # of float64 in an array: 4 MiB


def array(i):
    return np.arange(COUNT, dtype=float) + i


@pytest.fixture(scope="module")
def small(runtime, tmp_path_factory):
    with torchshm.start("exchanging", limit="24MiB", spill=tmp_path_factory.mktemp("spill")) as store:
        yield store


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "zarr"])
def test_more_than_fits_into_memory_comes_in_and_goes_out(small, tmp_path, suffix):
    np.savez(tmp_path / "in.npz", **{f"k{i:02}": array(i) for i in range(N)})
    keys = small.import_from(tmp_path / "in.npz", policy="spill")
    assert len(keys) == N and small.info("k00")["policy"] == "spill" and small.info()["spilled_bytes"] > 0
    assert small.export_to(tmp_path / f"out.{suffix}") == keys
    for key in keys:
        del small[key]
    assert small.import_from(tmp_path / f"out.{suffix}") == keys
    for i, key in enumerate(keys):
        assert (small[key] == array(i)).all()
        del small[key]


def test_a_snapshot_has_what_is_on_disk_and_keeps_policies(small, tmp_path):
    policies = ["spill", "drop", "keep", "pin"]
    for i in range(N):
        small.save(f"k{i:02}", array(i), policy="spill")
    for policy in policies:
        small.save(policy, {"x": np.arange(9)}, policy=policy)
    assert small.info()["spilled_bytes"] > 0
    written = small.snapshot(tmp_path / "s")
    assert sorted({*small, "drop"}) == sorted({*written, "drop"})
    with torchshm.open(tmp_path / "s") as file:
        for i in range(N):
            assert (file[f"k{i:02}"] == array(i)).all()
    with torchshm.start("exchanged", file=tmp_path / "s") as again:
        assert [again.info(key)["policy"] for key in policies] == policies


def test_a_value_that_can_not_be_brought_back_is_no_reason_for_a_larger_file(tmp_path):
    with torchshm.start("crowded", limit="24MiB", spill=tmp_path / "spill", timeout=0.2) as store:
        for i in range(6):
            store[f"k{i}"] = np.full(1 << 20, i, np.int64)
        held = [store[key] for key in ("k0", "k1", "k2")]
        assert [store.info(f"k{i}")["where"] for i in (3, 4, 5)] == ["disk"] * 3
        with pytest.raises(torchshm.errors.PoolFullError, match="could not be brought back"):
            store.snapshot(tmp_path / "copy")
        del held
        store.snapshot(tmp_path / "copy")
    with torchshm.open(tmp_path / "copy") as copy:
        assert all((copy[f"k{i}"] == i).all() for i in range(6))


def test_values_whose_files_are_gone_are_named_all_at_once(tmp_path):
    with torchshm.start("holed", limit="24MiB", spill=tmp_path / "spill") as store:
        for i in range(20):
            store.save(f"k{i:02}", np.full(1 << 19, i, np.int64), policy="spill")
        gone = [key for key in store if store.info(key)["where"] == "disk"]
        assert 10 < len(gone) < 20
        for file in (tmp_path / "spill").rglob("*.spill"):
            file.unlink()
        place = tmp_path / "place"
        place.mkdir()
        more = (
            rf"^{len(gone)} names can't be read: 'k00'.*'k09' and {len(gone) - 10} more .*skip_damaged=True"
        )
        with pytest.raises(torchshm.TorchshmError, match=more):
            store.snapshot(place / "s")
        assert list(place.iterdir()) == []
        with pytest.warns(RuntimeWarning, match=rf"^{len(gone)} names can't be read: 'k00'"):
            written = store.snapshot(place / "s", skip_damaged=True)
        assert sorted([*written, *gone]) == sorted(f"k{i:02}" for i in range(20))
        command = [sys.executable, "-m", "torchshm", "snapshot", "holed", place / "t"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 1 and "--skip-damaged" in done.stderr and not (place / "t").exists()
        done = subprocess.run([*command, "--skip-damaged"], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and "'k00'" in done.stderr
    for name in "st":
        with torchshm.open(place / name) as file:
            assert sorted(file) == sorted(written)
