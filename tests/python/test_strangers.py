"""A process outside the family gets a clear error that names the way, and never other data."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from scripts import passes

import torchshm

pytestmark = pytest.mark.usefixtures("registered")

LOAD = """
import os, pickle, sys
data = sys.stdin.buffer.read()
{before}
fds = len(os.listdir("/proc/self/fd"))
try:
    pickle.loads(data)
except Exception as error:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    print(kinds[0], "ConnectionError" in kinds, "TorchshmError" in kinds, error)
assert len(os.listdir("/proc/self/fd")) == fds
"""


def loaded_by_a_stranger(data, before="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(before=before)],
        input=data,
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.stderr == b""
    return done.stdout.decode()


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import torchshm",
        "import torchshm; torchshm.register()",
        "import torchshm; own = torchshm.share([1] * 9)",
    ],
    ids=["knows nothing", "imported", "registered", "has a pool of its own"],
)
def test_stranger_gets_an_error_that_names_the_store(before):
    x = np.arange(10_000.0)
    said = loaded_by_a_stranger(torchshm.dumps(x), before)
    assert said.startswith("StoreUnavailableError True True")
    for way in ["torchshm.start(", "torchshm.connect(", "torchshm.inline()"]:
        assert way in said


def test_subprocess_of_a_member_is_a_stranger_too():
    """Not started by multiprocessing: it has no authkey of ours, though it is our child."""
    source = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {LOAD.format(before='')!r}]).returncode)"
    done = subprocess.run(
        [sys.executable, "-c", source], input=torchshm.dumps(np.ones(5000)), capture_output=True, check=False
    )
    assert done.stdout.decode().startswith("StoreUnavailableError")


def test_what_was_pickled_inline_reaches_strangers():
    with torchshm.inline():
        data = torchshm.dumps(np.arange(5000.0))
    assert loaded_by_a_stranger(data) == ""


def test_stranger_takes_nothing_from_the_owner():
    x = np.arange(10_000.0)
    data = torchshm.dumps(x)
    loaded_by_a_stranger(data)
    assert np.array_equal(torchshm.loads(data), x)


GONE = """
import os
import subprocess
import sys

code = "import sys, torchshm; import numpy as np; sys.stdout.buffer.write(torchshm.dumps(np.ones(5000)))"
data = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
import pickle

try:
    pickle.loads(data)
except ConnectionError as error:
    print(type(error).__name__)
"""


def test_pool_that_is_gone_altogether_is_named_as_unreachable(tmp_path):
    assert passes(GONE, tmp_path) == "StoreUnavailableError\n"
