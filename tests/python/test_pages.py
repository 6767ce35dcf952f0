"""What pages a store consists of, where they lie, when they come, and how many: what was asked for, or an error that says why not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from scripts import passes

import torchshm
from torchshm import _C
from torchshm._size import parse_limit

pytestmark = pytest.mark.apart

MIB = 1 << 20
RESERVED = Path("/proc/sys/vm/nr_hugepages")
NODES = Path("/sys/devices/system/node/online")


def huge_pages(what):
    return int(re.search(rf"HugePages_{what}:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


@pytest.fixture
def reserve():
    """Reserves huge pages for a test; the machine has as many as before when it ends."""
    if not RESERVED.exists() or "Hugepagesize:       2048 kB" not in Path("/proc/meminfo").read_text():
        pytest.skip("this kernel has no reserved huge pages of 2 MiB")
    before = RESERVED.read_text()

    def to(count):
        try:
            RESERVED.write_text(str(count))
        except OSError as error:
            pytest.skip(f"huge pages can't be reserved here: {RESERVED}: {error.strerror}")
        if huge_pages("Free") < count:
            pytest.skip(
                f"the kernel reserved {huge_pages('Free')} of {count} huge pages: memory is in pieces"
            )

    yield to
    RESERVED.write_text(before)


# ---- shares


def test_a_limit_may_be_a_share_of_what_the_machine_allows(runtime, tmp_path):
    allowed = _C.memory_allowed()
    assert parse_limit("25%") == allowed // 4 and parse_limit(" 12.5 % ") == int(allowed * 0.125)
    assert parse_limit("100%") == allowed and parse_limit("0.0000001%") >= 1
    script = """
        import os, sys
        import torchshm
        from torchshm import _C

        torchshm.register()
        assert torchshm.stats()["limit_bytes"] == _C.memory_allowed() // 50
        torchshm.register(limit="1%")
        assert torchshm.stats()["limit_bytes"] == int(_C.memory_allowed() * 0.01)
        with torchshm.start("share", "5%") as store:
            assert store.info()["limit_bytes"] == int(_C.memory_allowed() * 0.05)
        print("ok")
    """
    assert passes(script, tmp_path, TORCHSHM_LIMIT="2%") == "ok\n"


@pytest.mark.parametrize("share", ["0%", "0.0 %", "101%", "1e3%", "-5%", "%", "half"])
def test_a_share_that_is_none_is_refused(runtime, share):
    for take in (
        parse_limit,
        lambda limit: torchshm.register(limit=limit),
        lambda limit: torchshm.start("x", limit),
    ):
        with pytest.raises(ValueError, match=r"as in 25%|or 25%"):
            take(share)


# ---- when


def test_prefaulted_memory_is_there_at_the_start_and_stays(runtime, tmp_path):
    script = """
        import numpy as np
        import torchshm

        store = torchshm.start("prefault", "65MiB", prefault=True)
        at_first = store.info()
        assert at_first["warm_bytes"] == at_first["committed_bytes"] == 64 << 20, at_first
        grown = at_first["processes"][0]["grown_bytes"]
        for step in range(3):
            for n in range(12):
                store[f"large{n}"] = np.full(4 << 20, n, "u1")
                store[f"small{n}"] = np.arange(1000)
            assert all((store[f"large{n}"] == n).all() for n in range(12))
            for n in range(12):
                del store[f"large{n}"]
        now = store.info()
        assert now["committed_bytes"] == 64 << 20 and now["processes"][0]["grown_bytes"] == grown, now
        # The janitor keeps it too.
        store["a"] = np.ones(50 << 20, "u1")
        del store["a"]
        assert store.info()["committed_bytes"] == 64 << 20
        print("ok")
    """
    assert passes(script, tmp_path) == "ok\n"


def test_prefault_without_the_memory_is_an_error_and_leaves_nothing(runtime, tmp_path):
    script = """
        import pathlib, sys
        import torchshm

        try:
            torchshm.start("too-much", "100%", prefault=True)
        except torchshm.PoolFullError as error:
            assert str(error).startswith("prefault: ") and "bytes are not to be had now" in str(error), error
        else:
            raise AssertionError("there was memory")
        assert not list(pathlib.Path(sys.argv[1]).glob("torchshm/too-much*"))
        torchshm.start("too-much", "16MiB").close()
        print("ok")
    """
    assert passes(script, tmp_path, str(runtime)) == "ok\n"


# ---- what

PAGES = """
    import multiprocessing
    import re
    import sys
    import numpy as np
    import torchshm


    def in_huge_pages(pool_id):
        sizes, name = 0, None
        for line in open("/proc/self/smaps"):
            if "memfd" in line or re.match("[0-9a-f]+-[0-9a-f]+ ", line):
                name = line
            elif line.startswith("ShmemPmdMapped:") and f"{pool_id:016x}-data" in name:
                sizes += int(line.split()[1]) << 10
        return sizes


    def client():
        store = torchshm.connect("kind")
        assert store["a"][0] == 1
        store["b"] = np.ones(32 << 20, "u1")
        print(store.info()["pages"], in_huge_pages(store.info()["pool_id"]), flush=True)


    if __name__ == "__main__":
        store = torchshm.start("kind", "256MiB", hugepages={"False": False, "None": None}[sys.argv[1]])
        store["a"] = np.ones(32 << 20, "u1")
        print(store.info()["pages"], in_huge_pages(store.info()["pool_id"]), flush=True)
        child = multiprocessing.get_context("spawn").Process(target=client)
        child.start()
        child.join()
        assert child.exitcode == 0
