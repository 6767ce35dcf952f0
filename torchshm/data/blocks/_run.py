"""One execution of a plan as its owner sees it: it starts the executor, and ends it; and the consumers, in any process."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.pool
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import time
import weakref
from collections.abc import Iterator
from typing import Any

from torchshm._size import format_size
from torchshm._store import Store
from torchshm.data.blocks._executor import serve
from torchshm.data.blocks._home import Home, client
from torchshm.data.blocks._job import Job
from torchshm.data.blocks._outlet import alive, announcement, begun, farewell
from torchshm.errors import PoolFullError, StoreUnavailableError, TorchshmError

_START = 60.0  # s for an executor to begin
_CONNECT = 60.0  # s for the store
_COMING = 600.0  # s for the process with the first shard to begin: it may have much else to do before
_END = 5.0  # s for it to end
_DYING = 0.1  # s for workers to die with it
_LOOK = 0.25  # s between looks at whether it still lives
_KEEPING = 30.0  # s without a block, after which a consumer looks whether it keeps too much itself
_FULL = 0.8  # of the limit: with less in use, that is not what it waits for


def raised(pickled: bytes, text: str) -> BaseException:
    """The exception of another process, with its traceback there as its cause."""
    error: BaseException | None = None
    if pickled:
        with contextlib.suppress(Exception):
            error = pickle.loads(pickled)
    if error is None:
        error = TorchshmError("a worker raised what can't be pickled; its traceback is above")
    error.__cause__ = multiprocessing.pool.RemoteTraceback(text)  # type: ignore[attr-defined]
    return error


def _call(payload: bytes, control: Any, owner: int) -> None:
    serve(pickle.loads(payload), control, owner, None)


class Run:
    """The executor of a job, a child of this process, with which it ends."""

    def __init__(self, job: Job, home: Home, start_method: str | None) -> None:
        method = start_method or multiprocessing.get_start_method()
        method = "fork" if method == "fork" else "spawn"
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        self._control, self._job, self.owner = here, job, os.getpid()
        arguments: tuple[Any, ...] = (job, there, os.getpid(), here)
        target: Any = serve
        if method != "fork":
            target, arguments = _call, (_pickled(job), there, os.getpid())
        config: dict[str, Any] = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
        daemon = config.get("daemon")
        try:
            # A DataLoader worker is one, and may have no children. This child ends with it.
            config["daemon"] = False
            self._process = context.Process(  # type: ignore[attr-defined]
                target=target, args=arguments, name=f"torchshm-blocks-{job.prefix}"
            )
            self._process.start()
        finally:
            config["daemon"] = daemon
        there.close()
        try:
            assert self._process.pid is not None
            self._death = os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.join()
            raise
        self._finalize = weakref.finalize(
            self, _end, self._process, self._death, here, home, job.prefix, os.getpid()
        )
        multiprocessing.util.Finalize(self, self._finalize, exitpriority=20)
        try:
            if not here.poll(_START):
                raise TorchshmError(
                    f"the executor of {job.store} has not begun within {_START:.0f} s. Where threads of this process held a lock as it "
                    'was forked, start_method="spawn" helps'
                )
            message = here.recv()
            while message[0] == "begun":  # it may have many files to look at
                if here.poll(_LOOK):
                    message = here.recv()
                elif self._process.exitcode is not None and not here.poll():
                    raise EOFError
        except EOFError:
            self._process.join(_END)
            self.close()
            raise TorchshmError(
                f"the executor of {job.store} died as it began, exit code {self._process.exitcode}"
            ) from None
        except BaseException:
            self.close()
            raise
        if message[0] == "failed":
            self.close()
            raise raised(*message[1:])

    @property
    def job(self) -> Job:
        return self._job

    def finish(self) -> None:
        """Let the executor end by itself when the consumers have everything."""
        if os.getpid() == self.owner and self._finalize.detach() is not None:
            os.close(self._death)
            with contextlib.suppress(OSError):
                self._control.send("finish")

    @property
    def exitcode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def failure(self) -> BaseException | None:
        """What it ended by, where it was a failure of its own."""
        with contextlib.suppress(EOFError, OSError):
            while self._control.poll():
                message = self._control.recv()
                if message[0] == "failed":
                    return raised(*message[1:])
        return None

    def close(self) -> None:
        """End the executor, its workers, its store and its files."""
        self._finalize()


def _pickled(job: Job) -> bytes:
    try:
        import cloudpickle

        payload: bytes = cloudpickle.dumps(job)
        return payload
    except ImportError:
        pass
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TorchshmError(
            f"the plan can't be sent to a process that is not forked: {error}. Install cloudpickle, or define its "
            "functions at the top of a module"
        ) from error


def _end(process: Any, death: int, control: Any, home: Home, prefix: str, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has nothing to end
        return
    with contextlib.suppress(OSError):
        control.send(None)
    # What process.join(_END) waits for a child of a worker may have too.
    if not multiprocessing.connection.wait([death], _END):
        process.kill()
    process.join()
    os.close(death)
    control.close()
    if process.exitcode:
        time.sleep(_DYING)
    home.leave(prefix)


class Consumer:
    """Blocks of one shard and epoch, in order, in any process."""

    def __init__(
        self,
        store: str,
        prefix: str,
        shard: int,
        epoch: int,
        run: Run | None = None,
        first: bool = True,
        mode: str | None = None,
    ) -> None:
        self._name, self._prefix, self._shard, self._epoch = store, prefix, shard, epoch
        self._run, self._first, self._mode = run, first, mode
        self._store: Store | None = None
        self.statistics: dict[str, Any] | None = None
        self._over = False
        self._begun, self._since = False, time.monotonic()
        self._pid = os.getpid()

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        """Each block, and its rows from and to that are this shard's."""
        store = self._store = client(self._name, _CONNECT)
        if not self._first:
            self._ask(store)
        for number in itertools.count():
            name = announcement(f"{self._prefix}{self._epoch}", self._shard, number)
            found = self._next(store, name)
            if "key" not in found:
                store.remove(name)
                if "error" in found:
                    raise raised(found["error"], found["text"])
                self.statistics, self._over = found["statistics"], True
                return
            try:
                where = store.info(found["key"])
                if where["where"] == "disk":
                    self._check_kept(store, where["bytes"])
                value = store.load(found["key"], mode=self._mode, allow_pickle=True)
                store.remove(name)
            except KeyError as error:
                if error.args not in ((found["key"],), (name,)):  # one that unpickling has raised
                    raise
                raise self._dead() from None  # whoever executes has left, with all that was its
            yield value, found["begin"], found["end"]
            del value

    def _ask(self, store: Store) -> None:
        """For this epoch."""
        name = self._prefix + "wanted"
        with store.lock(name):
            if store.get(name, 0) < self._epoch:
                store.save(name, self._epoch, overwrite=True, policy="pin")

    def leave(self) -> None:
        """Want nothing more of this epoch."""
        if self._store is None or self._over or os.getpid() != self._pid:  # a forked child has no say
            return
        self._over = True
        name = farewell(f"{self._prefix}{self._epoch}", self._shard)
        with contextlib.suppress(StoreUnavailableError):
            while self._alive():
                with contextlib.suppress(PoolFullError):
                    self._store.save(name, True, overwrite=True, policy="pin", timeout=_LOOK)
                    return

    def look(self) -> dict[str, Any] | None:
        """How far the execution is."""
        if self._store is not None and not self._over and os.getpid() == self._pid:
            with contextlib.suppress(KeyError, StoreUnavailableError):
                self.statistics = self._store.load(self._prefix + "statistics")
        return self.statistics

    def _next(self, store: Store, name: str) -> dict[str, Any]:
        late = time.monotonic() + _KEEPING
        while True:
            try:
                found: dict[str, Any] = store.load(name, timeout=_LOOK)
                return found
            except TimeoutError:
                if not self._alive():
                    break
                if time.monotonic() > late:
                    self._check_kept(store)
                    late += _KEEPING
        raise self._dead()

    def _dead(self) -> BaseException:
        """Why nothing more comes."""
        mine = self._mine()
        if mine is not None and (error := mine.failure()) is not None:
            return error
        if mine is None and not self._begun:
            return TorchshmError(
                f"nobody has begun to execute the plan ({self._name}) within {_COMING:.0f} s: the process with the first shard "
                "has to iterate too"
            )
        return TorchshmError(
            f"the process that executes the plan ({self._name}) has died"
            + self._how()
            + "; iterate again to begin anew"
        )

    def _mine(self) -> Run | None:
        """The run, where its executor is a child of this process."""
        return self._run if self._run is not None and self._run.owner == os.getpid() else None

    @staticmethod
    def _check_kept(store: Store, more: int = 0) -> None:
        """Raise PoolFullError when nothing can come because this process has kept what came before. `more`: bytes that must come back
        from disk."""
        info = store.info()
        limit = info["limit_bytes"]
        kept = sum(each["held_bytes"] for each in info["processes"] if each["pid"] == os.getpid())
        full = kept > limit // 2 and info["committed_bytes"] > limit * _FULL
        if kept + more > limit * _FULL if more else full:
            raise PoolFullError(
                f"there is no room for the next block: this process keeps arrays of {format_size(kept)} that came before, of "
                f"{format_size(limit)} that there are for all blocks. Copy what has to stay, or give more memory="
            )

    def _alive(self) -> bool:
        mine = self._mine()
        if mine is not None:
            return mine.exitcode is None
        store = self._store
        assert store is not None
        if not self._begun:
            # The process with the first shard may not have come to it.
            self._begun = store.contains(begun(self._prefix))
            return self._begun or time.monotonic() < self._since + _COMING
        lock = store._core.lock(alive(self._prefix))
        if not lock.try_acquire(False):
            return True
        lock.release()
        return False

    def _how(self) -> str:
        mine = self._mine()
        code = None if mine is None else mine.exitcode
        return "" if code is None else f", exit code {code}"
