"""What torchshm.data.blocks costs beside the work itself.

Quantity: time of one pass, in which two workers
- read .npy files, or Parquet files, that are in the page cache, and hand over what they have read;
- run a function of about 20 ms a batch;
- run one, or three, functions that cost next to nothing: they add a column, and leave the 4 KiB of each row as they are;
- run three functions that add a number to all there is, or one that does so three times, which is what the work costs without
  anything between functions.
Beside it the time until the first batch in a fresh process that has imported torchshm. Unit: seconds.
Opponents: two plain processes that read the same files by ``np.load`` and ``pq.read_table`` into memory of their own, and hand over
nothing; one plain process that runs the same function in a loop, whose speed times the number of workers is what a pass is judged by,
and two at once, which is what two cores really give: less, where they are two threads of one core or other guests have a part of them;
Ray Data for the first batch, with the time of ``ray.init`` apart.
Beside them: in how many orders rows come with one, two and four workers, by a hash of all rows. It has to be one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import disk
from benchmarks.arms import Arms
from benchmarks.availability import missing
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import Figure, at_least, at_most
from benchmarks.meter import Meter
from benchmarks.page import touch_pages
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.rounds import interleave
from benchmarks.sample import Sample, ratio
from benchmarks.units import GIB, MIB, format_bytes

NAME = "blocks_speed"
WORKERS = 2
MEMORY = GIB
OF_READING, OF_CORES, FUSED, FIRST = 0.85, 0.9, 1.15, 0.5

FILE, COLUMNS = 64 * MIB, 16
FILES, QUICK_FILES = 48, 16  # of each kind
ROW, TURNS = 32_768, 60  # float64 in a row, and how often their sine is taken: 20 ms
CALLS, QUICK_CALLS = 300, 100
MAPPED, QUICK_MAPPED = 2 * GIB, GIB
ORDERED_ROWS = 20_000

Batch = dict[str, Any]


# ---- the work


def write(folder: Path, count: int) -> None:
    """So many files of each kind, of the same size."""
    chance = np.random.default_rng(0)
    for number in range(count):
        array = chance.random((FILE // 8 // COLUMNS, COLUMNS))
        np.save(folder / f"{number:03}.npy", array)
        if missing("pyarrow") is None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({f"c{column}": array[:, column] for column in range(COLUMNS)})
            pq.write_table(table, folder / f"{number:03}.parquet", row_group_size=len(array) // 4)


def calculate(batch: Batch) -> Batch:
    """About 20 ms for each row, in a core's cache."""
    total = np.zeros(ROW)
    for row in batch["x"]:
        for turn in range(TURNS):
            total += np.sin(row + turn)
    return {"sum": np.array([total.sum()])}


def cheap(batch: Batch) -> Batch:
    return {**batch, "label": batch["label"] + 1}


def add(batch: Batch) -> Batch:
    return {**batch, "x": batch["x"] + np.float32(1)}


def add_thrice(batch: Batch) -> Batch:
    return add(add(add(batch)))


MAPS: dict[str, list[Callable[[Batch], Batch]]] = {
    "one cheap": [cheap],
    "three cheap": [cheap] * 3,
    "one that adds thrice": [add_thrice],
    "three that add": [add] * 3,
}


def draw(batch: Batch) -> Batch:
    """A function that takes what is random from where functions take it."""
    return {**batch, "drawn": np.random.random(len(batch["i"]))}  # noqa: NPY002


def nbytes_of(table: Any) -> int:
    """Bytes of its values; by itself it counts what else it has, which depends on who read it."""
    return int(table.num_rows) * COLUMNS * 8


class Reader:
    """A plain process."""

    def __init__(self, index: int, processes: int, folder: str) -> None:
        self._index, self._processes, self._folder = index, processes, Path(folder)

    def read(self, ending: str) -> int:
        """Bytes of its part of the files, all of them in memory."""
        total = 0
        for path in sorted(self._folder.glob(f"*.{ending}"))[self._index :: self._processes]:
            if ending == "npy":
                array = np.load(path)
                touch_pages(array)
                total += array.nbytes
            else:
                import pyarrow.parquet as pq

                total += nbytes_of(pq.read_table(path, use_threads=False))
        return total

    def calculate(self, calls: int) -> int:
        """Its part of them."""
        batch = {"x": np.ones((1, ROW))}
        mine = len(range(self._index, calls, self._processes))
        for _ in range(mine):
            calculate(batch)
        return mine


