"""Children and grandchildren of every start method are members by themselves: programs in real files, run as such."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import METHODS, WORK, passes, run

import torchshm
from torchshm import _C

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


@pytest.mark.parametrize("method", METHODS)
def test_three_generations_are_members_with_nothing_pooled_in_their_arguments(folder, method):
    assert passes(TREE, folder, method) == TREE_OUTPUT


def test_forkserver_that_is_older_than_register(folder):
    assert passes(TREE, folder, "forkserver", "started") == "the forkserver is up\n" + TREE_OUTPUT


@pytest.mark.parametrize("method", METHODS)
def test_torch_imported_later_in_parent_and_children(folder, method):
    assert passes(TREE, folder, method, "late") == TREE_OUTPUT


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
    shutil.copytree(
        Path(torchshm.__file__).parent, library / "torchshm", ignore=shutil.ignore_patterns("_C*.so")
    )
    shutil.copy(_C.__file__, library / "torchshm")
    (other / "deeper").mkdir(parents=True)
    (other / "deeper" / "work.py").write_text(WORK)
    (tmp_path / "script.py").write_text(ELSEWHERE)
    paths = [str(library), str(other), str(packages)]
    done = run([sys.executable, "-S", str(tmp_path / "script.py"), method, *paths], tmp_path, PYTHONPATH="")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"True {library / 'torchshm' / '__init__.py'}\n0\n"


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