"""


def test_without_huge_pages_there_are_none_in_any_process(runtime, tmp_path):
    said = passes(PAGES, tmp_path, "False").splitlines()
    assert said == ["4KiB 0", "4KiB 0"]
    other = [line.split() for line in passes(PAGES, tmp_path, "None").splitlines()]
    assert [kind for kind, _ in other] == ["auto", "auto"]
    if int(other[0][1]) == 0:
        pytest.skip("this system gives no transparent huge pages, so none are missing")


def test_reserved_pages_keep_values_right_in_every_mode(runtime, reserve, tmp_path):
    reserve(64)
    script = """
        import multiprocessing
        import numpy as np
        import torch
        import torchshm


        def child(pipe, name):
            store = torchshm.connect(name)
            private = store.load("a", mode="c")
            private[:] = 7
            assert (store["a"] == np.arange(1_000_000)).all()
            shared = store.load("r", mode="r+")
            shared[:] = 3
            array = pipe.recv()
            assert (array == 5).all()
            array[:] = 6
            store["received"] = array
            array[:] = 8
            assert (store["received"] == 6).all()
            pipe.send(array)
            pipe.close()


        if __name__ == "__main__":
            store = torchshm.start("reserved", "64MiB", hugepages=True)
            assert store.info()["pages"] == "2MiB"
            torchshm.register(store=store, min_bytes=0)
            store["a"] = np.arange(1_000_000)
            store["r"] = np.zeros(300_000)
            store["t"] = torch.arange(100_000)
            store["d"] = {"x": [np.ones(10), 1, "s"], "y": torch.ones(5)}
            tensor = store["t"]
            tensor[0] = 99
            assert store["t"][0] == 0
            assert store["d"]["x"][0].sum() == 10 and store["d"]["y"].sum() == 5
            for method in ("fork", "spawn"):
                context = multiprocessing.get_context(method)
                here, there = context.Pipe()
                process = context.Process(target=child, args=(there, "reserved"))
                process.start()
                sent = np.full(400_000, 5)
                here.send(sent)
                back = here.recv()
                assert (back == 8).all() and (sent == 5).all()
                process.join()
                assert process.exitcode == 0
                assert (store["r"] == 3).all() and (store["received"] == 6).all()
            info = store.info()
            assert info["committed_bytes"] % (2 << 20) == 0 and info["committed_bytes"] <= 64 << 20
            print("ok")
    """
    assert passes(script, tmp_path) == "ok\n"


def test_reserved_pages_are_counted_whole_and_given_back(runtime, reserve, tmp_path):
    reserve(64)
    script = """
        import re
        import time
        import numpy as np
        import torchshm

        free = lambda: int(re.search(r"HugePages_Free:\\s+(\\d+)", open("/proc/meminfo").read())[1])
        at_first = free()
        store = torchshm.start("counted", "96MiB", hugepages="2MiB")
        assert free() == at_first
        for n in range(10):
            store[f"x{n}"] = np.full(3 << 20, n, "u1")  # a page and a half
            assert store.info()["committed_bytes"] == (at_first - free()) << 21 == (n + 1) * 2 << 21
        report = __import__("torchshm._check", fromlist=["x"]).check_store("counted")
        assert report.sound, report
        for n in range(10):
            del store[f"x{n}"]
        # What is warm beyond a quarter of the limit goes back to the system.
        __import__("torchshm._C", fromlist=["x"]).choose(store.info()["pool_id"])
        torchshm.trim()
        assert store.info()["committed_bytes"] == 0
        until = time.monotonic() + 20
        while free() != at_first:  # the kernel counts them a moment later
            assert time.monotonic() < until, (free(), at_first)
            time.sleep(0.01)
        print("ok")
    """
    free = huge_pages("Free")
    assert passes(script, tmp_path) == "ok\n"
    deadline = time.monotonic() + 20
    while huge_pages("Free") != free:  # with the process
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_too_few_reserved_pages_say_how_many_are_missing(runtime, reserve):
    reserve(4)
    total, free = huge_pages("Total"), huge_pages("Free")
    with pytest.raises(
        torchshm.TorchshmError, match=f"needs 32 reserved pages of 2 MiB, and {free} are free"
    ) as said:
        torchshm.start("few", "63MiB", hugepages=True)
    assert f"sysctl vm.nr_hugepages={total + 32 - free}" in str(said.value)
    with pytest.raises(ValueError, match="chunks of 2 MiB"):
        torchshm.start("few2", hugepages="1GiB")
    with pytest.raises(ValueError, match="hugepages is auto, never or 2MiB, not '3MiB'"):
        torchshm.start("few2", hugepages="3MiB")


def test_without_a_limit_those_that_are_free_are_it(runtime, reserve, tmp_path):
    reserve(4)
    script = f"""
        import torchshm
        with torchshm.start("free", hugepages=True) as store:
            assert store.info()["limit_bytes"] == {huge_pages("Free")} << 21, store.info()
        print("ok")
    """
    assert passes(script, tmp_path) == "ok\n"


def test_reserved_pages_that_others_have_taken_are_an_error_and_no_signal(runtime, reserve, tmp_path):
    reserve(32)
    script = f"""
        import numpy as np
        import torchshm

        store = torchshm.start("taken", "64MiB", hugepages=True)
        store["a"] = np.ones(5 << 20, "u1")
        open({str(RESERVED)!r}, "w").write("0")  # the free ones are gone
        try:
            for n in range(12):
                store[f"x{{n}}"] = np.full(4 << 20, n, "u1")
        except torchshm.PoolFullError as error:
            assert "no reserved huge page is free" in str(error), error
        else:
            raise AssertionError("there were pages")
        private = store.load("a", mode="c")
        private[:] = 9  # where a page of the process's own would be needed
        assert all((store[f"x{{k}}"] == k).all() for k in range(n)) and (store["a"] == 1).all()
        open({str(RESERVED)!r}, "w").write("32")
        store[f"x{{n}}"] = np.full(4 << 20, n, "u1")  # there are some again
        assert (store[f"x{{n}}"] == n).all()
        print("ok")
    """
    assert passes(script, tmp_path) == "ok\n"


# ---- where


@pytest.mark.parametrize("huge", [False, True])
def test_the_policy_of_nodes_is_that_of_all_members(runtime, request, tmp_path, huge):
    if not NODES.exists():
        pytest.skip(f"the kernel tells of no nodes: no {NODES}")
    if huge:
        request.getfixturevalue("reserve")(64)
    script = """
        import re
        import multiprocessing
        import sys
        import numpy as np
        import torchshm


        def policies(name, huge):
            store = torchshm.connect(name)
            store[f"of {name}"] = np.ones(4 << 20, "u1")
            lines = [line for line in open("/proc/self/numa_maps") if f"{store.info()['pool_id']:016x}-data" in line]
            assert len(lines) >= 2
            if huge:  # kept with the mapping that pages are added through
                maps = [line.split() for line in open("/proc/self/maps")]
                writable = [words[0].split("-")[0] for words in maps if words[1] == "rw-s"]
                lines = [line for line in lines if line.split()[0].lstrip("0") in writable]
                assert len(lines) == 1 and " huge " in lines[0], lines
            return {line.split()[1] for line in lines}


        def child(name, expected, huge):
            found = policies(name, huge)
            assert found == {expected}, found


        if __name__ == "__main__":
            huge = sys.argv[1] == "True"
            wanted = {None: "default", "local": "default", "bind:0": "bind:0", "preferred:0": "prefer:0", "interleave:0": "interleave:0"}
            for n, (numa, expected) in enumerate(wanted.items()):
                try:
                    store = torchshm.start(f"node{n}", "32MiB", numa=numa, hugepages=huge or None)
                except torchshm.TorchshmError as error:
                    assert "mbind: forbidden here" in str(error), error
                    print(error)
                    sys.exit()
                child(store.name, expected, huge)
                process = multiprocessing.get_context("spawn").Process(target=child, args=(store.name, expected, huge))
                process.start()
                process.join()
                assert process.exitcode == 0
            print("ok")
    """
    said = passes(script, tmp_path, str(huge))
    if said != "ok\n":
        pytest.skip(said.strip())


@pytest.mark.parametrize(
    ("numa", "said"),
    [
        ("bind:1023", "no node 1023; those online are"),
        ("bind:0,99999", "not a list of nodes"),
        ("bind", "names no nodes"),
        ("spread:0", "no such policy: 'spread:0'"),
        ("interleave:0-", "not a list of nodes"),
        ("preferred:x", "write it as local, interleave"),
    ],
)
def test_a_policy_that_can_not_be_is_refused(runtime, numa, said):
    if not NODES.exists() and "no such policy" not in said:
        pytest.skip(f"the kernel tells of no nodes: no {NODES}")
    with pytest.raises(ValueError, match=said):
        torchshm.start("nowhere", "16MiB", numa=numa)
    assert not list(runtime.glob("torchshm/nowhere*"))


# ---- whose


def test_messages_and_processes_are_accounted_for(runtime, tmp_path):
    script = """
        import os
        import pickle
        from multiprocessing.reduction import ForkingPickler
        import numpy as np
        import torchshm

        store = torchshm.start("accounts", "64MiB")
        torchshm.register(store=store, min_bytes=0)
        before = store.info()
        assert [row["pid"] for row in before["processes"]] == [os.getpid()] and before["ticket_bytes"] == 0
        array = np.ones(1 << 20, "u1")
        messages = [bytes(ForkingPickler.dumps(array)) for _ in range(2)]
        held = torchshm.share(np.ones(1 << 20, "u1"))
        messages += [bytes(ForkingPickler.dumps(held)) for _ in range(2)]  # of one block
        for figures in (store.info(), torchshm.stats()):
            assert figures["tickets"] == 4 and figures["ticket_bytes"] == 3 << 20, figures
        received = [pickle.loads(message) for message in messages]
        now = store.info()
        assert now["tickets"] == 0 and now["ticket_bytes"] == 0
        (me,) = now["processes"]
        assert me["held_bytes"] == 3 << 20 and me["held_blocks"] == 3 and me["name"].startswith("python"), me
        print("ok")
    """
    assert passes(script, tmp_path) == "ok\n"
