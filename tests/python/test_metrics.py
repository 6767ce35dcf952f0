"""`torchshm metrics`, read back by Prometheus's own parser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import psutil
import pytest
from scripts import PATIENCE

import torchshm

pytestmark = pytest.mark.apart
pytest.importorskip("typer")
parser = pytest.importorskip("prometheus_client.parser")


def command(*arguments):
    return [sys.executable, "-m", "torchshm", "metrics", *arguments]


def values(text):
    """{(name, labels): value}"""
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter"), family
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample
            assert sample.name.startswith("torchshm_")
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def of(name, found, **labels):
    return found[name, frozenset(labels.items())]


def test_figures_are_those_of_the_store(store):
    store["a"], store["b"] = np.ones(1 << 20, "u1"), 1
    held = store["a"]
    del store["b"]
    done = subprocess.run(command("session"), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found, info = values(done.stdout), store.info()
    for name in (
        "live_bytes",
        "warm_bytes",
        "committed_bytes",
        "limit_bytes",
        "ticket_bytes",
        "names",
        "blocks",
    ):
        assert of(f"torchshm_store_{name}", found, store="session") == info[name]
    assert of("torchshm_store_up", found, store="session") == 1
    assert of("torchshm_store_saves_total", found, store="session") == info["saved"] >= 2
    assert of("torchshm_store_removals_total", found, store="session") == info["removed"] >= 1
    assert of("torchshm_store_spill_errors_total", found, store="session") == 0
    assert (
        of("torchshm_store_processes", found, store="session") == info["leases"]
    )  # who looks is not counted
    pool = f"{info['pool_id']:016x}"
    name = next(row["name"] for row in info["processes"] if row["pid"] == os.getpid())
    bytes_held = of("torchshm_process_held_bytes", found, pool=pool, pid=str(os.getpid()), process=name)
    assert bytes_held >= held.nbytes
    assert of("torchshm_store_info", found, store="session", pool=pool) == 1
    assert not [key for key in found if key[0].startswith("torchshm_pool_")]  # one store was asked for


def test_a_store_that_is_not_there_is_down(runtime):
    done = subprocess.run(command("not-there"), capture_output=True, text=True, timeout=PATIENCE)
    found = values(done.stdout)
    assert done.returncode == 0 and of("torchshm_store_up", found, store="not-there") == 0
    assert list(found) == [("torchshm_store_up", frozenset({("store", "not-there")}))]


def test_all_stores_and_pools_without_a_name(store):
    torchshm.register()
    try:
        block = torchshm.empty(1 << 20, "u1")
        done = subprocess.run(command(), capture_output=True, text=True, timeout=PATIENCE)
        found = values(done.stdout)
        assert of("torchshm_store_up", found, store="session") == 1
        live = [value for (name, _), value in found.items() if name == "torchshm_pool_live_bytes"]
        assert torchshm.stats()["live_bytes"] in live and block.nbytes <= max(live)
    finally:
        torchshm.unregister()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_http_serves_what_is_true_then(store, end):
    store["a"] = np.ones(1 << 20, "u1")
    with subprocess.Popen(command("--port", "0"), stdout=subprocess.PIPE, text=True) as server:
        url = re.search(r"http://127\.0\.0\.1:\d+/metrics", server.stdout.readline())[0]

        def live():
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                return of("torchshm_store_live_bytes", values(answer.read().decode()), store="session")

        assert live() == store.info()["live_bytes"]
        del store["a"]
        assert live() == store.info()["live_bytes"]
        children = psutil.Process(server.pid).children()
        assert children
        server.send_signal(end)
    assert server.returncode == 0
    assert not psutil.wait_procs(children, timeout=PATIENCE)[1]


def test_a_port_that_is_taken_is_said_so(runtime):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(command("--port", port), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and f"127.0.0.1:{port}: Address already in use" in done.stderr, done


def test_without_the_library_the_error_says_what_to_install(runtime):
    script = """
import sys
sys.modules["prometheus_client"] = None
sys.argv = ["torchshm", "metrics"]
from torchshm._cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert (
        done.returncode == 1
        and "pip install 'torchshm[cli]'" in done.stderr
        and "Traceback" not in done.stderr
    )
