"""A store across containers: processes of pid, mount and ipc namespaces of their own that share the directory of sockets."""

import shutil

import pytest
from program import Program, until

CONTAINER = (
    "--map-root-user",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--mount",
    "--ipc",
    "--uts",
)


@pytest.fixture
def container(runtime):
    """Makes programs in namespaces of their own; where that is not permitted the tests fail and say so."""
    unshare = shutil.which("unshare")
    assert unshare, "this test needs util-linux's unshare"
    begun = []

    def begin(code):
        begun.append(Program(code, under=(unshare, *CONTAINER)))
        return begun[-1]

    yield begin
    for program in begun:
        program.close()


SERVICE = """
import os
import numpy as np
import torchshm
store = torchshm.start("apart", limit="64MiB")
store["a"] = np.arange(100_000.0)
"""
CLIENT = """
import os
import numpy as np
import torchshm
store = torchshm.connect("apart")
"""


def test_a_container_has_what_another_one_saved(container):
    service, client = container(SERVICE), container(CLIENT)
    assert service.ask("os.getpid()") == client.ask("os.getpid()") == 1
    assert client.ask("(torchshm.is_shared(store['a']), float(store['a'].sum()))") == [True, 4999950000.0]
    client.do("store['b'] = np.ones(50_000)")
    assert service.ask("float(store['b'].sum())") == 50_000
    assert client.ask("store.info()['live_bytes']") == service.ask("store.info()['live_bytes']")


def test_what_a_killed_container_held_is_free_again(container):
    service, client, other = container(SERVICE), container(CLIENT), container(CLIENT)
    client.do("arrays = [store['a']]; store['b'] = np.ones(4_000_000); arrays.append(store['b'])")
    other.do("del store['b']")
    assert service.ask("store.info()['live_bytes']") > 32_000_000  # the client holds it
    client.kill()
    until(lambda: service.ask("store.info()['live_bytes']") < 2_000_000)
    assert other.ask("float(store['a'].sum())") == 4999950000.0
    assert service.ask("len(store.info()['processes'])") == 2


def test_a_store_goes_on_when_the_container_that_serves_it_is_killed(container):
    service, client = container(SERVICE), container(CLIENT)
    client.ask("len(store)")
    service.kill()
    client.do("store['b'] = np.ones(1000)")
    assert client.ask("(float(store['a'].sum()), sorted(store))") == [4999950000.0, ["a", "b"]]
