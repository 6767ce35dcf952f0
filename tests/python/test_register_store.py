"""register(store=...): the store's pool is the process's, so what is named can be sent and what was received can be named, uncopied."""

import pytest
from scripts import METHODS, passes, run_script

# Of every script: a store of its own, and what tells whether something was copied into it.
BEGIN = """
import gc
import multiprocessing
import sys

import numpy as np
import torchshm


def live(store):
    gc.collect()
    return store.info()["live_bytes"]


def echo(pipe):
    while (x := pipe.recv()) is not None:
        pipe.send(x)


def big(value):
    return np.full(1_000_000, float(value))
"""


def script(body, head=""):
    lines = "\n".join("    " + line for line in body.strip("\n").splitlines())
    return f"{BEGIN}\n{head}\n\nif __name__ == '__main__':\n    method = sys.argv[1]\n{lines}\n"


@pytest.mark.parametrize("method", METHODS)
def test_names_and_messages_share_memory(runtime, tmp_path, method):
    passes(
        script(
            """
store = torchshm.start("both", limit="256MiB")
torchshm.register(store=store)
store["x"] = big(1)
context = multiprocessing.get_context(method)
pipe, theirs = context.Pipe()
child = context.Process(target=name_it, args=(theirs, store), daemon=True)
child.start()
named = live(store)
x = store.load("x", mode="r+")
pipe.send(x)  # by reference, there and back
y = pipe.recv()
assert live(store) == named and torchshm.is_shared(y)
x[7] = 5
assert y[7] == 5
pipe.send(big(2))  # one copy, into the store; named there without another
assert pipe.recv() == big(2).nbytes
z = store["from the child"]
assert (z == 2).all() and live(store) <= named + big(2).nbytes + 8192
pipe.send(None)
x = pipe.recv()  # and from the child
assert (x == 3).all() and torchshm.is_shared(x)
child.join()
assert child.exitcode == 0 and torchshm.stats()["limit_bytes"] == 256 << 20
""",
            """
def name_it(pipe, store):
    x = pipe.recv()
    pipe.send(x)
    del x
    received = pipe.recv()
    before = live(store)
    store["from the child"] = received
    grown = live(store) - before
    assert grown == 0, grown
    pipe.send(received.nbytes)
    assert pipe.recv() is None
    pipe.send(big(3))
""",
        ),
        tmp_path,
        method,
    )


@pytest.mark.parametrize("method", METHODS)
def test_loader_workers_send_what_they_load_from_the_store(runtime, tmp_path, method):
    passes(
        script(
            """
from torch.utils.data import DataLoader
store = torchshm.start("loader", limit="256MiB")
for i in range(8):
    store[f"item {i}"] = big(i)
torchshm.register(store="loader")
loader = DataLoader(Items(torchshm.connect("loader")), batch_size=2, num_workers=2, collate_fn=list,
                    multiprocessing_context=method)
before = live(store)
batches = list(loader)
assert live(store) == before
for i, x in enumerate(x for batch in batches for x in batch):
    assert x[0] == i and torchshm.is_shared(x)
    store.load(f"item {i}", mode="r+")[0] = -1
    assert x[0] == -1
""",
            """
class Items:
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.store[f"item {i}"]
""",
        ),
        tmp_path,
        method,
    )


