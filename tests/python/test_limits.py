"""Few descriptors, few mappings, a limit that is kept: what a program may count on however many arrays it has."""

from __future__ import annotations

import resource
import shutil
import sys

import pytest
from scripts import passes, run, run_script

MIB = 1 << 20

COUNTING = """
import gc, multiprocessing, os, re, sys, threading, warnings
import numpy as np
import torchshm


def fds():
    return len(os.listdir("/proc/self/fd"))


def mappings():
    with open("/proc/self/maps") as file:
        return sum(1 for line in file)
"""

MANY = (
    COUNTING
    + """
def send(pipe):
    for n in range(200):
        pipe.send([np.full(40, float(n * 250 + m)) for m in range(250)])


def main():
    first = multiprocessing.Process(target=abs, args=(1,))
    first.start()
    first.join()
    multiprocessing.Pipe()  # all libraries are loaded from here on
    before = fds(), mappings()
    torchshm.register(min_bytes=0)
    own = [torchshm.empty(16, "u1") for n in range(50_000)]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=send, args=(theirs,))
    child.start()
    received = []
    for n in range(200):
        received += ours.recv()
    child.join()
    assert len(own) + len(received) == 100_000
    assert all(x[0] == n == x[-1] for n, x in enumerate(received))
    gc.collect()
    assert torchshm.stats()["processes"][0]["held_blocks"] == 100_000
    print(fds() - before[0], mappings() - before[1])


if __name__ == "__main__":
    main()
"""
)


def test_a_hundred_thousand_live_arrays_cost_a_handful_of_descriptors_and_mappings(tmp_path):
    fds, mappings = map(int, passes(MANY, tmp_path).split())
    assert fds <= 16
    assert mappings <= 64


TRAFFIC = (
    COUNTING
    + """
def echo(pipe):
    while (x := pipe.recv()) is not None:
        pipe.send(x)


def turn(sizes):
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.Process(target=echo, args=(theirs,))
    child.start()
    theirs.close()
    kept = []
    for size in sizes:
        ours.send([np.ones(size), torchshm.share(np.ones(size)), torchshm.share(np.ones(size), "r")])
        kept.append(ours.recv())
        kept[-1][1][:] = 5
        with torchshm.pooled():
            kept.append(np.ones(size) + 1)
    ours.send(None)
    child.join()
    assert child.exitcode == 0
    ours.close()
    child.close()


def main():
    torchshm.register(min_bytes=0)
    turn([10, 1000, 100_000])
    gc.collect()
    before = fds(), mappings(), torchshm.stats()
    for n in range(20):
        turn([1, 50, 600, 5000, 70_000, 300_000] * 5)
    gc.collect()
    after = fds(), mappings(), torchshm.stats()
    assert after[2]["blocks"] == after[2]["tickets"] == after[2]["live_bytes"] == 0, after
    assert after[2]["leases"] == 1
    assert after[0] == before[0], (before, after)
    assert after[1] <= before[1] + 4, (before, after)  # of malloc's and Python's own
    print("ok")


if __name__ == "__main__":
    main()
"""
)


def test_descriptors_mappings_and_blocks_are_back_at_the_baseline_after_traffic(tmp_path):
    assert passes(TRAFFIC, tmp_path) == "ok\n"


def test_ten_thousand_arrays_with_a_limit_of_forty_descriptors(tmp_path):
    script = MANY.replace("range(50_000)", "range(5_000)").replace("range(200)", "range(20)").replace("100_000", "10_000")
    fds, _ = map(int, passes(script, tmp_path, limits={resource.RLIMIT_NOFILE: 40}).split())
    assert fds <= 16


FULL = """
import os
import numpy as np
import torchshm

torchshm.register()
limit = torchshm.stats()["limit_bytes"]
assert limit == 16 << 20
kept = [torchshm.empty(1 << 20, "u1") for n in range(12)]
for want in (lambda: torchshm.empty(8 << 20, "u1"), lambda: torchshm.share(np.ones(1 << 20))):
    try:
        want()
    except MemoryError as error:
        said = str(error)
        assert type(error) is torchshm.PoolFullError and isinstance(error, torchshm.TorchshmError)
        assert f"pid {os.getpid()}" in said and "12.0 MiB" in said and "16.0 MiB" in said, said
        assert "TORCHSHM_LIMIT" in said and str(8 << 20) in said, said
    else:
        raise AssertionError("there was room")
try:
    torchshm.empty(1 << 50, "u1")
except torchshm.PoolFullError:
    pass
before = torchshm.stats()
assert before["committed_bytes"] <= limit, before
with torchshm.pooled():
    x = np.ones(1 << 20)
assert not torchshm.is_shared(x) and (x == 1).all()
del kept[:10]
y = torchshm.empty(8 << 20, "u1")
y[...] = 1
assert torchshm.stats()["committed_bytes"] <= limit
print("ok")
"""


def test_full_pool_says_who_holds_what_and_works_again_when_there_is_room(tmp_path):
    assert passes(FULL, tmp_path, TORCHSHM_LIMIT="16MiB") == "ok\n"


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
    done = run_script(LOADER, tmp_path, method, TORCHSHM_LIMIT="8MiB", PYTHONWARNINGS="always::RuntimeWarning")
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
        [unshare, "--map-root-user", "--mount", "sh", "-c", mount, "sh", sys.executable, "script.py", "fork"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ("" if script == "arrays" else "12\n")  # 96 MB of batches, all in the pool
