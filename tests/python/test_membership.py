"""Children and grandchildren of every start method are members by themselves: programs in real files, run as such."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import passes, run

import torchshm
from torchshm import _C

METHODS = ["fork", "spawn", "forkserver"]

# Knows nothing of torchshm: what it sends is pooled because its process is a member.
WORK = """
import multiprocessing
import sys

import numpy as np


def send(pipe, generation, more, method, late):
    assert method == "fork" or late or "torch" not in sys.modules
    if late:
        import torch
    if more:
        context = multiprocessing.get_context(method)
        child = context.Process(target=send, args=(pipe, generation + 1, more - 1, method, late))
        child.start()
        child.join()
        assert child.exitcode == 0
    pipe.send((generation, np.full(20_000, float(generation))))
    pipe.close()


def echo(pipe):
    while (x := pipe.recv()) is not None:
        pipe.send(x)
"""

TREE = """
import multiprocessing
import sys

import work

import torchshm


def main():
    method, late = sys.argv[1], "late" in sys.argv
    context = multiprocessing.get_context(method)
    if "started" in sys.argv:
        first = context.Process(target=print, args=("the forkserver is up",), kwargs={"flush": True})
        first.start()
        first.join()
    torchshm.register()
    if late:
        import torch
    ours, theirs = context.Pipe()
    child = context.Process(target=work.send, args=(theirs, 1, 2, method, late))
    child.start()
    for _ in range(3):
        generation, x = ours.recv()
        assert (x == generation).all()
        print(generation, torchshm.is_shared(x))
    child.join()
    print("leases", torchshm.stats()["leases"], "exit", child.exitcode)


if __name__ == "__main__":
    main()
"""
TREE_OUTPUT = "3 True\n2 True\n1 True\nleases 1 exit 0\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_three_generations_are_members_with_nothing_pooled_in_their_arguments(folder, method):
    assert passes(TREE, folder, method) == TREE_OUTPUT


def test_forkserver_that_is_older_than_register(folder):
    assert passes(TREE, folder, "forkserver", "started") == "the forkserver is up\n" + TREE_OUTPUT


@pytest.mark.parametrize("method", METHODS)
def test_torch_imported_later_in_parent_and_children(folder, method):
    assert passes(TREE, folder, method, "late") == TREE_OUTPUT


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


ELSEWHERE = """
import sys

sys.path[:0] = sys.argv[2:]
import multiprocessing

import numpy as np
import torchshm


def main():
    import deeper.work as work

    torchshm.register()
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    child = context.Process(target=work.echo, args=(theirs,), daemon=True)
    child.start()
    ours.send(np.arange(20_000.0))
    print(torchshm.is_shared(ours.recv()), torchshm.__file__)
    ours.send(None)
    child.join()
    print(child.exitcode)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", METHODS)
def test_torchshm_found_by_the_parent_alone_is_found_for_the_child(tmp_path, method):
    """No site-packages: what the script puts on sys.path is all there is, and the child starts without it."""
    packages = Path(np.__file__).parents[1]
    library, other = tmp_path / "library", tmp_path / "other"
    shutil.copytree(Path(torchshm.__file__).parent, library / "torchshm", ignore=shutil.ignore_patterns("_C*.so"))
    shutil.copy(_C.__file__, library / "torchshm")
    (other / "deeper").mkdir(parents=True)
    (other / "deeper" / "work.py").write_text(WORK)
    (tmp_path / "script.py").write_text(ELSEWHERE)
    paths = [str(library), str(other), str(packages)]
    done = run([sys.executable, "-S", str(tmp_path / "script.py"), method, *paths], tmp_path, PYTHONPATH="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"True {library / 'torchshm' / '__init__.py'}\n0\n"


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


HIDDEN = """
import sys


class Hide:
    def __reduce__(self):
        return hide, ()


def hide():
    sys.modules["torchshm"] = None
"""

NOT_THERE = """
import multiprocessing
import multiprocessing.spawn

import hidden


def main():
    import torchshm

    torchshm.register()
    stock = multiprocessing.spawn.get_preparation_data
    multiprocessing.spawn.get_preparation_data = lambda name: {"first": hidden.Hide(), **stock(name)}
    child = multiprocessing.get_context("spawn").Process(target=print, args=("alive",), kwargs={"flush": True})
    child.start()
    child.join()
    print(child.exitcode)


if __name__ == "__main__":
    main()
"""


def test_child_that_can_not_import_torchshm_starts_as_ever(tmp_path):
    (tmp_path / "hidden.py").write_text(HIDDEN)
    assert passes(NOT_THERE, tmp_path) == "alive\n0\n"
