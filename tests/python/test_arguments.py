"""What start(), save() and their kin take for sizes, times and paths, and what they say of what is none."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import torchshm
from torchshm._size import parse_limit, parse_seconds

pytestmark = pytest.mark.apart

MIB = 1 << 20


@pytest.fixture
def start(runtime):
    """Starts a store with these arguments, and gives it until the test ends."""
    held = []

    def begin(*arguments, **how):
        held.append(torchshm.start(f"arguments-{len(held)}", *arguments, **how))
        return held[-1]

    yield begin
    for store in held:
        store.close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"numa": 0}, 'numa is a policy such as "interleave" or "bind:0", or None, not 0'),
        ({"numa": ""}, "\"bind:0\", or None, not ''"),
        ({"spill": ""}, "spill is a directory, or None, not ''"),
        ({"file": ""}, "file is a path, or None, not ''"),
        ({"limit": math.nan}, "not a size for a limit"),
        ({"limit": math.inf}, "not a size for a limit"),
        ({"limit": 0.5}, "not a size for a limit"),
        ({"timeout": math.nan}, "timeout is a number of seconds"),
        ({"ttl": math.inf}, "ttl is a number of seconds above 0"),
    ],
)
def test_a_value_that_means_nothing_is_refused(runtime, how, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        torchshm.start("nothing", **how)
    assert not list(runtime.glob("torchshm/nothing*"))


@pytest.mark.parametrize("how", [{"limit": True}, {"limit": [1]}, {"timeout": "1s"}, {"ttl": "5m"}])
def test_a_type_that_means_nothing_is_refused(runtime, how):
    with pytest.raises(TypeError, match=r"not a size|is a number of seconds, not '"):
        torchshm.start("nothing", **how)


def test_limits_of_all_kinds_of_numbers():
    for number in (MIB, MIB + 0.7, np.int64(MIB), np.float64(MIB), np.float32(MIB), Fraction(MIB), str(MIB)):
        assert parse_limit(number) == MIB and type(parse_limit(number)) is int


def test_a_limit_may_be_more_than_the_machine_has(start):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = start("100TiB")
    store["a"] = np.ones(1000)
    assert store.info()["limit_bytes"] > 0 and store["a"].sum() == 1000


def test_times_are_numbers(start):
    store = start(0.9 * 64 * MIB)
    assert store.info()["limit_bytes"] == int(0.9 * 64 * MIB)
    for call in (
        lambda wrong: store.save("a", 1, timeout=wrong),
        lambda wrong: store.load("a", timeout=wrong),
        lambda wrong: store.get_or_create("a", int, timeout=wrong),
        lambda wrong: store.lock("a", timeout=wrong),
        lambda wrong: store.lock("a").acquire(wrong),
        lambda wrong: torchshm.connect("nobody", timeout=wrong),
    ):
        with pytest.raises(TypeError, match="timeout is a number of seconds, not '1s'"):
            call("1s")
        with pytest.raises(ValueError, match="timeout is a number of seconds, not nan"):
            call(math.nan)
    for wrong, error in (("5m", TypeError), (math.nan, ValueError), (b"5", TypeError)):
        with pytest.raises(error, match="ttl is a number of seconds"):
            store.save("a", 1, ttl=wrong)
    assert "a" not in store
    for right in (
        1,
        0.5,
        math.inf,
        -1,
        np.int8(1),
        np.int64(1),
        np.float16(1),
        np.float32(0.5),
        Fraction(1, 2),
    ):
        store.save("a", 1, timeout=right, overwrite=True)
        assert store.load("a", timeout=right) == store.load(["a"], timeout=right)[0] == 1
        assert store.get_or_create("a", int, timeout=right) == 1
        with store.lock("a", timeout=right):
            pass
    store.save("b", 1, ttl=np.float16(1000))
    assert 0 < store.info("b")["expires_in"] <= 1000
    assert parse_seconds(math.inf, "timeout") == -1


def test_a_directory_for_spilled_values_is_made_with_those_above_it(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    try:
        store = start("64MiB", spill="~/a/b/c")
        assert store.info()["spill_directory"] == str(tmp_path / "a/b/c")
        modes = [(tmp_path / each).stat().st_mode & 0o777 for each in ("a", "a/b", "a/b/c")]
        assert modes == [0o755, 0o755, 0o700]
        assert start("64MiB", file="~/kept")._core.file == str(tmp_path / "kept")
    finally:
        os.umask(before)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        start("64MiB", spill=tmp_path / "file" / "b" / "c")


def test_a_directory_in_memory_for_spilled_values_is_warned_of(start):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with pytest.warns(RuntimeWarning, match=r"is on tmpfs, which is memory") as warned:
            start("64MiB", spill=Path(folder) / "a" / "b")
        assert warned[0].filename.endswith(".py") and "torchshm/_store" not in warned[0].filename


def test_what_a_process_can_do_that_is_a_member_of_sixteen_pools(runtime, tmp_path):
    script = """
        import torchshm

        said = "member of 16 pools, which is the most; close() does not leave one until the process ends: use a child process"
        other = torchshm.start("one-0", "1MiB")
        for i in range(1, 17):
            try:
                torchshm.start(f"one-{i}", "1MiB").close()
            except torchshm.TorchshmError as error:
                assert i == 16 and said in str(error) and type(error) is torchshm.TorchshmError, (i, error)
                break
        else:
            raise AssertionError
        print("full", flush=True)
        input()
        try:
            torchshm.connect("elsewhere")
        except torchshm.TorchshmError as error:
            assert said in str(error) and "no store named" not in str(error), error
            print("said")
    """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    with subprocess.Popen(
        [sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as full:
        assert full.stdout.readline() == "full\n"
        with torchshm.start("elsewhere", "1MiB"):
            assert full.communicate("\n")[0] == "said\n"
