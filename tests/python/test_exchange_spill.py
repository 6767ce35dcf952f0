"""Files that are larger than a store's memory: what does not fit is on disk, on the way in and on the way out."""

import numpy as np
import pytest

import torchshm

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
