"""A working set of four times the memory: torchshm against Ray, which both write what does not fit into files.

Quantity: bytes loaded and saved a second, by four processes at once that ask for the same names in the same order in both
(`working_set.py`); of what is loaded every page is read. Unit: GB/s.
Opponent: Ray with `object_store_memory` of the same size and its spilling to the same directory. Its clients are actors. Twice: each
process has names of its own and holds their references itself, where Ray has nothing to find by name; and all processes share all
names, whose references one actor holds. The second one once more with files that do not stay in the page cache, as on a machine whose
memory is full. Ray gives memory up when the kernel has its file, and keeps as much in the page cache as it is let, beside its limit;
torchshm when the disk has it, and with ``spill_sync=False`` as Ray.
Both fill first and take two turns before the clock starts.
"""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from benchmarks import disk
from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import Figure, at_least
from benchmarks.meter import Meter
from benchmarks.page import touch_pages
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.sample import ratio
from benchmarks.units import MIB, format_bytes
from benchmarks.working_set import Values, WorkingSet

NAME = "spill_ray"
LIMIT, TIMES, PROCESSES = 512 * MIB, 4, 4
QUICK_LIMIT = 256 * MIB
ACCESSES, QUICK_ACCESSES = 80, 40
"""Of each process in one turn."""
WARM_TURNS = 2
OVER_RAY = 3
TIMEOUT = 30.0
"""Seconds that a client of torchshm waits for room."""


class Client(ABC):
    """One process, whatever the store: `load` and `save` are what differs."""

    def __init__(self, index: int, work: WorkingSet) -> None:
        self._index, self._work, self._values = index, work, Values()
        self._accesses = work.accesses(index)

    @abstractmethod
    def load(self, name: int) -> Any:
        """The array of a name."""

    @abstractmethod
    def save(self, name: int, value: Any) -> None:
        """Saves it, also over what is there."""

    def fill(self) -> None:
        """Saves this process's part of the names."""
        for name in self._work.own(self._index):
            self.save(name, self._values.of(name))

    def verify(self) -> None:
        """Compares every byte of this process's part."""
        for name in self._work.own(self._index):
            self._values.check(name, self.load(name), whole=True)

    def run(self, accesses: int) -> tuple[float, float, int]:
        """When it began and ended (CLOCK_MONOTONIC), and the bytes of all values that it loaded or saved."""
        moved = 0
        begin = time.monotonic()
        for _ in range(accesses):
            access = next(self._accesses)
            if access.overwrites:
                self.save(access.name, self._values.of(access.name))
            else:
                found = self.load(access.name)
                self._values.check(access.name, found)
                touch_pages(found)
                del found
            moved += WorkingSet.size_of(access.name)
        return begin, time.monotonic(), moved


def rate(answers: list[tuple[float, float, int]]) -> float:
    """GB/s of all together."""
    begins, ends, moved = zip(*answers, strict=True)
    return sum(moved) / (max(ends) - min(begins)) / 1e9


class TorchshmClient(Client):
    """A process of the crew."""

    def __init__(self, index: int, work: WorkingSet, address: str) -> None:
        import torchshm

        super().__init__(index, work)
        self._store = torchshm.connect(address)

    def load(self, name: int) -> Any:
        return self._store.load(f"name-{name}")

    def save(self, name: int, value: Any) -> None:
        self._store.save(f"name-{name}", value, overwrite=True)


class TorchshmHost:
    """Serves the store."""

    def __init__(self, limit: int, directory: str, sync: bool) -> None:
        import torchshm

        self._store = torchshm.start(
            f"bench-{os.getpid()}", limit=limit, spill=directory, spill_sync=sync, timeout=TIMEOUT
        )

    def address(self) -> str:
        return self._store.name

    def counted(self) -> dict[str, int]:
        info = self._store.info()
        return {name: info[name] for name in ("restores", "spills", "spilled_bytes", "committed_bytes")}

    def close(self) -> None:
        self._store.close()


class TorchshmArm:
    """The service, and forked clients."""

    SYNC = True

    def __init__(self, limit: int, work: WorkingSet, directory: str) -> None:
        import torchshm  # noqa: F401 - before the fork

        self._folder = Path(directory)
        self._host = Remote(TorchshmHost, limit, directory, self.SYNC)
        self._crew = Crew(work.processes, TorchshmClient, work, self._host.call("address"))

    def call(self, method: str) -> None:
        self._crew.call(method)

    def run(self, accesses: int, cached: bool) -> float:
        with contextlib.nullcontext() if cached else disk.forgetting(self._folder):
            return rate(self._crew.call("run", accesses))

    def counted(self) -> dict[str, int]:
        counted: dict[str, int] = self._host.call("counted")
        return counted

    def close(self) -> None:
        self._crew.close()
        self._host.close()


class UnsyncedArm(TorchshmArm):
    """Files are left to the page cache, as Ray leaves its own."""

    SYNC = False


class Directory:
    """An actor that holds all references by name."""

    def __init__(self) -> None:
        self._references: dict[int, list[Any]] = {}

    def find(self, name: int) -> list[Any]:
        return self._references[name]

    def set(self, name: int, reference: list[Any]) -> None:
        self._references[name] = reference


