"""Few descriptors, few mappings, a limit that is kept: what a program may count on however many arrays it has."""

from __future__ import annotations

from scripts import passes

MIB = 1 << 20

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


HALF_WAY = """
import numpy as np
import torchshm

torchshm.register()
before = torchshm.stats()
for turn in range(3):
    try:
        torchshm.share([np.ones(1 << 17) for n in range(40)])
    except torchshm.PoolFullError:
        pass
after = torchshm.stats()
assert (after["blocks"], after["tickets"]) == (before["blocks"], before["tickets"]), after
x = torchshm.empty(14 << 20, "u1")
print("ok")
"""


def test_share_that_finds_no_room_gives_back_what_it_had_taken(tmp_path):
    assert passes(HALF_WAY, tmp_path, TORCHSHM_LIMIT="16MiB") == "ok\n"


CHANGED = """
import multiprocessing
import numpy as np
import torchshm


def child(pipe):
    pipe.send(torchshm.stats()["limit_bytes"])
    pipe.recv()
    pipe.send(torchshm.stats()["limit_bytes"])
    try:
        torchshm.empty(20 << 20, "u1")
    except torchshm.PoolFullError as error:
        pipe.send(str(error))


torchshm.register(limit="64MiB")
assert torchshm.stats()["limit_bytes"] == 64 << 20
ours, theirs = multiprocessing.Pipe()
process = multiprocessing.Process(target=child, args=(theirs,), daemon=True)
process.start()
assert ours.recv() == 64 << 20
kept = torchshm.empty(20 << 20, "u1")
torchshm.register(limit=32 << 20)
ours.send(1)
assert ours.recv() == 32 << 20
assert "32.0 MiB" in ours.recv()
kept[...] = 3
torchshm.register(limit="64 MiB")
more = torchshm.empty(20 << 20, "u1")
for wrong in [0, -1, "many", "0"]:
    try:
        torchshm.register(limit=wrong)
    except ValueError as error:
        assert "limit" in str(error) or "size" in str(error)
    else:
        raise AssertionError(wrong)
assert torchshm.stats()["limit_bytes"] == 64 << 20
print("ok")
"""


def test_limit_is_set_and_changed_for_the_whole_family(tmp_path):
    assert passes(CHANGED, tmp_path) == "ok\n"
