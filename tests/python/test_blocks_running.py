"""torchshm.data.blocks while it runs: memory, errors, deaths, and what is left of it."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from program import until
from scripts import PATIENCE

import torchshm
from torchshm.data import blocks

pytestmark = pytest.mark.apart

ROWS = 20_000


def numbers(dataset, column="i"):
    return np.concatenate([np.array(block[column]) for block in dataset.iter_blocks()])


def children():
    return [
        child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE
    ]


def left_in(folder):
    """Values that are on disk."""
    return [path for path in Path(folder).rglob("*") if path.suffix in (".spill", ".part", ".spare")]


@pytest.fixture
def spill(tmp_path):
    """A folder to spill to; afterwards no process, block or file is left."""
    yield tmp_path
    gc.collect()
    until(lambda: not children())
    from torchshm.data.blocks import _home

    for home in _home._homes.values():
        assert home.shares == {}
        assert home.store.keys() == []
    until(lambda: not left_in(tmp_path))


def job(spill, rows=ROWS, width=64, **more):
    """Rows of 512 bytes in blocks of 100 KiB."""
    given = {"i": np.arange(rows), "x": np.zeros((rows, width))}
    options = {"memory": "64MiB", "block_size": "100KiB", "num_workers": 2, "seed": 1, "spill": spill, **more}
    return blocks.from_arrays(given).options(**options)


# ---- memory


def test_four_times_the_memory_is_shuffled_by_way_of_the_disk(spill):
    rows = 4 * (64 << 20) // 520
    dataset = job(spill, rows, memory="64MiB", block_size="1MiB").shuffle()
    found = np.zeros(rows, bool)
    most, home = 0, None
    for batch in dataset.iter_batches(1000):
        found[batch["i"]] = True
        assert (batch["x"] == 0).all()
        home = home or next(each for each in _homes() if each.shares)
        most = max(most, home.store.info()["committed_bytes"])
    assert found.all()
    assert most <= 64 << 20
    assert dataset._statistics["spills"] > 0


def _homes():
    from torchshm.data.blocks import _home

    return _home._homes.values()


def test_a_slow_consumer_makes_the_workers_wait(spill):
    dataset = job(spill, 200_000, memory="64MiB", block_size="1MiB")
    taken = iter(dataset.iter_batches(1000))
    next(taken)
    (home,) = (each for each in _homes() if each.shares)
    time.sleep(0.5)
    before = home.store.info()
    time.sleep(0.5)
    after = home.store.info()
    assert after["live_bytes"] == before["live_bytes"] < 16 << 20
    assert after["spills"] == before["spills"] == 0
    taken.close()


def test_memory_stays_warm_for_the_next_run_and_then_goes_back(spill, monkeypatch):
    from torchshm.data.blocks import _home

    monkeypatch.setattr(_home, "_WARM", 1.0)
    for _ in range(2):
        assert job(spill, 100_000, block_size="1MiB").count() == 100_000
    (home,) = (each for each in _homes() if Path(each.directory).parent == spill)
    assert home.store.info()["committed_bytes"] > 4 << 20
    until(lambda: home.store.info()["committed_bytes"] < 4 << 20)
    assert not home.store.keys()


def test_a_loop_that_keeps_all_is_told_so(monkeypatch):
    from torchshm.data.blocks import _run

    monkeypatch.setattr(_run, "_KEEPING", 2.0)
    kept = []
    with pytest.raises(torchshm.PoolFullError, match=r"keeps arrays of .* MiB.* Copy what has to stay"):
        kept.extend(job(None, 400_000, block_size="1MiB").iter_blocks())
    kept.clear()


def test_an_iterator_that_never_ends_is_bounded_too(spill):
    def forever():
        n = 0
        while True:
            yield {"i": np.arange(n, n + 1000), "x": np.zeros((1000, 100))}
            n += 1000

    dataset = blocks.from_iter(forever, batched=True).options(
        memory="64MiB", block_size="1MiB", num_workers=2, spill=spill
    )
    taken = dataset.map_batches(lambda batch: {"i": batch["i"]}).shuffle(window="1MiB").iter_batches(1000)
    for _ in range(200):
        assert len(next(taken)["i"]) == 1000
    taken.close()


def test_many_runs_in_one_process_need_no_more_pools_or_descriptors(spill):
    dataset = job(spill, 500)
    assert dataset.count() == 500
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(25):
        assert dataset.count() == 500
    assert len(os.listdir("/proc/self/fd")) <= before


def test_two_runs_at_once_do_not_touch_each_other(spill):
    both = zip(job(spill).iter_batches(100), job(spill).shuffle().iter_batches(100), strict=True)
    total = sum(int(one["i"].sum() - other["i"].sum()) for one, other in both)
    assert total == 0


# ---- errors


class OwnError(Exception):
    """Of a user."""


def test_an_exception_of_a_function_is_raised_with_its_traceback_there(spill):
    def bad(batch):
        if (batch["i"] == 15_000).any():
            raise OwnError("row 15000")
        return batch

    with pytest.raises(OwnError, match="row 15000") as raised:
        job(spill).map_batches(bad).count()
    text = str(raised.value.__cause__)
    assert "in bad" in text and "map_batches(bad)" in text
    assert job(spill).count() == ROWS


def test_what_a_function_must_not_return_is_named(spill):
    with pytest.raises(TypeError, match=r"map_batches\(<lambda>\) returned int"):
        job(spill).map_batches(lambda batch: 3).count()
    with pytest.raises(ValueError, match="differ in their numbers of rows"):
        job(spill).map_batches(lambda batch: {"a": batch["i"], "b": batch["i"][1:]}).count()
    with pytest.raises(ValueError, match="one bool for each row"):
        job(spill).filter(lambda batch: True).count()


def test_an_exception_that_cannot_be_pickled_comes_as_its_text(spill):
    def bad(batch):
        class Local(Exception):
            pass

        raise Local("nobody can pickle this")

    with pytest.raises(torchshm.TorchshmError) as raised:
        job(spill).map_batches(bad).count()
    assert "nobody can pickle this" in str(raised.value.__cause__)


def test_a_file_that_is_gone_is_an_error_of_the_source(spill):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"i": [1]}), spill / "a.parquet")
    dataset = blocks.read_parquet(spill / "a.parquet")
    (spill / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        dataset.count()


def test_a_mapped_file_that_becomes_shorter_is_an_error_and_no_sigbus(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.random.default_rng(0).random(100_000)}), path, row_group_size=10_000)

    def shorten(batch):
        os.truncate(path, 100)
        return batch

    with pytest.raises((ValueError, RuntimeError), match=r"Parquet|becomes shorter"):
        blocks.read_parquet(path).options(num_workers=1, block_size="64KiB").map_batches(shorten).count()


def test_a_failure_of_the_executor_itself_is_what_the_user_sees(monkeypatch):
    from torchshm.data.blocks import _executor, _outlet

    def fails(self, *_):
        raise OSError("no descriptor is left")

    monkeypatch.setattr(_executor.Executor, "_look", fails)
    monkeypatch.setattr(_outlet.Outlet, "fail", fails)  # it can't say so by the store
    with pytest.raises(OSError, match="no descriptor is left"):
        job(None).count()


def test_files_may_be_looked_at_for_longer_than_ranks_wait_for_a_beginning(monkeypatch):
    from torchshm.data.blocks import _home, _run, _sources

    plan = _sources.ArraySource.plan

    def slow(self, target):
        time.sleep(10)
        return plan(self, target)

    monkeypatch.setattr(_sources.ArraySource, "plan", slow)
    monkeypatch.setattr(_run, "_COMING", 5.0)
    found, consumer = [], _run.Consumer(_home.home(None, 64 << 20).store.name, "slow.", 1, 0)

    def rank():
        try:
            found.extend(end - begin for _, begin, end in consumer)
        except Exception as error:
            found.append(error)

    other = threading.Thread(target=rank)
    other.start()
    run = job(None, 1000)._run(shards=2, prefix="slow.")
    try:
        other.join(60)
        assert sum(found) == 500
    finally:
        run.close()


def test_an_executor_that_does_not_begin_is_an_error(monkeypatch):
    from torchshm.data.blocks import _run

    monkeypatch.setattr(_run, "_START", 0.5)
    monkeypatch.setattr(_run, "serve", lambda *_: time.sleep(60))
    with pytest.raises(torchshm.TorchshmError, match=r"not begun.*spawn"):
        job(None).count()
    assert not children()


def test_a_thread_that_can_not_be_started_at_the_end_is_no_error(monkeypatch):
    def refuses(self):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Timer, "start", refuses)
    assert job(None).count() == ROWS
    (home,) = (each for each in _homes() if Path(each.directory).parent == Path(tempfile.gettempdir()))
    assert home.store.info()["committed_bytes"] < 4 << 20


def test_ranks_are_told_that_nobody_has_begun(monkeypatch):
    from torchshm.data.blocks import _home, _run

    monkeypatch.setattr(_run, "_COMING", 0.5)
    home = _home.home(None, 64 << 20)
    with pytest.raises(torchshm.TorchshmError, match="first shard"):
        next(iter(_run.Consumer(home.store.name, "nobody.", 1, 0)))


# ---- deaths


def test_a_killed_workers_block_is_made_again(spill):
    killed = spill / "killed"
    killed.mkdir()

    def deadly(batch):
        noise = np.random.random(len(batch["i"]))  # noqa: NPY002
        for row in batch["i"][batch["i"] % 5000 == 17]:
            mark = killed / str(row)
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return {"i": batch["i"], "noise": noise}

    def calm(batch):
        return {"i": batch["i"], "noise": np.random.random(len(batch["i"]))}  # noqa: NPY002

    expected = job(spill).map_batches(calm).shuffle(window="1MiB")
    dataset = job(spill).map_batches(deadly).shuffle(window="1MiB")
    for column in ("i", "noise"):
        np.testing.assert_array_equal(numbers(dataset, column), numbers(expected, column))
    assert len(list(killed.iterdir())) == 4
    assert "again" in dataset.explain()
    for mark in killed.iterdir():
        mark.unlink()
    killed.rmdir()


def test_a_worker_that_leaves_a_child_behind_is_seen_to_die(tmp_path):
    left = tmp_path / "left"

    def deadly(batch):
        try:
            mark = left.open("x")  # one worker, not each
        except FileExistsError:
            return batch
        child = os.fork()
        if child == 0:  # holds the pipes of the worker
            time.sleep(120)
            os._exit(0)
        with mark:
            mark.write(str(child))
        os.kill(os.getpid(), signal.SIGKILL)

    begun = time.monotonic()
    try:
        np.testing.assert_array_equal(numbers(job(None).map_batches(deadly)), np.arange(ROWS))
        assert time.monotonic() - begun < 60
    finally:
        os.kill(int(left.read_text()), signal.SIGKILL)


def test_what_kills_its_worker_each_time_is_an_error_that_says_so(spill):
    def deadly(batch):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"map_batches\(deadly\), was begun 3 times.*SIGKILL"):
        job(spill, max_retries=2).map_batches(deadly).count()


def test_after_an_error_of_dead_workers_all_ends_at_once():
    def dies(batch):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="each time the worker died"):
        job(None, max_retries=0).map_batches(dies).count()
    (shard,) = job(None, max_retries=0).map_batches(dies).split(1)
    with pytest.raises(RuntimeError, match="each time the worker died"):
        next(shard.iter_batches())
    begun = time.monotonic()
    shard._run.close()
    assert time.monotonic() - begun < 4  # it was not killed for being deaf


def test_random_kills_change_nothing(spill):
    def slow(batch):
        time.sleep(0.02)
        return {"i": batch["i"], "noise": np.random.random(len(batch["i"]))}  # noqa: NPY002

    dataset = job(spill, max_retries=100).map_batches(slow, batch_size=100).shuffle(window="1MiB")
    expected = numbers(dataset, "noise")
    kills, over = 0, threading.Event()

    def kill():
        nonlocal kills
        while not over.wait(0.1):
            workers = [each for each in children() if each.ppid() != os.getpid()]
            if workers and kills < 8:
                workers[kills % len(workers)].kill()
                kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = numbers(dataset, "noise")
    finally:
        over.set()
        killer.join()
    assert kills >= 3
    np.testing.assert_array_equal(found, expected)


def test_the_death_of_the_executor_is_an_error_and_leaves_nothing(spill):
    taken = job(spill, 500_000).iter_batches(100)
    next(taken)
    (executor,) = (each for each in children() if each.ppid() == os.getpid())
    executor.kill()
    with pytest.raises(torchshm.TorchshmError, match="has died"):
        for _ in taken:
            pass
    assert job(spill).count() == ROWS


def test_a_loop_that_is_left_early_ends_everything(spill):
    for number, _ in enumerate(job(spill, 500_000).iter_batches(100)):
        if number == 3:
            break
    gc.collect()
    until(lambda: not children())


SCRIPT = """
import os, sys, time
import numpy as np
from torchshm.data import blocks

dataset = blocks.from_arrays({"i": np.arange(1_000_000)}).options(
    memory="64MiB", block_size="100KiB", num_workers=2, spill=sys.argv[1]
).shuffle(window="1MiB")
for number, batch in enumerate(dataset.iter_batches(100)):
    if number == 10:
        print("running", flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_program_ends_all_of_it(spill, how):
    import subprocess

    script = spill / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, spill / "files"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"running\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=PATIENCE)
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
    psutil.wait_procs(family, timeout=10)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family)
    until(lambda: not left_in(spill))
    script.unlink()