class Alone:
    """Plain processes, without torchshm."""

    def __init__(self, processes: int, folder: str) -> None:
        self._crew = Crew(processes, Reader, processes, folder)

    def run(self, work: str, amount: Any) -> tuple[float, int]:
        begin = time.perf_counter()
        done = sum(self._crew.call(work, amount))
        return time.perf_counter() - begin, done

    def close(self) -> None:
        self._crew.close()


def _given(spill: str) -> dict[str, Any]:
    # A spawned process, as an arm is, spawns its own; a program that is started by itself forks them.
    return {"memory": MEMORY, "num_workers": WORKERS, "spill": spill, "start_method": "fork"}


class Blocks:
    """The same by blocks."""

    def __init__(self, folder: str, spill: str) -> None:
        from torchshm.data import blocks

        if missing("pyarrow") is None:
            import pyarrow.parquet  # noqa: F401 - as the plain processes have after their first file

        self._blocks, self._folder, self._spill = blocks, folder, spill

    def run(self, work: str, amount: Any) -> tuple[float, int]:
        begin = time.perf_counter()
        done: int = getattr(self, work)(amount)
        return time.perf_counter() - begin, done

    def _all(self, dataset: Any, **options: Any) -> Iterator[Any]:
        given = {**_given(self._spill), "seed": 1, **options}
        found: Iterator[Any] = dataset.options(**given).iter_batches(None, batch_format=None)
        return found

    def read(self, ending: str) -> int:
        """Bytes that came."""
        reading = self._blocks.read_npy if ending == "npy" else self._blocks.read_parquet
        total = 0
        for batch in self._all(reading(f"{self._folder}/*.{ending}")):
            total += batch["data"].nbytes if ending == "npy" else nbytes_of(batch)
        return total

    def calculate(self, calls: int) -> int:
        rows = self._blocks.from_arrays({"x": np.ones((calls, ROW))})
        # Two calls in a task: a worker that ends before the other does idles for little.
        dataset = rows.map_batches(calculate, batch_size=1)
        return sum(len(batch["sum"]) for batch in self._all(dataset, block_size=2 * 8 * ROW))

    def maps(self, functions: str) -> int:
        """Bytes that went through those functions."""
        dataset = self._blocks.from_arrays({"x": self._content, "label": np.arange(len(self._content))})
        for function in MAPS[functions]:
            dataset = dataset.map_batches(function)
        return sum(batch["x"].nbytes for batch in self._all(dataset))

    def fill(self, nbytes: int) -> None:
        """What `maps` goes through."""
        self._content = np.ones((nbytes // 4 // 1024, 1024), np.float32)

    def order(self, kind: str, workers: int) -> str:
        """A hash of all rows in their order."""
        rows = ORDERED_ROWS
        dataset = self._blocks.from_arrays({"i": np.arange(rows), "x": np.ones((rows, 64))})
        if kind == "functions that draw":
            dataset = dataset.map_batches(draw)
        else:
            dataset = dataset.shuffle(window="1MiB" if kind == "shuffle in windows" else None)
        digest = hashlib.blake2b()
        for batch in self._all(dataset, num_workers=workers, memory=128 * MIB, block_size=256 << 10):
            for column in batch.values():
                digest.update(column.tobytes())
        return digest.hexdigest()


class Fresh:
    """A process that has imported torchshm, and nothing else has happened there."""

    def __init__(self, spill: str) -> None:
        from torchshm.data import blocks

        self._blocks, self._spill = blocks, spill

    def first(self) -> tuple[float, float]:
        """Seconds of the start, here none, and from the call of iter_batches to the first batch."""
        dataset = self._blocks.from_arrays({"x": np.arange(10_000)}).map_batches(add)
        dataset = dataset.options(**_given(self._spill))
        begin = time.perf_counter()
        batches = dataset.iter_batches(256)
        next(batches)
        seconds = time.perf_counter() - begin
        batches.close()
        return 0.0, seconds


class FreshRay:
    """The same with Ray Data."""

    def __init__(self, spill: str) -> None:
        import ray

        begin = time.perf_counter()
        ray.init(
            num_cpus=WORKERS,
            object_store_memory=MEMORY,
            object_spilling_directory=spill,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        self._started = time.perf_counter() - begin
        ray.data.DataContext.get_current().enable_progress_bars = False

    def first(self) -> tuple[float, float]:
        import ray

        dataset = ray.data.from_numpy(np.arange(10_000)).map_batches(lambda batch: {"x": batch["data"] + 1})
        begin = time.perf_counter()
        next(iter(dataset.iter_batches(batch_size=256)))
        return self._started, time.perf_counter() - begin

    def close(self) -> None:
        import ray

        ray.shutdown()


# ---- measured


ARMS = {
    "torchshm": Arm("torchshm", "blocks with two workers"),
    "three": Arm("torchshm, three functions", "blocks with two workers, and three functions in place of one"),
    "alone": Arm(
        "two plain processes", "np.load, pq.read_table, or the function, in a loop; nothing is handed over"
    ),
    "one": Arm("one plain process", "the function in a loop"),
    "ray": Arm("Ray Data", "from_numpy(...).map_batches(...).iter_batches(), after ray.init()"),
}
ORDERS = ("shuffle in windows", "shuffle", "functions that draw")

Seconds = dict[str, list[float]]


def measure(quick: bool, meter: Meter) -> Result:
    """Each work by its arms in turn, then first batches, then orders."""
    rounds = 3 if quick else 9
    files, calls = (QUICK_FILES, QUICK_CALLS) if quick else (FILES, CALLS)
    mapped = QUICK_MAPPED if quick else MAPPED
    result = Result(NAME, "time of one pass of blocks, and of the work itself", "s", ARMS, quick=quick)
    result.facts["files of each kind"] = f"{files} of {format_bytes(FILE)}"
    meter.expect(7 * rounds)
    with disk.folder("blocks-speed") as folder, Arms(result) as arms:
        (folder / "data").mkdir()
        meter.doing("writing the files")
        write(folder / "data", files)
        data, spill = str(folder / "data"), str(folder)
        for arm in ("torchshm", "three"):
            arms.start(arm, ("torchshm",), Blocks, data, spill)
            arms.call(arm, "fill", mapped)
        arms.start("alone", (), Alone, WORKERS, data)
        arms.start("one", (), Alone, 1, data)
        turn = partial(_turn, result, meter, arms, rounds)
        reading = {
            ending: turn(f"{ending} files", dict.fromkeys(("torchshm", "alone"), ("run", "read", ending)))
            for ending in ("npy", "parquet")
            if ending == "npy" or missing("pyarrow") is None
        }
        calculating = turn(
            f"{calls} calls", dict.fromkeys(("torchshm", "alone", "one"), ("run", "calculate", calls))
        )
        cheaply, adding = (
            turn(
                f"{what}, {format_bytes(mapped)}",
                {"torchshm": ("run", "maps", one), "three": ("run", "maps", three)},
            )
            for what, one, three in (
                ("cheap functions", "one cheap", "three cheap"),
                ("functions that add", "one that adds thrice", "three that add"),
            )
        )
        orders = _orders(meter, arms)
    with disk.folder("blocks-speed") as folder:
        first = _first(result, meter, folder, rounds)
    for ending, seconds in reading.items():
        for arm, values in seconds.items():
            result.facts[f"{arm}, {ending} files, GB/s"] = round(
                files * FILE / Sample.of(values).median / 1e9, 2
            )
    result.figures = [
        *(judge_reading(ending, seconds) for ending, seconds in reading.items()),
        *judge_calculating(calculating),
        judge_fusion("time of three cheap functions / of one", cheaply),
        judge_fusion("time of three functions over all bytes / of one that does the same", adding),
        judge_first(first),
        *(judge_order(kind, found) for kind, found in orders.items()),
    ]
    return result


def _turn(
    result: Result,
    meter: Meter,
    arms: Arms,
    rounds: int,
    work: str,
    calls: dict[str, tuple[Any, ...]],
) -> Seconds:
    """Seconds of each arm; all of them have to have done as much."""
    meter.doing(work)
    there = {arm: call for arm, call in calls.items() if arm in arms}
    for arm, call in there.items():
        arms.call(arm, *call)  # warms up
    answers = arms.rounds({arm: call for arm, call in there.items() if arm in arms}, rounds, meter.step)
    done = {amount for found in answers.values() for _, amount in found}
    if len(done) > 1:
        raise AssertionError(f"{work}: not all did as much: {done}")
    seconds = {arm: [each for each, _ in found] for arm, found in answers.items()}
    for arm, values in seconds.items():
        result.add(arm, values, work=work)
    return seconds


def _orders(meter: Meter, arms: Arms) -> dict[str, set[str] | None]:
    found: dict[str, set[str] | None] = dict.fromkeys(ORDERS)
    for kind in ORDERS:
        meter.doing(f"orders: {kind}")
        hashes = [arms.call("torchshm", "order", kind, n) for n in (1, 2, 4) if "torchshm" in arms]
        if hashes and None not in hashes:
            found[kind] = set(hashes)
    return found


def _first(result: Result, meter: Meter, folder: Path, rounds: int) -> Seconds:
    """Seconds until the first batch, each in a process of its own."""
    meter.doing("first batches")
    fresh: dict[str, type] = {}
    for arm, package, target in (("torchshm", "torchshm", Fresh), ("ray", "ray", FreshRay)):
        reason = missing(package)
        if reason is None:
            fresh[arm] = target
        else:
            result.not_available[arm] = reason

    def once(target: type) -> tuple[float, float]:
        remote = Remote(target, str(folder))
        try:
            found: tuple[float, float] = remote.call("first")
            return found
        finally:
            remote.close()

    def failed(arm: str, reason: str) -> None:
        result.not_available[arm] = "failed: " + reason.strip().splitlines()[-1]

    answers = interleave(
        {arm: partial(once, target) for arm, target in fresh.items()}, rounds, failed, meter.step
    )
    for arm, found in answers.items():
        result.add(arm, [seconds for _, seconds in found], work="first batch")
        if arm == "ray":
            result.facts["ray.init, s"] = round(Sample.of([started for started, _ in found]).median, 2)
    return {arm: [seconds for _, seconds in found] for arm, found in answers.items()}


# ---- judged


def judge_reading(ending: str, seconds: Seconds) -> Figure:
    both = {"torchshm", "alone"} <= set(seconds)
    measured = ratio(seconds["alone"], seconds["torchshm"]) if both else None
    note = f".{ending} files in the page cache, two workers"
    return at_least("bytes a second, blocks / two plain processes that read", OF_READING, "x", measured, note)


def judge_calculating(seconds: Seconds) -> list[Figure]:
    """By two times one core's speed. What two at once reach of that is said beside it."""
    there = {"torchshm", "alone", "one"} <= set(seconds)
    ideal = [each / WORKERS for each in seconds["one"]] if there else []
    note = ""
    if there:
        reached = ratio(ideal, seconds["alone"]).median
        of_those = ratio(seconds["alone"], seconds["torchshm"]).median
        note = f"two plain processes at once reach {reached:.2f}x, of which blocks reach {of_those:.2f}x"
    measured = ratio(ideal, seconds["torchshm"]) if there else None
    claim = "functions of 20 ms, blocks with two workers / two times one process's speed"
    return [at_least(claim, OF_CORES, "x", measured, note)]


def judge_fusion(claim: str, seconds: Seconds) -> Figure:
    both = {"torchshm", "three"} <= set(seconds)
    measured = ratio(seconds["three"], seconds["torchshm"]) if both else None
    return at_most(claim, FUSED, "x", measured)


def judge_first(seconds: Seconds) -> Figure:
    own = seconds.get("torchshm")
    claim = "from iter_batches() to the first batch, in a fresh process"
    return at_most(claim, FIRST, "s", Sample.of(own) if own else None)


def judge_order(kind: str, hashes: set[str] | None) -> Figure:
    measured = None if hashes is None else Sample.of([len(hashes)])
    return at_most("orders of the rows with one, two and four workers", 1, "orders", measured, kind)


BENCHMARK = Benchmark(NAME, "blocks against the work itself, in plain processes", measure)
