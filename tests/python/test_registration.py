"""Wherever and whenever a program calls register(): at its top level, in what a forkserver preloads, in children, too late."""

from __future__ import annotations

import pytest
from scripts import METHODS, passes

TOP_LEVEL = """
import multiprocessing
import sys

import numpy as np
import torchshm
import work

torchshm.register()


def main():
    context = multiprocessing.get_context(sys.argv[1])
    for _ in range(2):
        ours, theirs = context.Pipe()
        child = context.Process(target=work.echo, args=(theirs,), daemon=True)
        child.start()
        x = np.arange(20_000.0)
        for _ in range(3):
            ours.send(x)
            y = ours.recv()
            assert np.array_equal(x, y) and torchshm.is_shared(y)
            y[0] = 5
        ours.send(None)
        child.join()
        print(child.exitcode, torchshm.stats()["leases"])


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", METHODS)
def test_script_that_registers_at_its_top_level(folder, method):
    """The default forkserver imports the script, and so calls register() in a process of its own."""
    assert passes(TOP_LEVEL, folder, method) == "0 1\n0 1\n"


PRELOAD = """
import multiprocessing

import numpy as np
import torchshm
import work


def main():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchshm", "preloaded"])
    torchshm.register()
    ours, theirs = context.Pipe()
    child = context.Process(target=work.echo, args=(theirs,), daemon=True)
    child.start()
    ours.send(np.arange(20_000.0))
    print(torchshm.is_shared(ours.recv()))
    ours.send(None)
    child.join()
    print(child.exitcode)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("preloaded", ["import torchshm", "import torchshm\ntorchshm.register()"])
def test_forkserver_that_preloads_what_imports_or_registers(folder, preloaded):
    (folder / "preloaded.py").write_text(preloaded)
    assert passes(PRELOAD, folder) == "True\n0\n"


LATE = """
import multiprocessing
import sys

import numpy as np


def child(pipe, again):
    import torchshm

    torchshm.register()
    pipe.send(np.arange(20_000.0))
    x = pipe.recv()
    pipe.send((x.sum(), torchshm.is_shared(x)))
    pipe.recv()


def main():
    context = multiprocessing.get_context(sys.argv[1])
    pipes = [context.Pipe() for _ in range(2)]
    children = [context.Process(target=child, args=(theirs, 1), daemon=True) for _, theirs in pipes]
    for one in children:
        one.start()
    received = [ours.recv() for ours, _ in pipes]
    for x in received:
        assert np.array_equal(x, np.arange(20_000.0))
        x[0] = 1
    for ours, _ in pipes:
        ours.send(received[0])
        total, shared = ours.recv()
        print(total, "torchshm" in sys.modules)
        ours.send(None)
    for one in children:
        one.join()
        print(one.exitcode)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", METHODS)
def test_children_that_register_when_their_parent_did_not(folder, method):
    """Every child makes a pool of its own; the parent, which has none, joins them when a message tells of them."""
    assert passes(LATE, folder, method) == "199990001.0 True\n" * 2 + "0\n0\n"


BEFORE = """
import multiprocessing
import sys

import numpy as np
import work


def main():
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    child = context.Process(target=work.echo, args=(theirs,), daemon=True)
    child.start()
    ours.send(1)
    ours.recv()
    import torchshm

    torchshm.register()
    x = np.arange(20_000.0)
    for _ in range(3):
        ours.send(x)
        y = ours.recv()
        assert np.array_equal(x, y)
    print(torchshm.is_shared(y), torchshm.stats()["leases"])
    ours.send(None)
    child.join()
    print(child.exitcode)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", METHODS)
def test_children_that_are_older_than_register_receive_and_send_as_ever(folder, method):
    """They find the pool when a message tells of it, and pickle as they did."""
    assert passes(BEFORE, folder, method) == "False 2\n0\n"
