"""import and export as a shell sees them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from scripts import PATIENCE


@pytest.fixture
def command(store):
    def run(what, *arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "torchshm", what, store.name, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    return run


def test_arrays_go_out_and_come_back(store, tmp_path, command):
    store["m/a"], store["m/b"], store["c"] = np.arange(5), np.eye(3), "text"
    path = tmp_path / "m.npz"
    told = json.loads(command("export", path, "--prefix", "m/", "--json"))
    assert told == {"name": store.name, "path": str(path), "keys": ["m/a", "m/b"]}
    assert "overwrite=True" in command("export", path, "m/a", code=1)
    assert "Wrote 1 name" in command("export", path, "m/a", "--overwrite")
    assert json.loads(command("import", path, "--prefix", "n/", "--json"))["keys"] == ["n/m/a"]
    assert "n/m/a is a name" in command("import", path, "--prefix", "n/", code=1)
    assert "Saved 1 name into" in command("import", path, "--prefix", "n/", "--overwrite", "--ttl", "1h")
    assert (store["n/m/a"] == np.arange(5)).all() and store.info("n/m/a")["expires_in"] <= 3600
    command("import", path, "--key", "all")
    assert list(store["all"]) == ["m/a"]
    command("export", tmp_path / "odd", "m/b", "--format", "npy")
    assert (np.load(tmp_path / "odd") == np.eye(3)).all()


def test_what_is_wrong_is_said_in_a_line(store, tmp_path, command):
    store["c"] = "text"
    assert "is of type str" in command("export", tmp_path / "c.npz", code=1)
    assert "has no name 'd'" in command("export", tmp_path / "c.npz", "d", code=1)
    assert "nothing to export" in command("export", tmp_path / "c.npz", "--prefix", "d", code=1)
    assert "none.npz: No such file" in command("import", tmp_path / "none.npz", code=1)
    for what, name in (("export", "c.npz"), ("snapshot", "c.shm")):
        said = command(what, tmp_path / "no" / name, code=1)
        assert said == f"torchshm: {tmp_path / 'no'}: No such file or directory\n"
    assert "give format=" in command("import", tmp_path / "c.tif", code=2).replace("\n", " ")
    for wrong in (["--framework", "tf"], ["--key", "k", "--prefix", "p"], ["--ttl", "soon"]):
        command("import", tmp_path / "none.npz", *wrong, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_get_the_usual_permissions_whoever_writes_them(store, tmp_path, umask):
    pytest.importorskip("safetensors")
    pytest.importorskip("zarr")
    store["a"] = np.arange(5)
    before = os.umask(umask)
    try:
        for name in ("a.safetensors", "a.npy", "a.npz", "a.zarr.zip"):
            store.export_to(tmp_path / name)
        store.snapshot(tmp_path / "a.shm")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(modes) == 5 and set(modes.values()) == {0o666 & ~umask}, modes
