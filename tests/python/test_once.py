"""once: one process makes it, all have it, whoever dies."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import crew
from same import assert_same
from scripts import METHODS, PATIENCE, run_script

import torchshm
from torchshm.data import _once, once


@pytest.fixture(autouse=True)
def _as_before():
    """once() registers the reducers."""
    yield
    torchshm.unregister()


# ---- what comes back


VALUES = {
    "array": lambda: np.arange(50_000.0).reshape(100, 500),
    "tensor": lambda: torch.arange(50_000),
    "nested": lambda: {"x": [np.ones(50_000), "text"], "y": (torch.zeros(3), None, 5)},
    "nothing": lambda: None,
    "object": lambda: Corpus(np.arange(50_000)),
}


class Corpus:
    def __init__(self, tokens):
        self.tokens = tokens


def leaves(x):
    if isinstance(x, Corpus):
        return [x.tokens]
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in leaves(value)]
    if isinstance(x, list | tuple):
        return [leaf for value in x for leaf in leaves(value)]
    return [x]


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_what_fn_makes_comes_back_from_shared_memory(store, make):
    made = []

    def fn():
        made.append(make())
        return made[-1]

    for value in (once("a", fn, store=store), once("a", fn, store=store)):
        for got, wanted in zip(leaves(value), leaves(made[0]), strict=True):
            if isinstance(wanted, np.ndarray):
                assert_same(got, wanted)
                assert torchshm.is_shared(got) and got.flags.writeable
            elif isinstance(wanted, torch.Tensor):
                assert torch.equal(got, wanted) and torchshm.is_shared(got)
            else:
                assert got == wanted
    assert len(made) == 1


def sum_of(key, store="session", **how):
    return float(once(key, lambda: np.zeros(50_000), store=store, **how).sum())


def test_what_one_process_writes_stays_its_own(store, client):
    mine = once("a", lambda: np.ones(50_000), store=store)
    mine[:] = 7
    assert client.call(sum_of, "a") == 50_000
    assert mine.sum() == 350_000
    del mine


@pytest.mark.parametrize(("mode", "seen"), [("c", 0), ("r+", 50_000)])
def test_the_mode_says_who_sees_writes(store, client, mode, seen):
    value = once("a", lambda: np.zeros(50_000), store=store, mode=mode)
    value += 1
    assert client.call(sum_of, "a") == seen
    del value


def test_read_only(store):
    with pytest.raises(ValueError, match="read-only"):
        once("a", lambda: np.zeros(50_000), store=store, mode="r")[0] = 1


def test_a_store_may_be_given_by_name(store):
    assert once("a", lambda: [1, 2], store="session") == [1, 2] == store["a"]


def test_a_pickle_is_loaded_where_it_is_allowed(store):
    once("a", lambda: Corpus(np.zeros(5)), store=store)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        once("a", lambda: None, store=store, allow_pickle=False)


def test_a_key_is_forgotten_on_request_and_by_time(store):
    assert once("a", lambda: 1, store=store) == once("a", lambda: 2, store=store) == 1
    store.remove("a")
    assert once("a", lambda: 3, store=store, ttl=1000) == 3
    assert 0 < store.info("a")["expires_in"] <= 1000


@pytest.mark.parametrize(("key", "error"), [("", ValueError), ("\0a", ValueError), (5, TypeError)])
def test_a_key_is_a_text(store, key, error):
    with pytest.raises(error, match="a key"):
        once(key, lambda: 1, store=store)


def test_fn_that_asks_for_its_own_key_is_an_error(store):
    def fn():
        return once("a", fn, store=store)

    with pytest.raises(RuntimeError, match="'a' asks for 'a'"):
        once("a", fn, store=store)
    assert once("a", lambda: once("b", lambda: 5, store=store), store=store) == 5 == store["b"]
    assert once("c", lambda: 1, store=store) == 1


def test_fn_gets_progress_where_it_asks_for_it(store):
    def fn(first=1, *, progress):
        for step in range(-1, 12):
            progress(step / 10)
        return first

    assert once("a", fn, store=store) == 1
    assert once("b", dict, store=store) == {}  # no signature to look at
    assert len(store) == 2 and set(store.keys()) == {"a", "b"}


def test_progress_that_comes_too_late_is_nobodys(store, monkeypatch):
    monkeypatch.setattr(_once, "_TOLD_EVERY", 0)
    kept = []
    assert once("a", lambda progress: kept.append(progress), store=store) is None
    kept[0](0.5)
    store.remove("a")
    assert once("a", lambda: 5, store=store, timeout=0) == 5


def test_an_error_is_that_of_the_process_and_the_next_one_tries(store):
    def fails():
        raise OSError("out of luck")

    with pytest.raises(OSError, match="out of luck"):
        once("a", fails, store=store)
    assert once("a", lambda: 5, store=store) == 5


# ---- many processes


def test_sixteen_race_and_the_one_at_work_is_killed(tmp_path):
    """In every second round the first to run fn is killed in it; the others do not notice but that it takes longer."""
    script = """
    import zlib
    folder = os.getcwd()

    def make(number, kills):
        def fn():
            try:
                os.close(os.open(f"{folder}/first {number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                if kills:
                    os.kill(os.getpid(), signal.SIGKILL)
            made = np.frombuffer(os.urandom(300_000), np.uint8)
            with open(f"{folder}/completed {number}", "a") as file:
                file.write(f"{os.getpid()}\\n")
            return made
        return fn

    def race(numbers):
        return [(pool_id(), zlib.crc32(once(f"key {n}", make(n, n % 2)))) for n in numbers]

    rounds = 6
    ranks = [Rank(race, range(rounds)) for _ in range(16)]
    said = [rank.says() for rank in ranks]
    survivors = [eval(each) for each in said if each]
    assert len(survivors) == 16 - rounds // 2
    assert all(each == survivors[0] for each in survivors), survivors
    for number in range(rounds):
        assert len(open(f"{folder}/completed {number}").readlines()) == 1
    exits = [rank.leave() for rank in ranks]
    assert sorted(set(exits)) == [-signal.SIGKILL, 0] and os.listdir(stores) == []
    """
    crew(script, tmp_path)


def test_a_killed_one_leaves_no_memory_of_what_it_made(tmp_path):
    script = """
    def dies():
        def fn():
            made = [np.ones(500_000) for _ in range(10)]
            with node_store().storage():
                kept.append([np.full(500_000, 1.0) for _ in range(10)])
            os.write(theirs, b".")
            time.sleep(1000)
        kept = []
        once("a", fn)

    ours, theirs = os.pipe()
    first = Rank(dies)
    os.read(ours, 1)
    before = torchshm.connect(_job.job_name()).info()["live_bytes"]
    assert before >= 40_000_000

    def second():
        node_store()
        os.write(theirs, b".")
        return once("a", lambda: 1)

    second = Rank(second)
    os.read(ours, 1)
    first.kill()  # with the service
    assert second.says() == "1"
    store, end = torchshm.connect(_job.job_name()), time.monotonic() + 60
    while store.info()["live_bytes"] >= before and time.monotonic() < end:
        time.sleep(0.01)
    assert store.info()["live_bytes"] < before
    assert second.leave() == 0
    """
    crew(script, tmp_path)


def test_a_child_of_fn_that_tells_of_progress_and_dies_is_not_the_one_at_work(tmp_path):
    script = """
    from torchshm.data import _once
    _once._TOLD_EVERY = 0

    def make(progress):
        child = os.fork()
        if child == 0:
            progress(0.5)
            os._exit(0)
        os.waitpid(child, 0)
        os.write(theirs, b".")
        os.read(go, 1)
        return 5

    (ours, theirs), (go, gone) = os.pipe(), os.pipe()
    first = Rank(lambda: once("a", make))
    os.read(ours, 1)
    assert Rank(lambda: once("a", lambda: 6, timeout=0.3)).says() == "TimeoutError"
    os.write(gone, b".")
    assert first.says() == "5"
    """
    crew(script, tmp_path)


def test_an_error_passes_the_work_on(tmp_path):
    script = """
    def fails():
        def fn():
            os.write(theirs, b".")
            os.read(go, 1)
            raise LookupError
        once("a", fn)

    (ours, theirs), (go, gone) = os.pipe(), os.pipe()
    first = Rank(fails)
    os.read(ours, 1)
    second = Rank(lambda: once("a", lambda: 5))
    time.sleep(0.1)  # likely waits by now; either way it gets its own
    os.write(gone, b".")
    assert (first.says(), second.says()) == ("LookupError", "5")
    """
    crew(script, tmp_path)


def test_what_does_not_fit_is_an_error_in_every_process(tmp_path):
    script = """
    ranks = [Rank(lambda: once("a", lambda: np.ones(50_000_000))) for _ in range(3)]
    assert [rank.says() for rank in ranks] == ["PoolFullError"] * 3
    rank = Rank(lambda: once("a", lambda: 1))
    assert rank.says() == "1"
    """
    crew(script, tmp_path, TORCHSHM_LIMIT="32MiB")


def test_waiting_ends_when_the_time_is_up(tmp_path):
    script = """
    def slow():
        os.write(theirs, b".")
        time.sleep(1000)

    ours, theirs = os.pipe()
    first = Rank(lambda: once("a", slow))
    os.read(ours, 1)
    second = Rank(lambda: once("a", slow, timeout=0.05))
    assert second.says() == "TimeoutError"
    first.kill()
    """
    crew(script, tmp_path)


WORKERS = """
import os, sys
import numpy as np, torch, torchshm
from torch.utils.data import DataLoader, Dataset
from torchshm.data import node_store, once


def load():
    with open(os.environ["MADE"], "a") as file:
        file.write("made\\n")
    return np.arange(100_000)


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        tokens = once("tokens", load)
        assert torchshm.is_shared(tokens)
        return int(tokens[i]), os.getpid(), node_store()._core.pool_id % 2**31


def all_of(method):
    loader = DataLoader(Tokens(), 2, num_workers=2, multiprocessing_context=method)
    values, pids, pools = zip(*loader)
    assert torch.cat(values).tolist() == list(range(8))
    assert os.getpid() not in torch.cat(pids).tolist() and len(set(torch.cat(pids).tolist())) == 2
    return set(torch.cat(pools).tolist())
"""


@pytest.mark.parametrize("first", [True, False], ids=["made before", "made in a worker"])
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_program_without_ranks(tmp_path, runtime, method, first):
    """As in a notebook. What is made in a worker stays for as long as a process has it: here the workers of one epoch."""
    script = f"""
if __name__ == "__main__":
    if {first}:
        once("tokens", load)
    pools = all_of({method!r})
    if {first}:
        assert pools == {{node_store()._core.pool_id % 2**31}}
    print(len(pools), node_store().name)
"""
    made = tmp_path / "made"
    done = run_script(WORKERS + script, tmp_path, MADE=str(made))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 job-local-")
    assert made.read_text() == "made\n"
    assert not list((runtime / "torchshm").glob(done.stdout.split()[1] + "*"))


SENT = """
import gc
from torch.utils.data import DataLoader

class Blocks:
    def __init__(self, *arrays):
        self.arrays = arrays
    def __len__(self):
        return 4
    def __getitem__(self, i):
        assert all(torchshm.is_shared(array) for array in self.arrays)
        return sum(float(array[i]) for array in self.arrays)

if __name__ == "__main__":
    def live():
        gc.collect()
        return torchshm.stats()["live_bytes"] + node_store().info()["live_bytes"]

    array = once("array", lambda: np.ones(500_000))
    tensor = once("tensor", lambda: torch.ones(500_000))
    before = live()
    loader = DataLoader(Blocks(array, tensor), num_workers=2, multiprocessing_context=METHOD, persistent_workers=True)
    assert [float(x) for x in loader] == [2.0] * 4
    assert live() - before < 1_000_000, (before, live())
    assert node_store().info()["leases"] == 3
"""


@pytest.mark.parametrize("method", METHODS)
def test_workers_are_given_what_was_made_without_a_copy(tmp_path, runtime, method):
    done = run_script(WORKERS + f"METHOD = {method!r}\n" + SENT, tmp_path, MADE=str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr


RANKS = """
import torch.distributed as dist

if __name__ == "__main__":
    before = int(once("before", lambda: np.full(50_000, os.getpid()))[0])
    dist.init_process_group("gloo")
    after = int(once("after", lambda: np.full(50_000, os.getpid()))[0])
    pools = all_of("spawn")
    assert pools == {node_store()._core.pool_id % 2**31}
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, (before, after, pools))
    assert said == said[:1] * 2, said
    if dist.get_rank() == 0:
        with open(os.environ["SAID"], "w") as file:
            file.write(node_store().name)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_ranks_of_torchrun_and_their_workers(tmp_path, runtime):
    """Two jobs at once: each has its own store, made in once."""
    script = tmp_path / "train.py"
    script.write_text(WORKERS + RANKS)
    jobs = []
    for job in "ab":
        environment = {"MADE": str(tmp_path / f"made {job}"), "SAID": str(tmp_path / f"said {job}")}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        jobs.append(
            subprocess.Popen(
                [*command, str(script)],
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for job in jobs:
        out, _ = job.communicate(timeout=2 * PATIENCE)
        assert job.returncode == 0, out
    names = {(tmp_path / f"said {job}").read_text() for job in "ab"}
    assert len(names) == 2 and all(name.startswith("job-torchrun-") for name in names)
    assert [(tmp_path / f"made {job}").read_text() for job in "ab"] == ["made\n"] * 2
    assert not list((runtime / "torchshm").glob("job-torchrun-*"))


LIGHTNING = """
import os, warnings
warnings.filterwarnings("ignore")
import numpy as np, torch
import pytorch_lightning as pl
from torchshm.data import once


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def setup(self, stage):
        self.made = once("made", lambda: np.full((8, 4), os.getpid(), np.float32))
        with open(os.environ["MADE"], "a") as file:
            file.write(f"{int(self.made[0, 0])}\\n")

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.from_numpy(self.made), 2)

    def training_step(self, batch, index):
        return self.layer(batch).sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(Module())
"""


def test_ranks_that_lightning_starts(tmp_path, runtime):
    pytest.importorskip("pytorch_lightning")
    made = tmp_path / "made"
    done = run_script(LIGHTNING, tmp_path, MADE=str(made))
    assert done.returncode == 0, done.stderr
    one, other = made.read_text().split()
    assert one == other
    assert not list((runtime / "torchshm").glob("job-ranks-*"))
