"""Where the system allows no pool, register() warns once and everything works as before."""

from __future__ import annotations

import resource
import sys

import pytest
from scripts import run_script

WITHOUT = """
import multiprocessing
import multiprocessing.reduction
import pickle
import sys
import warnings

import numpy as np
import torchshm
from torchshm import _C


def child(pipe):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.send((np.arange(20_000.0), _C.is_member()))


def main():
    before = dict(multiprocessing.reduction.ForkingPickler._extra_reducers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchshm.register()
    assert [warning.category for warning in caught] == [RuntimeWarning], caught
    print(caught[0].message)
    assert multiprocessing.reduction.ForkingPickler._extra_reducers == before
    x = np.arange(20_000.0)
    assert bytes(multiprocessing.reduction.ForkingPickler.dumps(x)) == pickle.dumps(x)
    for method in ["fork", "spawn", "forkserver"]:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs,), daemon=True)
        process.start()
        y, member = ours.recv()
        process.join()
        assert np.array_equal(x, y) and not member and process.exitcode == 0
    assert not torchshm.is_shared(x)
    for want in [lambda: torchshm.empty(5), lambda: torchshm.share(x), torchshm.stats, lambda: torchshm.dumps(x)]:
        try:
            want()
        except torchshm.TorchshmError as error:
            assert str(error)
        else:
            raise AssertionError("worked without a pool")
    with torchshm.inline():
        pass
    torchshm.unregister()


if __name__ == "__main__":
    main()
"""

LIMITS = {
    "file size": {resource.RLIMIT_FSIZE: 1 << 20},
    "address space": {resource.RLIMIT_AS: 3 << 30},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_without_a_pool_register_warns_once_and_all_works_as_before(tmp_path, limit):
    done = run_script(WITHOUT, tmp_path, limits=LIMITS[limit])
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing is changed" in done.stdout
    if limit == "file size":
        assert "ulimit -f" in done.stdout


SMALLER = """
import numpy as np
import torchshm

torchshm.register()
x = torchshm.share(np.ones(50_000))
assert torchshm.is_shared(torchshm.loads(torchshm.dumps(x)))
print("ok")
"""


@pytest.mark.parametrize("limit", LIMITS)
def test_a_smaller_pool_fits_within_the_limits_of_the_process(tmp_path, limit):
    limits = {
        kind: value * 1024 if kind == resource.RLIMIT_FSIZE else value
        for kind, value in LIMITS[limit].items()
    }
    done = run_script(SMALLER, tmp_path, limits=limits, TORCHSHM_LIMIT="64MiB")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


CHILD_CAN_NOT = """
import multiprocessing

import numpy as np
import torchshm


def child(pipe):
    pipe.send(np.arange(20_000.0))


def main():
    torchshm.register()
    x = torchshm.share(np.ones(1000))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.set_executable("./limited")
    process = context.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    y = ours.recv()
    process.join()
    print(np.array_equal(y, np.arange(20_000.0)), process.exitcode)


if __name__ == "__main__":
    main()
"""


def test_child_that_can_not_join_warns_and_sends_as_ever(tmp_path):
    limited = tmp_path / "limited"
    limited.write_text(f'#!/bin/sh\nulimit -v {3 << 20}\nexec {sys.executable} "$@"\n')
    limited.chmod(0o755)
    done = run_script(CHILD_CAN_NOT, tmp_path)
    assert (done.returncode, done.stdout) == (0, "True 0\n"), done.stderr
    assert done.stderr.count("RuntimeWarning: torchshm: this process can't join the pool of its parent") == 1


@pytest.mark.parametrize("size", ["lots", "-5", "12 parsecs", ""])
def test_limit_that_is_no_size_is_said_so(tmp_path, size):
    done = run_script(SMALLER, tmp_path, TORCHSHM_LIMIT=size)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("ValueError: not a size")
