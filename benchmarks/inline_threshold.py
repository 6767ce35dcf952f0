"""The size from which the pool pays.

Quantity: time per message of one uint8 array, always inside the pickle against always through
the pool, from 1 B to 256 KiB. Unit: seconds. The size from which the pool is not slower is the
`crossover_bytes` of the JSON, and what the default of ``register(min_bytes=None)`` should be.
Opponent: stock ForkingPickler, as context.
"""

from __future__ import annotations

import math

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.message import Values, describe_arms, measure_size, start_exchanges
from benchmarks.meter import Meter
from benchmarks.result import Result
from benchmarks.sample import ratio
from benchmarks.units import format_bytes

NAME = "inline_threshold"
ARMS = ("torchshm_inline", "torchshm_always", "stock")
SIZES = tuple(1 << power for power in (0, 2, 4, *range(6, 19)))
QUICK_SIZES = SIZES[::2]


def measure(quick: bool, meter: Meter) -> Result:
    """Both ways at every size."""
    result = Result(
        NAME,
        "time per message of one uint8 array, inside the pickle and through the pool",
        "s",
        describe_arms(ARMS),
        quick=quick,
    )
    sizes = QUICK_SIZES if quick else SIZES
    meter.expect(len(sizes))
    measured: dict[int, Values] = {}
    with Arms(result) as arms:
        start_exchanges(arms, ARMS)
        for size in sizes:
            meter.doing(format_bytes(size))
            measured[size] = measure_size(arms, size, 5 if quick else 21)
            for arm, seconds in measured[size].items():
                result.add(arm, seconds, bytes=size)
            meter.step()
    pooled_over_inline = {
        size: ratio(values["torchshm_always"], values["torchshm_inline"]).median
        for size, values in measured.items()
        if "torchshm_always" in values and "torchshm_inline" in values
    }
    result.facts["pooled_over_inline"] = {str(size): value for size, value in pooled_over_inline.items()}
    result.facts["crossover_bytes"] = crossover(pooled_over_inline)
    return result


def crossover(pooled_over_inline: dict[int, float]) -> int | None:
    """The size from which the ratio stays at 1 or below, interpolated between the sizes measured.

    None where the pool never pays, or where nothing was measured.
    """
    sizes = sorted(pooled_over_inline)
    above = [size for size in sizes if pooled_over_inline[size] > 1]
    if not above:
        return sizes[0] if sizes else None
    last = sizes.index(above[-1])
    if last + 1 == len(sizes):
        return None
    left, right = sizes[last], sizes[last + 1]
    from_one, to_one = math.log(pooled_over_inline[left]), math.log(pooled_over_inline[right])
    share = from_one / (from_one - to_one)
    return round(left * (right / left) ** share)


BENCHMARK = Benchmark(NAME, "the size from which the pool beats travelling inside the pickle", measure)
