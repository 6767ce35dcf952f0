"""The job's name and its store on this node: one for all ranks and workers of a job, another for every other job."""

import multiprocessing
import multiprocessing.process
import os
import subprocess
import sys

import pytest
from ranks import crew
from scripts import METHODS, PATIENCE

from torchshm.data._job import job_name

LAUNCHERS = [
    "TORCHSHM_JOB",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_ERROR_FILE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "LOCAL_RANK",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "SLURM_STEP_NUM_TASKS",
    "PMIX_NAMESPACE",
]


@pytest.fixture
def config(monkeypatch):
    """This process's, which knows no job yet and was launched by nobody."""
    made = dict(multiprocessing.process.current_process()._config)
    made.pop("torchshm_job", None)
    monkeypatch.setattr(multiprocessing.process.current_process(), "_config", made)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def named(config, monkeypatch):
    """The name of the job of a process that has just been launched with this environment."""

    def name(**environment):
        with monkeypatch.context() as patch:
            config.pop("torchshm_job", None)
            for key, value in environment.items():
                patch.setenv(key, value)
            return job_name()

    return name


def torchrun(rank=0, run="none", port="29500", logs="/tmp/torchelastic_ab/none_cd", attempt=0):
    return {
        "TORCHELASTIC_RUN_ID": run,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_ERROR_FILE": logs and f"{logs}/attempt_{attempt}/{rank}/error.json",
    }


def slurm(rank=0, job="4711", step="0", tasks="8"):
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": step,
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_PROCID": str(rank),
    }


def ranks(rank=0, port="12355"):
    return {"RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": port}


@pytest.mark.parametrize(
    ("one", "same", "others"),
    [
        (
            torchrun(),
            [torchrun(3), torchrun(3, attempt=2)],
            [
                torchrun(run="other"),
                torchrun(port="29501"),
                torchrun(logs="/tmp/torchelastic_ab/none_ef"),
                {},
            ],
        ),
        (torchrun(logs=""), [torchrun(3, logs="")], [torchrun(port="29501", logs="")]),
        (
            slurm(),
            [slurm(3), slurm() | {"MASTER_PORT": "1", "MASTER_ADDR": "a"}],
            [slurm(job="4712"), slurm(step="1")],
        ),
        ({"PMIX_NAMESPACE": "prterun-a-1@1"}, [], [{"PMIX_NAMESPACE": "prterun-a-2@1"}, {}]),
        (
            {"LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            [{"LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}],
            [{"MASTER_ADDR": "a", "MASTER_PORT": "1"}],
        ),
        (ranks(), [ranks(3)], [ranks(port="12356"), torchrun(port="12355")]),
        ({"TORCHSHM_JOB": "mine"}, [{"TORCHSHM_JOB": "mine", **slurm()}], [{"TORCHSHM_JOB": "yours"}]),
        # No launcher: MASTER_PORT alone says nothing, nor does a shell in a Slurm step.
        ({}, [{"MASTER_PORT": "1", "MASTER_ADDR": "a"}, slurm(tasks="1")], []),
    ],
    ids=["torchrun", "torchrun without logs", "Slurm", "MPI", "Lightning", "ranks", "given", "no launcher"],
)
def test_the_name_is_that_of_the_job(named, one, same, others):
    name = named(**one)
    assert [named(**each) for each in same] == [name] * len(same)
    assert name not in [named(**each) for each in others]
    assert len(name) < 64 and all(c.isalnum() or c in "._-" for c in name)


def test_what_is_chosen_stays_though_the_environment_changes(config, monkeypatch):
    name = job_name()
    for key, value in ranks().items():
        monkeypatch.setenv(key, value)
    assert job_name() == name


def changed(pipe):
    os.environ.update(ranks(port=str(os.getpid())))
    pipe.send(job_name())


@pytest.mark.parametrize("method", METHODS)
def test_children_belong_to_the_job_of_their_parent(config, method):
    context = multiprocessing.get_context(method)
    name = job_name()
    ours, theirs = context.Pipe()
    child = context.Process(target=changed, args=(theirs,))
    child.start()
    child.join(PATIENCE)
    assert ours.poll(0) and ours.recv() == name


def test_another_program_that_is_started_from_here_is_another_job(config):
    code = "from torchshm.data._job import job_name; print(job_name())"
    theirs = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=True
    )
    assert theirs.stdout.startswith("job-local-") and theirs.stdout.strip() != job_name()


# ---- the store


def test_the_store_outlives_who_served_it(tmp_path):
    """The one that serves is killed; who comes next finds the store with the others, and serves it."""
    script = """
    first = Rank(both)
    pool, made = eval(first.says())
    assert made == first.pid
    second = Rank(both)
    assert eval(second.says()) == (pool, made)
    first.kill()
    third = Rank(lambda: (*both(), node_store()._core.serving))
    assert eval(third.says()) == (pool, made, True), "taken over with all that is in it"
    second.kill()
    fourth = Rank(lambda: (*both(), node_store()._core.serving))
    assert eval(fourth.says()) == (pool, made, False)
    third.kill(), fourth.kill()
    fifth = Rank(both)
    other, made = eval(fifth.says())
    assert other != pool and made == fifth.pid, "nothing is left when all have gone"
    assert fifth.leave() == 0 and os.listdir(stores) == []
    """
    crew(script, tmp_path)