class RayClient(Client):
    """An actor. References in a list are passed on as such; by themselves Ray would pass their values."""

    def __init__(self, index: int, work: WorkingSet, directory: Any) -> None:
        import ray

        super().__init__(index, work)
        self._ray, self._directory = ray, directory
        self._references: dict[int, Any] = {}

    def load(self, name: int) -> Any:
        if self._directory is None:
            return self._ray.get(self._references[name])
        return self._ray.get(self._ray.get(self._directory.find.remote(name))[0])

    def save(self, name: int, value: Any) -> None:
        if self._directory is None:
            self._references[name] = self._ray.put(value)
        else:
            self._ray.get(self._directory.set.remote(name, [self._ray.put(value)]))


class RayArm:
    """Ray with little memory, and actors as clients."""

    def __init__(self, limit: int, work: WorkingSet, directory: str) -> None:
        import ray

        self._ray, self._folder = ray, Path(directory)
        ray.init(
            num_cpus=work.processes,
            object_store_memory=limit,
            object_spilling_directory=directory,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        self._directory = ray.remote(num_cpus=0)(Directory).remote() if work.shared else None
        actor = ray.remote(num_cpus=1)(RayClient)
        self._clients = [actor.remote(index, work, self._directory) for index in range(work.processes)]

    def call(self, method: str) -> None:
        self._ray.get([getattr(client, method).remote() for client in self._clients])

    def run(self, accesses: int, cached: bool) -> float:
        with contextlib.nullcontext() if cached else disk.forgetting(self._folder):
            return rate(self._ray.get([client.run.remote(accesses) for client in self._clients]))

    def counted(self) -> dict[str, int]:
        files = [path.stat().st_size for path in self._folder.rglob("*") if path.is_file()]
        return {"spilled_bytes": sum(files), "files": len(files)}

    def close(self) -> None:
        self._ray.shutdown()


ARMS: dict[str, tuple[tuple[str, ...], type]] = {
    "torchshm": (("torchshm",), TorchshmArm),
    "unsynced": (("torchshm",), UnsyncedArm),
    "ray": (("ray",), RayArm),
}


def measure(quick: bool, meter: Meter) -> Result:
    """Names of each process's own, then names of all."""
    limit = QUICK_LIMIT if quick else LIMIT
    rounds = 3 if quick else 11
    accesses = QUICK_ACCESSES if quick else ACCESSES
    result = Result(
        NAME,
        f"bytes loaded and saved a second, {TIMES} times as much as the {format_bytes(limit)} of memory",
        "GB/s",
        {
            "torchshm": Arm("torchshm", "start(limit=, spill=); load and save by name"),
            "unsynced": Arm("torchshm, spill_sync=False", "files are left to the page cache, as Ray's are"),
            "ray": Arm("Ray", "object_store_memory= and object_spilling_directory=; put and get in actors"),
        },
        quick=quick,
    )
    meter.expect(3 * rounds)
    for shared in (False, True):
        work = WorkingSet(TIMES * limit, PROCESSES, shared)
        result.figures += _measure(result, meter, work, limit, accesses, rounds)
    return result


def _measure(
    result: Result, meter: Meter, work: WorkingSet, limit: int, accesses: int, rounds: int
) -> list[Figure]:
    whose = "shared" if work.shared else "own"
    figures = []
    with disk.folder("spill-ray") as folder, Arms(result) as arms:
        for arm, (packages, target) in ARMS.items():
            (folder / arm).mkdir()
            arms.start(arm, packages, target, limit, work, str(folder / arm))
        for method in ("fill", "verify"):
            for arm in arms:
                meter.doing(f"{whose} names, {method}, {arm}")
                arms.call(arm, "call", method)
        for cached in (True, False) if work.shared else (True,):
            meter.doing(f"{whose} names")
            for _ in range(WARM_TURNS):
                for arm in arms:
                    arms.call(arm, "run", accesses, cached)
            values = arms.rounds(dict.fromkeys(arms, ("run", accesses, cached)), rounds, meter.step)
            page_cache = "" if cached else ", no page cache"
            for arm, rates in values.items():
                result.add(arm, rates, names=f"{whose} names{page_cache}")
            figures += [judge(values, arm, work.shared, cached) for arm in ("torchshm", "unsynced")]
        for arm in arms:
            result.facts[f"{arm}, {whose} names, counted"] = str(arms.call(arm, "counted"))
        for arm in arms:
            meter.doing(f"{whose} names, verify, {arm}")
            arms.call(arm, "call", "verify")
    return figures


def judge(values: dict[str, list[float]], arm: str, shared: bool, cached: bool) -> Figure:
    """Its throughput by Ray's."""
    measured = ratio(values[arm], values["ray"]) if {arm, "ray"} <= set(values) else None
    note = "names of all processes" if shared else "names of each process's own"
    if not cached:
        note += ", files dropped from the page cache"
    if arm == "unsynced":
        note += ", spill_sync=False"
    return at_least("torchshm / Ray, working set of four times the memory", OVER_RAY, "x", measured, note)


BENCHMARK = Benchmark(NAME, "four times as much data as memory, against Ray", measure)
