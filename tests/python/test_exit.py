"""A program ends as it would without torchshm: its exit status, nothing on stderr, whatever is still alive."""

from __future__ import annotations

import re

import pytest
from scripts import passes, run_script

PROGRAMS = {
    "live arrays": """
        received = torchshm.loads(torchshm.dumps(x))
        shared = [torchshm.share(x, mode) for mode in ("c", "r", "r+")]
        with torchshm.pooled():
            pooled = x + 1
    """,
    "arrays in a cycle": """
        class Node: pass
        node = Node()
        node.self, node.array = node, torchshm.share(x)
    """,
    "arrays in a class and a closure": """
        class Holder:
            array = torchshm.share(x)
            def __del__(self):
                self.array[1] = own[1]
        own = torchshm.share(x)
        holder = Holder()
    """,
    "arrays in a module": """
        import types
        sys.modules["keeper"] = module = types.ModuleType("keeper")
        module.array = torchshm.share(x)
    """,
    "ended inside pooled()": """
        torchshm.pooled().__enter__()
        kept = x + 1
    """,
    "unreceived messages": """
        messages = [torchshm.dumps(x) for n in range(10)]
    """,
    "daemon thread that allocates": """
        def work():
            kept = []
            while True:
                with torchshm.pooled():
                    kept.append(x + 1)
                del kept[:-3]
        for n in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
    """,
    "daemon threads that wait in queues": """
        context = torchshm.get_context("fork")
        empty, full, open_task = context.Queue(), context.Queue(1), context.JoinableQueue()
        full.put(1), open_task.put(1)
        for wait in (empty.get, lambda: full.put(x), open_task.join, context.Event().wait, lambda: empty._reader.poll(None)):
            threading.Thread(target=wait, daemon=True).start()
        time.sleep(0.05)
        class Slow:
            def __del__(self, sleep=time.sleep):
                sleep(0.3)
        slow = Slow()
    """,
    "daemon thread that sends and receives": """
        def work():
            kept = []
            while True:
                kept += torchshm.loads(torchshm.dumps([x, x + 1]))
                del kept[:-3]
        for n in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
    """,
    "daemon thread that copies a large array": """
        big = np.ones(1 << 24)
        def work():
            while True:
                torchshm.dumps(big)
                torchshm.trim()
        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
    """,
    "work at exit": """
        def last():
            assert (torchshm.loads(torchshm.dumps(x)) == x).all()
            torchshm.stats()
            kept.append(torchshm.share(x))
        kept = []
        atexit.register(last)
    """,
    "queue with something in it": """
        box = multiprocessing.Queue()
        for n in range(3):
            box.put(x)
        time.sleep(0.05)
        box.cancel_join_thread()
    """,
    "daemon child": """
        def child(pipe):
            kept = []
            while True:
                kept.append(torchshm.share(x))
                pipe.send(x)
                del kept[:-3]
        ours, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=child, args=(theirs,), daemon=True).start()
        received = [ours.recv() for n in range(3)]
    """,
    "child that is joined at exit": """
        def child():
            kept = torchshm.share(x)
            time.sleep(0.1)
            assert (kept == x).all()
        multiprocessing.Process(target=child).start()
        kept = torchshm.share(x)
    """,
    "pool of workers left open": """
        pool = multiprocessing.Pool(1)
        results = pool.map(np.negative, [x, x])
    """,
    "torch tensors over arrays": """
        import torch
        tensor = torch.from_numpy(torchshm.share(x, "r+"))[3:]
        del x
    """,
    "nothing sent": "",
}
START = """
import atexit, multiprocessing, os, sys, threading, time
import numpy as np
import torchshm
torchshm.register()
x = np.arange(50_000.0)
"""


def program(name, end="", method="fork"):
    import textwrap

    start = START.replace(
        "torchshm.register()", f"multiprocessing.set_start_method({method!r})\ntorchshm.register()"
    )
    return start + textwrap.dedent(PROGRAMS[name]) + end


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_ends_well_and_says_nothing(tmp_path, name):
    assert passes(program(name), tmp_path) == ""


@pytest.mark.parametrize("name", ["live arrays", "daemon thread that allocates", "ended inside pooled()"])
def test_program_keeps_its_exit_status_and_last_words(tmp_path, name):
    done = run_script(program(name, "\nsys.exit(7)"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    done = run_script(program(name, "\nraise KeyError('the last word')"), tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        r"Traceback \(most recent call last\):\n.*KeyError: 'the last word'\n", done.stderr, re.DOTALL
    )
    done = run_script(program(name, "\nos._exit(3)"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


CHILD = """
import multiprocessing
import sys
import threading

import numpy as np
import torchshm


def child(how):
    x = torchshm.share(np.arange(50_000.0))
    if how == "thread":
        def work():
            while True:
                torchshm.loads(torchshm.dumps(x + 1))
        threading.Thread(target=work, daemon=True).start()
    globals()["kept"] = [x, torchshm.loads(torchshm.dumps(x))]
    if how == "status":
        sys.exit(5)


if __name__ == "__main__":
    torchshm.register()
    context = multiprocessing.get_context(sys.argv[1])
    left = 0
    for how in ["plain", "thread", "status"]:
        process = context.Process(target=child, args=(how,))
        process.start()
        process.join()
        # A thread that ended between dumps() and loads() leaves what it sent: anybody may still
        # receive that. Nothing else may stay.
        stats = torchshm.stats()
        sent = stats["tickets"] if how == "thread" else left
        print(process.exitcode, stats["leases"], stats["blocks"] - sent, sent <= 1)
        left = sent
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_end_well_with_live_arrays(tmp_path, method):
    assert passes(CHILD, tmp_path, method) == "0 1 0 True\n0 1 0 True\n5 1 0 True\n"


def test_interrupt_ends_a_program_as_ever(tmp_path):
    end = (
        "\nimport signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
        "\nthreading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\ntime.sleep(60)"
    )
    done = run_script(program("daemon thread that sends and receives", end), tmp_path)
    assert done.returncode in (130, -2)
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "torchshm" not in done.stderr.replace("torchshm.loads", "")