def test_a_service_that_dies_while_it_answers_is_succeeded_by_the_one_who_asked(tmp_path):
    script = """
    first = Rank(both)
    pool, made = eval(first.says())

    def second():
        class Dying:
            start = torchshm._C.Store.start

            def connect(name, timeout):
                core = torchshm._C.Store.connect(name, timeout)
                os.kill(first.pid, signal.SIGKILL)
                while _job._pool_served(name) is not None:
                    time.sleep(0.001)
                return core

        class Core:
            Store = Dying
            store_status = torchshm._C.store_status

        _job._C = Core
        return *both(), node_store()._core.serving

    second = Rank(second)
    assert eval(second.says()) == (pool, made, True)
    os.waitpid(first.pid, 0)
    assert second.leave() == 0 and os.listdir(stores) == []
    """
    crew(script, tmp_path)


def test_a_job_leaves_nothing_behind_in_what_order_ever_its_ranks_leave(tmp_path):
    script = """
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        ranks = [Rank(value)]
        ranks[0].says()
        ranks += [Rank(value), Rank(value)]
        assert len({ranks[1].says(), ranks[2].says()}) == 1
        for index in order:
            assert os.listdir(stores) or index != order[0]
            assert ranks[index].leave() == 0
        assert os.listdir(stores) == [], order
    # The one that serves is killed, and the last one to leave tidies up after it.
    first = Rank(value)
    first.says()
    second = Rank(value)
    second.says()
    first.kill()
    assert os.listdir(stores)
    assert second.leave() == 0 and os.listdir(stores) == []
    """
    crew(script, tmp_path)
    assert not [name for name in os.listdir("/dev/shm") if "torchshm" in name]


def test_what_a_job_leaves_that_was_killed_as_a_whole_the_next_one_removes(tmp_path):
    script = """
    def of(job):
        os.environ.update(RANK="0", MASTER_ADDR="localhost", MASTER_PORT=job)
        return value()

    killed, alive = Rank(of, "1"), Rank(of, "2")
    assert float(killed.says()) == killed.pid and float(alive.says()) == alive.pid, "two jobs do not mix"
    assert len(os.listdir(stores)) == 4
    killed.kill()
    assert len(os.listdir(stores)) == 4
    third = Rank(of, "3")
    third.says()
    assert len(os.listdir(stores)) == 4, "those of one that is alive stay"
    late = Rank(of, "2")
    assert float(late.says()) == alive.pid
    assert [rank.leave() for rank in (third, late, alive)] == [0, 0, 0] and os.listdir(stores) == []
    """
    crew(script, tmp_path)


def test_a_given_store_may_outlive_the_job(tmp_path):
    script = """
    with torchshm.start("lasting") as lasting:
        os.environ["TORCHSHM_JOB"] = "lasting"
        for _ in range(2):
            rank = Rank(both)
            pool, made = eval(rank.says())
            assert pool == lasting._core.pool_id
            assert rank.leave() == 0
        assert made != rank.pid and list(lasting) == ["a"]
    os.environ["TORCHSHM_JOB"] = "not a/name"
    try:
        node_store()
    except ValueError as error:
        assert "63 letters" in str(error)
    """
    crew(script, tmp_path)


def test_threads_and_forks_share_the_store_of_their_process(tmp_path):
    script = """
    import threading
    found = []
    threads = [threading.Thread(target=lambda: found.append(node_store())) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(set(map(id, found))) == 1
    held, done = threading.Event(), threading.Event()

    def hold():
        with _job._lock:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start(), held.wait()
    rank = Rank(lambda: (node_store()._core.pool_id, node_store() is found[0], _job._lock.acquire(timeout=5)))
    done.set(), holder.join()
    assert eval(rank.says()) == (found[0]._core.pool_id, True, True)
    assert rank.leave() == 0
    node_store().close()
    assert node_store() is not found[0] and node_store()._core.serving
    """
    crew(script, tmp_path)


def test_the_limit_is_that_of_the_environment(tmp_path):
    script = """
    rank = Rank(lambda: node_store().info()["limit_bytes"])
    assert rank.says() == str(64 << 20)
    """
    crew(script, tmp_path, TORCHSHM_LIMIT="64MiB")


def test_a_missing_runtime_directory_is_named(tmp_path):
    script = """
    os.environ["XDG_RUNTIME_DIR"] = missing = os.path.dirname(stores) + "/missing"
    try:
        node_store()
    except torchshm.StoreUnavailableError as error:
        assert "unset XDG_RUNTIME_DIR" in str(error)
        os.mkdir(missing)
    assert len(node_store()) == 0
    """
    crew(script, tmp_path)