@pytest.mark.parametrize("method", METHODS)
def test_tensors_are_named_and_sent_in_one_memory(runtime, tmp_path, method):
    passes(
        script(
            """
import torch
store = torchshm.start("tensors", limit="256MiB")
torchshm.register(store=store)
context = multiprocessing.get_context(method)
pipe, theirs = context.Pipe()
child = context.Process(target=echo, args=(theirs,), daemon=True)
child.start()
with store.storage():
    x = torch.ones(1_000_000)
made = live(store)
store["x"] = x  # only named
pipe.send(x)  # only sent
y = pipe.recv()
assert live(store) == made, (live(store), made)
x[3] = 7
assert y[3] == 7
z = store["x"]  # its own writes are its own
pipe.send(z)
again = pipe.recv()
assert live(store) == made
z[3] = 9
assert x[3] == 7 and again[3] == 9  # one private view in a process
pipe.send(None)
child.join()
store.close()
"""
        ),
        tmp_path,
        method,
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_pool_of_before_goes_on(runtime, tmp_path, method):
    """What lies there stays, and stays shared with whoever gets it; what is made now is the store's."""
    passes(
        script(
            """
torchshm.register()
context = multiprocessing.get_context(method)
old_pipe, theirs = context.Pipe()
old_child = context.Process(target=echo, args=(theirs,), daemon=True)
old_child.start()
shared = torchshm.empty(1_000_000)
shared[:] = 1
early = torchshm.dumps(big(4))

store = torchshm.start("later", limit="256MiB")
torchshm.register(store=store)
torchshm.register(min_bytes=None)
new_pipe, theirs = context.Pipe()
new_child = context.Process(target=echo, args=(theirs,), daemon=True)
new_child.start()
for n, pipe in enumerate([old_pipe, new_pipe]):
    before = live(store)
    pipe.send(shared)
    back = pipe.recv()
    assert live(store) == before
    shared[n] = 17
    assert back[n] == 17
    pipe.send(big(5))
    back = pipe.recv()
    assert (back == 5).all()
    if pipe is new_pipe:
        assert live(store) > before
assert (torchshm.loads(early) == 4).all()
copied = torchshm.share(shared)
before = live(store)
store["copied"] = copied
assert live(store) == before
old_pipe.send(None)
new_pipe.send(None)
old_child.join()
new_child.join()
assert old_child.exitcode == new_child.exitcode == 0
""",
        ),
        tmp_path,
        method,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_parent_that_does_not_know_the_store_receives_from_it(runtime, tmp_path, method):
    passes(
        script(
            """
context = multiprocessing.get_context(method)
pipe, theirs = context.Pipe()
child = context.Process(target=serve, args=(theirs,), daemon=True)
child.start()
assert pipe.recv() == "up"
store = pipe.recv()
assert (store == 6).all() and torchshm.is_shared(store)
child.kill()
child.join()
assert (store == 6).all()
""",
            """
def serve(pipe):
    store = torchshm.start("childs", limit="256MiB")
    torchshm.register(store=store)
    pipe.send("up")
    store["six"] = big(6)
    pipe.send(store["six"])
    pipe.recv()
""",
        ),
        tmp_path,
        method,
    )


def test_what_was_received_and_saved_stays_the_receivers_own(runtime, tmp_path):
    """Nobody sees what it writes there later, and it does not see what others write."""
    passes(
        script(
            """
store = torchshm.start("own", limit="256MiB")
torchshm.register(store=store)
context = multiprocessing.get_context(method)
pipe, theirs = context.Pipe()
child = context.Process(target=peer, args=(theirs, store), daemon=True)
child.start()
pipe.send(big(1))
x = pipe.recv()
before = live(store)
store["x"] = x
store["again"] = {"nested": x[10:]}
assert live(store) <= before + 8192
x[0] = 99
x[20] = 98
assert store["x"][0] == 1 and store["again"]["nested"][10] == 1
store["changed"] = x  # as it is now
assert store["changed"][0] == 99 and store["x"][0] == 1
pipe.send("look")
assert pipe.recv() == (1.0, 99.0)
try:
    store.load("x", mode="r+")
except torchshm.TorchshmError as error:
    assert "delete that first" in str(error)
else:
    raise AssertionError
try:
    store.load("again", mode="r+")
except torchshm.TorchshmError as error:
    assert "delete that first" in str(error)
else:
    raise AssertionError
assert store.load("x", mode="c")[0] == 1
del x
store.load("x", mode="r+")[0] = 50
pipe.send("look")
assert pipe.recv() == (50.0, 99.0)
pipe.send(None)
child.join()
assert child.exitcode == 0
""",
            """
def peer(pipe, store):
    while (x := pipe.recv()) is not None:
        pipe.send((float(store["x"][0]), float(store["changed"][0])) if isinstance(x, str) else x + 0)
""",
        ),
        tmp_path,
        "spawn",
    )


def test_what_can_not_be_is_said(runtime, tmp_path):
    passes(
        script(
            """
def refused(kind, text, **how):
    try:
        torchshm.register(**how)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(how)

refused(torchshm.StoreUnavailableError, "no store named nobody", store=torchshm.Store("nobody", 0, None))
store = torchshm.start("limits", limit="64MiB")
refused(ValueError, "limit is the store's", store=store, limit="1GiB")
torchshm.register(store=store)
refused(ValueError, "keeps the limit", limit="1GiB")
store.close()
refused(torchshm.StoreUnavailableError, "closed", store=store)
""",
        ),
        tmp_path,
        "spawn",
    )


def test_a_store_without_room_is_no_reason_to_fail(runtime, tmp_path):
    done = run_script(
        script(
            """
store = torchshm.start("full", limit="4MiB")
torchshm.register(store=store)
held = [torchshm.loads(torchshm.dumps(big(i))) for i in range(4)]
assert all((x == i).all() for i, x in enumerate(held))
""",
        ),
        tmp_path,
        "spawn",
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" in done.stderr and "limit" in done.stderr
