"""Peers that live as long as the session, and a process that is registered for the length of a test."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from apart import allow_time, run_apart
from peer import Peer
from scripts import WORK

import torchshm


def pytest_configure(config):
    config.addinivalue_line("markers", "apart: the module's tests run in a process of their own")
    # Where stores are found. From the start: a fork server keeps the environment that it began with. Short: sockets allow 107 bytes.
    folder = tempfile.mkdtemp(prefix="stores", dir="/tmp")
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = folder

    def end():
        if before is None:
            os.environ.pop("XDG_RUNTIME_DIR", None)
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)

    config.add_cleanup(end)


def pytest_collection_modifyitems(items):
    allow_time(items)


def pytest_runtest_protocol(item, nextitem):
    return run_apart(item, nextitem) or None


def pytest_collection_finish():
    gc.freeze()  # collections during tests look at what the tests made


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_by_the_module_before():
    """Cycles may keep blocks, and a later test counts them."""
    gc.collect()


@pytest.fixture
def registered():
    """Register this process for one test. It stays a member of its pool afterwards, as every process does."""
    torchshm.register()
    yield
    torchshm.unregister()
    gc.collect()


@pytest.fixture(scope="session")
def _spawned():
    torchshm.register()
    with Peer("spawn") as peer:
        yield peer


@pytest.fixture(scope="session")
def _second():
    torchshm.register()
    with Peer("spawn") as peer:
        yield peer


@pytest.fixture
def peer(_spawned, registered):
    """A child process that lives as long as the session. Nothing of an earlier test is left in it."""
    _spawned.forget()
    yield _spawned
    _spawned.forget()


@pytest.fixture
def other(_second, registered):
    """One more of them."""
    _second.forget()
    yield _second
    _second.forget()


@pytest.fixture
def folder(tmp_path):
    """A directory with the module `work` in it, for scripts whose children are to know nothing of torchshm."""
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


@pytest.fixture
def all_pooled(registered):
    """Here the smallest arrays go through the pool too. Not in peers, whose threshold is their own."""
    torchshm.register(min_bytes=0)
    yield
    torchshm.register()


@pytest.fixture(params=["pooled", "carried"])
def way(request, registered):
    """Small arrays go through the pool, or inside the pickle."""
    torchshm.register(min_bytes=0 if request.param == "pooled" else 1 << 40)
    yield request.param
    torchshm.register()


@pytest.fixture(scope="session")
def runtime():
    """Where the stores of this session are found, by this process and its children."""
    return Path(os.environ["XDG_RUNTIME_DIR"])


@pytest.fixture(scope="session")
def _served(runtime):
    with torchshm.start("session", limit="1GiB") as served:
        yield served


@pytest.fixture
def store(_served):
    """A store, empty. One for the session: what a process has joined it never leaves."""
    yield _served
    for key in list(_served):
        del _served[key]
    gc.collect()


@pytest.fixture(scope="session")
def _client(_served):
    with Peer("spawn") as peer:
        yield peer


@pytest.fixture
def client(_client, store):
    """A child process that knows the store by its name only."""
    yield _client
    _client.forget()
