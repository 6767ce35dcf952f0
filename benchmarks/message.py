"""One array from a process to another.

Quantity: time per message (send + receive + release) of one uint8 array through a
multiprocessing.Pipe, one way, a window of messages under way. Unit: seconds.
Opponents: stock ForkingPickler, pickle protocol 5 out of band, torch tensors by file_descriptor
and by file_system, a SharedMemory segment per array, joblib's memmap through /dev/shm, Ray's
put and get, and the limit: a hand-made ring of warm blocks. The receiver reads nothing of what
it received; the rows with ``read: pages`` repeat some sizes with one byte of every page read.
"""

from __future__ import annotations

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.carriers import CARRIERS
from benchmarks.exchange import Exchange
from benchmarks.figure import Figure, at_least, at_most
from benchmarks.meter import Meter
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample, ratio
from benchmarks.units import KIB, MIB, format_bytes

NAME = "message"
ARMS = (
    "torchshm",
    "torchshm_pooled",
    "limit",
    "stock",
    "pickle5",
    "torch_fd",
    "torch_fs",
    "shared_memory",
    "joblib",
    "ray",
)
SIZES = (1, 64, KIB, 4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
QUICK_SIZES = (1, 4 * KIB, 64 * KIB, MIB, 4 * MIB)
READ_SIZES = (64 * KIB, MIB, 64 * MIB)

RUN_SECONDS = 0.02
"""How long one arm's turn in a round aims to last."""
MOST_MESSAGES = 4000

OVER_TORCH_FD = {64 * KIB: 30, MIB: 15, 4 * MIB: 12, 64 * MIB: 6}
OF_LIMIT = {64 * KIB: 1.6, MIB: 1.3, 4 * MIB: 1.1, 16 * MIB: 1.1, 64 * MIB: 1.1}

Values = dict[str, list[float]]


def measure(quick: bool, meter: Meter) -> Result:
    """Every arm at every size."""
    result = Result(
        NAME,
        "time per message of one uint8 array between two processes (send + receive + release)",
        "s",
        describe_arms(ARMS),
        quick=quick,
    )
    sizes = QUICK_SIZES if quick else SIZES
    points = [(size, "nothing") for size in sizes] + [(size, "pages") for size in READ_SIZES if not quick]
    meter.expect(len(points))
    unread: dict[int, Values] = {}
    with Arms(result) as arms:
        start_exchanges(arms, ARMS)
        for size, read in points:
            meter.doing(f"{format_bytes(size)}, {read} read")
            values = measure_size(arms, size, rounds_for(size, quick), touch=read == "pages")
            for arm, seconds in values.items():
                result.add(arm, seconds, bytes=size, read=read)
            if read == "nothing":
                unread[size] = values
            meter.step()
    result.figures = judge(unread)
    return result


def describe_arms(names: tuple[str, ...]) -> dict[str, Arm]:
    """The carriers `names` as arms of a result."""
    return {name: Arm(CARRIERS[name].label, CARRIERS[name].how) for name in names}


def start_exchanges(arms: Arms, names: tuple[str, ...]) -> None:
    """One exchange for each of the carriers `names` that is available."""
    for name in names:
        package = CARRIERS[name].package
        arms.start(name, (package,) if package else (), Exchange, name)


def rounds_for(size: int, quick: bool) -> int:
    """Small messages are compared to within 10 %, so they get more rounds; they are cheap."""
    if quick:
        return 5
    return 41 if size < MIB else 15


def measure_size(arms: Arms, size: int, rounds: int, touch: bool = False) -> Values:
    """Seconds per message of every arm, round by round."""
    calls = {}
    for arm in arms:
        arms.call(arm, "load", size)
        if arm in arms:
            arms.call(arm, "run", 1, touch)  # the first window warms up
        if arm in arms:
            seconds = arms.call(arm, "run", 1, touch)
        if arm in arms:
            messages = max(1, min(MOST_MESSAGES, int(RUN_SECONDS / seconds)))
            calls[arm] = ("run", messages, touch)
    return arms.rounds(calls, rounds)


def judge(values: dict[int, Values]) -> list[Figure]:
    """The figures, from the rounds of each size."""

    def compare(above: str, below: str, size: int) -> Sample | None:
        at = values.get(size, {})
        return ratio(at[above], at[below]) if above in at and below in at else None

    figures = [
        at_least(
            f"torch file_descriptor / torchshm at {format_bytes(size)}",
            target,
            "x",
            compare("torch_fd", "torchshm", size),
        )
        for size, target in OVER_TORCH_FD.items()
    ]
    against_stock = {size: compare("torchshm", "stock", size) for size in values}
    size, sample = _extreme(against_stock, max)
    figures.append(
        at_most("torchshm / stock ForkingPickler, the worst of all sizes", 1.1, "x", sample, _worst_at(size))
    )
    over_stock = {size: compare("stock", "torchshm", size) for size in values if size >= MIB}
    size, sample = _extreme(over_stock, min)
    figures.append(
        at_least("stock ForkingPickler / torchshm, the worst from 1 MiB up", 15, "x", sample, _worst_at(size))
    )
    figures += [
        at_most(f"torchshm / limit at {format_bytes(size)}", target, "x", compare("torchshm", "limit", size))
        for size, target in OF_LIMIT.items()
    ]
    return figures


def _extreme(samples: dict[int, Sample | None], choose: object) -> tuple[int | None, Sample | None]:
    measured = {size: sample for size, sample in samples.items() if sample}
    if not measured:
        return None, None
    size = choose(measured, key=lambda size: measured[size].median)  # type: ignore[operator]
    return size, measured[size]


def _worst_at(size: int | None) -> str:
    return "" if size is None else f"at {format_bytes(size)}"


BENCHMARK = Benchmark(NAME, "one array between two processes, 1 B to 64 MiB, against ten ways", measure)
