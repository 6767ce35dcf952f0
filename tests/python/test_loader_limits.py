"""A DataLoader delivers when its pool is full, and is not bound to /dev/shm."""

from __future__ import annotations

import shutil
import sys

import pytest
from scripts import run, run_script

LOADER = """
import os, sys, warnings
import numpy as np


class Numbers:
    def __len__(self):
        return 48

    def __getitem__(self, index):
        return np.full((256, 256), float(index))


def check(loader):
    batches = list(loader)
    assert len(batches) == 12
    for n, batch in enumerate(batches):
        assert batch.shape == (4, 256, 256)
        assert (batch == np.arange(4 * n, 4 * n + 4)[:, None, None]).all()
    return batches


def main():
    import torchshm
    from torch.utils.data import DataLoader

    torchshm.register()
    loader = DataLoader(Numbers(), batch_size=4, num_workers=2, collate_fn=np.stack, multiprocessing_context=sys.argv[1])
    batches = check(loader)  # 24 MB, all kept
    pooled = sum(map(torchshm.is_shared, batches))
    figures = torchshm.stats()
    assert figures["committed_bytes"] <= figures["limit_bytes"], figures
    del batches
    check(loader)
    print(pooled)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_whose_pool_is_full_still_delivers_with_one_warning(tmp_path, method):
    done = run_script(
        LOADER, tmp_path, method, TORCHSHM_LIMIT="8MiB", PYTHONWARNINGS="always::RuntimeWarning"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12
    assert done.stderr.count("RuntimeWarning: torchshm") == 1, done.stderr
    assert "slower" in done.stderr
    assert "TORCHSHM_LIMIT" in done.stderr


SMALL_SHM = """
import os
import numpy as np
import torchshm

assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 << 20
torchshm.register()
x = torchshm.empty(200 << 20, "u1")
x[...] = 7
y = torchshm.share(np.ones(10 << 20))
z = torchshm.loads(torchshm.dumps(np.ones(10 << 20)))
assert x[-1] == 7 and y[-1] == 1 and z[-1] == 1
assert os.listdir("/dev/shm") == []
"""


@pytest.mark.parametrize("script", ["arrays", "loader"])
def test_all_of_it_works_under_a_small_dev_shm(tmp_path, script):
    """A tmpfs of 64 MiB mounted there in a private namespace; where that is not permitted this test fails and says so."""
    source = SMALL_SHM if script == "arrays" else LOADER.replace("256, 256", "512, 512")
    (tmp_path / "script.py").write_text(source)
    unshare = shutil.which("unshare")
    assert unshare, "this test needs util-linux's unshare"
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    done = run(
        [unshare, "--map-root-user", "--mount", "sh", "-c", mount, "sh", sys.executable, "script.py", "fork"],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ("" if script == "arrays" else "12\n")  # 96 MB of batches, all in the pool
