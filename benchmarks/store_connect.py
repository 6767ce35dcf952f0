"""Becoming a client, and waiting for a name.

Quantities: time of the first torchshm.connect of a process (the import is done before), and the
time from the beginning of a save to the return of a load that was waiting for it in another
process, so the save itself is counted. Unit: seconds.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.arms import Arms
from benchmarks.benchmark import Benchmark
from benchmarks.crew import Crew
from benchmarks.figure import at_most
from benchmarks.meter import Meter
from benchmarks.naming import Host
from benchmarks.remote import Remote
from benchmarks.result import Arm, Result
from benchmarks.sample import Sample
from benchmarks.units import GIB, KIB

NAME = "store_connect"
SAVED_BYTES = 4 * KIB
ASLEEP = 0.005  # s; for the waiter to have gone to sleep
CONNECT_MOST, WAKE_MOST = 5e-3, 200e-6


class Newcomer:
    """A fresh process that has imported torchshm and knows no store."""

    def __init__(self, index: int, address: str) -> None:
        self._address = address

    def connect(self) -> float:
        """Seconds of the first connect."""
        import torchshm

        begin = time.perf_counter()
        self._store = torchshm.connect(self._address)
        return time.perf_counter() - begin


class Connecting:
    """Connects in a process forked for each time."""

    def __init__(self) -> None:
        import torchshm  # noqa: F401 - before the fork

        self._host = Remote(Host, "torchshm", GIB)
        self._address = self._host.call("address")
        self._host.call("fill", "name-", 1000, SAVED_BYTES)

    def run(self) -> float:
        """Seconds of one connect."""
        crew = Crew(1, Newcomer, self._address)
        try:
            return crew.call("connect")[0]
        finally:
            crew.close()

    def close(self) -> None:
        self._host.close()


class Waiter:
    """Waits in a load."""

    def __init__(self, index: int, address: str) -> None:
        import torchshm

        self._store = torchshm.connect(address)

    def wait(self, key: str) -> int:
        """When the load returned: CLOCK_MONOTONIC, ns."""
        self._store.load(key, timeout=60)
        return time.monotonic_ns()


class Waking:
    """Saves what another process waits for."""

    def __init__(self) -> None:
        import torchshm

        self._host = Remote(Host, "torchshm", GIB)
        address = self._host.call("address")
        self._crew = Crew(1, Waiter, address)
        self._store = torchshm.connect(address)
        self._saved = 0
        self._array = np.ones(SAVED_BYTES, np.uint8)

    def run(self) -> float:
        """Seconds from the beginning of a save until the waiter has it."""
        self._saved += 1
        key = f"awaited-{self._saved}"
        self._crew.begin("wait", key)
        time.sleep(ASLEEP)
        begin = time.monotonic_ns()
        self._store.save(key, self._array)
        (woken,) = self._crew.gather()
        self._store.remove(key)
        return (woken - begin) / 1e9

    def close(self) -> None:
        self._crew.close()
        self._host.close()


def measure(quick: bool, meter: Meter) -> Result:
    """Both, in turn."""
    result = Result(
        NAME,
        "time to become a client of a store, and for a waiter to have what was saved",
        "s",
        {
            "torchshm_connect": Arm("connect", "the first torchshm.connect of a process"),
            "torchshm_wake": Arm(
                "wake", "from the beginning of a save of 4 KiB to the return of a waiting load"
            ),
        },
        quick=quick,
    )
    rounds = 20 if quick else 300
    meter.expect(rounds)
    meter.doing("connecting and waking")
    with Arms(result) as arms:
        arms.start("torchshm_connect", ("torchshm",), Connecting)
        arms.start("torchshm_wake", ("torchshm",), Waking)
        for arm in arms:
            arms.call(arm, "run")  # warms up
        values = arms.rounds(dict.fromkeys(arms, ("run",)), rounds, after_round=meter.step)
    samples: dict[str, Sample] = {}
    for arm, seconds in values.items():
        worst = float(np.percentile(seconds, 99))
        result.add(arm, seconds, {"p99": worst})
        samples[arm] = Sample.of(seconds)
    result.figures = [
        at_most("connect", CONNECT_MOST, "s", samples.get("torchshm_connect"), "the median"),
        at_most(
            "a waiter has it after the save began", WAKE_MOST, "s", samples.get("torchshm_wake"), "the median"
        ),
    ]
    return result


BENCHMARK = Benchmark(NAME, "becoming a client of a store, and waiting for a name", measure)
