"""What a store without room says: at once where nothing can help, and what would help in this store."""

from __future__ import annotations

import errno
import os

import pytest
from disks import small_disk
from scripts import passes

pytestmark = pytest.mark.apart

BEGIN = """
import os, sys, time
import numpy as np
import pytest
import torch
import torchshm
from torchshm import PoolFullError

MIB = 1 << 20
begun = time.monotonic()

def full(call):
    with pytest.raises(PoolFullError) as raised:
        call()
    assert type(raised.value) is PoolFullError
    return str(raised.value)
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script with the names above, where nobody else's stores are."""

    def run(source, *arguments):
        return passes(BEGIN + source, tmp_path, *map(str, arguments), XDG_RUNTIME_DIR=str(tmp_path))

    return run


def test_more_than_the_limit_can_not_be_loaded_together_and_nobody_waits_for_it(script, tmp_path):
    script(
        """
store = torchshm.start("many", "64MiB", spill=sys.argv[1], timeout=60)
keys = [f"k{i:02}" for i in range(20)]
for i, key in enumerate(keys):
    store[key] = np.full(10 * MIB, i, np.uint8)
said = "these 20 values need 200.0 MiB together, and the store's limit is 64.0 MiB: load fewer at a time"
assert said == full(lambda: store.load(keys)) == full(lambda: store.load(prefix="k"))
assert "these 7 values need 70.0 MiB" in full(lambda: store.load([*keys[:7], keys[0], keys[1]]))
assert [int(x[0]) for x in store.load([*keys[3:8], keys[3]])] == [3, 4, 5, 6, 7, 3]
for key in keys:
    del store[key]
store["one"] = np.ones(40 * MIB, np.uint8)
store["two"] = store["one"]  # the same memory
assert len(store.load(["one", "two"])) == 2
del store["one"], store["two"]
for i, key in enumerate(keys):
    store[key] = bytes([i]) * (10 * MIB)  # copied when they are loaded
assert store.info(keys[0])["where"] == "disk"
assert [x[0] for x in store.load(keys)] == list(range(20))
assert time.monotonic() - begun < 30
""",
        tmp_path / "spill",
    )


def test_one_after_the_other_the_error_says_which_and_that_the_program_holds_the_rest(script, tmp_path):
    script(
        """
store = torchshm.start("values", "64MiB", spill=sys.argv[1], timeout=0.2)
for i in range(10):
    store[f"k{i}"] = np.full(10 * MIB, i, np.uint8)
held = []
def all_of_them():
    for value in store.values():
        held.append(value)
said = full(all_of_them)
assert said.startswith(f"'k{len(held)}' can't come back from disk: no room for 10485760 bytes"), said
assert f"This process itself holds {len(held) * 10}.0 MiB of it" in said, said
assert "Or start the store with a larger limit=" in said and "spill=" not in said, said
assert full(lambda: store.load([f"k{i}" for i in range(10)])).startswith("these 10 values need 100.0 MiB")
""",
        tmp_path / "spill",
    )


def test_a_value_that_is_more_than_the_limit_makes_no_room_and_does_not_wait(script, tmp_path):
    script(
        """
store = torchshm.start("large", "64MiB", spill=sys.argv[1], timeout=60)
store["kept"] = np.ones(30 * MIB, np.uint8)
part = [np.ones(20 * MIB, np.uint8) for _ in range(5)]
said = "this value needs 100.0 MiB, and the store's limit is 64.0 MiB: save it in parts"
assert said in full(lambda: store.save("list", part))
assert said in full(lambda: store.save("dict", {i: torch.from_numpy(x) for i, x in enumerate(part)}))
assert said in full(lambda: store.get_or_create("made", lambda: part))
for whole in (torch.ones(100 * MIB, dtype=torch.uint8), [np.ones(100 * MIB, np.uint8)]):
    full(lambda: store.save("whole", whole))
assert store.info("kept")["where"] == "memory" and list(store) == ["kept"]
assert time.monotonic() - begun < 30
""",
        tmp_path / "spill",
    )


def test_what_would_help_is_said_of_a_store_in_memory(script):
    script(
        """
store = torchshm.start("memory", "64MiB")
for i, size in enumerate((10, 30, 20)):
    store[f"k{i}"] = np.ones(size * MIB, np.uint8)
more = np.ones(20 * MIB, np.uint8)
for value in (more, [more], torch.from_numpy(more)):
    said = full(lambda: store.save("more", value))
    assert "the largest: 'k1' (30.0 MiB), 'k2' (20.0 MiB), 'k0' (10.0 MiB)" in said, said
    assert said.endswith("Or start the store with a larger limit=, or with spill="), said
    assert "This process itself" not in said and "Drop arrays" not in said, said
held = store["k1"]
assert "This process itself holds 30.0 MiB" in full(lambda: store.save("more", more))
"""
    )


def test_what_would_help_is_said_of_a_cache_and_of_a_file(script, tmp_path):
    script(
        """
cache = torchshm.start("cache", "64MiB", policy="drop", timeout=0.1)
for i in range(6):
    cache[f"k{i}"] = np.ones(10 * MIB, np.uint8)
cache.set_policy("k0", "pin")
held = [cache[f"k{i}"] for i in range(1, 6)]
more = np.ones(20 * MIB, np.uint8)
said = full(lambda: cache.save("more", more))
assert "This process itself holds 50.0 MiB" in said and "spill=" not in said, said
assert "1 name of 10.0 MiB can't go, by the policy 'pin'" in said, said
file = torchshm.start("file", "64MiB", file=sys.argv[1])
file["a"] = np.ones(50 * MIB, np.uint8)
said = full(lambda: file.save("more", more))
assert "'a' (50.0 MiB)" in said and said.endswith("with its file= and a larger limit=") and "spill=" not in said, said
""",
        tmp_path / "file",
    )


def test_what_would_help_is_said_where_the_disk_is_full(script, tmp_path):
    with small_disk(tmp_path / "small", 48) as folder:
        script(
            """
with pytest.warns(RuntimeWarning, match="tmpfs"):
    store = torchshm.start("disk", "64MiB", spill=sys.argv[1], timeout=0.3)
def fill():
    for i in range(40):
        store[f"k{i}"] = np.ones(8 * MIB, np.uint8)
said = full(fill)
assert sys.argv[2] in said and "Make room on that disk, which has" in said and "remove names" in said, said
assert "spill=" not in said, said
""",
            folder / "spill",
            os.strerror(errno.ENOSPC),
        )
